//! Configurations of kernels that walk over a flat tensor, a grid's width further each time.

use std::fmt;
use std::str::FromStr;

use super::{
    KernelFamily, KernelPass, KernelTarget, Parts, Problem, THREADS, around, refused, vector_len, vector_word,
};
use crate::{Error, Result};

/// Vectors of a thread, at least, where blocks are chosen: enough that starting it weighs little.
const VECTORS: usize = 4;
/// Blocks at most where each leaves a partial sum, which one block adds.
const SUM_BLOCKS: usize = 1024;
/// Blocks at most where nothing is summed: a few times what the largest GPU holds at once.
const MAP_BLOCKS: usize = 4096;
/// Elements of a block of the gradient's norm, at least.
const NORM_ELEMENTS: usize = 4096;
/// Elements that a block of an optimizer's step takes at a time: four for each thread.
const STEP_ELEMENTS: usize = 1024;
/// Blocks of an optimizer's step at most.
const STEP_BLOCKS: usize = super::GRID_LIMIT;
/// Blocks that the first dimension of a grid may have.
const BLOCK_LIMIT: usize = i32::MAX as usize;

/// A tensor of `len` elements to walk over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalkProblem {
    /// [`KernelFamily::Elementwise`], [`KernelFamily::Activation`] or [`KernelFamily::Dropout`].
    pub family: KernelFamily,
    /// Elements.
    pub len: usize,
    /// Whether all operands are aligned to 16 bytes.
    pub aligned: bool,
}

/// Elements that a thread takes at a time, and blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalkConfig {
    /// Whether it takes 16-byte vectors.
    pub vector: bool,
    /// Blocks. Where the kernel sums, each leaves a partial sum.
    pub blocks: usize,
}

impl WalkConfig {
    /// Blocks.
    pub fn grid(&self) -> [usize; 3] {
        [self.blocks, 1, 1]
    }

    /// Floats of the partial sums `[blocks]` of a kernel that sums.
    pub fn workspace(&self) -> usize {
        self.blocks
    }
}

impl Problem for WalkProblem {
    type Config = WalkConfig;

    fn family(&self) -> KernelFamily {
        self.family
    }

    fn choose(&self, _: KernelPass, on: KernelTarget) -> WalkConfig {
        let vectors = |count: usize| self.len.div_ceil(count * THREADS * vector_len(on.dtype));
        match self.family {
            KernelFamily::Elementwise => {
                WalkConfig { vector: self.aligned, blocks: vectors(VECTORS).clamp(1, MAP_BLOCKS) }
            }
            KernelFamily::Dropout => WalkConfig { vector: true, blocks: vectors(1) },
            _ => WalkConfig { vector: true, blocks: vectors(VECTORS).clamp(1, SUM_BLOCKS) },
        }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<WalkConfig> {
        let most = self.len.div_ceil(THREADS).max(1);
        let blocks = around(self.choose(pass, on).blocks, 4, 1..=most);
        let all = [true, false].into_iter();
        let all = all.flat_map(|vector| blocks.iter().map(move |&blocks| WalkConfig { vector, blocks }));
        all.filter(|&config| self.check(config, pass, on).is_ok()).collect()
    }

    fn check(&self, config: WalkConfig, _: KernelPass, _: KernelTarget) -> Result<()> {
        if !config.vector && self.family != KernelFamily::Elementwise {
            return Err(refused(config, "these kernels read vectors alone"));
        }
        if config.vector && !self.aligned {
            return Err(refused(config, "an operand is not aligned to 16 bytes"));
        }
        if config.blocks > BLOCK_LIMIT || (config.blocks == 0 && self.len > 0) {
            return Err(refused(config, format!("1 to {BLOCK_LIMIT} blocks are possible")));
        }
        Ok(())
    }
}

/// `vector-blocks1024`.
impl fmt::Display for WalkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-blocks{}", vector_word(self.vector), self.blocks)
    }
}

impl FromStr for WalkConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "vector-blocks1024");
        let (vector, blocks) = (parts.vector()?, parts.numbered("blocks")?);
        parts.end(Self { vector, blocks })
    }
}

/// A step over flat buffers of `len` elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OptimizerProblem {
    /// Elements.
    pub len: usize,
}

/// Blocks of the gradient's norm and of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OptimizerConfig {
    /// Blocks of the norm, each of which leaves a partial sum.
    pub norm: usize,
    /// Blocks of the step.
    pub step: usize,
}

impl OptimizerConfig {
    /// Blocks of the norm.
    pub fn norm_grid(&self) -> [usize; 3] {
        [self.norm, 1, 1]
    }

    /// Blocks of the step.
    pub fn step_grid(&self) -> [usize; 3] {
        [self.step, 1, 1]
    }

    /// Floats of the partial sums `[blocks]` of the norm.
    pub fn workspace(&self) -> usize {
        self.norm
    }
}

impl Problem for OptimizerProblem {
    type Config = OptimizerConfig;

    fn family(&self) -> KernelFamily {
        KernelFamily::Optimizer
    }

    fn choose(&self, _: KernelPass, _: KernelTarget) -> OptimizerConfig {
        OptimizerConfig {
            norm: self.len.div_ceil(NORM_ELEMENTS).clamp(1, SUM_BLOCKS),
            step: self.len.div_ceil(STEP_ELEMENTS).clamp(1, STEP_BLOCKS),
        }
    }

    fn list(&self, pass: KernelPass, on: KernelTarget) -> Vec<OptimizerConfig> {
        let OptimizerConfig { norm, step } = self.choose(pass, on);
        let most = self.len.div_ceil(THREADS).max(1);
        let steps = around(step, 3, 1..=most);
        let all = around(norm, 3, 1..=most).into_iter();
        all.flat_map(|norm| steps.iter().map(move |&step| OptimizerConfig { norm, step })).collect()
    }

    fn check(&self, config: OptimizerConfig, _: KernelPass, _: KernelTarget) -> Result<()> {
        let fits = |blocks: usize| (1..=BLOCK_LIMIT).contains(&blocks);
        if !fits(config.norm) || !fits(config.step) {
            return Err(refused(config, format!("1 to {BLOCK_LIMIT} blocks are possible")));
        }
        Ok(())
    }
}

/// `norm64-step256`.
impl fmt::Display for OptimizerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "norm{}-step{}", self.norm, self.step)
    }
}

impl FromStr for OptimizerConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = Parts::new(text, "norm64-step256");
        let (norm, step) = (parts.numbered("norm")?, parts.numbered("step")?);
        parts.end(Self { norm, step })
    }
}
