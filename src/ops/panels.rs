//! Weights in panels, as the products of the host read them: each as wide as a tile of a product, so that every step of the
//! reduction reads one run of memory.

use std::cell::Cell;
use std::ops::Range;

use super::parallel::with_scratch;
use super::shared::Shared;
use super::simd::lanes;
use super::team::{each, each_chunk};
use crate::device::View;

/// Vectors of channels of a panel at most.
pub(super) const MAX_VECTORS: usize = 3;
/// Elements of weights at most that a core's second-level cache keeps while they are used again and again.
const KEPT: usize = 64 << 10;

/// How weights `[groups · c_out, k]` are packed: for each group panels of some vectors of output channels, in each the
/// reduction, then the channel, with zeros where a group has fewer channels than its vectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PanelLayout {
    /// Groups of channels, each with its own reduction.
    pub groups: usize,
    /// Output channels of a group.
    pub c_out: usize,
    /// Length of the reduction.
    pub k: usize,
}

impl PanelLayout {
    /// How a group is cut into panels.
    #[inline(always)]
    pub(super) fn cut(&self, lanes: usize) -> Cut {
        let vectors = self.c_out.div_ceil(lanes);
        Cut { vectors, panels: vectors.div_ceil(MAX_VECTORS) }
    }

    /// Panels of a group.
    pub(super) fn count(&self) -> usize {
        self.cut(lanes()).panels
    }

    /// The output channels of some panels of a group.
    pub(super) fn channels(&self, panels: Range<usize>) -> Range<usize> {
        self.channels_of(self.cut(lanes()).vectors_of(panels), lanes())
    }

    /// The output channels of some vectors of a group.
    #[inline(always)]
    pub(super) fn channels_of(&self, vectors: Range<usize>, lanes: usize) -> Range<usize> {
        (vectors.start * lanes).min(self.c_out)..(vectors.end * lanes).min(self.c_out)
    }

    /// Elements of a group's panels.
    #[inline(always)]
    pub(super) fn group_len(&self, lanes: usize) -> usize {
        self.cut(lanes).vectors * lanes * self.k
    }

    /// Elements of all panels: those of the weights and zeros. It depends on the vectors of the processor.
    pub fn panel_elements(&self) -> usize {
        self.groups * self.group_len(lanes())
    }

    /// Packs weights.
    ///
    /// # Panics
    /// When `w` or `to` has another length.
    pub fn pack(&self, w: &[f32], to: &mut [f32]) {
        self.each_panel(w, to, |channels, width, w, to| {
            transpose(&w[channels.start * self.k..channels.end * self.k], self.k, to, width);
        });
    }

    /// Packs the transpose of weights: `[k, c_out]` of each group.
    ///
    /// # Panics
    /// When `w` or `to` has another length.
    pub(super) fn pack_transposed(&self, w: &[f32], to: &mut [f32]) {
        let (c_out, k) = (self.c_out, self.k);
        self.each_panel(w, to, |channels, width, w, to| {
            for (to, w) in to.chunks_exact_mut(width).zip(w[..c_out * k].chunks_exact(c_out)) {
                let (own, none) = to.split_at_mut(channels.len());
                own.copy_from_slice(&w[channels.clone()]);
                none.fill(0.0);
            }
        });
    }

    /// Calls `pack` with every panel's channels in its group, its width, the group's weights and the panel.
    fn each_panel(&self, w: &[f32], to: &mut [f32], pack: impl Fn(Range<usize>, usize, &[f32], &mut [f32]) + Sync) {
        let Self { groups, c_out, k } = *self;
        assert!(w.len() == groups * c_out * k && to.len() == self.panel_elements(), "weights of another layout");
        let (lanes, to) = (lanes(), Shared::new(to));
        let (cut, len) = (self.cut(lanes), self.group_len(lanes));
        let count = cut.panels;
        let pack = |task: usize| {
            let (group, panel) = (task / count, task % count);
            let vectors = cut.vectors_of(panel..panel + 1);
            let (at, width) = (group * len + vectors.start * lanes * k, vectors.len() * lanes);
            // SAFETY: panels share no element.
            let to = unsafe { to.range(at..at + width * k).slice() };
            pack(self.channels_of(vectors, lanes), width, &w[group * c_out * k..][..c_out * k], to);
        };
        // A panel alone may be shared out itself.
        match groups * count {
            1 => pack(0),
            tasks => each(tasks, pack),
        }
    }
}

