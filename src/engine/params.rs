//! Parameters on the device: what is trained in one flat buffer, running statistics in another.

use std::ops::Range;

use crate::Result;
use crate::device::{Buffer, Device, View};
use crate::dtype::Dtype;
use crate::graph::ParamSpec;
use crate::model::Weights;
use crate::ops::add;
use crate::tensor::Tensor;

use super::plan::{BatchNormParams, ParamId};

/// Parameters, their gradients and where each lies.
#[derive(Debug)]
pub(super) struct Params {
    pub specs: Vec<ParamSpec>,
    /// Range of each parameter in its flat buffer.
    pub ranges: Vec<Range<usize>>,
    /// Trained parameters: index and range.
    pub trained: Vec<(ParamId, Range<usize>)>,
    pub values: Buffer,
    pub gradients: Buffer,
    pub running: Buffer,
    /// `values` in the type that kernels read, where it is another.
    copy: Option<Buffer>,
    /// Whether `values` changed since `copy` was made.
    stale: bool,
}

/// Elements to which parameters are aligned in their flat buffer, so that vectors of every type can be read.
const ALIGNMENT: usize = 16;

impl Params {
    pub fn new(device: &Device, specs: Vec<ParamSpec>, weights: &Weights, training: bool) -> Result<Self> {
        let (mut values_len, mut running_len) = (0, 0);
        let mut ranges = Vec::with_capacity(specs.len());
        let mut trained = Vec::new();
        for (id, spec) in specs.iter().enumerate() {
            let end = if spec.role.is_trained() { &mut values_len } else { &mut running_len };
            let range = *end..*end + spec.len();
            *end = range.end.next_multiple_of(ALIGNMENT);
            if spec.role.is_trained() {
                trained.push((id, range.clone()));
            }
            ranges.push(range);
        }
        let gradients = device.zeros(if training { values_len } else { 0 })?;
        let (values, running) = (device.zeros(values_len)?, device.zeros(running_len)?);
        let copy = match device.precision() {
            Dtype::F32 => None,
            _ => Some(device.activations(values_len)?),
        };
        let mut params = Self { specs, ranges, trained, values, gradients, running, copy, stale: true };
        params.load(weights)?;
        Ok(params)
    }

    /// Copies weights that fit the specs (checked by [`crate::model::Model::new`]).
    pub fn load(&mut self, weights: &Weights) -> Result<()> {
        let (mut values, mut running) = (vec![0.0; self.values.len()], vec![0.0; self.running.len()]);
        for (spec, range) in self.specs.iter().zip(&self.ranges) {
            let to = if spec.role.is_trained() { &mut values } else { &mut running };
            to[range.clone()].copy_from_slice(&weights[&spec.name].data);
        }
        self.stale = true;
        self.values.write(&values)?;
        self.running.write(&running)
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        [&self.values, &self.gradients, &self.running].into_iter().chain(&self.copy).map(Buffer::bytes).sum()
    }

    /// Brings the copy that kernels read up to date.
    pub fn refresh(&mut self) {
        if std::mem::take(&mut self.stale)
            && let Some(copy) = &mut self.copy
        {
            let len = self.values.len();
            add::backward(self.values.view(0..len), copy.view_mut(0..len), false);
        }
    }

    /// Weights, gradients and the copy, for an optimizer that writes all three.
    pub fn for_update(&mut self) -> (&mut Buffer, &Buffer, Option<&mut Buffer>) {
        (&mut self.values, &self.gradients, self.copy.as_mut())
    }

    /// Weights and gradients, for anyone who may change them.
    pub fn for_change(&mut self) -> (&mut Buffer, &mut Buffer) {
        self.stale = true;
        (&mut self.values, &mut self.gradients)
    }

    pub fn weights(&self) -> Result<Weights> {
        let (mut values, mut running) = (vec![0.0; self.values.len()], vec![0.0; self.running.len()]);
        self.values.read(&mut values)?;
        self.running.read(&mut running)?;
        let tensor = |(spec, range): (&ParamSpec, &Range<usize>)| {
            let from = if spec.role.is_trained() { &values } else { &running };
            (spec.name.clone(), Tensor { shape: spec.shape.clone(), data: from[range.clone()].to_vec() })
        };
        Ok(self.specs.iter().zip(&self.ranges).map(tensor).collect())
    }

    pub fn range(&self, id: ParamId) -> Range<usize> {
        self.ranges[id].clone()
    }

    /// The weights of a convolution or a linear layer, in the type of activations.
    pub fn weight(&self, id: ParamId) -> View<'_> {
        self.copy.as_ref().unwrap_or(&self.values).view(self.range(id))
    }

    /// A trained parameter, in `f32`.
    pub fn value(&self, id: ParamId) -> View<'_> {
        self.values.view(self.range(id))
    }

    /// A running statistic.
    pub fn statistic(&self, id: ParamId) -> View<'_> {
        self.running.view(self.range(id))
    }
}

impl BatchNormParams {
    /// Ranges of running mean and variance.
    pub(super) fn running(&self, ranges: &[Range<usize>]) -> [Range<usize>; 2] {
        [ranges[self.mean].clone(), ranges[self.var].clone()]
    }

    /// Ranges of γ and β.
    pub(super) fn affine(&self, ranges: &[Range<usize>]) -> [Range<usize>; 2] {
        [ranges[self.gamma].clone(), ranges[self.beta].clone()]
    }
}
