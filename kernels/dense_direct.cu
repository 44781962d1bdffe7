// 3x3 convolution of an image of few channels, stride 1 or 2, one group: a network's first layer.
//
// x `[n, h_in, w_in, C_IN]`, y `[n, h_out, w_out, c_out]`, w `[c_out, 3, 3, C_IN]`. As a matrix product it has 9 or 27
// products a sum and gathers single elements for them, so that instructions bound it. Here a thread has eight channels of y and
// a strip of columns, reads each pixel under the strip once for all of them, and forms its sums in registers. Weights lie in
// shared memory. Sums are float and are rounded once. What bounds it is y, which is ten times as large as x, and plain float
// arithmetic beside it.
//
//   dense_direct_forward<T, C_IN, STRIDE>      strips of 4 columns of y
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry g, int slab, int lanes)
//   dense_direct_bn_forward<T, C_IN, STRIDE>   the same in front of a batch-norm: with moments of y
//     (const T* x, const T* w, T* y, float* partials [slabs, 2, c_out]: mean, Σ (y − mean)², float* counts [tiles, slabs],
//      float* groups, u32* tickets, int group, float* running_mean [c_out], float* running_var [c_out],
//      float* saved [2, c_out], float eps, float momentum, ConvGeometry g, int slab, int lanes)
//     partials and groups to momentum are StatisticsOut of statistics.cuh
//   dense_direct_wgrad<T, C_IN, STRIDE>        strips of 2 columns of dy; a thread has one row of the kernel
//     (const T* x, const T* dy, float* partials [slabs, c_out, 3, 3, C_IN], ConvGeometry g, int slab, int lanes)
//
//   channels   c_out is a multiple of 8; pointers to what has c_out channels are aligned to 16
//   block      256 threads, as slab.cuh says with N = 8: `lanes` vectors of channels, at most 8; in wgrad three times as many
//   grid       (tiles of c_out, slabs of `slab` strips, 1)
//
// `DirectConfig` of src/ops/config/direct.rs has lanes, slabs and the size of `partials`.
//
// instances: dense_direct_{forward,bn_forward,wgrad}<{float,f16,bf16}, {1,3}, {1,2}>

#include "epilogue.cuh"
#include "geometry.cuh"
#include "slab.cuh"
#include "statistics.cuh"

/// Channels of y of a thread, and of a block at most.
constexpr int CHANNELS = 8, BLOCK_CHANNELS = 64;
/// Sides of the kernel.
constexpr int K = 3;
/// Columns of a thread, forward and in wgrad, where a row of the kernel takes most registers.
constexpr int STRIP = 4, WGRAD_STRIP = 2;

/// Columns of x under a strip.
template <int COLUMNS, int STRIDE>
constexpr int UNDER = (COLUMNS - 1) * STRIDE + K;

/// The pixels of a row of x from column `first` on; those outside are zero.
template <int COLUMNS, int C_IN, typename T>
__device__ __forceinline__ void load_pixels(const T* row, int first, int width, float (&out)[COLUMNS][C_IN]) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const bool inside = static_cast<unsigned>(first + j) < static_cast<unsigned>(width);
#pragma unroll
        for (int c = 0; c < C_IN; c++) out[j][c] = inside ? to_float(row[(first + j) * C_IN + c]) : 0.0f;
    }
}

/// Brings the weights of a block's channels into shared memory, `[9 · C_IN, channels of the block]`.
template <int C_IN, typename T>
__device__ __forceinline__ void load_weights(const T* w, int c, int lanes, float* weights) {
    const int channels = lanes * CHANNELS, first = static_cast<int>(blockIdx.x) * channels;
    for (int i = static_cast<int>(threadIdx.x); i < K * K * C_IN * channels; i += BLOCK_THREADS) {
        const int channel = first + i % channels;
        weights[i] = channel < c ? to_float(w[channel * (K * K * C_IN) + i / channels]) : 0.0f;
    }
    __syncthreads();
}

