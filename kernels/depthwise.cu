// Depthwise k×k convolution.
//
//   forward   y[n, oh, ow, c] = φ(Σ w[kh, kw, c] · x[n, s·oh + kh − pad, s·ow + kw − pad, c] + bias + residual)
//   dgrad     dx (+)= the transpose of that sum
//   wgrad     dw[kh, kw, c] = Σ over images and output pixels of dy · x
//
// x, y and their gradients are NHWC of type T, w is `[k_h, k_w, c]` of type T, dw is the same in float. Nine or
// twenty-five products per element are too few to keep a GPU's arithmetic busy, so that all passes are bound by memory
// and the design is about reading every element once. Lanes run over channels, two to a thread, which leaves registers
// for everything else: a thread keeps the k·k weights of its channels and marches down a strip of 2 columns. It reads
// each row of the input once and multiplies it with all kernel rows at the same time; the products go to the sums of
// the ⌈k / stride⌉ output rows that the row reaches, which stay in registers until they are complete. The weight
// gradient marches likewise, with rows of dy in the place of rows of sums.
//
// The strided input gradient is a gather: rows and columns of dx fall into two parities, each with taps of its own, so
// that a thread makes 2×2 pixels of dx from one window of dy and never tests a remainder.
//
// The kernels named *_any take any kernel size, stride and channel count, one element per thread.
//
// The weight gradient writes one float partial of dw per slab of output; `sum_slabs` of conv_reduce.cu adds them. With
// one slab, dw itself may be given as `partials`.
//
// Launches. All blocks have 256 threads and no dynamic shared memory. `lanes` is as slab.cuh says, with N = 2, or 1 for
// *_any. The fast kernels need an even c, and all pointers aligned to two elements. ConvGeometry is that of the forward
// pass, except where it says otherwise; offsets inside one image are below 2^31, and so is the number of pixels. `rows`
// is how far a thread marches; only wgrad's result depends on it, so there it must follow from the problem alone.
// Grids, rows, slabs and the size of `partials` are those of `DepthwiseConfig` in src/ops/config/depthwise.rs.
//
// depthwise_forward<T, K, STRIDE>    K 3, 5, 7; STRIDE 1, 2                                              18 instances
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry, int rows, int lanes, int flipped)
//     flipped is 0. With STRIDE 1 this is dgrad too: x = dy, y = dx, flipped = 1, the geometry with input and output
//     exchanged and each pad replaced by K − 1 − pad (which may be negative), no bias, slope 1; residual = dx, or null
//     where dx is not accumulated.
// depthwise_dgrad<T, K>              K 3, 5, 7; both strides 2                                           9 instances
//     a thread marches down rows of pairs of dx, ⌊(h_in − 1 + pad_top) / 2⌋ − ⌊pad_top / 2⌋ + 1 of them, columns alike
//     (const T* dy, const T* w, T* dx, int accumulate, ConvGeometry, int rows, int lanes)
// depthwise_wgrad<T, K, STRIDE>      K 3, 5, 7; STRIDE 1, 2                                              18 instances
//     grid (tiles, slabs), a slab being of strips of `rows` × 2 pixels
//     (const T* x, const T* dy, float* partials [slabs, K, K, c], int slab, ConvGeometry, int rows, int lanes)
//
// depthwise_forward_any<T>                                                                               3 instances
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry, int lanes)
// depthwise_dgrad_any<T>                                                                                 3 instances
//     (const T* dy, const T* w, T* dx, int accumulate, ConvGeometry, int lanes)
// depthwise_wgrad_any<T>             grid (tiles, slabs, k_h · k_w)                                      3 instances
//     (const T* x, const T* dy, float* partials [slabs, k_h, k_w, c], int slab, ConvGeometry, int lanes)
//     a slab is of pixels
//
// instances: depthwise_{forward,wgrad}<{float,f16,bf16}, {3,5,7}, {1,2}>
// instances: depthwise_dgrad<{float,f16,bf16}, {3,5,7}>
// instances: depthwise_{forward,dgrad,wgrad}_any<{float,f16,bf16}>

#include "depthwise.cuh"
#include "epilogue.cuh"

/// Blocks that shall fit a multiprocessor: as many as the weights and sums allow without spilling.
constexpr __device__ int resident_blocks(int k) { return k == 3 ? 3 : k == 5 ? 2 : 1; }

/// An input that is read as it is stored.
template <typename T>
struct StoredRows {
    template <int COLUMNS>
    __device__ __forceinline__ void load(const T* row, int first, int width, int c,
                                         float (&out)[COLUMNS][CHANNELS]) const {
        load_row(row, first, width, c, out);
    }
};

