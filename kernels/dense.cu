// Dense k_h x k_w convolution, any stride, padding and number of groups, as an implicit matrix product.
//
// x `[n, h_in, w_in, c_in]`, y `[n, h_out, w_out, c_out]`, w `[c_out, k_h, k_w, c_in / groups]`. The patches of x under
// the kernel are gathered while a tile is staged and are never stored. Sums are float and are rounded once. Bound by
// arithmetic for merged blocks; the taps of a patch find x in the caches.
//
// `dense_dgrad` of stride s is s_h·s_w convolutions of stride 1, one per phase: the input pixels whose row and column
// leave the same remainders meet the same taps, and only those are multiplied. `dense_wgrad` writes one float partial
// of dw per slab of output pixels; `sum_slabs` of conv_reduce.cu adds them. With one slab, dw itself may be given as
// `partials`. No output may overlap an input, but for dx where it accumulates.
//
//   VECTOR     needs c_in / groups and c_out / groups to be multiples of 16 bytes of T, and all pointers aligned to 16
//   tiles      64x64 for every T; with VECTOR also 128x32, 128x128 and, forward, 128x64, 128x96 and 256x32 for f16 and bf16
//   block      128 threads; 192 for 128x96 and 256 for 128x128.   dynamic shared memory: none
//   grid       (tiles of the result M x N, y, groups)
//
//   kernel                                     M                    N                       y
//   dense_forward<T, TILE_M, TILE_N, VECTOR>   n·h_out·w_out        c_out / groups          1
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry g)
//   dense_bn_forward<T, TILE_M, TILE_N, VECTOR>   as dense_forward, in front of a batch-norm: with moments of y
//     (const T* x, const T* w, T* y, float* partials [tiles of M, 2, c_out]: mean, Σ (y − mean)², float* groups,
//      u32* tickets, int group_size, float* running_mean [c_out], float* running_var [c_out], float* saved [2, c_out],
//      float eps, float momentum, ConvGeometry g)      partials to momentum: StatisticsOut of statistics.cuh
//   dense_dgrad<T, TILE_M, TILE_N, VECTOR>     n·ceil(h_in / s_h)   c_in / groups           s_h·s_w
//     (const T* dy, const T* w, T* dx,         ·ceil(w_in / s_w)
//      int accumulate, ConvGeometry g)
//   dense_wgrad<T, TILE_M, TILE_N, VECTOR>     c_out / groups       k_h·k_w·c_in / groups   slabs of `slab` pixels
//     (const T* x, const T* dy, float* partials, int slab, ConvGeometry g)
//
// Tiles and slabs are chosen by the problem alone, so that results do not depend on the device, and a slab is a
// multiple of 32 pixels: `GemmConfig` of src/ops/config/gemm.rs has grids, slabs and the size of `partials`.
//
// instances: dense_{forward,bn_forward,dgrad,wgrad}<{float,f16,bf16}, 64, 64, {true,false}>
// instances: dense_{forward,bn_forward,dgrad}<{f16,bf16}, 128, {32,128}, true>
// instances: dense_{forward,bn_forward}<{f16,bf16}, 128, {64,96}, true>
// instances: dense_{forward,bn_forward}<{f16,bf16}, 256, 32, true>
// instances: dense_wgrad<{f16,bf16}, 128, 128, true>

#include "conv_gemm.cuh"
#include "epilogue.cuh"
#include "geometry.cuh"

/// A tap of the kernel and a channel under it, in the order `[h, w, c]`.
struct Tap {
    int h, w, c;

    __device__ __forceinline__ static Tap of(int index, int taps_w, int channels) {
        const int tap = index / channels;
        return {tap / taps_w, tap % taps_w, index % channels};
    }

    __device__ __forceinline__ void advance(int step, int taps_w, int channels) {
        c += step;
        while (c >= channels) {
            c -= channels;
            if (++w == taps_w) {
                w = 0;
                h++;
            }
        }
    }
};

/// A value for each dimension of a map.
struct Pair {
    int h, w;
};

