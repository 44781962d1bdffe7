//! `pool.cu`.

use super::{Tiles, grid, int};
use crate::device::gpu::{GpuView, GpuViewMut};

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