/// Adds pixels of a strip, as many as there are.
template <typename T>
__device__ __forceinline__ void add_strip(const T* row, int columns, int c, float (&values)[STRIP][CHANNELS]) {
    float more[STRIP][CHANNELS];
    load_row(row, 0, columns, c, more);
#pragma unroll
    for (int j = 0; j < STRIP; j++) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) values[j][i] += more[j][i];
    }
}

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_forward(
    const T* __restrict__ x,          // [n, h_in, w_in, c]
    const T* __restrict__ w,          // [K, K, c]
    const float* __restrict__ bias,   // [bias_pixels, c] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* residual,                // [n, h_out, w_out, c] or null; may be y
    float limit, float slope,         // of the activation; slope 1 for none
    T* y,                             // [n, h_out, w_out, c]
    ConvGeometry g, int rows, int lanes, int flipped) {
    const int c = g.c_out, tiles = divide_up(c, lanes * CHANNELS);
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int index = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || index >= patches(g.n, g.h_out, g.w_out, rows, STRIP)) return;
    const Patch at = patch(index, g.h_out, g.w_out, rows, STRIP);
    const Clamp clamp{limit, slope};
    const Weights<K * K> weights(w + tile.channel, c, flipped != 0);
    float start[CHANNELS] = {};
    if (bias != nullptr && bias_pixels == 1) load_floats(bias + tile.channel, start);
    march<T, K, STRIDE>(StoredRows<T>{}, x, weights, start, g, at, tile.channel,
                        [&](float (&values)[STRIP][CHANNELS], i64 to, int in_image, int columns) {
        if (bias != nullptr && bias_pixels > 1) add_strip(bias + in_image, columns, c, values);
        if (residual != nullptr) add_strip(residual + to, columns, c, values);
        if (slope != 1.0f) {
#pragma unroll
            for (int j = 0; j < STRIP; j++) clamp.apply(values[j]);
        }
#pragma unroll
        for (int j = 0; j < STRIP; j++) {
            if (j < columns) store_floats(y + to + j * c, values[j]);
        }
    }, NothingElse{});
}

