//! Storages, and the tensors that are views of them.

use super::storage_class::StorageClass;

/// A run of elements that tensors are views of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Storage<'a> {
    pub key: &'a str,
    pub class: &'static StorageClass,
    /// Number of elements.
    pub len: usize,
}

/// A tensor: element `[i, j, …]` is element `offset + i·strides[0] + j·strides[1] + …` of the storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct View<'a> {
    pub storage: Storage<'a>,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

impl View<'_> {
    /// Number of elements.
    pub fn len(&self) -> Option<usize> {
        self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))
    }

    /// One behind the last element of the storage that is read.
    pub fn end(&self) -> Option<usize> {
        if self.shape.contains(&0) {
            return Some(0);
        }
        let last = self.shape.iter().zip(&self.strides).try_fold(self.offset, |end, (&d, &stride)| {
            (d - 1).checked_mul(stride).and_then(|reach| end.checked_add(reach))
        });
        last?.checked_add(1)
    }

    /// Whether the elements lie in the storage as they are read, without gaps.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1usize;
        self.shape.iter().zip(&self.strides).rev().all(|(&d, &stride)| {
            let fits = d == 1 || stride == expected;
            expected = expected.saturating_mul(d);
            fits
        })
    }

    /// Calls `visit` with every element's place in the storage, the last dimension fastest. Only after
    /// [`end`](Self::end) was checked.
    pub fn for_each_offset(&self, mut visit: impl FnMut(usize)) {
        let mut index = vec![0; self.shape.len()];
        let mut at = self.offset;
        for _ in 0..self.len().unwrap_or(0) {
            visit(at);
            for (dim, i) in index.iter_mut().enumerate().rev() {
                *i += 1;
                at += self.strides[dim];
                if *i < self.shape[dim] {
                    break;
                }
                at -= *i * self.strides[dim];
                *i = 0;
            }
        }
    }
}
