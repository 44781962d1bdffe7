// Padding: y[n, row, col] (+)= x[n, row − top, col − left], 0 outside of x; negative amounts cut the rim off. The gradient
// is the same kernel with the sizes exchanged and the amounts' signs turned.
//
// All tensors are of type T. Bound by memory: a thread has one pixel of the result, N neighbouring channels of it, reads
// at most one pixel and writes each element.
//
// Blocks have 256 threads; no dynamic shared memory. grid (pixels of the result, tiles, n), `LaneConfig::pad_grid` of
// src/ops/config/lanes.rs; n, tiles ≤ 65535. With VECTOR, N = 16 / sizeof(T), c is a multiple of N and tensors are
// aligned to 16 bytes; without, N = 1. `lanes`, tiles and R are as slab.cuh says.
//
// pad<T, VECTOR>   (const T* x, T* y, int accumulate, int h_in, int w_in, int h_out, int w_out, int c, int top, int left,
//                   int lanes)                                                                        6 instances
//
// instances: pad<{float,f16,bf16}, {true,false}>

#include "slab.cuh"

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) pad(
    const T* __restrict__ x,   // [n, h_in, w_in, c]
    T* __restrict__ y,         // [n, h_out, w_out, c]
    int accumulate,            // 1 adds to what is in y
    int h_in, int w_in, int h_out, int w_out, int c, int top, int left, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.y));
    const int pixel = static_cast<int>(blockIdx.x) * tile.rows + tile.row;
    if (!tile.active || pixel >= h_out * w_out) return;
    const int row = pixel / w_out - top, col = pixel % w_out - left;
    const i64 image = static_cast<i64>(blockIdx.z);
    T* const to = y + (image * h_out * w_out + pixel) * c + tile.channel;
    const bool inside = row >= 0 && row < h_in && col >= 0 && col < w_in;
    float values[N] = {};
    if (inside) load_floats(x + ((image * h_in + row) * w_in + col) * c + tile.channel, values);
    if (accumulate != 0) {
        float before[N];
        load_floats(to, before);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += before[i];
    }
    store_floats(to, values);
}
