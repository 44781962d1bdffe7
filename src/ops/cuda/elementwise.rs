//! `elementwise.cu` and `dropout.cu`.

use super::{grid, long, vector_len};
use crate::device::driver::{Argument, LaunchShape};
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::dtype::Dtype;

/// Blocks that give every thread a few vectors.
fn shape(dtype: Dtype, n: usize) -> LaunchShape {
    grid(n.div_ceil(256 * 4 * vector_len(dtype)).clamp(1, 4096), 1, 1)
}

/// Whether all addresses allow 16-byte accesses.
fn aligned(addresses: &[u64]) -> bool {
    addresses.iter().all(|address| address.is_multiple_of(16))
}

/// to = from, converted where the types differ.
pub fn cast(from: GpuView<'_>, to: &GpuViewMut<'_>) {
    let (x, y) = (from.dtype(), to.view().dtype());
    let vector = aligned(&[from.address(), to.view().address()]);
    let name = format!("cast<{}, {}, {vector}>", y.kernel_name(), x.kernel_name());
    let arguments = [from.into(), to.into(), long(from.len()).into()];
    // SAFETY: arguments as the kernel's header says; both have one length.
    unsafe { from.gpu().launch(&name, shape(Dtype::F32, from.len()), &arguments) }
}

/// z = a + b.
pub fn add(a: GpuView<'_>, b: GpuView<'_>, z: &GpuViewMut<'_>) {
    let vector = aligned(&[a.address(), b.address(), z.view().address()]);
    let name = format!("add<{}, {vector}>", a.dtype().kernel_name());
    let arguments = [a.into(), b.into(), z.into(), long(a.len()).into()];
    // SAFETY: arguments as the kernel's header says; all have one length.
    unsafe { a.gpu().launch(&name, shape(a.dtype(), a.len()), &arguments) }
}

/// a += b.
pub fn accumulate(a: &GpuViewMut<'_>, b: GpuView<'_>) {
    let vector = aligned(&[a.view().address(), b.address()]);
    let name = format!("accumulate<{}, {vector}>", b.dtype().kernel_name());
    // SAFETY: arguments as the kernel's header says; both have one length.
    unsafe { b.gpu().launch(&name, shape(b.dtype(), b.len()), &[a.into(), b.into(), long(b.len()).into()]) }
}

/// y (+)= x·mask/(1 − p).
pub fn dropout(p: f32, stream: GpuView<'_>, x: GpuView<'_>, y: &GpuViewMut<'_>, accumulate: bool) {
    let n = x.len();
    let name = format!("dropout<{}>", x.dtype().kernel_name());
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    let arguments: [Argument; 7] = [
        x.into(),
        y.into(),
        (1.0 / (1.0 - p)).into(),
        threshold.into(),
        stream.into(),
        i32::from(accumulate).into(),
        long(n).into(),
    ];
    let blocks = n.div_ceil(256 * vector_len(x.dtype()));
    // SAFETY: arguments as the kernel's header says; `stream` holds a u64.
    unsafe { x.gpu().launch(&name, grid(blocks, 1, 1), &arguments) }
}
