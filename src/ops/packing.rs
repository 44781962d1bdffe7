//! Weights as the host's kernels read them, packed once ahead of many passes.

use super::conv::winograd::WinogradProblem;
use super::panels::PanelLayout;

/// How a step's weights are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// In panels, for a product.
    Panels(PanelLayout),
    /// Transformed, for a convolution in tiles.
    Winograd(WinogradProblem),
}

impl Packing {
    /// Elements of the packed weights. It depends on the vectors of the processor.
    pub fn elements(&self) -> usize {
        match self {
            Self::Panels(layout) => layout.panel_elements(),
            Self::Winograd(problem) => problem.packed_elements(),
        }
    }

    /// Packs weights.
    ///
    /// # Panics
    /// When `w` or `to` has another length.
    pub fn pack(&self, w: &[f32], to: &mut [f32]) {
        match self {
            Self::Panels(layout) => layout.pack(w, to),
            Self::Winograd(problem) => problem.pack(w, to),
        }
    }
}