/// The patches of a map under a kernel that visits a grid of pixels: lines are the grid's pixels, positions are taps.
/// Grid pixel (i, j) has tap (u, v) in the map's row origin.h + step.h·i + direction·u, columns likewise.
template <typename T>
struct Patches {
    using Element = T;
    using Position = Tap;
    using OnLoad = AsStored;
    // The taps of neighbouring pixels overlap.
    static constexpr bool REUSED = true;
    struct Line {
        int h, w, pixel, index;   // tap 0's row and column, and the pixel that it would be; the grid pixel
    };
    // Row of a line past the end, from which no tap reaches the map.
    static constexpr int NOWHERE = -(1 << 30);

    const T* data;   // [n, map.h, map.w, c], from the group's first channel on
    Pair map;
    int c;
    int channels;    // of the group
    Pair taps, grid, step, origin;
    int direction;
    int lines;       // grid pixels from this one on read as zero

    __device__ __forceinline__ Line line(int index) const {
        const int row = index / grid.w, image = row / grid.h;
        const int h = row % grid.h * step.h + origin.h, w = index % grid.w * step.w + origin.w;
        return {index < lines ? h : NOWHERE, w, (image * map.h + h) * map.w + w, index};
    }

    __device__ __forceinline__ Position position(int index) const { return Tap::of(index, taps.w, channels); }

    __device__ __forceinline__ void advance_line(Line& line, int by) const {
        line.index += by;
        line.w += by * step.w;
        line.pixel += by * step.w;
        while (line.w >= origin.w + grid.w * step.w) {
            line.w -= grid.w * step.w;
            line.h += step.h;
            line.pixel += step.h * map.w - grid.w * step.w;
            if (line.h >= origin.h + grid.h * step.h) {
                line.h = origin.h;
                line.pixel += (map.h - grid.h * step.h) * map.w;
            }
        }
        if (line.index >= lines) line.h = NOWHERE;
    }

    __device__ __forceinline__ void advance(Position& tap, int by) const { tap.advance(by, taps.w, channels); }

    __device__ __forceinline__ Place<T> at(const Line& line, const Position& tap) const {
        const int row = line.h + direction * tap.h, column = line.w + direction * tap.w;
        const int pixel = line.pixel + direction * (tap.h * map.w + tap.w);
        // A negative row or column is a large unsigned one.
        const bool stored = tap.h < taps.h && static_cast<u32>(row) < static_cast<u32>(map.h) &&
                            static_cast<u32>(column) < static_cast<u32>(map.w);
        return {behind(data + tap.c, wide_product(pixel, c * static_cast<int>(sizeof(T)))), stored};
    }
};

/// The patches of x under the kernel, one per output pixel up to pixel `lines`.
template <typename T>
__device__ __forceinline__ Patches<T> input_patches(const T* x, const ConvGeometry& g, int lines) {
    const Pair map{g.h_in, g.w_in}, taps{g.k_h, g.k_w}, grid{g.h_out, g.w_out}, step{g.stride_h, g.stride_w};
    return {x, map, g.c_in, g.c_in / g.groups, taps, grid, step, {-g.pad_top, -g.pad_left}, 1, lines};
}

/// One dimension of a phase of dgrad. Its input pixels are remainder + stride·i, its taps first + stride·j, and the two
/// meet at the output pixel base + i − j.
struct Phase {
    int remainder, stride, pixels, first, taps, base;

    __device__ __forceinline__ Phase(int remainder, int stride, int pad, int k, int size)
        : remainder(remainder), stride(stride), pixels(divide_up(max_of(size - remainder, 0), stride)),
          first((remainder + pad) % stride), taps(divide_up(max_of(k - first, 0), stride)),
          base((remainder + pad) / stride) {}
};

/// The weights of a phase as dgrad wants them: lines are (tap, output channel), positions are input channels.
template <typename T>
struct PhaseWeights {
    using Element = T;
    using Line = Tap;
    using OnLoad = AsStored;
    static constexpr bool REUSED = false;
    using Position = int;

