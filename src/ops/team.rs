//! The host's threads: a team that shares out the tasks of one loop after another.
//!
//! Between two loops its helpers wait for the next one awake for a short while, so that a network's steps, of tens of
//! microseconds each, follow each other without the system being asked for anything. A task is claimed when a thread is
//! free, so that which thread does it follows from nothing: results must not depend on that, and do not, as tasks write
//! different memory and sums are taken in a fixed order.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, Thread};

use super::parallel::slab_range;

/// How often a helper looks for the next loop before it sleeps: one to two hundred microseconds.
const LOOKS: usize = 4000;
/// How often whoever leads a loop looks for its end before it lets other threads run.
const LOOKS_FOR_END: usize = 20_000;
/// Stack of a helper: kernels keep large matters elsewhere.
const STACK_BYTES: usize = 1 << 21;

thread_local! {
    /// Whether the thread is at a task: loops in it are its own.
    static AT_TASK: Cell<bool> = const { Cell::new(false) };
}

/// How many threads a loop of the caller has.
pub(crate) fn threads() -> usize {
    if AT_TASK.get() { 1 } else { rayon::current_num_threads() }
}

/// Calls `task` with every number below `count`, each once, on as many threads as the current `rayon` pool has. Inside of a
/// task, and while the team is at another thread's loop, the caller does it alone.
///
/// # Panics
/// When a task does.
pub(crate) fn each(count: usize, task: impl Fn(usize) + Sync) {
    let threads = threads().min(count);
    if threads > 1 && TEAM.lead(threads - 1, count, &task) {
        return;
    }
    (0..count).for_each(task);
}

/// The answers of `task` for every number below `count`, in order.
pub(crate) fn map<R: Send>(count: usize, task: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let mut answers = Vec::with_capacity(count);
    each_chunk(&mut answers.spare_capacity_mut()[..count], 1, |index, answer| {
        answer[0].write(task(index));
    });
    // SAFETY: every task was done, or `each_chunk` has panicked.
    unsafe { answers.set_len(count) };
    answers
}

/// Calls `task` with every chunk of `len` elements of a slice, of which the last may be shorter, and its number.
pub(crate) fn each_chunk<T: Send>(data: &mut [T], len: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    each_chunk_pair(data, len, &mut [(); 0], 0, |index, chunk, _| task(index, chunk));
}

/// Calls `task` with `count` parts of a slice of units of `len` elements, each of as many units as the others or one more, and
/// with the numbers of its units.
pub(crate) fn each_part<T: Send>(
    data: &mut [T],
    len: usize,
    count: usize,
    task: impl Fn(Range<usize>, &mut [T]) + Sync,
) {
    let (units, data) = (data.len() / len, Parts::new(data));
    each(count, |part| {
        let range = slab_range(units, count, part);
        // SAFETY: parts share no unit.
        task(range.clone(), unsafe { data.range(range.start * len..range.end * len) });
    });
}

/// The same with the chunks of two slices, the second of `other_len` elements each.
pub(crate) fn each_chunk_pair<T: Send, U: Send>(
    data: &mut [T],
    len: usize,
    other: &mut [U],
    other_len: usize,
    task: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    assert!(len > 0, "chunks of no element");
    let count = data.len().div_ceil(len);
    let (data, other) = (Parts::new(data), Parts::new(other));
    each(count, |index| {
        // SAFETY: every number is given out once, and chunks of different numbers share no element.
        let (chunk, other) = unsafe { (data.chunk(index, len), other.chunk(index, other_len)) };
        task(index, chunk, other);
    });
}

/// A borrowed slice whose chunks several threads have.
struct Parts<T> {
    data: *mut T,
    len: usize,
}

// SAFETY: threads have different chunks of it, of elements that may go to another thread.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    fn new(data: &mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len() }
    }

    /// # Safety
    /// The slice must be borrowed still, and nobody else have the chunk.
    #[allow(clippy::mut_from_ref, reason = "whoever asks promises that the chunk is its own")]
    unsafe fn chunk(&self, index: usize, len: usize) -> &mut [T] {
        let start = (index * len).min(self.len);
        // SAFETY: promised.
        unsafe { self.range(start..(start + len).min(self.len)) }
    }

    /// # Safety
    /// The slice must be borrowed still, and nobody else have the range.
    #[allow(clippy::mut_from_ref, reason = "whoever asks promises that the range is its own")]
    unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a slice outside of it");
        // SAFETY: the range lies inside of the slice; the rest is promised.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

