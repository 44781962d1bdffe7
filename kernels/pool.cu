// Pooling. Global average: y[n, c] = the mean over pixels of x[n, pixels, c]; backward dx (+)= dy / pixels.
// Maximum: y[n, u, c] = the largest x of window u, where padding is −∞ and not-a-number wins over all; backward gives dy
// of each window to its first largest pixel in row-major order.
//
// All tensors are of type T. Bound by memory. A block of the global pool has a tile of one image's channels (slab.cuh):
// its rows of threads take the pixels in turn and their sums are added in a fixed order. In the max-pools a thread has
// one pixel of the result: forward a window's, backward an input pixel's. The latter finds the winner of each window it
// lies in from x again, mostly out of the caches, so that nothing is stored by the forward pass and no two threads
// write one element; it adds over the windows in row-major order.
//
// Blocks have 256 threads; no dynamic shared memory. grid (tiles, n) for the global pool, (pixels of the result, tiles, n)
// for the max-pools: `LaneConfig` of src/ops/config/lanes.rs has both; n, tiles ≤ 65535. With VECTOR, N = 16 / sizeof(T),
// c is a multiple of N and tensors are aligned to 16 bytes; without, N = 1. `lanes`, tiles and R are as slab.cuh says.
// ConvGeometry is that of a depthwise convolution with the pool's window, its padding smaller than its kernel.
//
// global_pool_forward<T, VECTOR>     (const T* x, T* y, int pixels, int c, int lanes)                      6 instances
// global_pool_backward<T, VECTOR>    (const T* dy, T* dx, int accumulate, int pixels, int c, int lanes)    6 instances
// max_pool_forward<T, VECTOR>        (const T* x, T* y, ConvGeometry, int lanes)                           6 instances
// max_pool_backward<T, VECTOR>       (const T* x, const T* dy, T* dx, int accumulate, ConvGeometry, int lanes)
//                                                                                                          6 instances
//
// instances: {global,max}_pool_{forward,backward}<{float,f16,bf16}, {true,false}>

#include "geometry.cuh"
#include "slab.cuh"

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) global_pool_forward(
    const T* __restrict__ x,   // [n, pixels, c]
    T* __restrict__ y,         // [n, c]
    int pixels, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    SHARED_ARRAY(float, shared, N * BLOCK_THREADS);
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const T* const image = x + static_cast<i64>(blockIdx.y) * pixels * c + tile.channel;
    float sums[N] = {};
    if (tile.active) {
#pragma unroll 4
        for (int pixel = tile.row; pixel < pixels; pixel += tile.rows) {
            float values[N];
            load_floats(image + static_cast<i64>(pixel) * c, values);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += values[i];
        }
    }
    sum_rows(tile, sums, shared);
    if (!tile.active || tile.row > 0) return;
    const float scale = 1.0f / static_cast<float>(pixels);
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] *= scale;
    store_floats(y + static_cast<i64>(blockIdx.y) * c + tile.channel, sums);
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) global_pool_backward(
    const T* __restrict__ dy,   // [n, c]
    T* __restrict__ dx,         // [n, pixels, c]
    int accumulate,             // 1 adds to what is in dx
    int pixels, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    if (!tile.active) return;
    T* const image = dx + static_cast<i64>(blockIdx.y) * pixels * c + tile.channel;
    const float scale = 1.0f / static_cast<float>(pixels);
    float share[N];
    load_floats(dy + static_cast<i64>(blockIdx.y) * c + tile.channel, share);
#pragma unroll
    for (int i = 0; i < N; i++) share[i] *= scale;
    for (int pixel = tile.row; pixel < pixels; pixel += tile.rows) {
        T* const to = image + static_cast<i64>(pixel) * c;
        float values[N] = {};
        if (accumulate != 0) load_floats(to, values);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += share[i];
        store_floats(to, values);
    }
}

/// The rows or columns of a window that lie inside the image.
struct WindowRange {
    int begin, end;
};

__device__ __forceinline__ WindowRange window_range(int at, int stride, int k, int pad, int size) {
    const int first = at * stride - pad;
    return WindowRange{max_of(first, 0), min_of(first + k, size)};
}

