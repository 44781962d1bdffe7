//! Values whose vectors of channels are formed where they are read.

use std::ops::Range;

use pulp::Simd;

use super::simd::load;

/// A map `[pixels, c]` that is read a vector of channels at a time.
pub(super) trait VectorSource: Sync {
    /// Reads some channels.
    type Reader<'a, S: Simd>: VectorReader<S>
    where
        Self: 'a;

    /// Of some channels, at most as many as a vector has.
    fn reader<S: Simd>(&self, simd: S, channels: Range<usize>) -> Self::Reader<'_, S>;
}

/// Some channels of a map. It owns what it needs for a vector, so that the compiler sees that it stays the same from pixel to
/// pixel.
pub(super) trait VectorReader<S: Simd> {
    /// The vector that begins at an element of the map; lanes without a channel are of no account.
    fn vector(&self, simd: S, at: usize) -> S::f32s;

    /// Asks for the memory of a vector that will be read soon; there may be none.
    fn prefetch(&self, at: usize);
}

/// A stored map.
pub(super) struct Stored<'a>(pub &'a [f32]);

/// Some channels of a stored map.
#[derive(Clone, Copy)]
pub(super) struct StoredReader<'a> {
    data: &'a [f32],
    channels: usize,
}

impl<'a> StoredReader<'a> {
    /// So many channels of a map.
    #[inline(always)]
    pub fn new(data: &'a [f32], channels: usize) -> Self {
        Self { data, channels }
    }

    /// How many.
    #[inline(always)]
    pub fn channels(&self) -> usize {
        self.channels
    }
}

impl VectorSource for Stored<'_> {
    type Reader<'a, S: Simd>
        = StoredReader<'a>
    where
        Self: 'a;

    #[inline(always)]
    fn reader<S: Simd>(&self, _: S, channels: Range<usize>) -> StoredReader<'_> {
        StoredReader::new(self.0, channels.len())
    }
}

impl<S: Simd> VectorReader<S> for StoredReader<'_> {
    #[inline(always)]
    fn vector(&self, simd: S, at: usize) -> S::f32s {
        load(simd, &self.data[at..at + self.channels])
    }

    #[inline(always)]
    fn prefetch(&self, at: usize) {
        super::simd::prefetch(self.data.as_ptr().wrapping_add(at));
    }
}