    const T* data;   // [c_out of the group, k_h, k_w, length], from the phase's first tap on
    int channels;    // output channels of the group
    int length;      // input channels of the group
    Pair taps;
    Pair step;       // elements from one tap of the phase to the next
    int filter;      // elements of an output channel

    __device__ __forceinline__ Line line(int index) const { return Tap::of(index, taps.w, channels); }
    __device__ __forceinline__ Position position(int index) const { return index; }
    __device__ __forceinline__ void advance_line(Line& tap, int by) const { tap.advance(by, taps.w, channels); }
    __device__ __forceinline__ void advance(Position& position, int by) const { position += by; }

    __device__ __forceinline__ Place<T> at(const Line& tap, Position position) const {
        const bool stored = tap.h < taps.h && position < length;
        const i64 bytes = wide_product(tap.c, filter * static_cast<int>(sizeof(T)));
        return {behind(data + tap.h * step.h + tap.w * step.w + position, bytes), stored};
    }
};

/// The input pixels of a tile's rows, from a table in shared memory: nothing of the phase is kept while products run.
struct TilePixels {
    const int* table;   // [TILE_M]
    int first;          // row m of the first entry

    __device__ __forceinline__ int operator()(int m) const { return table[m - first]; }

    /// The input pixel that row m of a phase is.
    __device__ __forceinline__ static int find(int m, const Phase& h, const Phase& w, Pair input) {
        const int row = m / w.pixels;
        const int i = h.remainder + row % h.pixels * h.stride, j = w.remainder + m % w.pixels * w.stride;
        return (row / h.pixels * input.h + i) * input.w + j;
    }
};

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) dense_forward(
    const T* __restrict__ x,          // [n, h_in, w_in, c_in]
    const T* __restrict__ w,          // [c_out, k_h, k_w, c_in / groups]
    const float* __restrict__ bias,   // [bias_pixels, c_out] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* __restrict__ residual,   // [n, h_out, w_out, c_out] or null
    float limit, float slope,         // of the activation; slope 1 for none
    T* __restrict__ y,                // [n, h_out, w_out, c_out]
    ConvGeometry g) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Column, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const int group = static_cast<int>(blockIdx.z), c_in = g.c_in / g.groups, c_out = g.c_out / g.groups;
    const int pixels = g.n * g.h_out * g.w_out, filter = g.k_h * g.k_w * c_in, channel = group * c_out;
    const Origin at = tile_origin<TILE_M, TILE_N>(c_out);
    const Matrix<T> weights{w + static_cast<i64>(channel) * filter, c_out, filter, filter};
    Product product;
    product.multiply(input_patches(x + group * c_in, g, pixels), weights, at, 0, filter, shared);
    const float* const group_bias = bias != nullptr ? bias + channel : nullptr;
    const T* const group_residual = residual != nullptr ? residual + channel : nullptr;
    const ForwardWriter<T> writer{y + channel, group_bias, bias_pixels, group_residual, make_clamp(limit, slope),
                                     g.c_out};
    product.write(writer, at, pixels, c_out, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) dense_bn_forward(
    const T* __restrict__ x,        // [n, h_in, w_in, c_in]
    const T* __restrict__ w,        // [c_out, k_h, k_w, c_in / groups]
    T* __restrict__ y,              // [n, h_out, w_out, c_out]
    float* partials,                // [tiles of pixels, 2, c_out]: mean, Σ (y − mean)²
    float* groups,                  // as StatisticsOut of statistics.cuh
    u32* tickets, int group_size,
    float* __restrict__ running_mean,   // [c_out]
    float* __restrict__ running_var,    // [c_out]
    float* __restrict__ saved,          // [2, c_out]
    float eps, float momentum,
    ConvGeometry g) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Column, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const int group = static_cast<int>(blockIdx.z), c_in = g.c_in / g.groups, c_out = g.c_out / g.groups;
    const int pixels = g.n * g.h_out * g.w_out, filter = g.k_h * g.k_w * c_in, channel = group * c_out;
    const Origin at = tile_origin<TILE_M, TILE_N>(c_out);
    const Matrix<T> weights{w + static_cast<i64>(channel) * filter, c_out, filter, filter, {}};
    Product product;
    product.multiply(input_patches(x + group * c_in, g, pixels), weights, at, 0, filter, shared);
    MomentsWriter<T, Product::COLUMNS> writer{y + channel, g.c_out, {}};
    product.write(writer, at, pixels, c_out, shared);
    const StatisticsOut out{partials, groups, tickets, group_size, running_mean, running_var, saved, eps, momentum};
    Product::finish_moments(writer.moments, at, pixels, c_out, out, g.c_out, channel, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) dense_dgrad(
    const T* __restrict__ dy,   // [n, h_out, w_out, c_out]
    const T* __restrict__ w,    // [c_out, k_h, k_w, c_in / groups]
    T* __restrict__ dx,         // [n, h_in, w_in, c_in]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const int group = static_cast<int>(blockIdx.z), c_in = g.c_in / g.groups, c_out = g.c_out / g.groups;
    const int phase = static_cast<int>(blockIdx.y), filter = g.k_h * g.k_w * c_in;
    const Phase ph(phase / g.stride_w, g.stride_h, g.pad_top, g.k_h, g.h_in);
    const Phase pw(phase % g.stride_w, g.stride_w, g.pad_left, g.k_w, g.w_in);
    const int pixels = g.n * ph.pixels * pw.pixels;
    const Origin at = tile_origin<TILE_M, TILE_N>(c_in);
    // The grid has the tiles of the largest phase.
    if (at.m >= pixels) return;
    SHARED_ARRAY(int, table, TILE_M);
    if (thread_index() < TILE_M) {
        table[thread_index()] = TilePixels::find(at.m + thread_index(), ph, pw, {g.h_in, g.w_in});
    }
    const Pair taps{ph.taps, pw.taps}, step{g.stride_h * g.k_w * c_in, g.stride_w * c_in};
    const Pair map{g.h_out, g.w_out}, grid{ph.pixels, pw.pixels}, base{ph.base, pw.base};
    const Patches<T> patches{dy + group * c_out, map, g.c_out, c_out, taps, grid, {1, 1}, base, -1, pixels};
    const T* const first = w + static_cast<i64>(group) * c_out * filter + (ph.first * g.k_w + pw.first) * c_in;
    const PhaseWeights<T> weights{first, c_out, c_in, taps, step, filter};
    Product product;
    product.multiply(patches, weights, at, 0, ph.taps * pw.taps * c_out, shared);
    const InputGradientWriter<T, TilePixels> writer{dx + group * c_in, accumulate != 0, g.c_in, {table, at.m}};
    product.write(writer, at, pixels, c_in, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) dense_wgrad(
    const T* __restrict__ x,        // [n, h_in, w_in, c_in]
    const T* __restrict__ dy,       // [n, h_out, w_out, c_out]
    float* __restrict__ partials,   // [slabs, c_out, k_h, k_w, c_in / groups]
    int slab,                       // output pixels per slab
    ConvGeometry g) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Column, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const int group = static_cast<int>(blockIdx.z), c_in = g.c_in / g.groups, c_out = g.c_out / g.groups;
    const int pixels = g.n * g.h_out * g.w_out, filter = g.k_h * g.k_w * c_in;
    const int begin = static_cast<int>(blockIdx.y) * slab, end = min_of(begin + slab, pixels);
    const Origin at = tile_origin<TILE_M, TILE_N>(filter);
    const Matrix<T> gradients{dy + group * c_out, end, c_out, g.c_out};
    Product product;
    product.multiply(gradients, input_patches(x + group * c_in, g, end), at, begin, end, shared);
    float* const partial = partials + (static_cast<i64>(blockIdx.y) * g.c_out + group * c_out) * filter;
    product.write(WeightGradientWriter{partial, filter}, at, c_out, filter, shared);
}