/// Forms the pixels of a slab and hands them to the writer, eight channels at a time.
template <typename T, int C_IN, int STRIDE, class Writer>
__device__ __forceinline__ void convolve(const T* x, const float* weights, Writer& writer, const ConvGeometry& g,
                                         const ChannelTile& tile, int slab) {
    const int channels = tile.lanes * CHANNELS, lane = static_cast<int>(threadIdx.x) % tile.lanes;
    const Range range = slab_range(patches(g.n, g.h_out, g.w_out, 1, STRIP), slab, static_cast<int>(blockIdx.y));
    const int end = tile.active ? static_cast<int>(range.end) : 0;
    for (int index = static_cast<int>(range.begin) + tile.row; index < end; index += tile.rows) {
        const Patch at = patch(index, g.h_out, g.w_out, 1, STRIP);
        float sums[STRIP][CHANNELS] = {};
#pragma unroll
        for (int k_h = 0; k_h < K; k_h++) {
            const int row = at.first_row * STRIDE + k_h - g.pad_top;
            if (row < 0 || row >= g.h_in) continue;
            float pixels[UNDER<STRIP, STRIDE>][C_IN];
            load_pixels(x + (static_cast<i64>(at.image) * g.h_in + row) * g.w_in * C_IN, at.column * STRIDE - g.pad_left,
                        g.w_in, pixels);
#pragma unroll
            for (int k_w = 0; k_w < K; k_w++) {
#pragma unroll
                for (int c = 0; c < C_IN; c++) {
                    float taps[CHANNELS];
                    load_floats(weights + ((k_h * K + k_w) * C_IN + c) * channels + lane * CHANNELS, taps);
#pragma unroll
                    for (int j = 0; j < STRIP; j++) {
#pragma unroll
                        for (int i = 0; i < CHANNELS; i++) {
                            sums[j][i] = fma_f(pixels[j * STRIDE + k_w][c], taps[i], sums[j][i]);
                        }
                    }
                }
            }
        }
        const int pixel = (at.image * g.h_out + at.first_row) * g.w_out + at.column;
#pragma unroll
        for (int j = 0; j < STRIP; j++) {
            if (at.column + j < g.w_out) writer.write(pixel + j, tile.channel, sums[j]);
        }
    }
}

template <typename T, int C_IN, int STRIDE>
__global__ void __launch_bounds__(256, 2) dense_direct_forward(
    const T* __restrict__ x,          // [n, h_in, w_in, C_IN]
    const T* __restrict__ w,          // [c_out, 3, 3, C_IN]
    const float* __restrict__ bias,   // [bias_pixels, c_out] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* __restrict__ residual,   // [n, h_out, w_out, c_out] or null
    float limit, float slope,         // of the activation; slope 1 for none
    T* __restrict__ y,                // [n, h_out, w_out, c_out]
    ConvGeometry g, int slab, int lanes) {
    SHARED_ARRAY(float, weights, K * K * C_IN * BLOCK_CHANNELS);
    load_weights<C_IN>(w, g.c_out, lanes, weights);
    const ForwardWriter<T> writer{y, bias, bias_pixels, residual, make_clamp(limit, slope), g.c_out};
    const ChannelTile tile = channel_tile<CHANNELS>(g.c_out, lanes, static_cast<int>(blockIdx.x));
    convolve<T, C_IN, STRIDE>(x, weights, writer, g, tile, slab);
}

