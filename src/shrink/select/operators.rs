//! The operator that each block gets: kept, one convolution, or its shortcut alone, of the highest value within a time.
//!
//! `ran-operators` values them by NN-Mass, after Restructurable Activation Networks (Ghosh et al., arXiv 2208.08562). Read of it: that RAN-e chooses for each block, by what the hardware takes for either, between an inverted residual and one
//! dense convolution with its shortcut, and that NN-Mass, Σ 2·dim over blocks, tells without training how networks of different
//! depth compare; of the choice there is no code, and the two networks it led to are given. Decided here: an exact knapsack chooses; a
//! block kept, with activations on two layers, has the mass 2·dim, one convolution dim, a shortcut none; the shortcut alone is an
//! operator, too, where there is one; and the convolution is not trained from fresh weights but merged from the block.

use std::fmt;

use rand::{Rng, RngExt};

use super::blocks::{BlockOption, BlockOptions, Drawn};
use super::pareto::{Arc, States};
use super::within;
use crate::Result;
use crate::graph::{BlockId, Graph};
use crate::shrink::mask::Mask;
use crate::shrink::selection::Selection;

/// What becomes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// It keeps its activations.
    Kept,
    /// It becomes one convolution.
    Merged,
    /// Its shortcut alone is left.
    Bypassed,
}

/// What the operators of a block are worth, in any unit in which values of blocks add up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OperatorValues {
    /// Kept.
    pub kept: f64,
    /// As one convolution.
    pub merged: f64,
    /// As its shortcut.
    pub bypassed: f64,
}

impl OperatorValues {
    /// NN-Mass of a block with `channels` of its output: 2·dim for two layers with activations, half of it as one convolution.
    pub fn mass(channels: usize) -> Self {
        let dim = channels as f64;
        Self { kept: 2.0 * dim, merged: dim, bypassed: 0.0 }
    }

    fn of(&self, operator: Operator) -> f64 {
        match operator {
            Operator::Kept => self.kept,
            Operator::Merged => self.merged,
            Operator::Bypassed => self.bypassed,
        }
    }
}

/// One operator for each block. Written, `k`, `m` and `b`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operators(Vec<Operator>);

impl Operators {
    /// From one operator for each block.
    pub fn new(operators: Vec<Operator>) -> Self {
        Self(operators)
    }

    /// Those of a selection in a network.
    pub fn of(selection: &Selection, graph: &Graph) -> Self {
        let operator = |block: BlockId| match selection.keep.kept()[block.index()] {
            true => Operator::Kept,
            false if selection.bypassed.contains(&graph.blocks[block].name) => Operator::Bypassed,
            false => Operator::Merged,
        };
        Self(BlockId::all(graph.blocks.len()).map(operator).collect())
    }

    /// One operator for each block.
    pub fn operators(&self) -> &[Operator] {
        &self.0
    }

    /// What they make of a network.
    pub fn selection(&self, graph: &Graph) -> Selection {
        let kept = self.0.iter().map(|operator| *operator == Operator::Kept).collect();
        let blocks = graph.blocks.iter().zip(&self.0);
        let bypassed = blocks.filter(|(_, operator)| **operator == Operator::Bypassed);
        let bypassed = bypassed.map(|(block, _)| block.name.clone()).collect();
        Selection { bypassed, ..Mask::new(kept).into() }
    }
}

impl fmt::Display for Operators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |operator: &Operator| match operator {
            Operator::Kept => 'k',
            Operator::Merged => 'm',
            Operator::Bypassed => 'b',
        };
        self.0.iter().try_for_each(|operator| write!(f, "{}", letter(operator)))
    }
}

impl Operator {
    /// Milliseconds of a block.
    fn time_ms(self, block: &BlockOption) -> f64 {
        match self {
            Self::Kept => block.kept_ms,
            Self::Merged => block.merged_ms,
            Self::Bypassed => 0.0,
        }
    }
}

impl BlockOptions<'_> {
    /// The operators that a block can have.
    fn operators_of(block: &BlockOption) -> &'static [Operator] {
        match (block.stays, block.has_residual) {
            (true, _) => &[Operator::Kept],
            (false, false) => &[Operator::Kept, Operator::Merged],
            (false, true) => &[Operator::Kept, Operator::Merged, Operator::Bypassed],
        }
    }

    /// Of all choices within a time that of the highest sum of values, exactly.
    ///
    /// # Errors
    /// A time below that of the fastest choice, which the message names.
    pub fn operators(&self, values: &[OperatorValues], budget_ms: f64) -> Result<Operators> {
        let arcs = |(from, (block, values)): (usize, (&BlockOption, &OperatorValues))| -> Vec<Arc> {
            let arc = |operator: &Operator| Arc { from, time: operator.time_ms(block), value: values.of(*operator) };
            Self::operators_of(block).iter().map(arc).collect()
        };
        let into = self.blocks().iter().zip(values).enumerate().map(arcs);
        let into = std::iter::once(Vec::new()).chain(into).collect();
        let states = States { start: self.fixed_ms(), into, ends: vec![self.blocks().len()] };
        let path = within(&states, budget_ms)?;
        let chosen = path.arcs.iter().zip(self.blocks()).map(|(&(_, arc), block)| Self::operators_of(block)[arc]);
        Ok(Operators::new(chosen.collect()))
    }

    /// `count` different choices that take no more than the budget and no less than `1 − tolerance` of it: what a choice of
    /// operators has to beat at equal latency. Each draw changes every block with one probability, which is uniform over
    /// \[0, 1\), to one of the operators with which the block takes less time, each as likely as the other.
    ///
    /// # Errors
    /// A budget below the fastest choice, or where fewer choices are found.
    pub fn random_operators(&self, budget_ms: f64, tolerance: f64, seed: u64, count: usize) -> Result<Vec<Operators>> {
        let faster = |block: &BlockOption| -> Vec<Operator> {
            let forms = Self::operators_of(block).iter().copied();
            forms.filter(|form| form.time_ms(block) < block.kept_ms).collect()
        };
        let faster: Vec<Vec<Operator>> = self.blocks().iter().map(faster).collect();
        let drawn = Drawn { budget_ms, tolerance, seed, least_ms: self.least_operators_ms() };
        drawn.of(count, |rng| random_operators(rng, &faster), |operators| self.operators_ms(operators))
    }

    /// Milliseconds under operators, what always runs included.
    pub fn operators_ms(&self, operators: &Operators) -> f64 {
        let blocks = self.blocks().iter().zip(operators.operators());
        blocks.fold(self.fixed_ms(), |sum, (block, operator)| sum + operator.time_ms(block))
    }

    /// Milliseconds below which no choice of operators is.
    pub fn least_operators_ms(&self) -> f64 {
        let least = |block: &BlockOption| {
            let times = Self::operators_of(block).iter().map(|operator| operator.time_ms(block));
            times.fold(f64::INFINITY, f64::min)
        };
        self.blocks().iter().map(least).fold(self.fixed_ms(), |sum, ms| sum + ms)
    }
}

/// One of the forms of each block, or none with a probability that all blocks share.
fn random_operators(rng: &mut impl Rng, forms: &[Vec<Operator>]) -> Operators {
    let share = rng.random::<f64>();
    let form = |forms: &Vec<Operator>| match rng.random::<f64>() < share && !forms.is_empty() {
        true => forms[rng.random_range(0..forms.len())],
        false => Operator::Kept,
    };
    Operators::new(forms.iter().map(form).collect())
}
