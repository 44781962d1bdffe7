//! Operations on a GPU: which instance of which kernel, how many blocks, which arguments.
//!
//! The header comment of each file of `kernels/` states what a launch must look like; the functions here say the same in
//! Rust and nothing more. Everything that decides the order of a sum follows from the problem alone, so that results
//! repeat bit by bit on GPUs of one architecture; how a tensor core adds within one instruction differs among them.

pub(super) mod activation;
pub(super) mod augment;
pub(super) mod batch_norm;
pub(super) mod conv;
pub(super) mod elementwise;
pub(super) mod loss;
pub(super) mod optimizer;
pub(super) mod pool;

use crate::device::driver::LaunchShape;
use crate::dtype::Dtype;

/// Threads of a block of every kernel that says nothing else.
const THREADS: u32 = 256;

/// A launch of blocks of 256 threads.
fn grid(x: usize, y: usize, z: usize) -> LaunchShape {
    blocks([x, y, z], THREADS)
}

fn blocks(grid: [usize; 3], threads: u32) -> LaunchShape {
    let grid = grid.map(|n| u32::try_from(n).expect("a batch that fits a device's memory fits its grids"));
    LaunchShape { grid, block: [threads, 1, 1], shared: 0 }
}

/// An integer argument of a kernel.
fn int(n: usize) -> i32 {
    i32::try_from(n).expect("a tensor's dimensions and slabs fit 31 bits")
}

/// A count of elements.
fn long(n: usize) -> i64 {
    n as i64
}

/// Elements of a 16-byte vector.
fn vector_len(dtype: Dtype) -> usize {
    16 / dtype.bytes()
}

/// Whether `c` channels are whole vectors.
fn vectors(dtype: Dtype, c: usize) -> bool {
    c.is_multiple_of(vector_len(dtype))
}

/// How blocks share `[pixels, c]` with `n` channels to a thread (`kernels/slab.cuh`).
#[derive(Debug, Clone, Copy)]
struct Tiles {
    lanes: usize,
    tiles: usize,
    rows: usize,
}

impl Tiles {
    fn new(c: usize, n: usize) -> Self {
        let vectors = c.div_ceil(n);
        let tiles = vectors.div_ceil(64);
        let lanes = vectors.div_ceil(tiles);
        Self { lanes, tiles, rows: THREADS as usize / lanes }
    }

    /// With 16-byte vectors where the channels allow it.
    fn of(dtype: Dtype, c: usize) -> (bool, Self) {
        let vector = vectors(dtype, c);
        (vector, Self::new(c, if vector { vector_len(dtype) } else { 1 }))
    }
}
