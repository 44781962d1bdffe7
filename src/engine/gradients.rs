//! Planning a backward pass: which gradient is stored where, and whether a step writes it or adds to it.
//!
//! A value's gradient is written by the first step that reaches it and added to by the others. Parameter gradients are
//! written, since every parameter belongs to one step.

use std::collections::HashMap;

use crate::ops::activation::Activation;
use crate::ops::batch_norm::NormGradient;
use crate::ops::step::{Backend, Backward, GradientOperand, Place, Sink, Step, Store, ValueId, Values};

/// The backward pass so far.
pub(super) struct Gradients<'a> {
    backend: Backend,
    values: &'a mut Values,
    image: ValueId,
    /// Gradients that some step writes, and those that are formed on load.
    known: HashMap<ValueId, GradientOperand>,
    /// Gradients of parameters.
    params: HashMap<ValueId, ValueId>,
    steps: Vec<Box<dyn Step>>,
}

impl<'a> Gradients<'a> {
    /// Nothing yet; `image` needs no gradient.
    pub fn new(backend: Backend, values: &'a mut Values, image: ValueId) -> Self {
        Self { backend, values, image, known: HashMap::new(), params: HashMap::new(), steps: Vec::new() }
    }

    /// A gradient that is given before the backward pass begins.
    pub fn give(&mut self, value: ValueId) -> ValueId {
        let gradient = self.values.add(self.values.get(value).extent, Store::Activation, Place::Planned);
        self.known.insert(value, GradientOperand::Stored(gradient));
        gradient
    }

    /// The gradients that are stored.
    pub fn known(&self) -> GradientTable {
        let stored = |(value, gradient): (&ValueId, &GradientOperand)| match gradient {
            GradientOperand::Stored(gradient) => Some((*value, *gradient)),
            GradientOperand::Formed(_) => None,
        };
        GradientTable(self.known.iter().filter_map(stored).chain(self.params.iter().map(|(p, g)| (*p, *g))).collect())
    }

    /// The steps that were appended since the last call.
    pub fn take(&mut self) -> Vec<Box<dyn Step>> {
        std::mem::take(&mut self.steps)
    }
}

/// Where each gradient is stored.
#[derive(Debug, Clone)]
pub struct GradientTable(HashMap<ValueId, ValueId>);

impl GradientTable {
    /// The stored gradient of a value or of a parameter.
    pub fn of(&self, value: ValueId) -> Option<ValueId> {
        self.0.get(&value).copied()
    }
}

impl Backward for Gradients<'_> {
    fn backend(&self) -> Backend {
        self.backend
    }

    fn values(&mut self) -> &mut Values {
        self.values
    }

    fn of(&self, value: ValueId) -> Option<GradientOperand> {
        self.known.get(&value).copied()
    }

    fn sink(&mut self, value: ValueId) -> Option<Sink> {
        if value == self.image {
            return None;
        }
        match self.known.get(&value) {
            Some(GradientOperand::Stored(gradient)) => Some(Sink { value: *gradient, add: true }),
            Some(GradientOperand::Formed(_)) => panic!("a gradient that is formed on load has one source"),
            None => Some(Sink { value: self.give(value), add: false }),
        }
    }

    fn form(&mut self, value: ValueId, gradient: NormGradient) {
        let before = self.known.insert(value, GradientOperand::Formed(gradient));
        assert!(before.is_none(), "a gradient that is formed on load has one source");
    }

    fn param_gradient(&mut self, param: ValueId) -> ValueId {
        let value = *self.values.get(param);
        match value.place {
            Place::Param(id) | Place::Weight(id) => {
                let gradient = self.values.pinned(Place::ParamGradient(id), value.len(1));
                self.params.insert(param, gradient);
                gradient
            }
            other => panic!("{other:?} is no trained parameter"),
        }
    }

    fn score(&mut self, act: Option<&Activation>) -> Option<ValueId> {
        let site = act?.site?;
        Some(self.values.pinned(Place::Score(site), 1))
    }

    fn push(&mut self, step: Box<dyn Step>) {
        self.steps.push(step);
    }
}
