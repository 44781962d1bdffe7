//! `elementwise.cu` and `dropout.cu`.

use super::{Call, configured, long};
use crate::device::argument::Element;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::config::{KernelFamily, KernelPass, WalkProblem, resolve};

/// Bytes to which operands must be aligned that are read by vectors.
const VECTOR_BYTES: u64 = 16;

fn walk(len: usize, addresses: &[u64]) -> WalkProblem {
    let aligned = addresses.iter().all(|address| address.is_multiple_of(VECTOR_BYTES));
    WalkProblem { family: KernelFamily::Elementwise, len, aligned }
}

/// to = from, converted where the types differ.
pub fn cast(from: GpuView<'_>, to: &GpuViewMut<'_>) {
    let (x, y, n) = (from.dtype(), to.view().dtype(), from.len());
    let problem = walk(n, &[from.address(), to.view().address()]);
    // Blocks as for floats, which one side of a conversion is in.
    let config = match resolve(&problem, KernelPass::Forward, from.gpu(), Dtype::F32) {
        Ok(config) => config,
        Err(error) => return from.gpu().fail(error),
    };
    Call::new(from.gpu(), format!("cast<{}, {}, {}>", y.kernel_name(), x.kernel_name(), config.vector))
        .reads("what is converted", from, n)
        .writes("the result", to, n)
        .value(long(n))
        .launch(config.grid());
}

/// z = a + b.
pub fn add(a: GpuView<'_>, b: GpuView<'_>, z: &GpuViewMut<'_>) {
    let problem = walk(a.len(), &[a.address(), b.address(), z.view().address()]);
    let Some(config) = configured(&problem, KernelPass::Forward, a) else { return };
    Call::new(a.gpu(), format!("add<{}, {}>", a.dtype().kernel_name(), config.vector))
        .reads("a", a, a.len())
        .reads("b", b, a.len())
        .writes("the sum", z, a.len())
        .value(long(a.len()))
        .launch(config.grid());
}

/// a += b.
pub fn accumulate(a: &GpuViewMut<'_>, b: GpuView<'_>) {
    let problem = walk(b.len(), &[a.view().address(), b.address()]);
    let Some(config) = configured(&problem, KernelPass::Forward, b) else { return };
    Call::new(b.gpu(), format!("accumulate<{}, {}>", b.dtype().kernel_name(), config.vector))
        .writes("the sum", a, b.len())
        .reads("b", b, b.len())
        .value(long(b.len()))
        .launch(config.grid());
}

/// y (+)= x·mask/(1 − p).
pub fn dropout(p: f32, stream: GpuView<'_>, x: GpuView<'_>, y: &GpuViewMut<'_>, accumulate: bool) {
    let problem = WalkProblem { family: KernelFamily::Dropout, len: x.len(), aligned: true };
    let Some(config) = configured(&problem, KernelPass::Forward, x) else { return };
    // The share of 2^32 below which an element is dropped.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    Call::new(x.gpu(), format!("dropout<{}>", x.dtype().kernel_name()))
        .reads("x", x, x.len())
        .writes("y", y, x.len())
        .value(1.0 / (1.0 - p))
        .value(threshold)
        .reads_memory("the stream", stream, Element::U64, 1)
        .value(i32::from(accumulate))
        .value(long(x.len()))
        .launch(config.grid());
}
