// Sums over pixels, over slabs of pixels and over images: the gradients of biases, and the second stage of those of
// weights, of all convolutions and fully connected layers. Bound by reading. The order of every sum is fixed by the
// launch alone, so that runs repeat bit by bit.
//
//   kernel                     grid                    block   dynamic shared memory
//   bias_gradient<T, VECTOR>   (tiles, slabs, 1)       256     none
//     (const T* dy, float* partials, int slab, int pixels, int c, int lanes)
//     T: float, f16, bf16; VECTOR needs c to be a multiple of 16 bytes of T and dy aligned to 16 bytes. tiles and lanes
//     are as slab.cuh says, with N = 16 bytes of T, or 1 without VECTOR; slabs are those of `BiasConfig` in
//     src/ops/config/lanes.rs. partials is [slabs, c], for sum_slabs<float>; with one slab it may be db itself.
//   sum_slabs<T>               (ceil(len / 32), 1, 1)  256     none
//     (const T* partials, float* sums, int slabs, long long len)
//     sums[i] = Σ over slabs of partials[slab, i]. T: float for second stages; the network's T for the gradient of a
//     bias map, db[h, w, c] = Σ over images of dy (slabs = n, len = h·w·c).
//
// instances: bias_gradient<{float,f16,bf16}, {true,false}>
// instances: sum_slabs<{float,f16,bf16}>

#include "slab.cuh"

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) bias_gradient(
    const T* __restrict__ dy,       // [pixels, c]
    float* __restrict__ partials,   // [slabs, c]
    int slab,                       // pixels per slab
    int pixels, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    SHARED_ARRAY(float, shared, N * BLOCK_THREADS);
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(pixels, slab, static_cast<int>(blockIdx.y));
    float sums[N] = {};
    if (tile.active) {
#pragma unroll 4
        for (i64 pixel = range.begin + tile.row; pixel < range.end; pixel += tile.rows) {
            float values[N];
            load_floats(dy + pixel * c + tile.channel, values);
#pragma unroll
            for (int i = 0; i < N; i++) sums[i] += values[i];
        }
    }
    sum_rows(tile, sums, shared);
    if (tile.active && tile.row == 0) store_floats(partials + static_cast<i64>(blockIdx.y) * c + tile.channel, sums);
}

template <typename T>
__global__ void __launch_bounds__(256) sum_slabs(
    const T* __restrict__ partials,   // [slabs, len]
    float* __restrict__ sums,         // [len]
    int slabs, long long len) {
    SHARED_ARRAY(double, shared, BLOCK_THREADS);
    add_slabs(partials, sums, slabs, len, static_cast<int>(blockIdx.x), shared);
}
