//! What is done to a result while it is in registers or in cache: a bias, a residual, an activation.
//!
//! y = φ(v + bias + residual). One type serves plans, where operands are [`ValueId`]s, and runs, where they are views.

use super::activation::{Act, Activation};
use super::step::{Io, ValueId};
use crate::device::View;

/// What is added to a convolution's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BiasOperand<V> {
    /// Nothing.
    #[default]
    None,
    /// `[c_out]`.
    Channel(V),
    /// `[h_out, w_out, c_out]`.
    Map(V),
}

/// Bias, then residual, then activation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Epilogue<V, A> {
    /// Added first.
    pub bias: BiasOperand<V>,
    /// Added next, of the result's shape.
    pub residual: Option<V>,
    /// Applied last.
    pub act: Option<A>,
}

/// An epilogue in a plan.
pub type PlannedEpilogue = Epilogue<ValueId, Activation>;

impl<V, A> Default for Epilogue<V, A> {
    fn default() -> Self {
        Self { bias: BiasOperand::None, residual: None, act: None }
    }
}

impl<V> BiasOperand<V> {
    /// The bias in terms of other operands.
    pub fn map<W>(self, of: impl FnOnce(V) -> W) -> BiasOperand<W> {
        match self {
            Self::None => BiasOperand::None,
            Self::Channel(bias) => BiasOperand::Channel(of(bias)),
            Self::Map(bias) => BiasOperand::Map(of(bias)),
        }
    }

    /// The operand, if there is one.
    pub fn operand(self) -> Option<V> {
        match self {
            Self::None => None,
            Self::Channel(bias) | Self::Map(bias) => Some(bias),
        }
    }
}

impl PlannedEpilogue {
    /// The values it reads.
    pub fn reads(&self) -> impl Iterator<Item = ValueId> {
        self.bias.operand().into_iter().chain(self.residual)
    }

    /// The epilogue over the values of a run.
    pub fn lend<'a>(&self, io: &Io<'a>) -> Epilogue<View<'a>, Act<'a>> {
        Epilogue {
            bias: self.bias.map(|bias| io.read(bias)),
            residual: self.residual.map(|residual| io.read(residual)),
            act: self.act.as_ref().map(|act| io.act(act)),
        }
    }

    /// In words, each behind a plus.
    pub fn describe(&self) -> String {
        let residual = if self.residual.is_some() { " + residual" } else { "" };
        let act = if self.act.is_some() { " + activation" } else { "" };
        format!("{residual}{act}")
    }
}
