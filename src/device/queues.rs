//! What the emulator knows of the two queues of a device, whose work runs side by side on a GPU: it is an error to use memory
//! in one before what the other did with it is known to be done.
//!
//! Work here runs when it is given. Copies of the other queue are put off until somebody is ordered behind them, and so is
//! what goes to page-locked memory until the host waits for it, so that who relies on them too early finds what was there
//! before.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;

use super::driver::{Address, Event, HostBlock, Queue};
use crate::{Error, Result};

/// How far each queue is known to be: by [`Queue`] as a number.
type Clock = [u64; 2];

const WORK: usize = Queue::Work as usize;
const COPIES: usize = Queue::Copies as usize;

/// The two queues.
#[derive(Debug, Default)]
pub(super) struct Queues {
    /// Of each queue, how much it was given, and how much of the other it is behind.
    given: [Clock; 2],
    /// What the host knows to be done.
    host: Clock,
    /// Where the queues were when events were recorded.
    events: Vec<Clock>,
    /// All allocations.
    allocations: BTreeMap<Address, Allocation>,
    pending: Vec<Pending>,
    /// A fault that whoever made it could not be told.
    fault: Option<String>,
}

/// Where an allocation ends, and its last use in each queue.
#[derive(Debug)]
struct Allocation {
    end: Address,
    used: Clock,
}

/// A copy that the host does not know to be done, and which of its queue it is.
#[derive(Debug)]
enum Pending {
    Upload { number: u64, to: Address, from: HostBlock, bytes: usize, content: u64, done: bool },
    Download { number: u64, to: HostBlock, data: Vec<u8> },
}

fn join(clock: &mut Clock, other: Clock) {
    clock.iter_mut().zip(other).for_each(|(own, other)| *own = (*own).max(other));
}

fn content(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn fault(text: &str) -> Error {
    Error::Device(format!("emulator: {text}"))
}

impl Queues {
    /// Gives a queue something to do.
    pub fn give(&mut self, queue: Queue) -> Result<()> {
        if let Some(text) = self.fault.take() {
            return Err(fault(&text));
        }
        // What the host waited for is done before whatever it gives from then on.
        let host = self.host;
        let clock = &mut self.given[queue as usize];
        join(clock, host);
        clock[queue as usize] += 1;
        Ok(())
    }

    /// The queue's last piece of work uses memory at an address.
    pub fn uses(&mut self, queue: Queue, at: Address) -> Result<()> {
        let (queue, other) = (queue as usize, 1 - queue as usize);
        let below = self.allocations.range_mut(..=at).next_back();
        let Some((_, allocation)) = below.filter(|(_, allocation)| at < allocation.end) else { return Ok(()) };
        if allocation.used[other] > self.given[queue][other] {
            let (own, others) = if queue == WORK { ("work", "a copy beside it") } else { ("a copy", "work beside it") };
            return Err(fault(&format!("{own} uses memory that {others} uses too, and is not ordered behind that")));
        }
        allocation.used[queue] = self.given[queue][queue];
        Ok(())
    }

    /// Memory of the device was allocated.
    pub fn allocated(&mut self, memory: Range<Address>) {
        self.allocations.insert(memory.start, Allocation { end: memory.end, used: [0; 2] });
    }

    /// A copy to the device, beside the work.
    ///
    /// # Safety
    /// Both have room; the host's memory stays.
    pub unsafe fn upload(&mut self, to: Address, from: HostBlock, bytes: usize) -> Result<()> {
        self.give(Queue::Copies)?;
        self.uses(Queue::Copies, to)?;
        // SAFETY: promised by the caller.
        let content = content(unsafe { &from.bytes()[..bytes] });
        self.pending.push(Pending::Upload {
            number: self.given[COPIES][COPIES],
            to,
            from,
            bytes,
            content,
            done: false,
        });
        Ok(())
    }

    /// A copy of what the work so far has made, to page-locked memory.
    ///
    /// # Safety
    /// The host's memory has room, and stays.
    pub unsafe fn download(&mut self, to: HostBlock, data: Vec<u8>) {
        self.pending.push(Pending::Download { number: self.given[WORK][WORK], to, data });
    }

    /// A new event.
    pub fn event(&mut self) -> Event {
        self.events.push([0; 2]);
        Event(self.events.len() - 1)
    }

    /// Notes where a queue is.
    pub fn record(&mut self, event: Event, queue: Queue) {
        let mut clock = self.given[queue as usize];
        join(&mut clock, self.host);
        self.events[event.0] = clock;
    }

    /// Puts all that a queue is given from now on behind an event.
    ///
    /// # Safety
    /// Memory of copies that are not done yet is still there.
    pub unsafe fn order(&mut self, queue: Queue, event: Event) -> Result<()> {
        join(&mut self.given[queue as usize], self.events[event.0]);
        // SAFETY: promised by the caller.
        unsafe { self.settle() }
    }

    /// The host waits for an event, or without one for all work.
    ///
    /// # Safety
    /// As [`order`](Self::order).
    pub unsafe fn wait(&mut self, event: Option<Event>) -> Result<()> {
        let clock = event.map_or(self.given[WORK], |event| self.events[event.0]);
        join(&mut self.host, clock);
        // SAFETY: promised by the caller.
        unsafe { self.settle() }
    }

    /// Memory of the device, or page-locked memory, is given back.
    pub fn freed(&mut self, memory: &Range<u64>) {
        let touches = |pending: &Pending| match pending {
            Pending::Upload { to, from, .. } => memory.contains(to) || memory.contains(&(from.at as u64)),
            Pending::Download { to, .. } => memory.contains(&(to.at as u64)),
        };
        if self.pending.iter().any(touches) {
            self.fault = Some("memory was freed while a copy to or from it was under way".into());
            self.pending.retain(|pending| !touches(pending));
        }
        self.allocations.remove(&memory.start);
    }

    /// Does the copies that somebody is behind, and forgets those that the host is behind.
    ///
    /// # Safety
    /// Their memory is still there.
    unsafe fn settle(&mut self) -> Result<()> {
        let copies = self.given[WORK][COPIES].max(self.host[COPIES]);
        for pending in &mut self.pending {
            // SAFETY: promised by whoever gave the copy, and by the caller.
            unsafe {
                match pending {
                    Pending::Upload { number, to, from, bytes, content: before, done } => {
                        let from = &from.bytes()[..*bytes];
                        if content(from) != *before {
                            return Err(fault("page-locked memory was changed while a copy from it was under way"));
                        }
                        if *number <= copies && !std::mem::replace(done, true) {
                            std::ptr::copy_nonoverlapping(from.as_ptr(), *to as *mut u8, *bytes);
                        }
                    }
                    Pending::Download { number, to, data } if *number <= self.host[WORK] => {
                        to.bytes_mut()[..data.len()].copy_from_slice(data);
                    }
                    Pending::Download { .. } => {}
                }
            }
        }
        let host = self.host;
        self.pending.retain(|pending| match pending {
            Pending::Upload { number, .. } => *number > host[COPIES],
            Pending::Download { number, .. } => *number > host[WORK],
        });
        Ok(())
    }
}
