//! Convolutions and fully connected layers: `pointwise.cu`, `dense.cu`, `depthwise.cu`, `conv_reduce.cu`.

use super::{Tiles, blocks, grid, int, long, vectors};
use crate::device::driver::{Argument, ConvGeometry};
use crate::device::gpu::{GpuView, GpuViewMut};
use crate::dtype::Dtype;
use crate::ops::activation::{Act, Clamp};
use crate::ops::conv::{ConvFamily, ConvProblem};

/// What is added to the sums of a forward pass, and the activation after it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Epilogue<'a> {
    /// Bias, and how many pixels it tells apart: 1, or h·w for a map.
    pub bias: Option<(GpuView<'a>, usize)>,
    /// Added after the bias.
    pub residual: Option<GpuView<'a>>,
    /// Applied last.
    pub act: Option<Act<'a>>,
}

impl Epilogue<'_> {
    fn arguments(&self) -> [Argument; 5] {
        let [limit, slope] = self.act.unwrap_or(Clamp::NONE.into()).fixed_arguments();
        let (bias, bias_pixels) = (self.bias.map(|b| b.0).into(), int(self.bias.map_or(1, |b| b.1)).into());
        [bias, bias_pixels, self.residual.into(), limit, slope]
    }
}

/// y = φ(conv(x, w) + bias + residual).
pub fn forward(p: &ConvProblem, x: GpuView<'_>, w: GpuView<'_>, epilogue: Epilogue<'_>, y: &GpuViewMut<'_>) {
    let t = x.dtype();
    let pixels = p.n * p.output.pixels();
    match p.family() {
        ConvFamily::Pointwise => product_forward((pixels, p.input.c, p.output.c), x, w, epilogue, y),
        ConvFamily::Dense => {
            let (c_in, c_out) = (p.input.c / p.groups, p.output.c / p.groups);
            let tile = Tile::choose(t, c_in, c_out, pixels, c_out);
            let [bias, bias_pixels, residual, limit, slope] = epilogue.arguments();
            let name = tile.instance("dense_forward", t);
            let arguments =
                [x.into(), w.into(), bias, bias_pixels, residual, limit, slope, y.into(), geometry(p).into()];
            // SAFETY: arguments as the kernel's header says; views cover the problem (checked by the caller's planner).
            unsafe { x.gpu().launch(&name, tile.launch(pixels, c_out, 1, p.groups), &arguments) }
        }
        ConvFamily::Depthwise => {
            let [bias, bias_pixels, residual, limit, slope] = epilogue.arguments();
            let head = [x.into(), w.into(), bias, bias_pixels, residual, limit, slope, y.into()];
            depthwise_forward(p, geometry(p), false, &head, x);
        }
    }
}

/// y `[m, c_out]` = φ(x·Wᵀ + bias + residual).
pub fn product_forward(
    (m, c_in, c_out): (usize, usize, usize),
    x: GpuView<'_>,
    w: GpuView<'_>,
    epilogue: Epilogue<'_>,
    y: &GpuViewMut<'_>,
) {
    let tile = Tile::choose(x.dtype(), c_in, c_out, m, c_out);
    let name = tile.instance("pointwise_forward", x.dtype());
    let [bias, bias_pixels, residual, limit, slope] = epilogue.arguments();
    let sizes = [int(m).into(), int(c_in).into(), int(c_out).into()];
    let arguments =
        [x.into(), w.into(), bias, bias_pixels, residual, limit, slope, y.into(), sizes[0], sizes[1], sizes[2]];
    // SAFETY: as in `forward`.
    unsafe { x.gpu().launch(&name, tile.launch(m, c_out, 1, 1), &arguments) }
}

