//! Parameters on the device: what is trained in one flat buffer, running statistics in another.

use std::ops::Range;

use crate::Result;
use crate::device::{Buffer, Device, View};
use crate::graph::ParamSpec;
use crate::model::Weights;
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
}

impl Params {
    pub fn new(device: &Device, specs: Vec<ParamSpec>, weights: &Weights, training: bool) -> Result<Self> {
        let (mut values_len, mut running_len) = (0, 0);
        let mut ranges = Vec::with_capacity(specs.len());
        let mut trained = Vec::new();
        for (id, spec) in specs.iter().enumerate() {
            let end = if spec.role.is_trained() { &mut values_len } else { &mut running_len };
            let range = *end..*end + spec.len();
            *end = range.end;
            if spec.role.is_trained() {
                trained.push((id, range.clone()));
            }
            ranges.push(range);
        }
        let gradients = device.zeros(if training { values_len } else { 0 })?;
        let (values, running) = (device.zeros(values_len)?, device.zeros(running_len)?);
        let mut params = Self { specs, ranges, trained, values, gradients, running };
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
        self.values.write(&values)?;
        self.running.write(&running)
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

    /// A trained parameter.
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
