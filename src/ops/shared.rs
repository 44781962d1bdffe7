//! Results that several tasks write at once.

use std::marker::PhantomData;
use std::ops::Range;

/// A result `[rows, c]` that several tasks may write at once, each its own elements.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared<'a, T = f32> {
    data: *mut T,
    len: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a borrowed slice in parts; that tasks write different ones is promised where it is written.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T: Copy> Shared<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self { data: data.as_mut_ptr(), len: data.len(), borrowed: PhantomData }
    }

    /// A range of it.
    #[inline(always)]
    pub fn range(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "a part of a shared result outside of it");
        // SAFETY: the start lies inside of the slice, or at its end.
        Self { data: unsafe { self.data.add(range.start) }, len: range.len(), ..*self }
    }

    /// Its elements.
    #[inline(always)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Where it begins.
    #[inline(always)]
    pub fn as_mut_ptr(&self) -> *mut T {
        self.data
    }

    /// All of it.
    ///
    /// # Safety
    /// Nobody else may use it as long as the slice lives.
    #[inline(always)]
    pub unsafe fn slice(&self) -> &'a mut [T] {
        // SAFETY: it is part of a borrowed slice, and the caller promises that nobody else uses it.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}
