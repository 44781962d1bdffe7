// Statistics of a batch over images and pixels. A block has the moments of its slab of pixels, and the last block to end merges
// what all of them wrote, so that there is no second launch. Which block that is depends on timing, what it adds and in which order does
// not, so that equal launches give equal bits.
//
// A kernel cuts its pixels into slabs and its channels into tiles. The blocks of a tile are merged in two levels: the last
// block of each `group` of neighbouring slabs merges the group, mostly while others still work, and the last of these merges
// the groups. With about as many groups as slabs in a group, what nobody else works beside is short.

#pragma once

#include "reduce.cuh"
#include "slab.cuh"

/// Moments of N columns over the rows that a thread has, about the first of them, so that a large mean does not swallow
/// the variance.
template <int N>
struct Moments {
    float origin[N] = {}, sums[N] = {}, squares[N] = {};
    int count = 0;

    __device__ __forceinline__ void add(const float (&values)[N]) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (count == 0) origin[i] = values[i];
            const float difference = values[i] - origin[i];
            sums[i] += difference;
            squares[i] += difference * difference;
        }
        count++;
    }

    /// The same about another origin.
    __device__ __forceinline__ void move_to(const float (&other)[N]) {
        if (count == 0) return;
        const float rows = static_cast<float>(count);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float shift = origin[i] - other[i];
            squares[i] += shift * (2.0f * sums[i] + rows * shift);
            sums[i] += rows * shift;
            origin[i] = other[i];
        }
    }
};

/// Mean and centred second moment of `count` numbers from their sums about an origin, one `stride` behind the other.
__device__ __forceinline__ void store_moments(
    float origin, float sum, float squares, float count, float* to, int stride) {
    const float share = 1.0f / count;
    to[0] = origin + sum * share;
    // Rounding may leave it a little below zero; not-a-number stays.
    const float moment = squares - sum * sum * share;
    to[stride] = moment < 0.0f ? 0.0f : moment;
}

/// Where a batch's statistics go, and memory for both levels.
struct StatisticsOut {
    float* partials;   // [slabs, 2, c]: mean, Σ (y − mean)²
    float* groups;     // [⌈slabs / group⌉, 3, c]: mean, Σ (y − mean)², pixels
    u32* tickets;      // [tiles, ⌈slabs / group⌉ + 1]: zero before and after the launch
    int group;
    float* running_mean;   // [c]
    float* running_var;    // [c]
    float* saved;          // [2, c]: μ, ρ
    float eps, momentum;
};

/// Whether this block is the last of `blocks` to come here with a ticket. It then sees what all of them wrote before. The
/// ticket is zero before the first and behind the last. `shared` is a word. All threads of the block take part.
__device__ __forceinline__ bool is_last_block(u32* ticket, int blocks, void* shared) {
    u32* const flag = static_cast<u32*>(shared);
    // What each thread wrote is on its way to the others before the block says that it was here.
    __threadfence();
    __syncthreads();
    if (thread_rank() == 0) {
        const bool last = atomicAdd(ticket, 1u) + 1 == static_cast<u32>(blocks);
        if (last) *ticket = 0;
        *flag = last;
    }
    __syncthreads();
    const bool last = *flag != 0;
    __threadfence();
    __syncthreads();
    return last;
}

/// Adds each lane's values over a block's rows, in their order; all rows get the sums. `shared` is `[N, THREADS]`. All
/// threads of the block take part: each adds one column.
template <int THREADS, int N>
__device__ __forceinline__ void sum_rows_in_order(const ChannelTile& tile, double (&values)[N], void* shared) {
    double* const memory = static_cast<double*>(shared);
    const int thread = thread_rank(), lane = thread % tile.lanes, columns = N * tile.lanes;
    if (tile.row < tile.rows) {
#pragma unroll
        for (int i = 0; i < N; i++) memory[tile.row * columns + i * tile.lanes + lane] = values[i];
    }
    __syncthreads();
    for (int column = thread; column < columns; column += THREADS) {
        double sum = memory[column];
#pragma unroll 4
        for (int row = 1; row < tile.rows; row++) sum += memory[row * columns + column];
        memory[column] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; i++) values[i] = memory[i * tile.lanes + lane];
    __syncthreads();
}

/// Moments of many pixels, of N channels of the first row's threads.
template <int N>
struct MergedMoments {
    double mean[N], moment[N], count;
};

/// Merges the moments `begin` .. `end` of `from` `[.., stride]`, means first and `c` further second moments, of which entry i
/// has count(i) pixels. Distances are from the first one's mean, so that one reading gives the moment about the whole mean too.
/// `shared` is `[N, THREADS]` doubles. All threads of the block take part.
template <int THREADS, int N, class Count>
__device__ __forceinline__ MergedMoments<N> merge_moments(const ChannelTile& tile, const float* from, int stride, int c,
                                                          int begin, int end, Count count, void* shared) {
    float origin[N] = {};
    double sums[N] = {}, squares[N] = {}, pixels[1] = {};
    if (tile.active) {
        const float* const column = from + tile.channel;
        load_floats(column + static_cast<i64>(begin) * stride, origin);
#pragma unroll 2
        for (int entry = begin + tile.row; entry < end; entry += tile.rows) {
            float mean[N], moment[N];
            load_floats(column + static_cast<i64>(entry) * stride, mean);
            load_floats(column + static_cast<i64>(entry) * stride + c, moment);
            const double here = count(entry);
            pixels[0] += here;
#pragma unroll
            for (int i = 0; i < N; i++) {
                const double distance = static_cast<double>(mean[i]) - static_cast<double>(origin[i]);
                sums[i] += here * distance;
                squares[i] += static_cast<double>(moment[i]) + here * distance * distance;
            }
        }
    }
    sum_rows_in_order<THREADS>(tile, sums, shared);
    sum_rows_in_order<THREADS>(tile, squares, shared);
    sum_rows_in_order<THREADS>(tile, pixels, shared);
    MergedMoments<N> merged;
    merged.count = pixels[0];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const double shift = sums[i] / pixels[0], moment = squares[i] - sums[i] * shift;
        merged.mean[i] = static_cast<double>(origin[i]) + shift;
        // Rounding may leave it a little below zero; not-a-number stays.
        merged.moment[i] = moment < 0.0 ? 0.0 : moment;
    }
    return merged;
}

