//! Memory that follows the input: data sets, models, batches and pictures. What cannot be had is an error here, where an
//! ordinary allocation aborts the process; the program's own allocator ends it with one line for all the rest.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytemuck::Zeroable;

use crate::error::MEMORY_REMEDY;
use crate::{Error, Result};

/// `len` zeros; `what` is what they are for.
///
/// # Errors
/// [`Error::Memory`] when there is no room for them.
pub fn zeros<T: Zeroable>(len: usize, what: &str) -> Result<Vec<T>> {
    asking(|| bytemuck::allocation::try_zeroed_vec(len)).map_err(|()| lacking::<T>(len, what))
}

/// An empty list with room for `len` elements; `what` is what they are for.
///
/// # Errors
/// As [`zeros`].
pub fn room<T>(len: usize, what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    reserve(&mut list, len, what)?;
    Ok(list)
}

/// A copy of a list; `what` is what it is for.
///
/// # Errors
/// As [`zeros`].
pub fn copy<T: Copy>(data: &[T], what: &str) -> Result<Vec<T>> {
    let mut list = room(data.len(), what)?;
    list.extend_from_slice(data);
    Ok(list)
}

/// Makes a list `len` zeros long where it is shorter or longer; old elements stay.
///
/// # Errors
/// As [`zeros`].
pub fn resize<T: Zeroable + Copy>(list: &mut Vec<T>, len: usize, what: &str) -> Result<()> {
    reserve(list, len.saturating_sub(list.len()), what)?;
    list.resize(len, T::zeroed());
    Ok(())
}

/// Makes room for `more` elements behind those of a list; `what` is what they are for.
///
/// # Errors
/// As [`zeros`].
pub fn reserve<T>(list: &mut Vec<T>, more: usize, what: &str) -> Result<()> {
    asking(|| list.try_reserve_exact(more)).map_err(|_| lacking::<T>(list.len().saturating_add(more), what))
}

/// Reads all that is left into a list, behind what it holds.
///
/// # Errors
/// As the reader, and [`io::ErrorKind::OutOfMemory`], which [`Error::io`] takes for [`Error::Memory`].
pub fn read_to_end(mut from: impl Read, list: &mut Vec<u8>) -> io::Result<usize> {
    asking(|| from.read_to_end(list))
}

/// The error of an allocation that failed.
fn lacking<T>(len: usize, what: &str) -> Error {
    let megabytes = len as f64 * size_of::<T>() as f64 / 1e6;
    Error::Memory(format!("{what} would take {megabytes:.1} MB"))
}

thread_local! {
    /// Whether this thread can be told that there is no memory.
    static ASKING: Cell<bool> = const { Cell::new(false) };
}

fn asking<T>(allocate: impl FnOnce() -> T) -> T {
    ASKING.set(true);
    let outcome = allocate();
    ASKING.set(false);
    outcome
}

/// The system's allocator for a program that must end with one line and exit code 1 where memory runs out.
///
/// The functions above cover what this crate allocates for its input. What other crates do (a JPEG decoder's coefficients,
/// a product's packed operands, a header's JSON, a page of Parquet) follows the input as well and has no error to return:
/// there the process would abort with a signal, and the hook that could change this (`set_alloc_error_hook`) is not in
/// stable Rust. It hands everything on to [`System`] and looks only at whether memory came back.
#[derive(Debug)]
pub struct EndingAllocator;

/// Whether a thread ends the process already.
static ENDING: AtomicBool = AtomicBool::new(false);

// SAFETY: every method hands its arguments on to the system's allocator, whose contract is the same, and returns what it
// returned, or does not return.
unsafe impl GlobalAlloc for EndingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        had(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        had(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above; `memory` came from `System`, as all memory does here.
        had(unsafe { System.realloc(memory, layout, size) }, size)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) };
    }
}

/// Passes memory on. Without any, the process ends, unless the thread can be told.
fn had(memory: *mut u8, size: usize) -> *mut u8 {
    if memory.is_null() && !ASKING.get() {
        end(size);
    }
    memory
}

#[cold]
fn end(size: usize) {
    // Whatever is allocated from here on in this thread gets no second ending.
    ASKING.set(true);
    if ENDING.swap(true, Ordering::SeqCst) {
        // Another thread is writing the line, unless it waits for standard error, which this one may hold.
        std::thread::sleep(Duration::from_secs(1));
        std::process::exit(1);
    }
    // Neither writing to standard error nor formatting a number allocates.
    let _ = writeln!(io::stderr(), "error: out of memory: {size} bytes more cannot be had; {MEMORY_REMEDY}");
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_had_is_named_with_its_size() {
        let far = usize::MAX / 64;
        let mut list = vec![1u8];
        let refused = [
            zeros::<f32>(far, "a batch").unwrap_err(),
            room::<u64>(far, "a batch").unwrap_err(),
            resize(&mut list, usize::MAX / 2, "a batch").unwrap_err(),
            reserve(&mut list, usize::MAX, "a batch").unwrap_err(),
        ];
        for error in refused {
            let text = error.to_string();
            assert!(text.starts_with("out of memory: a batch would take") && text.contains("MB"), "{text}");
        }
        assert_eq!(list, [1]);
        resize(&mut list, 3, "a batch").unwrap();
        assert_eq!((list, copy(&[1, 2], "x").unwrap()), (vec![1, 0, 0], vec![1, 2]));
        assert_eq!(zeros::<f32>(2, "x").unwrap(), [0.0; 2]);
    }
}
