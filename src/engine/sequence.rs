//! Steps outside a network, each value in a buffer of its own: what benches time and `check` compares.

use std::sync::Arc;

use crate::device::{Buffer, Device, View};
use crate::ops::dropout::DropoutStream;
use crate::ops::step::{Backend, Io, Place, Slopes, Step, Store, ValueId, Values};
use crate::{Result, memory};

use super::gradients::{GradientTable, Gradients};
use super::plan::StepCost;

/// A few steps and the values they use.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// What the steps use.
    pub values: Arc<Values>,
    /// The steps, in order.
    pub steps: Arc<Vec<Box<dyn Step>>>,
}

impl Sequence {
    /// Some steps.
    pub fn new(values: Values, steps: Vec<Box<dyn Step>>) -> Self {
        Self { values: Arc::new(values), steps: Arc::new(steps) }
    }

    /// The backward pass of these steps. `outputs` are the values whose gradients are given, and `added_to` those whose
    /// gradients hold something already.
    pub fn backward(&self, backend: Backend, outputs: &[ValueId], added_to: &[ValueId]) -> Backpropagated {
        let mut values = (*self.values).clone();
        // Nothing is the image here, so that every operand has its gradient.
        let image = values.floats(0);
        let mut gradients = Gradients::new(backend, &mut values, image);
        let given = outputs.iter().chain(added_to).map(|&value| gradients.give(value)).collect();
        for step in self.steps.iter().rev() {
            step.gradient(&mut gradients);
        }
        let (steps, known) = (gradients.take(), gradients.known());
        Backpropagated { steps: Self::new(values, steps), given, gradients: known }
    }

    /// The values that some step uses, each once, in order.
    pub fn used(&self) -> Vec<ValueId> {
        let mut used: Vec<ValueId> = self.steps.iter().flat_map(|step| step.uses().all().collect::<Vec<_>>()).collect();
        used.sort();
        used.dedup();
        used
    }

    /// What all of them must move and compute.
    pub fn cost(&self) -> Option<StepCost> {
        let costs = self.steps.iter().map(|step| StepCost::of(step.as_ref(), &step.uses(), &self.values));
        costs.reduce(StepCost::and)
    }
}

/// The backward pass of a sequence.
#[derive(Debug)]
pub struct Backpropagated {
    /// Its steps.
    pub steps: Sequence,
    /// The gradients that are given, in the order asked for.
    pub given: Vec<ValueId>,
    /// Where the gradients lie that the steps write.
    pub gradients: GradientTable,
}

/// A sequence on a device, over one set of buffers for a batch.
#[derive(Debug)]
pub struct SequenceRun {
    sequence: Sequence,
    n: usize,
    buffers: Vec<Option<Buffer>>,
    /// Weights that were packed, by value; empty for all others.
    panels: Vec<Vec<f32>>,
    dropout: DropoutStream,
}

impl SequenceRun {
    /// Allocates the values that some step uses, all zeros.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device, sequence: &Sequence, n: usize) -> Result<Self> {
        let mut buffers: Vec<Option<Buffer>> = sequence.values.iter().map(|_| None).collect();
        for id in sequence.used() {
            let value = sequence.values.get(id);
            let len = value.len(n);
            buffers[id.index()] = Some(match value.store {
                Store::Activation => device.activations(len)?,
                Store::Float => device.zeros(len)?,
                Store::Sum => device.sums(len)?,
            });
        }
        let panels = vec![Vec::new(); buffers.len()];
        Ok(Self { sequence: sequence.clone(), n, buffers, panels, dropout: DropoutStream::new(device)? })
    }

    /// A value that some step uses.
    ///
    /// # Panics
    /// When none does.
    pub fn buffer(&self, id: ValueId) -> &Buffer {
        self.buffers[id.index()].as_ref().unwrap_or_else(|| panic!("no step uses {id:?}"))
    }

    /// The same, to be written; `None` where no step uses it.
    pub fn buffer_mut(&mut self, id: ValueId) -> Option<&mut Buffer> {
        self.buffers[id.index()].as_mut()
    }

    /// Takes over a value from a run before this one, such as what a forward pass kept.
    pub fn take_from(&mut self, other: &mut Self, id: ValueId) {
        if self.buffers[id.index()].is_some() {
            self.buffers[id.index()] = other.buffers[id.index()].take();
        }
    }

    /// Packs the host's weights for all runs that follow, as an engine does in inference. Weights must not change behind it.
    ///
    /// # Errors
    /// When memory cannot be had.
    pub fn pack_weights(&mut self) -> Result<()> {
        for (id, packing) in self.sequence.steps.iter().flat_map(|step| step.packed()) {
            if let Some(buffer @ Buffer::Host(_)) = &self.buffers[id.index()] {
                let mut panels = memory::zeros(packing.elements(), "packed weights")?;
                packing.pack(buffer.view(0..buffer.len()).host(), &mut panels);
                self.panels[id.index()] = panels;
            }
        }
        Ok(())
    }

    /// Trades weights for those of another run of the same steps.
    pub fn swap_weights(&mut self, other: &mut Self) {
        let is_weight = |id: &ValueId| matches!(self.sequence.values.get(*id).place, Place::Weight(_));
        for id in self.sequence.used().into_iter().filter(is_weight) {
            std::mem::swap(&mut self.buffers[id.index()], &mut other.buffers[id.index()]);
            std::mem::swap(&mut self.panels[id.index()], &mut other.panels[id.index()]);
        }
    }

    /// Runs the steps, each over all of the batch.
    pub fn run(&mut self) {
        self.run_first(self.n);
    }

    /// Runs the steps over the first `n` images of the batch.
    pub fn run_first(&mut self, n: usize) {
        let values = self.sequence.values.clone();
        let len = |id: ValueId| values.get(id).len(n);
        for step in self.sequence.steps.iter() {
            let uses = step.uses();
            let take = |id: &ValueId| (*id, self.buffers[id.index()].take());
            let mut taken: Vec<(ValueId, Option<Buffer>)> = uses.writes.iter().map(take).collect();
            let mut io = Io::new(n, Slopes::default(), &self.dropout);
            for &id in &uses.reads {
                let buffer = self.buffers[id.index()].as_ref();
                let buffer = buffer.unwrap_or_else(|| panic!("a step reads {id:?} while it writes it"));
                let view = buffer.view(0..len(id));
                let panels = &self.panels[id.index()][..];
                io.lend(id, if panels.is_empty() { view } else { View::Packed(view.host(), panels) });
            }
            for (id, buffer) in &mut taken {
                let buffer = buffer.as_mut().unwrap_or_else(|| panic!("a step writes {id:?} twice"));
                io.lend_mut(*id, buffer.view_mut(0..len(*id)));
            }
            step.run(&mut io);
            for (id, buffer) in taken {
                self.buffers[id.index()] = buffer;
            }
        }
    }
}
