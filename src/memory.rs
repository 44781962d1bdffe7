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
///
/// A list of `f32`, which may hold activations or weights, begins at a line of the cache, since a vector of 64 bytes that
/// lies across two lines is read and written as two, and large memory at a page of two megabytes, which the system is asked
/// to give as one: of small pages a network uses thousands a pass, more than the processor keeps the addresses of.
#[derive(Debug)]
pub struct EndingAllocator;

/// Bytes of a line of the cache, and of memory that begins at one.
const CACHE_LINE: usize = 64;
const FROM_BYTES: usize = 1 << 14;
/// Bytes of a large page, and of memory that begins at one.
const LARGE_PAGE: usize = 1 << 21;
const LARGE_FROM_BYTES: usize = 1 << 20;

/// A layout as the system is asked for it. Lists of other things than numbers in `f32` stay as they are: what grows with them,
/// such as a file that is read, may then be extended where it lies.
fn aligned(layout: Layout) -> Layout {
    if layout.align() != align_of::<f32>() {
        return layout;
    }
    let alignment = match layout.size() {
        0..FROM_BYTES => return layout,
        FROM_BYTES..LARGE_FROM_BYTES => CACHE_LINE,
        _ => LARGE_PAGE,
    };
    layout.align_to(alignment).unwrap_or(layout)
}

/// Asks the system for large pages. It may refuse: they are a matter of speed alone.
fn advise(memory: *mut u8, layout: Layout) {
    #[cfg(target_os = "linux")]
    if layout.align() == align_of::<f32>() && layout.size() >= LARGE_FROM_BYTES && !memory.is_null() {
        use rustix::mm::{Advice, madvise};
        // SAFETY: the advice changes no content. It may reach past the memory, to the end of its last large page.
        let _ = unsafe { madvise(memory.cast(), layout.size().next_multiple_of(LARGE_PAGE), Advice::LinuxHugepage) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (memory, layout);
}

/// Whether a thread ends the process already.
static ENDING: AtomicBool = AtomicBool::new(false);

// SAFETY: every method hands its arguments on to the system's allocator, whose contract is the same, and returns what it
// returned, or does not return.
unsafe impl GlobalAlloc for EndingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        let memory = had(unsafe { System.alloc(aligned(layout)) }, layout.size());
        advise(memory, layout);
        memory
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if aligned(layout) == layout {
            // SAFETY: as above.
            return had(unsafe { System.alloc_zeroed(layout) }, layout.size());
        }
        // SAFETY: as above; all of the new memory is written.
        unsafe {
            let memory = self.alloc(layout);
            if !memory.is_null() {
                memory.write_bytes(0, layout.size());
            }
            memory
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises a size that is not zero, and that it makes a layout.
        let to = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if aligned(to).align() == aligned(layout).align() {
            // SAFETY: `memory` came from `System` with this layout, as all memory does here.
            let memory = had(unsafe { System.realloc(memory, aligned(layout), size) }, size);
            advise(memory, to);
            return memory;
        }
        // SAFETY: both memories hold the smaller size.
        unsafe {
            let moved = self.alloc(to);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(memory, size.min(layout.size()));
                self.dealloc(memory, layout);
            }
            moved
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(memory, aligned(layout)) };
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
