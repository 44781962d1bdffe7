// How blocks share an activation `[pixels, c]`, and sums over it in two stages.
//
// The 256 threads of a block are spread over `lanes` neighbouring vectors of N channels and over as many rows of
// threads as that leaves, so that any channel count fills the block: no warp is padded. The launch chooses the tiles
// that cover all channels and the lanes of each (`Lanes` of src/ops/config/lanes.rs), and so R = ⌊256 / lanes⌋ rows.
//
// A sum over pixels cuts them into slabs of `slab` pixels; the last may be shorter. Each block sums one slab, in an
// order that is fixed by the launch, and a second kernel adds the slabs, so that equal launches give equal bits.

#pragma once

#include "vector.cuh"

/// Threads of a block that is spread over channels, and of a block that adds slabs.
constexpr int BLOCK_THREADS = 256;

/// Channels that a thread has in a kernel bound by memory alone.
template <typename T, bool VECTOR>
constexpr int LANE_CHANNELS = VECTOR ? VECTOR_LEN<T> : 1;

/// A thread's place in a block that covers `lanes` vectors of channels.
struct ChannelTile {
    int lanes, rows;
    int row;
    /// First channel of the thread.
    int channel;
    /// Whether there is such a channel, and a whole row of threads to hold it.
    bool active;
};

/// The place in tile `index` of `c` channels.
template <int N>
__device__ __forceinline__ ChannelTile channel_tile(int c, int lanes, int index) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rows = BLOCK_THREADS / lanes, row = thread / lanes;
    const int channel = (index * lanes + thread % lanes) * N;
    return ChannelTile{lanes, rows, row, channel, row < rows && channel < c};
}

/// A run of pixels, of slabs or of anything else that is counted.
struct Range {
    i64 begin, end;
};

/// Slab `index` of 0..units.
__device__ __forceinline__ Range slab_range(i64 units, i64 slab, int index) {
    return Range{slab * index, min_of(slab * (index + 1), units)};
}

/// Adds each lane's values over the block's rows; the first row has the sums. `shared` is `[N · 256]`. All threads of
/// the block take part.
template <int N>
__device__ __forceinline__ void sum_rows(const ChannelTile& tile, float (&values)[N], float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    for (int count = tile.rows, half; count > 1; count = half) {
        half = divide_up(count, 2);
        if (tile.row >= half && tile.row < count) {
#pragma unroll
            for (int i = 0; i < N; i++) shared[i * BLOCK_THREADS + thread] = values[i];
        }
        // One barrier a round is enough: the next round writes rows that this one does not read.
        __syncthreads();
        if (tile.row + half < count) {
#pragma unroll
            for (int i = 0; i < N; i++) values[i] += shared[i * BLOCK_THREADS + thread + half * tile.lanes];
        }
    }
}

/// The sums of term(slab)[0..N] over all slabs for one of a block's COLUMNS columns, formed by the 256 / COLUMNS threads
/// whose index is the column's modulo COLUMNS: each takes a segment of the slabs. `shared` is `[N, 256]`. All threads of
/// the block take part, and all threads of a column get the sums.
template <int COLUMNS, int N, typename Term>
__device__ __forceinline__ void sum_over_slabs(int slabs, double* shared, double (&sums)[N], Term term) {
    constexpr int SEGMENTS = BLOCK_THREADS / COLUMNS;
    const int thread = static_cast<int>(threadIdx.x);
    const int segment = divide_up(slabs, SEGMENTS), first = thread / COLUMNS * segment;
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = 0;
#pragma unroll 4
    for (int slab = first; slab < min_of(first + segment, slabs); slab++) {
        double terms[N];
        term(slab, terms);
#pragma unroll
        for (int n = 0; n < N; n++) sums[n] += terms[n];
    }
#pragma unroll
    for (int n = 0; n < N; n++) shared[n * BLOCK_THREADS + thread] = sums[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        sums[n] = 0;
        for (int i = 0; i < SEGMENTS; i++) sums[n] += shared[n * BLOCK_THREADS + i * COLUMNS + thread % COLUMNS];
    }
    __syncthreads();
}

/// Columns of a block that adds slabs, neighbours of a warp.
constexpr int SLAB_COLUMNS = WARP_SIZE;

/// sums[i] = Σ over slabs of partials[slab, i], of the columns that are block `block`'s. `shared` is `[256]`. All threads of the
/// block take part.
template <typename T>
__device__ __forceinline__ void add_slabs(const T* __restrict__ partials, float* __restrict__ sums, int slabs, i64 len,
                                          int block, double* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const i64 at = static_cast<i64>(block) * SLAB_COLUMNS + thread % SLAB_COLUMNS;
    // The columns past the end read the last element, and are not written.
    const T* const column = partials + min_of(at, len - 1);
    double sum[1];
    sum_over_slabs<SLAB_COLUMNS>(slabs, shared, sum, [&](int slab, double (&term)[1]) {
        term[0] = to_float(column[slab * len]);
    });
    if (at < len && thread < SLAB_COLUMNS) sums[at] = static_cast<float>(sum[0]);
}

/// The sum of `values` `[count]`, formed by a block of 256 threads, all of which get it. `shared` is `[256]`.
__device__ __forceinline__ double sum_array(const float* __restrict__ values, i64 count, double* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    double sum = 0;
#pragma unroll 4
    for (i64 i = thread; i < count; i += BLOCK_THREADS) sum += static_cast<double>(values[i]);
    shared[thread] = sum;
    for (int half = BLOCK_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) shared[thread] += shared[thread + half];
    }
    __syncthreads();
    sum = shared[0];
    __syncthreads();
    return sum;
}