static TEAM: Team = Team { helpers: Mutex::new(Vec::new()), job: Job::new() };

struct Team {
    /// Whoever holds it leads.
    helpers: Mutex<Vec<Arc<Helper>>>,
    job: Job,
}

/// A thread of the team, as whoever leads sees it.
struct Helper {
    is_asleep: AtomicBool,
    thread: Mutex<Option<Thread>>,
}

/// The loop that the team is at.
struct Job {
    /// The loop's number, whether helpers may join it, and how many have.
    state: AtomicU64,
    /// Helpers that may join at most.
    most: AtomicUsize,
    /// Helpers that have joined and left.
    left: AtomicUsize,
    /// Tasks claimed from the front, by whoever leads, and from the back, by helpers, so that in one loop after another each
    /// works on memory near to what it had.
    claims: AtomicU64,
    tasks: UnsafeCell<Option<Tasks>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What is to be done. The reference lives as long as the loop.
#[derive(Clone, Copy)]
struct Tasks {
    count: usize,
    task: &'static (dyn Fn(usize) + Sync),
}

// SAFETY: `tasks` is written by whoever leads while no helper is in a loop, and read by helpers that have joined one.
unsafe impl Sync for Job {}

const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const NUMBER: u64 = 1 << 32;
const FROM_BACK: u64 = 1 << 32;

impl Team {
    /// Shares out a loop with up to so many helpers; says no where they are busy with another.
    fn lead(&'static self, helpers: usize, count: usize, task: &(dyn Fn(usize) + Sync)) -> bool {
        let mut members = match self.helpers.try_lock() {
            Ok(members) => members,
            // A loop whose task panicked has ended all the same.
            Err(TryLockError::Poisoned(members)) => members.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        while members.len() < helpers {
            let Some(helper) = self.hire(members.len()) else { break };
            members.push(helper);
        }
        // SAFETY: the reference is used until `close` returns, below, and no longer.
        let task: &'static (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(task) };
        let tasks = Tasks { count, task };
        self.job.open(tasks, helpers);
        for helper in members.iter() {
            helper.wake();
        }
        AT_TASK.set(true);
        let own = catch_unwind(AssertUnwindSafe(|| self.job.work(tasks, true)));
        AT_TASK.set(false);
        self.job.close();
        let theirs = self.job.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        drop(members);
        if let Some(panic) = own.err().or(theirs) {
            resume_unwind(panic);
        }
        true
    }

    /// One more thread; `None` where the system has none.
    fn hire(&'static self, number: usize) -> Option<Arc<Helper>> {
        let helper = Arc::new(Helper { is_asleep: AtomicBool::new(false), thread: Mutex::new(None) });
        let own = helper.clone();
        let started = thread::Builder::new()
            .name(format!("team-{number}"))
            .stack_size(STACK_BYTES)
            .spawn(move || self.job.help(&own))
            .ok()?;
        *helper.thread.lock().unwrap_or_else(|e| e.into_inner()) = Some(started.thread().clone());
        Some(helper)
    }
}

impl Helper {
    fn wake(&self) {
        if self.is_asleep.load(Ordering::SeqCst)
            && let Some(thread) = &*self.thread.lock().unwrap_or_else(|e| e.into_inner())
        {
            thread.unpark();
        }
    }
}

impl Job {
    const fn new() -> Self {
        Self {
            state: AtomicU64::new(0),
            most: AtomicUsize::new(0),
            left: AtomicUsize::new(0),
            claims: AtomicU64::new(0),
            tasks: UnsafeCell::new(None),
            panic: Mutex::new(None),
        }
    }

    fn open(&self, tasks: Tasks, most: usize) {
        // SAFETY: no helper is in a loop: the last one was closed.
        unsafe { *self.tasks.get() = Some(tasks) };
        self.most.store(most, Ordering::Relaxed);
        self.left.store(0, Ordering::Relaxed);
        self.claims.store(0, Ordering::Relaxed);
        let number = (self.state.load(Ordering::Relaxed) & !(NUMBER - 1)).wrapping_add(NUMBER);
        self.state.store(number | OPEN, Ordering::SeqCst);
    }