/// How the channels of a group are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    /// Vectors of a group.
    pub vectors: usize,
    /// Panels of a group.
    pub panels: usize,
}

impl Cut {
    /// The vectors of some panels; panels are as evenly wide as they can be.
    #[inline(always)]
    pub fn vectors_of(&self, panels: Range<usize>) -> Range<usize> {
        match self.panels {
            // Without a division: products may be small and many.
            1 => panels.start * self.vectors..panels.end * self.vectors,
            count => panels.start * self.vectors / count..panels.end * self.vectors / count,
        }
    }
}

/// Rows of `k` elements → columns of a matrix with rows of `width`, whose other columns become zero.
fn transpose(rows: &[f32], k: usize, out: &mut [f32], width: usize) {
    /// Columns that are read of one row before the next: memory is read in long runs, and what is written stays in cache until its
    /// lines are full.
    const COLUMNS: usize = 256;
    let count = rows.len() / k;
    each_chunk(out, COLUMNS * width, |task, out| {
        let len = out.len() / width;
        for column in 0..count {
            let row = &rows[column * k + task * COLUMNS..][..len];
            for i in 0..len {
                out[i * width + column] = row[i];
            }
        }
        for out in out.chunks_exact_mut(width) {
            out[count..].fill(0.0);
        }
    });
}

/// A matrix with rows of `k` elements → its transpose with rows of `width`.
pub(super) fn transpose_in_place(matrix: &mut [f32], k: usize, width: usize) {
    with_scratch(matrix.len(), |rows| {
        rows.copy_from_slice(matrix);
        transpose(rows, k, matrix, width);
    });
}

thread_local! {
    /// The memory of the last panels that were packed for one pass, for the next ones.
    static PACKED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Weights in panels: those that are packed already, else packed for one pass.
pub(super) struct Packed<'a> {
    layout: PanelLayout,
    given: Option<&'a [f32]>,
    own: Vec<f32>,
}

impl<'a> Packed<'a> {
    /// Of weights on the host.
    pub fn new(layout: PanelLayout, w: View<'a>) -> Self {
        let given = w.panels();
        let mut own = Vec::new();
        if given.is_none() {
            own = PACKED.take();
            own.resize(layout.panel_elements(), 0.0);
            layout.pack(w.host(), &mut own);
        }
        Self { layout, given, own }
    }

    /// Of the transpose of weights, `[k, c_out]` of each group, for one pass.
    pub fn transposed(layout: PanelLayout, w: &[f32]) -> Self {
        let mut own = PACKED.take();
        own.resize(layout.panel_elements(), 0.0);
        layout.pack_transposed(w, &mut own);
        Self { layout, given: None, own }
    }

    /// The panels.
    pub fn panels(&self) -> Panels<'_> {
        Panels::new(self.layout, self.given.unwrap_or(&self.own))
    }
}

impl Drop for Packed<'_> {
    fn drop(&mut self) {
        if self.given.is_none() {
            PACKED.set(std::mem::take(&mut self.own));
        }
    }
}

/// Weights in panels, lent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels<'a> {
    /// How they lie.
    pub layout: PanelLayout,
    /// All of them.
    pub data: &'a [f32],
    /// What will be read behind them.
    pub next: &'a [f32],
}

impl<'a> Panels<'a> {
    /// Those that were packed as a layout says.
    pub fn new(layout: PanelLayout, data: &'a [f32]) -> Self {
        assert_eq!(data.len(), layout.panel_elements(), "panels of another layout");
        Self { layout, data, next: &[] }
    }

    /// Those of one group, as if there were no other; the next group's are taken to be read next.
    pub fn of_group(&self, group: usize) -> Self {
        let len = self.layout.group_len(lanes());
        let (data, next) = self.data[group * len..].split_at(len);
        let next = if self.data.len() > KEPT { next } else { &[] };
        Self { layout: PanelLayout { groups: 1, ..self.layout }, data, next }
    }
}