template <typename T, int C_IN, int STRIDE>
__global__ void __launch_bounds__(256, 2) dense_direct_bn_forward(
    const T* __restrict__ x,        // [n, h_in, w_in, C_IN]
    const T* __restrict__ w,        // [c_out, 3, 3, C_IN]
    T* __restrict__ y,              // [n, h_out, w_out, c_out]
    float* partials,                // [slabs, 2, c_out]: mean, Σ (y − mean)²
    float* counts,                  // [tiles, slabs]: pixels
    float* groups,                  // as StatisticsOut of statistics.cuh
    u32* tickets, int group,
    float* __restrict__ running_mean,   // [c_out]
    float* __restrict__ running_var,    // [c_out]
    float* __restrict__ saved,          // [2, c_out]
    float eps, float momentum,
    ConvGeometry g, int slab, int lanes) {
    SHARED_ARRAY(float, memory, (2 * CHANNELS + 1) * BLOCK_THREADS);
    static_assert(K * K * C_IN * BLOCK_CHANNELS <= (2 * CHANNELS + 1) * BLOCK_THREADS, "weights lie where sums do later");
    load_weights<C_IN>(w, g.c_out, lanes, memory);
    MomentsWriter<T, CHANNELS> writer{y, g.c_out, {}};
    const ChannelTile tile = channel_tile<CHANNELS>(g.c_out, lanes, static_cast<int>(blockIdx.x));
    convolve<T, C_IN, STRIDE>(x, memory, writer, g, tile, slab);
    __syncthreads();
    const StatisticsOut out{partials, groups, tickets, group, running_mean, running_var, saved, eps, momentum};
    const SlabPlace place{static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
    finish_slab_moments(tile, writer.moments, out, counts, place, g.c_out, memory);
}

template <typename T, int C_IN, int STRIDE>
__global__ void __launch_bounds__(256, 2) dense_direct_wgrad(
    const T* __restrict__ x,        // [n, h_in, w_in, C_IN]
    const T* __restrict__ dy,       // [n, h_out, w_out, c_out]
    float* __restrict__ partials,   // [slabs, c_out, 3, 3, C_IN]
    ConvGeometry g, int slab, int lanes) {
    SHARED_ARRAY(float, memory, CHANNELS * BLOCK_THREADS);
    // A row of threads has the vectors of channels once for each row of the kernel.
    const int thread = static_cast<int>(threadIdx.x), across = K * lanes, rows = BLOCK_THREADS / across;
    const int k_h = thread % across / lanes;
    const int channel = (static_cast<int>(blockIdx.x) * lanes + thread % lanes) * CHANNELS;
    const ChannelTile tile{across, rows, thread / across, channel, thread / across < rows && channel < g.c_out};
    const Range range = slab_range(patches(g.n, g.h_out, g.w_out, 1, WGRAD_STRIP), slab, static_cast<int>(blockIdx.y));
    const int end = tile.active ? static_cast<int>(range.end) : 0;
    float sums[K * C_IN][CHANNELS] = {};
    for (int index = static_cast<int>(range.begin) + tile.row; index < end; index += tile.rows) {
        const Patch at = patch(index, g.h_out, g.w_out, 1, WGRAD_STRIP);
        const int row = at.first_row * STRIDE + k_h - g.pad_top;
        if (row < 0 || row >= g.h_in) continue;
        float pixels[UNDER<WGRAD_STRIP, STRIDE>][C_IN], gradients[WGRAD_STRIP][CHANNELS] = {};
        load_pixels(x + (static_cast<i64>(at.image) * g.h_in + row) * g.w_in * C_IN, at.column * STRIDE - g.pad_left,
                    g.w_in, pixels);
        const T* const from =
            dy + ((static_cast<i64>(at.image) * g.h_out + at.first_row) * g.w_out + at.column) * g.c_out + channel;
#pragma unroll
        for (int j = 0; j < WGRAD_STRIP; j++) {
            if (at.column + j < g.w_out) load_floats(from + j * g.c_out, gradients[j]);
        }
#pragma unroll
        for (int tap = 0; tap < K * C_IN; tap++) {
#pragma unroll
            for (int j = 0; j < WGRAD_STRIP; j++) {
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) {
                    sums[tap][i] = fma_f(pixels[j * STRIDE + tap / C_IN][tap % C_IN], gradients[j][i], sums[tap][i]);
                }
            }
        }
    }
    float* const to = partials + static_cast<i64>(blockIdx.y) * g.c_out * (K * K * C_IN);
#pragma unroll
    for (int tap = 0; tap < K * C_IN; tap++) {
        sum_rows(tile, sums[tap], memory);
        if (!tile.active || tile.row > 0) continue;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) to[(channel + i) * (K * K * C_IN) + k_h * (K * C_IN) + tap] = sums[tap][i];
    }
}
