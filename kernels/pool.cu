// Global average pooling: y[n, c] = the mean over pixels of x[n, pixels, c]; backward dx (+)= dy / pixels.
//
// x and y are of type T. Bound by memory. A block has a tile of one image's channels (slab.cuh): its rows of threads
// take the pixels in turn and their sums are added in a fixed order.
//
// Blocks have 256 threads; no dynamic shared memory. grid (tiles, n), n ≤ 65535. With VECTOR, N = 16 / sizeof(T), c is
// a multiple of N and tensors are aligned to 16 bytes; without, N = 1. `lanes` and tiles are as slab.cuh says.
//
// global_pool_forward<T, VECTOR>     (const T* x, T* y, int pixels, int c, int lanes)                      6 instances
// global_pool_backward<T, VECTOR>    (const T* dy, T* dx, int accumulate, int pixels, int c, int lanes)    6 instances
//
// instances: global_pool_{forward,backward}<{float,f16,bf16}, {true,false}>

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