/// Merges the moments of a tile of channels where this block is the last to have written its own, and writes mean and 1 / √(σ² + ε),
/// and the running ones. This block has slab `slab` of `slabs`; `pixels(slab)` says how many each has. `shared` is `[N, THREADS]`
/// doubles. All threads of the block take part, the first row of which has the tile's channels.
template <int THREADS, int N, class Pixels>
__device__ __forceinline__ void finish_statistics(const StatisticsOut& out, const ChannelTile& tile, int tile_index,
                                                  int slab, int slabs, int c, Pixels pixels, void* shared) {
    const int groups = divide_up(slabs, out.group), group = slab / out.group;
    const int begin = group * out.group, end = min_of(begin + out.group, slabs);
    u32* const tickets = out.tickets + tile_index * (groups + 1);
    if (!is_last_block(tickets + group, end - begin, shared)) return;
    MergedMoments<N> merged = merge_moments<THREADS, N>(tile, out.partials, 2 * c, c, begin, end, pixels, shared);
    if (groups > 1) {
        if (tile.active && tile.row == 0) {
            float* const to = out.groups + static_cast<i64>(group) * 3 * c + tile.channel;
#pragma unroll
            for (int i = 0; i < N; i++) {
                to[i] = static_cast<float>(merged.mean[i]);
                to[c + i] = static_cast<float>(merged.moment[i]);
                to[2 * c + i] = static_cast<float>(merged.count);
            }
        }
        if (!is_last_block(tickets + groups, groups, shared)) return;
        merged = merge_moments<THREADS, N>(tile, out.groups, 3 * c, c, 0, groups, [&](int entry) {
            return static_cast<double>(out.groups[static_cast<i64>(entry) * 3 * c + 2 * c + tile.channel]);
        }, shared);
    }
    if (!tile.active || tile.row > 0) return;
    const double keep = 1.0 - static_cast<double>(out.momentum), momentum = static_cast<double>(out.momentum);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int channel = tile.channel + i;
        const double mean = merged.mean[i], unbiased = merged.moment[i] / max_of(merged.count - 1.0, 1.0);
        out.running_mean[channel] = static_cast<float>(keep * out.running_mean[channel] + momentum * mean);
        out.running_var[channel] = static_cast<float>(keep * out.running_var[channel] + momentum * unbiased);
        out.saved[channel] = static_cast<float>(mean);
        out.saved[c + channel] = 1.0f / sqrt_f(static_cast<float>(merged.moment[i] / merged.count + out.eps));
    }
}

/// Which tile of channels and which slab a block has, and how many slabs there are.
struct SlabPlace {
    int tile, slab, slabs;
};

/// Adds the moments of a block's threads, which share a slab of pixels, and of all slabs; the pixels of a slab go to `counts`
/// `[tiles, slabs]`. The first row of threads has pixels. `memory` is `[2·N + 1, 256]`. All threads of the block take part.
template <int N>
__device__ __forceinline__ void finish_slab_moments(const ChannelTile& tile, Moments<N>& moments,
                                                    const StatisticsOut& out, float* counts, const SlabPlace& place,
                                                    int c, float* memory) {
    const int lane = static_cast<int>(threadIdx.x) % tile.lanes;
    if (tile.active && tile.row == 0) {
#pragma unroll
        for (int i = 0; i < N; i++) memory[lane * N + i] = moments.origin[i];
    }
    __syncthreads();
    float origin[N];
#pragma unroll
    for (int i = 0; i < N; i++) origin[i] = memory[lane * N + i];
    moments.move_to(origin);
    float sums[2 * N + 1];
#pragma unroll
    for (int i = 0; i < N; i++) {
        sums[i] = moments.sums[i];
        sums[N + i] = moments.squares[i];
    }
    sums[2 * N] = static_cast<float>(moments.count);
    sum_rows(tile, sums, memory);
    float* const of_tile = counts + static_cast<i64>(place.tile) * place.slabs;
    if (tile.active && tile.row == 0) {
        const float count = sums[2 * N];
        float* const to = out.partials + static_cast<i64>(place.slab) * 2 * c + tile.channel;
#pragma unroll
        for (int i = 0; i < N; i++) store_moments(origin[i], sums[i], sums[N + i], count, to + i, c);
        if (lane == 0) of_tile[place.slab] = count;
    }
    finish_statistics<BLOCK_THREADS, N>(out, tile, place.tile, place.slab, place.slabs, c, [&](int slab) {
        return static_cast<double>(of_tile[slab]);
    }, memory);
}