    /// Lets no more helpers in, and waits for those that are.
    fn close(&self) {
        let joined = (self.state.fetch_and(!OPEN, Ordering::AcqRel) & JOINED) as usize;
        let mut looks = 0;
        while self.left.load(Ordering::Acquire) < joined {
            looks += 1;
            if looks < LOOKS_FOR_END { std::hint::spin_loop() } else { thread::yield_now() }
        }
    }

    /// Does tasks until all are claimed.
    fn work(&self, Tasks { count, task }: Tasks, leads: bool) {
        loop {
            let claims = self.claims.fetch_add(if leads { 1 } else { FROM_BACK }, Ordering::Relaxed);
            let (front, back) = ((claims & (FROM_BACK - 1)) as usize, (claims >> 32) as usize);
            if front + back >= count {
                return;
            }
            task(if leads { front } else { count - 1 - back });
        }
    }

    /// What a helper does all its life.
    fn help(&self, helper: &Helper) {
        AT_TASK.set(true);
        let mut last = 0;
        loop {
            last = self.next(helper, last);
            if !self.join(last) {
                continue;
            }
            // SAFETY: whoever leads the loop that was joined waits until all who joined have left it.
            let tasks = unsafe { *self.tasks.get() };
            let done = catch_unwind(AssertUnwindSafe(|| tasks.into_iter().for_each(|tasks| self.work(tasks, false))));
            if let Err(panic) = done {
                *self.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(panic);
            }
            self.left.fetch_add(1, Ordering::Release);
        }
    }

    /// Waits for an open loop that is not the last one; its number.
    fn next(&self, helper: &Helper, last: u64) -> u64 {
        let found = |state: u64| {
            let number = state & !(NUMBER - 1);
            (state & OPEN != 0 && number != last).then_some(number)
        };
        loop {
            for _ in 0..LOOKS {
                if let Some(number) = found(self.state.load(Ordering::Relaxed)) {
                    return number;
                }
                std::hint::spin_loop();
            }
            helper.is_asleep.store(true, Ordering::SeqCst);
            // Whoever opened a loop before it could see that this one sleeps is seen here.
            if found(self.state.load(Ordering::SeqCst)).is_none() {
                thread::park();
            }
            helper.is_asleep.store(false, Ordering::SeqCst);
        }
    }

    /// Joins the loop of a number, unless it is over or has enough helpers.
    fn join(&self, number: u64) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        loop {
            let is_open = state & OPEN != 0 && state & !(NUMBER - 1) == number;
            if !is_open || (state & JOINED) as usize >= self.most.load(Ordering::Relaxed) {
                return false;
            }
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn on_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool").install(body)
    }

    /// Every task is done once, in loops that follow each other at once and after the helpers fell asleep.
    #[test]
    fn tasks_are_done_once() {
        on_threads(3, || {
            for round in 0..2000 {
                let count = round % 7;
                let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                each(count, |task| {
                    done[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1), "round {round}");
                if round % 500 == 0 {
                    thread::sleep(std::time::Duration::from_millis(2));
                }
            }
            let answers = map(100, each_answer);
            assert_eq!(answers, (0..100).map(each_answer).collect::<Vec<_>>());
        });
    }

    /// What a task says that has a loop of its own.
    fn each_answer(task: usize) -> usize {
        map(task, |inner| inner).into_iter().sum()
    }

    /// Loops of several threads at once, of which one has the team.
    #[test]
    fn loops_of_several_threads_do_not_meet() {
        thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    on_threads(2, || {
                        for round in 0..500 {
                            let mut data = vec![0; 50];
                            each_chunk(&mut data, 8, |index, chunk| chunk.fill(thread + round + index));
                            assert!(data.iter().enumerate().all(|(i, &v)| v == thread + round + i / 8));
                        }
                    });
                });
            }
        });
    }

    /// A task that panics ends the loop for whoever called, and the team goes on.
    #[test]
    fn a_panic_reaches_the_caller() {
        on_threads(2, || {
            for failing in 0..8 {
                let outcome = catch_unwind(|| each(8, |task| assert_ne!(task, failing, "it fails")));
                assert!(outcome.is_err());
            }
            assert_eq!(map(9, |task| task * task)[8], 64);
        });
    }
}
