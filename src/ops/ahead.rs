//! Memory that is asked for while something else is computed.

use super::simd::prefetch;

/// Elements of a line of the cache.
pub(super) const LINE: usize = 16;

/// Memory that is read next.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Ahead<'a> {
    /// Parts in their order.
    pub parts: [&'a [f32]; 3],
}

impl<'a> Ahead<'a> {
    /// Elements that are left.
    pub fn len(&self) -> usize {
        self.parts.iter().map(|part| part.len()).sum()
    }

    /// At most so many elements of the first part that is left.
    pub fn take(&mut self, len: usize) -> &'a [f32] {
        let Some(part) = self.parts.iter_mut().find(|part| !part.is_empty()) else { return &[] };
        let (head, rest) = part.split_at(len.min(part.len()));
        *part = rest;
        head
    }
}

/// Asks for all lines of some memory. Measured: a tighter loop, which asks for many in a burst, holds up the loads beside it.
#[inline(always)]
pub(super) fn ask(data: &[f32]) {
    for line in data.chunks(LINE) {
        prefetch(line.as_ptr());
    }
}

/// The same of so many elements from a place on. It is a hint: there need not be any memory.
#[inline(always)]
pub(super) fn ask_at(from: *const f32, elements: usize) {
    for at in (0..elements).step_by(LINE) {
        prefetch(from.wrapping_add(at));
    }
}
