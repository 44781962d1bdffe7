//! Parameters on the device: what is trained in one flat buffer, running statistics in another.

use std::ops::Range;

use crate::device::{Buffer, Device, View};
use crate::dtype::Dtype;
use crate::graph::ParamSpec;
use crate::model::{Model, Weights};
use crate::ops::copy::copy;
use crate::ops::packing::Packing;
use crate::ops::step::{ParamId, Place};
use crate::tensor::Tensor;
use crate::{Result, memory};

use super::plan::Plan;

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
    /// Weights as the host's products read them, where they are read more often than they change: not in training.
    panels: Vec<f32>,
    /// How each parameter is packed there, and where.
    packed: Vec<Option<(Packing, Range<usize>)>>,
    /// Whether `values` changed since `copy` and `panels` were made.
    stale: bool,
}

/// Elements to which parameters are aligned in their flat buffer, so that vectors of every type can be read.
const ALIGNMENT: usize = 16;

impl Params {
    pub fn new(device: &Device, model: &Model, plan: &Plan) -> Result<Self> {
        let (specs, training) = (model.graph.params()?, plan.target.training);
        let (mut values_len, mut running_len) = (0, 0);
        let mut ranges = Vec::with_capacity(specs.len());
        let mut trained = Vec::new();
        for (id, spec) in ParamId::enumerate(&specs) {
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
        let mut packed = vec![None; specs.len()];
        let mut end: usize = 0;
        let is_packed = *device == Device::Cpu && !training;
        for (value, packing) in plan.steps.iter().filter(|_| is_packed).flat_map(|step| step.step.packed()) {
            if let Place::Weight(id) = plan.values.get(value).place {
                packed[id.index()].get_or_insert_with(|| {
                    let start = end;
                    end = (start + packing.elements()).next_multiple_of(ALIGNMENT);
                    (packing, start..start + packing.elements())
                });
            }
        }
        let panels = memory::zeros(end, "packed weights")?;
        let mut params = Self { specs, ranges, trained, values, gradients, running, copy, panels, packed, stale: true };
        params.load(&model.weights)?;
        Ok(params)
    }

    /// Copies weights that fit the specs (checked by [`crate::model::Model::new`]).
    pub fn load(&mut self, weights: &Weights) -> Result<()> {
        let (mut values, mut running) = self.copies()?;
        for (spec, range) in self.specs.iter().zip(&self.ranges) {
            let to = if spec.role.is_trained() { &mut values } else { &mut running };
            to[range.clone()].copy_from_slice(&weights[&spec.name].data);
        }
        self.stale = true;
        self.values.write(&values)?;
        self.running.write(&running)
    }

    /// Zeros for a copy of trained parameters and of running statistics.
    fn copies(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let zeros = |buffer: &Buffer| memory::zeros(buffer.len(), "a copy of the parameters");
        Ok((zeros(&self.values)?, zeros(&self.running)?))
    }

    /// Elements of the trained parameters.
    pub fn trained_elements(&self) -> usize {
        self.values.len()
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        let panels = size_of_val(&self.panels[..]) as u64;
        let flat = [&self.values, &self.gradients, &self.running].into_iter().chain(&self.copy);
        panels + flat.map(Buffer::bytes).sum::<u64>()
    }

    /// Brings the copies that kernels read up to date.
    pub fn refresh(&mut self) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let len = self.values.len();
        if let Some(own) = &mut self.copy {
            copy(self.values.view(0..len), own.view_mut(0..len));
        }
        for (packed, range) in self.packed.iter().zip(&self.ranges) {
            if let Some((packing, to)) = packed {
                packing.pack(self.values.view(range.clone()).host(), &mut self.panels[to.clone()]);
            }
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
        let (mut values, mut running) = self.copies()?;
        self.values.read(&mut values)?;
        self.running.read(&mut running)?;
        let tensor = |(spec, range): (&ParamSpec, &Range<usize>)| {
            let from = if spec.role.is_trained() { &values } else { &running };
            let data = memory::copy(&from[range.clone()], "a copy of the parameters")?;
            Ok((spec.name.clone(), Tensor { shape: spec.shape.clone(), data }))
        };
        self.specs.iter().zip(&self.ranges).map(tensor).collect()
    }

    pub fn range(&self, id: ParamId) -> Range<usize> {
        self.ranges[id].clone()
    }

    /// A parameter or a running statistic, to be read.
    pub fn read(&self, place: Place) -> View<'_> {
        self.readable().view(place).unwrap_or_else(|| match place {
            Place::Running(id) => self.running.view(self.range(id)),
            other => panic!("{other:?} is no parameter that a step reads"),
        })
    }

    fn readable(&self) -> Readable<'_> {
        let Self { ranges, values, copy, panels, packed, .. } = self;
        Readable { ranges, values, copy: copy.as_ref(), panels, packed }
    }

    /// What is read, and apart from it what is written.
    pub fn parts(&mut self) -> Parts<'_> {
        let Self { ranges, values, copy, panels, packed, running, gradients, .. } = self;
        Parts { read: Readable { ranges, values, copy: copy.as_ref(), panels, packed }, running, gradients }
    }
}

/// Trained parameters, to be read.
#[derive(Clone, Copy)]
struct Readable<'a> {
    ranges: &'a [Range<usize>],
    values: &'a Buffer,
    copy: Option<&'a Buffer>,
    panels: &'a [f32],
    packed: &'a [Option<(Packing, Range<usize>)>],
}

impl<'a> Readable<'a> {
    fn view(self, place: Place) -> Option<View<'a>> {
        match place {
            Place::Param(id) => Some(self.values.view(self.ranges[id].clone())),
            Place::Weight(id) => {
                let weights = self.copy.unwrap_or(self.values).view(self.ranges[id].clone());
                Some(match &self.packed[id.index()] {
                    Some((_, range)) => View::Packed(weights.host(), &self.panels[range.clone()]),
                    None => weights,
                })
            }
            _ => None,
        }
    }
}

/// Parameters during a training pass.
pub(super) struct Parts<'a> {
    read: Readable<'a>,
    pub running: &'a mut Buffer,
    pub gradients: &'a mut Buffer,
}

impl<'a> Parts<'a> {
    /// A trained parameter, to be read.
    pub fn read(&self, place: Place) -> View<'a> {
        self.read.view(place).unwrap_or_else(|| panic!("{place:?} is no parameter that a training step reads"))
    }
}