/// dx (+)= the input gradient.
pub fn input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let t = dy.dtype();
    match p.family() {
        ConvFamily::Pointwise => {
            product_input_gradient((p.n * p.output.pixels(), p.input.c, p.output.c), dy, w, dx, accumulate);
        }
        ConvFamily::Dense => {
            let (c_in, c_out) = (p.input.c / p.groups, p.output.c / p.groups);
            let (s_h, s_w) = (p.window.stride_h, p.window.stride_w);
            let m = p.n * p.input.h.div_ceil(s_h) * p.input.w.div_ceil(s_w);
            let tile = Tile::choose(t, c_in, c_out, m, c_in);
            let name = tile.instance("dense_dgrad", t);
            let arguments = [dy.into(), w.into(), dx.into(), i32::from(accumulate).into(), geometry(p).into()];
            // SAFETY: as in `forward`.
            unsafe { dy.gpu().launch(&name, tile.launch(m, c_in, s_h * s_w, p.groups), &arguments) }
        }
        ConvFamily::Depthwise => depthwise_input_gradient(p, dy, w, dx, accumulate),
    }
}

/// dx `[m, c_in]` (+)= dy·W.
pub fn product_input_gradient(
    (m, c_in, c_out): (usize, usize, usize),
    dy: GpuView<'_>,
    w: GpuView<'_>,
    dx: &GpuViewMut<'_>,
    accumulate: bool,
) {
    let tile = Tile::choose(dy.dtype(), c_in, c_out, m, c_in);
    let name = tile.instance("pointwise_dgrad", dy.dtype());
    let flag = i32::from(accumulate).into();
    let arguments = [dy.into(), w.into(), dx.into(), flag, int(m).into(), int(c_in).into(), int(c_out).into()];
    // SAFETY: as in `forward`.
    unsafe { dy.gpu().launch(&name, tile.launch(m, c_in, 1, 1), &arguments) }
}

/// dw = the weight gradient, in `f32`.
pub fn weight_gradient(p: &ConvProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    let t = x.dtype();
    let pixels = p.n * p.output.pixels();
    match p.family() {
        ConvFamily::Pointwise => product_weight_gradient((pixels, p.input.c, p.output.c), x, dy, dw),
        ConvFamily::Dense => {
            let (c_in, c_out) = (p.input.c / p.groups, p.output.c / p.groups);
            let n = p.window.taps() * c_in;
            let tile = Tile::of_weights(t, c_in, c_out, n);
            let (slab, slabs) = tile.slabs(pixels, tile.count(c_out, n) * p.groups);
            let shape = tile.launch(c_out, n, slabs, p.groups);
            in_slabs(x, slabs, dw, |partials| {
                let arguments = [x.into(), dy.into(), partials, int(slab).into(), geometry(p).into()];
                // SAFETY: as in `forward`; the partial sums have room for every slab.
                unsafe { x.gpu().launch(&tile.instance("dense_wgrad", t), shape, &arguments) }
            });
        }
        ConvFamily::Depthwise => depthwise_weight_gradient(p, x, dy, dw),
    }
}

/// dw `[c_out, c_in]` = dyᵀ·x over `m` rows.
pub fn product_weight_gradient(
    (m, c_in, c_out): (usize, usize, usize),
    x: GpuView<'_>,
    dy: GpuView<'_>,
    dw: &GpuViewMut<'_>,
) {
    let tile = Tile::of_weights(x.dtype(), c_in, c_out, c_in);
    let (slab, slabs) = tile.slabs(m, tile.count(c_out, c_in));
    in_slabs(x, slabs, dw, |partials| {
        let sizes = [int(slab), int(m), int(c_in), int(c_out)].map(Argument::from);
        let arguments = [x.into(), dy.into(), partials, sizes[0], sizes[1], sizes[2], sizes[3]];
        let name = tile.instance("pointwise_wgrad", x.dtype());
        // SAFETY: as in `forward`; the partial sums have room for every slab.
        unsafe { x.gpu().launch(&name, tile.launch(c_out, c_in, slabs, 1), &arguments) }
    });
}

