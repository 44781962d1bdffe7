//! Operations: per operation the problem it solves, its forward and its backward pass.
//!
//! Every pass takes views of device memory and dispatches on where that memory is. All results are bit-identical for
//! any number of threads: each sum is taken in an order that follows from the problem's sizes alone, however work is cut.

#![allow(
    clippy::needless_range_loop,
    reason = "loops over indices of slices cut to one length always become vector code; deeply nested zips do not"
)]

pub mod activation;
pub mod add;
mod ahead;
pub mod augment;
pub mod batch_norm;
pub mod config;
pub mod conv;
pub mod copy;
mod cuda;
pub mod dropout;
pub mod epilogue;
pub mod inverted_residual;
pub mod linear;
pub mod loss;
pub mod operation;
pub mod optimizer;
mod outer;
pub mod packing;
pub mod pad;
pub mod panels;
mod parallel;
pub mod pool;
mod product;
mod random;
mod reused;
mod shared;
pub(crate) mod simd;
pub mod step;
mod streaming;
pub(crate) mod team;
mod vector_source;
