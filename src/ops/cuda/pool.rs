//! `pool.cu`.

use super::conv::geometry;
use super::{Tiles, grid, int};
use crate::device::driver::ConvGeometry;
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::ops::conv::ConvProblem;
use crate::ops::pool::PoolProblem;

/// y `[n, c]` = mean over pixels of x `[n, pixels, c]`.
pub fn forward((n, pixels, c): (usize, usize, usize), x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let (vector, tiles) = Tiles::of(x.dtype(), c);
    let name = format!("global_pool_forward<{}, {vector}>", x.dtype().kernel_name());
    let arguments = [x.into(), y.into(), int(pixels).into(), int(c).into(), int(tiles.lanes).into()];
    // SAFETY: arguments as the kernel's header says.
    unsafe { x.gpu().launch(&name, grid(tiles.tiles, n, 1), &arguments) }
}

/// dx (+)= dy / pixels.
pub fn backward((n, pixels, c): (usize, usize, usize), dy: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let (vector, tiles) = Tiles::of(dy.dtype(), c);
    let name = format!("global_pool_backward<{}, {vector}>", dy.dtype().kernel_name());
    let sizes = [int(pixels), int(c), int(tiles.lanes)];
    let flag = i32::from(accumulate).into();
    let arguments = [dy.into(), dx.into(), flag, sizes[0].into(), sizes[1].into(), sizes[2].into()];
    // SAFETY: arguments as the kernel's header says.
    unsafe { dy.gpu().launch(&name, grid(tiles.tiles, n, 1), &arguments) }
}

/// y `[n, h_out, w_out, c]` = the largest of each window of x `[n, h_in, w_in, c]`.
pub fn max_forward(p: &PoolProblem, x: GpuView<'_>, y: &GpuViewMut<'_>) {
    let (vector, tiles) = Tiles::of(x.dtype(), p.input.c);
    let name = format!("max_pool_forward<{}, {vector}>", x.dtype().kernel_name());
    let arguments = [x.into(), y.into(), window(p).into(), int(tiles.lanes).into()];
    let shape = grid(p.output.pixels().div_ceil(tiles.rows), tiles.tiles, p.n);
    // SAFETY: arguments as the kernel's header says.
    unsafe { x.gpu().launch(&name, shape, &arguments) }
}

/// dx (+)= the gradients of the windows that a pixel won.
pub fn max_backward(p: &PoolProblem, (x, dy): (GpuView<'_>, GpuView<'_>), dx: &GpuViewMut<'_>, accumulate: bool) {
    let (vector, tiles) = Tiles::of(x.dtype(), p.input.c);
    let name = format!("max_pool_backward<{}, {vector}>", x.dtype().kernel_name());
    let flag = i32::from(accumulate).into();
    let arguments = [x.into(), dy.into(), dx.into(), flag, window(p).into(), int(tiles.lanes).into()];
    let shape = grid(p.input.pixels().div_ceil(tiles.rows), tiles.tiles, p.n);
    // SAFETY: arguments as the kernel's header says.
    unsafe { x.gpu().launch(&name, shape, &arguments) }
}

/// A pool slides as a depthwise convolution does.
fn window(p: &PoolProblem) -> ConvGeometry {
    geometry(&ConvProblem { n: p.n, input: p.input, output: p.output, window: p.window, groups: p.input.c })
}