/// db `[c]` = Σ dy over `m` pixels.
pub fn bias_gradient((m, c): (usize, usize), dy: GpuView<'_>, db: &GpuViewMut<'_>) {
    let (vector, tiles) = Tiles::of(dy.dtype(), c);
    let slab = m.div_ceil(512).max(256);
    let slabs = m.div_ceil(slab);
    let name = format!("bias_gradient<{}, {vector}>", dy.dtype().kernel_name());
    in_slabs(dy, slabs, db, |partials| {
        let sizes = [int(slab), int(m), int(c), int(tiles.lanes)].map(Argument::from);
        let arguments = [dy.into(), partials, sizes[0], sizes[1], sizes[2], sizes[3]];
        // SAFETY: as in `forward`; the partial sums have room for every slab.
        unsafe { dy.gpu().launch(&name, grid(tiles.tiles, slabs, 1), &arguments) }
    });
}

/// db `[h, w, c]` = Σ dy over images.
pub fn bias_map_gradient((n, len): (usize, usize), dy: GpuView<'_>, db: &GpuViewMut<'_>) {
    sum_slabs(dy.dtype(), dy.into(), db, (n, len), dy);
}

/// Runs a first stage that writes partial sums `[slabs, out]`, then adds them; with one slab it writes `out` itself.
fn in_slabs(of: GpuView<'_>, slabs: usize, out: &GpuViewMut<'_>, first: impl FnOnce(Argument)) {
    let len = out.view().len();
    if slabs == 1 {
        return first(out.into());
    }
    let partials = Argument::from(of.gpu().workspace(slabs * len));
    first(partials);
    sum_slabs(Dtype::F32, partials, out, (slabs, len), of);
}

fn sum_slabs(t: Dtype, partials: Argument, out: &GpuViewMut<'_>, (slabs, len): (usize, usize), of: GpuView<'_>) {
    let name = format!("sum_slabs<{}>", t.kernel_name());
    let arguments = [partials, out.into(), int(slabs).into(), long(len).into()];
    // SAFETY: `partials` holds `slabs` runs of `len`, and `out` one.
    unsafe { of.gpu().launch(&name, grid(len.div_ceil(32), 1, 1), &arguments) }
}

/// Multiprocessors of a large GPU, about. A constant, so that a problem is launched alike on every GPU.
const MULTIPROCESSORS: usize = 128;

/// The tile of a matrix product.
#[derive(Debug, Clone, Copy)]
struct Tile {
    m: usize,
    n: usize,
    vector: bool,
}

impl Tile {
    /// The tile that serves every type.
    fn small(t: Dtype, c_in: usize, c_out: usize) -> Self {
        Self { m: 64, n: 64, vector: vectors(t, c_in) && vectors(t, c_out) }
    }

    /// A tile for a result of `m` × `n`: large where it is filled and there are enough of them for every multiprocessor,
    /// narrow where there are few columns.
    fn choose(t: Dtype, c_in: usize, c_out: usize, m: usize, n: usize) -> Self {
        let small = Self::small(t, c_in, c_out);
        let large = Self { m: 128, n: 128, ..small };
        match t != Dtype::F32 && small.vector {
            true if m >= 128 && n <= 32 => Self { m: 128, n: 32, ..small },
            true if n > 64 && large.is_filled(m, n) && large.count(m, n) >= MULTIPROCESSORS => large,
            _ => small,
        }
    }

    /// A tile for a weight gradient of `c_out` × `n`, whose slabs make as many blocks as are wanted.
    fn of_weights(t: Dtype, c_in: usize, c_out: usize, n: usize) -> Self {
        let small = Self::small(t, c_in, c_out);
        let large = Self { m: 128, n: 128, ..small };
        let fits = t != Dtype::F32 && small.vector && c_out >= 128 && n >= 128 && large.is_filled(c_out, n);
        if fits { large } else { small }
    }

    /// Whether tiles of this size compute at most a quarter more than those of 64 × 64 to cover `m` × `n`.
    fn is_filled(&self, m: usize, n: usize) -> bool {
        let covered = |tile_m, tile_n| m.next_multiple_of(tile_m) * n.next_multiple_of(tile_n);
        4 * covered(self.m, self.n) <= 5 * covered(64, 64)
    }

