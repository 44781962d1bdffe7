//! Copies, converted where types differ, and additions to what is there.

use super::cuda::elementwise;
use super::operation::require;
use super::simd::vectorised;
use super::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use super::team::each_chunk;
use crate::device::{View, ViewMut};

const BLOCK: usize = 1 << 14;

/// to = from.
pub fn copy(from: View<'_>, to: ViewMut<'_>) {
    require("a copy", [("the target", to.len(), from.len())]);
    if let View::Gpu(from) = from {
        return elementwise::cast(from, &to.gpu());
    }
    let (from, to) = (from.host(), to.host());
    each_chunk(to, BLOCK, |block, to| to.copy_from_slice(&from[block * BLOCK..][..to.len()]));
}

/// to += from.
pub fn accumulate(from: View<'_>, to: ViewMut<'_>) {
    require("an accumulation", [("the target", to.len(), from.len())]);
    if let View::Gpu(from) = from {
        return elementwise::accumulate(&to.gpu(), from);
    }
    let (from, to) = (from.host(), to.host());
    each_chunk(to, BLOCK, |block, to| {
        let from = &from[block * BLOCK..][..to.len()];
        vectorised(
            #[inline(always)]
            || to.iter_mut().zip(from).for_each(|(to, from)| *to += from),
        );
    });
}

/// A value copied or added to a gradient: the gradient of a sum, and dropout where nothing is dropped.
#[derive(Debug)]
pub struct CopyStep {
    /// What is copied.
    pub from: ValueId,
    /// Where to.
    pub to: Sink,
    /// Elements per image.
    pub len: usize,
}

impl Step for CopyStep {
    fn describe(&self) -> String {
        if self.to.add { "accumulate" } else { "copy" }.into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.from], []).with([self.to])
    }

    fn work(&self) -> Work {
        Work::vector(if self.to.add { self.len as u64 } else { 0 })
    }

    fn run(&self, io: &mut Io<'_>) {
        let (to, add) = io.write_into(self.to);
        let from = io.read(self.from);
        if add { accumulate(from, to) } else { copy(from, to) }
    }

    fn gradient(&self, _: &mut dyn Backward) {}
}