template <typename T, int K>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_dgrad(
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    const T* __restrict__ w,    // [K, K, c]
    T* dx,                      // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int rows, int lanes) {
    const int c = g.c_in, tiles = divide_up(c, lanes * CHANNELS);
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const Pairs pairs(g);
    const int index = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || index >= patches(g.n, pairs.rows, pairs.columns, rows, PAIRS)) return;
    const Patch at = patch(index, pairs.rows, pairs.columns, rows, PAIRS);
    const Weights<K * K> weights(w + tile.channel, c, false);
    march_pairs<T, K>(StoredRows<T>{}, dy, weights, g, pairs, at, tile.channel, [&](float (&values)[CHANNELS], i64 to) {
        store_gradient(dx + to, accumulate != 0, values);
    }, NothingElse{});
}

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_wgrad(
    const T* __restrict__ x,         // [n, h_in, w_in, c]
    const T* __restrict__ dy,        // [n, h_out, w_out, c]
    float* __restrict__ partials,    // [slabs, K, K, c]
    int slab,                        // patches per slab
    ConvGeometry g, int rows, int lanes) {
    constexpr int LIVE = ::LIVE<K, STRIDE>;
    SHARED_ARRAY(float, memory, K * CHANNELS * BLOCK_THREADS);
    const int c = g.c_out;
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(patches(g.n, g.h_out, g.w_out, rows, STRIP), slab, static_cast<int>(blockIdx.y));
    float sums[K][K * CHANNELS] = {};
    const int end = tile.active ? static_cast<int>(range.end) : 0;
    for (int index = static_cast<int>(range.begin) + tile.row; index < end; index += tile.rows) {
        const Patch at = patch(index, g.h_out, g.w_out, rows, STRIP);
        // The next rows of x and dy, at the strip's left end.
        int ih = at.first_row * STRIDE - g.pad_top, oh = at.first_row;
        const int left = at.column * STRIDE - g.pad_left;
        const T* x_row = x + static_cast<i64>(at.image) * g.h_in * g.w_in * c + (ih * g.w_in + left) * c + tile.channel;
        const T* dy_row =
            dy + static_cast<i64>(at.image) * g.h_out * g.w_out * c + (oh * g.w_out + at.column) * c + tile.channel;
        // d[i] is the row of dy i above the youngest one.
        float d[LIVE][STRIP][CHANNELS] = {};
        auto add_input = [&](int q) {
            float in[COLUMNS<K, STRIDE>][CHANNELS];
            load_row(x_row, left, g.w_in, c, in);
#pragma unroll
            for (int kh = q; kh < K; kh += STRIDE) {
#pragma unroll
                for (int k = 0; k < K * CHANNELS; k++) {
                    const int kw = k / CHANNELS, i = k % CHANNELS;
#pragma unroll
                    for (int j = 0; j < STRIP; j++) sums[kh][k] += in[j * STRIDE + kw][i] * d[kh / STRIDE][j][i];
                }
            }
        };
        const int last = at.last_row + LIVE - 1;
        while (oh < last) {
#pragma unroll
            for (int unrolled = 0; unrolled < UNROLL<K, STRIDE>; unrolled++, oh++, dy_row += g.w_out * c) {
                if (oh >= last) break;
                move_on(d, {});
                if (oh < at.last_row) load_row(dy_row, at.column, g.w_out, c, d[0]);
#pragma unroll
                for (int q = 0; q < STRIDE; q++, ih++, x_row += g.w_in * c) {
                    if (ih >= 0 && ih < g.h_in) add_input(q);
                }
            }
        }
    }
    write_weight_sums<K>(tile, sums, partials, c, memory);
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_forward_any(
    const T* __restrict__ x,          // [n, h_in, w_in, c]
    const T* __restrict__ w,          // [k_h, k_w, c]
    const float* __restrict__ bias,   // [bias_pixels, c] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* residual,                // [n, h_out, w_out, c] or null
    float limit, float slope,         // of the activation; slope 1 for none
    T* y,                             // [n, h_out, w_out, c]
    ConvGeometry g, int lanes) {
    const int c = g.c_out, tiles = divide_up(c, lanes);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int pixel = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || pixel >= g.n * g.h_out * g.w_out) return;
    const int top = pixel / g.w_out % g.h_out * g.stride_h - g.pad_top;
    const int left = pixel % g.w_out * g.stride_w - g.pad_left;
    const T* const image = x + static_cast<i64>(pixel / g.w_out / g.h_out) * g.h_in * g.w_in * c + tile.channel;
    float sums[1] = {};
    for (int kh = max_of(0, -top); kh < min_of(g.k_h, g.h_in - top); kh++) {
        for (int kw = max_of(0, -left); kw < min_of(g.k_w, g.w_in - left); kw++) {
            const T in = image[((top + kh) * g.w_in + left + kw) * c];
            sums[0] += to_float(in) * to_float(w[(kh * g.k_w + kw) * c + tile.channel]);
        }
    }
    const ForwardWriter<T> writer{y, bias, bias_pixels, residual, Clamp{limit, slope}, c};
    writer.write(pixel, tile.channel, sums);
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_dgrad_any(
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    const T* __restrict__ w,    // [k_h, k_w, c]
    T* dx,                      // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int lanes) {
    const int c = g.c_in, tiles = divide_up(c, lanes);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int pixel = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || pixel >= g.n * g.h_in * g.w_in) return;
    const int bottom = pixel / g.w_in % g.h_in + g.pad_top, right = pixel % g.w_in + g.pad_left;
    const T* const image = dy + static_cast<i64>(pixel / g.w_in / g.h_in) * g.h_out * g.w_out * c + tile.channel;
    float sums[1] = {};
    for (int kh = bottom % g.stride_h; kh < min_of(g.k_h, bottom + 1); kh += g.stride_h) {
        const int oh = (bottom - kh) / g.stride_h;
        if (oh >= g.h_out) continue;
        for (int kw = right % g.stride_w; kw < min_of(g.k_w, right + 1); kw += g.stride_w) {
            const int ow = (right - kw) / g.stride_w;
            if (ow >= g.w_out) continue;
            const T in = image[(oh * g.w_out + ow) * c];
            sums[0] += to_float(in) * to_float(w[(kh * g.k_w + kw) * c + tile.channel]);
        }
    }
    const InputGradientWriter<T> writer{dx, accumulate != 0, c, {}};
    writer.write(pixel, tile.channel, sums);
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_wgrad_any(
    const T* __restrict__ x,         // [n, h_in, w_in, c]
    const T* __restrict__ dy,        // [n, h_out, w_out, c]
    float* __restrict__ partials,    // [slabs, k_h, k_w, c]
    int slab,                        // output pixels per slab
    ConvGeometry g, int lanes) {
    SHARED_ARRAY(float, memory, BLOCK_THREADS);
    const int c = g.c_out, tap = static_cast<int>(blockIdx.z);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(static_cast<i64>(g.n) * g.h_out * g.w_out, slab, static_cast<int>(blockIdx.y));
    float sums[1] = {};
    for (i64 i = range.begin + tile.row; tile.active && i < range.end; i += tile.rows) {
        const int pixel = static_cast<int>(i);
        const int ih = pixel / g.w_out % g.h_out * g.stride_h - g.pad_top + tap / g.k_w;
        const int iw = pixel % g.w_out * g.stride_w - g.pad_left + tap % g.k_w;
        if (ih < 0 || ih >= g.h_in || iw < 0 || iw >= g.w_in) continue;
        const i64 from = (static_cast<i64>(pixel / g.w_out / g.h_out) * g.h_in + ih) * g.w_in + iw;
        sums[0] += to_float(x[from * c + tile.channel]) * to_float(dy[i * c + tile.channel]);
    }
    sum_rows(tile, sums, memory);
    if (!tile.active || tile.row > 0) return;
    partials[(static_cast<i64>(blockIdx.y) * gridDim.z + tap) * c + tile.channel] = sums[0];
}