    fn count(&self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m) * n.div_ceil(self.n)
    }

    fn launch(&self, m: usize, n: usize, y: usize, z: usize) -> crate::device::driver::LaunchShape {
        blocks([self.count(m, n), y, z], if self.m * self.n == 128 * 128 { 256 } else { 128 })
    }

    /// Pixels per slab of a weight gradient over `tiles` tiles, and slabs: enough blocks to fill a GPU, of which it runs
    /// fewer at a time of the large ones, and no more, since the partial sums of every slab are written and read.
    fn slabs(&self, pixels: usize, tiles: usize) -> (usize, usize) {
        let blocks = if self.m * self.n == 128 * 128 { 160 } else { 512 };
        let splits = (blocks / tiles).clamp(1, (pixels / 256).max(1));
        let slab = pixels.div_ceil(splits).next_multiple_of(32);
        (slab, pixels.div_ceil(slab))
    }

    fn instance(&self, kernel: &str, t: Dtype) -> String {
        format!("{kernel}<{}, {}, {}, {}>", t.kernel_name(), self.m, self.n, self.vector)
    }
}

pub(super) fn geometry(p: &ConvProblem) -> ConvGeometry {
    ConvGeometry {
        n: int(p.n),
        h_in: int(p.input.h),
        w_in: int(p.input.w),
        c_in: int(p.input.c),
        h_out: int(p.output.h),
        w_out: int(p.output.w),
        c_out: int(p.output.c),
        k_h: int(p.window.k_h),
        k_w: int(p.window.k_w),
        stride_h: int(p.window.stride_h),
        stride_w: int(p.window.stride_w),
        pad_top: int(p.window.pad.top),
        pad_left: int(p.window.pad.left),
        groups: int(p.groups),
    }
}

/// The kernel size and stride that the fast depthwise kernels are made for.
fn specialised(p: &ConvProblem) -> Option<(usize, usize)> {
    let w = p.window;
    let square = w.k_h == w.k_w && w.stride_h == w.stride_w;
    let made = [3, 5, 7].contains(&w.k_h) && [1, 2].contains(&w.stride_h) && p.input.c.is_multiple_of(2);
    (square && made).then_some((w.k_h, w.stride_h))
}

/// How far a thread of the fast kernels marches down `h` rows.
fn march(h: usize) -> usize {
    h.div_ceil(h.div_ceil(16))
}

/// Strips of two columns that cover images of `h` × `w`.
fn strips(n: usize, h: usize, w: usize) -> usize {
    n * h.div_ceil(march(h)) * w.div_ceil(2)
}

/// `head` is the arguments before the geometry.
fn depthwise_forward(p: &ConvProblem, g: ConvGeometry, flipped: bool, head: &[Argument], of: GpuView<'_>) {
    let t = of.dtype().kernel_name();
    let c = p.input.c;
    let mut arguments = head.to_vec();
    let (name, shape) = match specialised(p) {
        Some((k, stride)) => {
            let tiles = Tiles::new(c, 2);
            let (h, w) = (g.h_out as usize, g.w_out as usize);
            arguments.push(g.into());
            arguments.extend([int(march(h)), int(tiles.lanes), i32::from(flipped)].map(Argument::from));
            (format!("depthwise_forward<{t}, {k}, {stride}>"), tiles.tiles * strips(p.n, h, w).div_ceil(tiles.rows))
        }
        None => {
            let tiles = Tiles::new(c, 1);
            arguments.extend([Argument::from(g), int(tiles.lanes).into()]);
            let pixels = p.n * p.output.pixels();
            (format!("depthwise_forward_any<{t}>"), tiles.tiles * pixels.div_ceil(tiles.rows))
        }
    };
    // SAFETY: as in `forward`.
    unsafe { of.gpu().launch(&name, grid(shape, 1, 1), &arguments) }
}