/// Whether a value takes the place of the largest so far.
__device__ __forceinline__ bool wins(float x, float best) { return x > best || x != x; }

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) max_pool_forward(
    const T* __restrict__ x,   // [n, h_in, w_in, c]
    T* __restrict__ y,         // [n, h_out, w_out, c]
    ConvGeometry g, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(g.c_in, lanes, static_cast<int>(blockIdx.y));
    const int pixel = static_cast<int>(blockIdx.x) * tile.rows + tile.row;
    if (!tile.active || pixel >= g.h_out * g.w_out) return;
    const WindowRange rows = window_range(pixel / g.w_out, g.stride_h, g.k_h, g.pad_top, g.h_in);
    const WindowRange cols = window_range(pixel % g.w_out, g.stride_w, g.k_w, g.pad_left, g.w_in);
    const T* const image = x + static_cast<i64>(blockIdx.z) * g.h_in * g.w_in * g.c_in + tile.channel;
    float best[N];
#pragma unroll
    for (int i = 0; i < N; i++) best[i] = -INFINITY_F;
    for (int row = rows.begin; row < rows.end; row++) {
        for (int col = cols.begin; col < cols.end; col++) {
            float values[N];
            load_floats(image + (static_cast<i64>(row) * g.w_in + col) * g.c_in, values);
#pragma unroll
            for (int i = 0; i < N; i++) best[i] = wins(values[i], best[i]) ? values[i] : best[i];
        }
    }
    const i64 to = static_cast<i64>(blockIdx.z) * g.h_out * g.w_out + pixel;
    store_floats(y + to * g.c_in + tile.channel, best);
}

// Four blocks: left to itself the assembler spills for a full multiprocessor.
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256, 4) max_pool_backward(
    const T* __restrict__ x,    // [n, h_in, w_in, c]
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    T* __restrict__ dx,         // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(g.c_in, lanes, static_cast<int>(blockIdx.y));
    const int pixel = static_cast<int>(blockIdx.x) * tile.rows + tile.row;
    if (!tile.active || pixel >= g.h_in * g.w_in) return;
    const int row = pixel / g.w_in, col = pixel % g.w_in;
    const T* const image = x + static_cast<i64>(blockIdx.z) * g.h_in * g.w_in * g.c_in + tile.channel;
    const T* const gradients = dy + static_cast<i64>(blockIdx.z) * g.h_out * g.w_out * g.c_in + tile.channel;
    T* const to = dx + (static_cast<i64>(blockIdx.z) * g.h_in * g.w_in + pixel) * g.c_in + tile.channel;
    float sums[N] = {};
    if (accumulate != 0) load_floats(to, sums);
    // Windows that hold this pixel: those that begin at most k − 1 before it, counted in the padded image.
    const int first_row = divide_up(max_of(row + g.pad_top - g.k_h + 1, 0), g.stride_h);
    const int first_col = divide_up(max_of(col + g.pad_left - g.k_w + 1, 0), g.stride_w);
    const int last_row = min_of((row + g.pad_top) / g.stride_h, g.h_out - 1);
    const int last_col = min_of((col + g.pad_left) / g.stride_w, g.w_out - 1);
    for (int out_row = first_row; out_row <= last_row; out_row++) {
        const WindowRange rows = window_range(out_row, g.stride_h, g.k_h, g.pad_top, g.h_in);
        for (int out_col = first_col; out_col <= last_col; out_col++) {
            const WindowRange cols = window_range(out_col, g.stride_w, g.k_w, g.pad_left, g.w_in);
            float best[N];
            int winner[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                best[i] = -INFINITY_F;
                winner[i] = rows.begin * g.w_in + cols.begin;
            }
#pragma unroll 1
            for (int r = rows.begin; r < rows.end; r++) {
#pragma unroll 1
                for (int c = cols.begin; c < cols.end; c++) {
                    float values[N];
                    load_floats(image + (static_cast<i64>(r) * g.w_in + c) * g.c_in, values);
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        if (wins(values[i], best[i])) {
                            best[i] = values[i];
                            winner[i] = r * g.w_in + c;
                        }
                    }
                }
            }
            float share[N];
            load_floats(gradients + (static_cast<i64>(out_row) * g.w_out + out_col) * g.c_in, share);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += winner[i] == pixel ? share[i] : 0.0f;
        }
    }
    store_floats(to, sums);
}
