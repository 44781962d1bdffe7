//! Dropout whose mask is a function of (seed, step, element), so that nothing needs saving and a resumed run repeats it.

use serde::{Deserialize, Serialize};

use super::copy::CopyStep;
use super::cuda;
use super::operation::{LoweredNode, Operation, bad, require};
use super::random::mix;
use super::step::{Backward, Io, Sink, Step, Uses, ValueId, Work};
use crate::Result;
use crate::device::float_mode::flush_subnormals;
use crate::device::gpu::GpuBuffer;
use crate::device::{Device, View, ViewMut};
use crate::dtype::Dtype;
use crate::shape::Shape;

/// The stream of random numbers of a step. A GPU keeps it in its memory, where work that was recorded reads it anew.
#[derive(Debug)]
pub struct DropoutStream {
    stream: u64,
    gpu: Option<GpuBuffer>,
}

impl DropoutStream {
    /// The stream of seed 0 and step 0.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &Device) -> Result<Self> {
        let gpu = match device {
            Device::Cpu => None,
            Device::Gpu(gpu, _) => Some(GpuBuffer::input(gpu, Dtype::F32, size_of::<u64>() / size_of::<f32>())?),
        };
        let mut new = Self { stream: 0, gpu };
        new.set(0, 0)?;
        Ok(new)
    }

    /// Goes to a step of a seed.
    ///
    /// # Errors
    /// When the device fails.
    pub fn set(&mut self, seed: u64, step: u64) -> Result<()> {
        self.stream = mix(seed ^ mix(step));
        self.gpu.as_mut().map_or(Ok(()), |at| at.write_bytes(&self.stream.to_ne_bytes()))
    }
}

/// y (+)= x·mask/(1 − p), and likewise the gradient: dx (+)= dy·mask/(1 − p).
pub fn apply(p: f32, from: &DropoutStream, x: View<'_>, y: ViewMut<'_>, accumulate: bool) {
    require("dropout", [("y", y.len(), x.len())]);
    if let View::Gpu(x) = x {
        let stream = from.gpu.as_ref().expect("a stream of the operands' device");
        return cuda::elementwise::dropout(p, stream.view(0..stream.len()), x, &y.gpu(), accumulate);
    }
    let (x, y) = (x.host(), y.host());
    let scale = 1.0 / (1.0 - p);
    let stream = from.stream;
    // The share of 2^32 below which an element is dropped.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    flush_subnormals(|| {
        for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
            let kept = mix(stream.wrapping_add(i as u64)) >> 32 >= threshold;
            let value = if kept { x * scale } else { 0.0 };
            *y = if accumulate { *y + value } else { value };
        }
    });
}

/// Dropout in a training plan; its gradient is the same with the gradients.
#[derive(Debug)]
pub struct DropoutStep {
    /// Probability of a zero.
    pub p: f32,
    /// Elements per image.
    pub len: usize,
    /// Input.
    pub x: ValueId,
    /// Output.
    pub y: Sink,
}

impl Step for DropoutStep {
    fn describe(&self) -> String {
        "dropout".into()
    }

    fn uses(&self) -> Uses {
        Uses::new([self.x], []).with([self.y])
    }

    fn work(&self) -> Work {
        Work::vector(2 * self.len as u64)
    }

    fn run(&self, io: &mut Io<'_>) {
        let (y, add) = io.write_into(self.y);
        apply(self.p, io.dropout(), io.read(self.x), y, add);
    }

    fn gradient(&self, to: &mut dyn Backward) {
        let (Some(x), Some(y)) = (to.stored(self.y.value), to.sink(self.x)) else { return };
        to.push(Box::new(Self { p: self.p, len: self.len, x, y }));
    }
}

/// Zeroes features with probability `p` while training, scaling the rest; the identity at inference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropout {
    /// Probability of a zero.
    pub p: f32,
}

impl Operation for Dropout {
    fn output_shape(&self, name: &str, inputs: &[Shape]) -> Result<Shape> {
        if (0.0..1.0).contains(&self.p) { Ok(inputs[0]) } else { bad(name, "dropout needs a probability in 0..1") }
    }

    fn describe(&self) -> String {
        format!("dropout {}", self.p)
    }

    fn lower(&self, node: &mut dyn LoweredNode) -> Result<Vec<Box<dyn Step>>> {
        let (len, x) = (node.output_shape().len(), node.input(0));
        let y = Sink { value: node.output(), add: false };
        Ok(match node.training() {
            true => vec![Box::new(DropoutStep { p: self.p, len, x, y })],
            false => vec![Box::new(CopyStep { from: x, to: y, len })],
        })
    }
}