fn depthwise_input_gradient(p: &ConvProblem, dy: GpuView<'_>, w: GpuView<'_>, dx: &GpuViewMut<'_>, accumulate: bool) {
    let t = dy.dtype().kernel_name();
    let (c, pad) = (p.input.c, p.window.pad);
    let flag = i32::from(accumulate);
    let (name, shape, arguments): (String, usize, Vec<Argument>) = match specialised(p) {
        Some((k, 1)) => {
            // The same convolution with the flipped filter.
            let g = geometry(p);
            let g = ConvGeometry {
                h_in: g.h_out,
                w_in: g.w_out,
                h_out: g.h_in,
                w_out: g.w_in,
                pad_top: k as i32 - 1 - g.pad_top,
                pad_left: k as i32 - 1 - g.pad_left,
                ..g
            };
            let residual = accumulate.then(|| dx.view());
            let [bias, bias_pixels, residual, limit, slope] = Epilogue { residual, ..Epilogue::default() }.arguments();
            let head = [dy.into(), w.into(), bias, bias_pixels, residual, limit, slope, dx.into()];
            return depthwise_forward(p, g, true, &head, dy);
        }
        Some((k, _)) => {
            let tiles = Tiles::new(c, 2);
            let quads = |len: usize, pad: usize| (len - 1 + pad) / 2 - pad / 2 + 1;
            let (h, w_quads) = (quads(p.input.h, pad.top), quads(p.input.w, pad.left));
            let rows = march(h);
            let patches = p.n * h.div_ceil(rows) * w_quads.div_ceil(2);
            let tail = [flag.into(), geometry(p).into(), int(rows).into(), int(tiles.lanes).into()];
            let arguments = [dy.into(), w.into(), dx.into()].into_iter().chain(tail).collect();
            (format!("depthwise_dgrad<{t}, {k}>"), tiles.tiles * patches.div_ceil(tiles.rows), arguments)
        }
        None => {
            let tiles = Tiles::new(c, 1);
            let tail = [flag.into(), geometry(p).into(), int(tiles.lanes).into()];
            let arguments = [dy.into(), w.into(), dx.into()].into_iter().chain(tail).collect();
            let pixels = p.n * p.input.pixels();
            (format!("depthwise_dgrad_any<{t}>"), tiles.tiles * pixels.div_ceil(tiles.rows), arguments)
        }
    };
    // SAFETY: as in `forward`.
    unsafe { dy.gpu().launch(&name, grid(shape, 1, 1), &arguments) }
}

fn depthwise_weight_gradient(p: &ConvProblem, x: GpuView<'_>, dy: GpuView<'_>, dw: &GpuViewMut<'_>) {
    let t = x.dtype().kernel_name();
    let fast = specialised(p);
    let tiles = Tiles::new(p.input.c, if fast.is_some() { 2 } else { 1 });
    let (units, per_row) = match fast {
        Some(_) => (strips(p.n, p.output.h, p.output.w), 2),
        None => (p.n * p.output.pixels(), 32),
    };
    let wanted = units.div_ceil(per_row * tiles.rows).min(512usize.div_ceil(tiles.tiles));
    let slab = units.div_ceil(wanted);
    let slabs = units.div_ceil(slab);
    in_slabs(x, slabs, dw, |partials| {
        let mut arguments = vec![x.into(), dy.into(), partials, int(slab).into(), geometry(p).into()];
        let (name, z) = match fast {
            Some((k, stride)) => {
                arguments.push(int(march(p.output.h)).into());
                (format!("depthwise_wgrad<{t}, {k}, {stride}>"), 1)
            }
            None => (format!("depthwise_wgrad_any<{t}>"), p.window.taps()),
        };
        arguments.push(int(tiles.lanes).into());
        // SAFETY: as in `forward`; the partial sums have room for every slab.
        unsafe { x.gpu().launch(&name, grid(tiles.tiles, slabs, z), &arguments) }
    });
}
