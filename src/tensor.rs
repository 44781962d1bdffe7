//! Host tensors: what models and files hold.

use crate::{Error, Result};

/// Contiguous `f32` numbers with a shape, row-major.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tensor {
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    /// The numbers; as many as the dimensions' product.
    pub data: Vec<f32>,
}

impl Tensor {
    /// A tensor from its parts.
    ///
    /// # Errors
    /// When the number of elements is not the product of the dimensions.
    pub fn new(shape: Vec<usize>, data: Vec<f32>) -> Result<Self> {
        if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(data.len()) {
            return Err(Error::shape("tensor", format!("{shape:?}"), format!("{} numbers", data.len())));
        }
        Ok(Self { shape, data })
    }

    /// A tensor of one repeated value.
    pub fn full(shape: &[usize], value: f32) -> Self {
        Self { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    /// A tensor of zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self::full(shape, 0.0)
    }
}
