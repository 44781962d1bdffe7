// Average pooling: y[n, u, c] = the mean of x over the pixels of window u that lie inside the image; backward
// dx (+)= dy of each window a pixel lies in, over the number of pixels that window holds.
//
// All tensors are of type T. Bound by memory: a thread has one pixel of the result, N neighbouring channels of it; forward
// the windows overlap in the caches, backward a pixel reads the few windows it lies in. No two threads write one element,
// and sums run in row-major order.
//
// Blocks have 256 threads; no dynamic shared memory. grid (pixels of the result, tiles, n), `LaneConfig::window_pool_grid`
// of src/ops/config/lanes.rs; n, tiles ≤ 65535. With VECTOR, N = 16 / sizeof(T), c is a multiple of N and tensors are
// aligned to 16 bytes; without, N = 1. `lanes`, tiles and R are as slab.cuh says. ConvGeometry is that of a depthwise
// convolution with the pool's window, its padding smaller than its kernel.
//
// avg_pool_forward<T, VECTOR>     (const T* x, T* y, ConvGeometry, int lanes)                    6 instances
// avg_pool_backward<T, VECTOR>    (const T* dy, T* dx, int accumulate, ConvGeometry, int lanes)  6 instances
//
// instances: avg_pool_{forward,backward}<{float,f16,bf16}, {true,false}>

#include "geometry.cuh"
#include "slab.cuh"

/// The rows or columns of a window that lie inside the image.
struct WindowSpan {
    int begin, end;
};

__device__ __forceinline__ WindowSpan window_span(int at, int stride, int k, int pad, int size) {
    const int first = at * stride - pad;
    return WindowSpan{max_of(first, 0), min_of(first + k, size)};
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) avg_pool_forward(
    const T* __restrict__ x,   // [n, h_in, w_in, c]
    T* __restrict__ y,         // [n, h_out, w_out, c]
    ConvGeometry g, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(g.c_in, lanes, static_cast<int>(blockIdx.y));
    const int pixel = static_cast<int>(blockIdx.x) * tile.rows + tile.row;
    if (!tile.active || pixel >= g.h_out * g.w_out) return;
    const WindowSpan rows = window_span(pixel / g.w_out, g.stride_h, g.k_h, g.pad_top, g.h_in);
    const WindowSpan cols = window_span(pixel % g.w_out, g.stride_w, g.k_w, g.pad_left, g.w_in);
    const i64 to = (static_cast<i64>(blockIdx.z) * g.h_out * g.w_out + pixel) * g.c_in + tile.channel;
    const float scale = one_over((rows.end - rows.begin) * (cols.end - cols.begin));
    const T* line = x + ((static_cast<i64>(blockIdx.z) * g.h_in + rows.begin) * g.w_in + cols.begin) * g.c_in + tile.channel;
    float sums[N] = {};
    for (int row = rows.begin; row < rows.end; row++) {
        const T* from = line;
        for (int col = cols.begin; col < cols.end; col++) {
            float values[N];
            load_floats(from, values);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += values[i];
            from += g.c_in;
        }
        line += static_cast<i64>(g.w_in) * g.c_in;
    }
#pragma unroll
    for (int i = 0; i < N; i++) sums[i] *= scale;
    store_floats(y + to, sums);
}

// Four blocks, as in max_pool_backward: left to itself the assembler spills on sm_70.
template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256, 4) avg_pool_backward(
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    T* __restrict__ dx,         // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(g.c_in, lanes, static_cast<int>(blockIdx.y));
    const int pixel = static_cast<int>(blockIdx.x) * tile.rows + tile.row;
    if (!tile.active || pixel >= g.h_in * g.w_in) return;
    const int row = pixel / g.w_in, col = pixel % g.w_in;
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
        const WindowSpan rows = window_span(out_row, g.stride_h, g.k_h, g.pad_top, g.h_in);
        for (int out_col = first_col; out_col <= last_col; out_col++) {
            const WindowSpan cols = window_span(out_col, g.stride_w, g.k_w, g.pad_left, g.w_in);
            const float scale = one_over((rows.end - rows.begin) * (cols.end - cols.begin));
            float share[N];
            load_floats(gradients + (static_cast<i64>(out_row) * g.w_out + out_col) * g.c_in, share);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += share[i] * scale;
        }
    }
    store_floats(to, sums);
}
