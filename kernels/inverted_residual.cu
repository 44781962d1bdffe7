// The inverted residual as one kernel, for inference: batch norms are folded into weights and biases beforehand.
//
//   h = φ₁(x · w_expandᵀ + b_expand)                     1x1 expansion; left out where w_expand is null, and then h = x
//   d = φ₂(Σ w_depthwise[kh, kw] · h[s·oh + kh − pad, s·ow + kw − pad] + b_depthwise)    zeros around h
//   y = φ₃(d · w_projectᵀ + b_project + residual)        1x1 projection
//
// x `[n, h_in, w_in, c_in]` and y `[n, h_out, w_out, c_out]` are NHWC of type T, and so is the residual, which is x
// itself where the block has one. w_expand `[hidden, c_in]`, w_depthwise `[K, K, hidden]`, w_project `[c_out, hidden]`
// are of type T, biases are float. y overlaps nothing that is read. Launched by
// src/ops/inverted_residual/cuda.rs.
//
// Memory: x is read from global memory (again for every slice of hidden channels and for the halo of a tile, but then
// from the caches) and y is written once. h and d, which are six times as wide and make up most of the traffic of three
// separate kernels, are in shared memory only; they are rounded to T there, as they would be if they were stored. Sums
// are float. What remains is bound by arithmetic: by the products for wide blocks, else by the instructions around them
// and around the depthwise sums.
//
// A block has 8 columns by 8 (STRIDE 1) or 4 (STRIDE 2) rows of output pixels and up to COLUMNS output channels. It
// walks over the hidden channels in slices of 32:
//
//   expand      h of the slice for the pixels under the tile, 128 of them at a time, as a product of conv_gemm.cuh
//   depthwise   a thread has two channels of a column; it reads every row of h once and keeps all sums of the column
//   project     the slice is one step (two for float) along k of the sums of y, which stay in registers over all slices
//
// Vectors are loaded ahead of the step that takes them; single elements, whose gathering takes more registers, are not.
// An element's sum runs over k in the same order whatever the tile, so that equal launches give equal bits. Where c_out
// is above COLUMNS, the blocks of a tile form h and d once each: it costs arithmetic, but no memory.
//
//   inverted_residual<T, K, STRIDE, COLUMNS, VECTOR>    K 3, 5; COLUMNS 64 or 128 for STRIDE 1, 128 for STRIDE 2
//     VECTOR   needs c_in, hidden and c_out to be multiples of 16 bytes of T, and all pointers aligned to 16
//     block    128 threads.   shared memory: static, below 48 KiB
//     grid     (n · ⌈h_out / rows⌉ · ⌈w_out / 8⌉ · ⌈c_out / COLUMNS⌉)
//     (const T* x, const T* w_expand, const float* b_expand, const T* w_depthwise, const float* b_depthwise,
//      const T* w_project, const float* b_project, const T* residual, float limit_1, float slope_1, float limit_2,
//      float slope_2, float limit_3, float slope_3, T* y, ConvGeometry g, int hidden)
//     g has the block's c_in and c_out and the window of the depthwise convolution.
//
// instances: inverted_residual<{float,f16,bf16}, {3,5}, 1, 64, {true,false}>
// instances: inverted_residual<{float,f16,bf16}, {3,5}, 1, 128, true>
// instances: inverted_residual<{float,f16,bf16}, {3,5}, 2, 128, {true,false}>

#include "conv_gemm.cuh"
#include "epilogue.cuh"
#include "geometry.cuh"

/// Hidden channels that are on chip at a time.
constexpr int SLICE = 32;
/// Channels of a thread in the depthwise part: its 128 threads are 16 pairs by the 8 columns of the tile.
constexpr int PAIR = 2;

/// The activation, `slope` 1 for none.
__device__ __forceinline__ float activate(const Clamp& clamp, float x) {
    return clamp.slope != 1.0f ? clamp.apply(x) : x;
}

/// The input pixels under a tile of output pixels, WIDTH to a row, as an operand of the expansion: those outside the
/// image read as zero.
template <typename T, int WIDTH, int PIXELS>
struct Halo {
    using Element = T;
    using Line = int;   // the pixel's index in the image, −1 outside
    using Position = int;
    using OnLoad = AsStored;
    static constexpr bool REUSED = true;

    const T* image;   // [h, w, c]
    int h, w, c;
    int top, left;   // of the halo; may be negative

    __device__ __forceinline__ Line line(int index) const {
        const int row = top + index / WIDTH, column = left + index % WIDTH;
        // A negative row or column is a large unsigned one.
        const bool in_rows = static_cast<u32>(row) < static_cast<u32>(h);
        const bool in_columns = static_cast<u32>(column) < static_cast<u32>(w);
        return in_rows && in_columns && index < PIXELS ? row * w + column : -1;
    }
    __device__ __forceinline__ Position position(int index) const { return index; }
    __device__ __forceinline__ void advance(Position& position, int by) const { position += by; }

    __device__ __forceinline__ Place<T> at(Line line, Position position) const {
        const i64 bytes = wide_product(line, c * static_cast<int>(sizeof(T)));
        return {behind(image + position, bytes), line >= 0 && position < c};
    }
};

/// Stores the activated expansion into shared memory; outside the image it is zero.
template <typename T, class Pixels>
struct HiddenWriter {
    using Output = T;

    T* hidden;           // [pixels, SLICE]
    const float* bias;   // [channels], from the slice's first channel on
    int channels;        // that are left from there; the others' sums are zero
    Clamp clamp;
    const Pixels& pixels;

    template <int N>
    __device__ __forceinline__ void write(int m, int n, float (&values)[N]) const {
        float more[N] = {};
        if (n < channels) load_floats<N>(bias + n, more);
        const bool inside = pixels.line(m) >= 0;
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = inside ? activate(clamp, values[i] + more[i]) : 0.0f;
        store_floats<N>(hidden + m * SLICE + n, values);
    }
};

/// Writes those pixels of a tile, WIDTH to a row, that are in the image.
template <typename T, int WIDTH>
struct TileWriter {
    using Output = T;

    ForwardWriter<T> writer;
    int first;           // the tile's first pixel
    int rows, columns;   // from there on to the image's end
    int w;               // pixels of a row of the image

    template <int N>
    __device__ __forceinline__ void write(int m, int n, float (&values)[N]) const {
        const int row = m / WIDTH, column = m % WIDTH;
        if (row < rows && column < columns) writer.write(first + row * w + column, n, values);
    }
};

/// A pair of channels, of which `count` exist and the others are zero.
template <bool VECTOR, typename U>
__device__ __forceinline__ void load_pair(const U* from, int count, float (&out)[PAIR]) {
    if constexpr (VECTOR) {
        if (count > 0) {
            load_floats(from, out);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < PAIR; i++) out[i] = i < count ? to_float(from[i]) : 0.0f;
}

/// The larger of two sizes, at compile time.
constexpr __device__ int larger(int a, int b) { return a < b ? b : a; }

/// The sizes of a block's work, and its operations on a slice of hidden channels.
template <typename T, int K, int STRIDE, int COLUMNS, bool VECTOR>
struct FusedTile {
    static constexpr int WIDTH = 8, HEIGHT = STRIDE == 1 ? 8 : 4, PIXELS = WIDTH * HEIGHT;
    static constexpr int HALO_WIDTH = (WIDTH - 1) * STRIDE + K, HALO_HEIGHT = (HEIGHT - 1) * STRIDE + K;
    static constexpr int HALO_PIXELS = HALO_WIDTH * HALO_HEIGHT;
    using Pixels = Halo<T, HALO_WIDTH, HALO_PIXELS>;

    // 128 threads have 32 sums each in either product.
    static constexpr int EXPAND_PIXELS = 128, GROUP = 4096 / PIXELS, GROUPS = COLUMNS / GROUP;
    using Expand = Gemm<T, EXPAND_PIXELS, SLICE, Major::Row, Major::Column, VECTOR>;
    using Project = Gemm<T, PIXELS, GROUP, Major::Row, Major::Column, VECTOR>;
    static constexpr int THREADS = Project::THREADS, TILE_K = Project::TILE_K, STEPS = SLICE / TILE_K;
    static_assert(THREADS == SLICE / PAIR * WIDTH && THREADS == Expand::THREADS, "every part uses all threads");
    static_assert(GROUPS * GROUP == COLUMNS && STEPS * TILE_K == SLICE, "tiles divide the work");

    // Shared memory beside h, for one part after the other: a step of the expansion, its sums on their way to h, the
    // operands of the projection, its sums on their way to y.
    static constexpr int LEFT = STEPS * PIXELS * Project::LD_A, RIGHT = COLUMNS * Project::LD_B;
    static constexpr int SIZE = static_cast<int>(sizeof(T));
    static constexpr int STAGE_BYTES = larger(Expand::STAGE, LEFT + RIGHT) * SIZE;
    static constexpr int SUMS_BYTES = larger(Expand::SLICE_BYTES, Project::SLICE_BYTES);
    static constexpr int WORK_BYTES = larger(STAGE_BYTES, SUMS_BYTES);
    static_assert(WORK_BYTES + HALO_PIXELS * SLICE * SIZE <= 48 * 1024, "static shared memory");

    /// h = φ(x·wᵀ + bias) for the slice from channel `slice` on.
    __device__ __forceinline__ static void expand(const Pixels& pixels, const Matrix<T>& w, const float* bias,
                                                  int slice, const Clamp& clamp, T* hidden, u8* work) {
        T* const left_tile = reinterpret_cast<T*>(work);
        T* const right_tile = left_tile + Expand::LINES_A * Expand::LD_A;
        const HiddenWriter<T, Pixels> writer{hidden, bias + slice, w.lines - slice, clamp, pixels};
#pragma unroll 1
        for (int first = 0; first < HALO_PIXELS; first += EXPAND_PIXELS) {
            typename Expand::template StagerA<Pixels> left(pixels, first, 0);
            typename Expand::template StagerB<Matrix<T>> right(w, slice, 0);
            Expand product;
            product.sums.clear();
            const typename Expand::Lane lane;
            const auto fetch = [&] {
                left.fetch();
                right.fetch();
            };
            if constexpr (VECTOR) fetch();
#pragma unroll 1
            for (int k = 0; k < w.length; k += TILE_K) {
                if constexpr (!VECTOR) fetch();
                // Past the barrier nobody reads what was there before.
                __syncthreads();
                left.deposit(left_tile);
                right.deposit(right_tile);
                __syncthreads();
                if constexpr (VECTOR) {
                    if (k + TILE_K < w.length) fetch();
                }
                product.accumulate(left_tile, lane);
            }
            product.write(writer, {first, 0}, HALO_PIXELS, SLICE, work);
        }
    }

    /// h = x, where there is no expansion.
    __device__ __forceinline__ static void copy(const Pixels& pixels, int slice, T* hidden) {
        constexpr int N = VECTOR ? VECTOR_LEN<T> : 1, PER_PIXEL = SLICE / N;
        for (int i = thread_index(); i < HALO_PIXELS * PER_PIXEL; i += THREADS) {
            const int pixel = i / PER_PIXEL, channel = i % PER_PIXEL * N;
            const Place<T> from = pixels.at(pixels.line(pixel), slice + channel);
            const Vector<T, N> values = from.stored ? load_vector<T, N>(from.at) : Vector<T, N>{};
            store_vector<T, N>(hidden + pixel * SLICE + channel, values);
        }
    }

    /// d, as the left operand of the projection: one tile `[PIXELS, LD_A]` per step.
    __device__ __forceinline__ static void depthwise(const T* hidden, const T* w, const float* bias, int slice,
                                                     int channels, const Clamp& clamp, T* left) {
        const int pair = thread_index() % (SLICE / PAIR) * PAIR, column = thread_index() / (SLICE / PAIR);
        const int channel = slice + pair, count = channels - channel;
        float weights[K * K][PAIR], start[PAIR], sums[HEIGHT][PAIR];
#pragma unroll
        for (int tap = 0; tap < K * K; tap++) load_pair<VECTOR>(w + tap * channels + channel, count, weights[tap]);
        load_pair<VECTOR>(bias + channel, count, start);
#pragma unroll
        for (int row = 0; row < HEIGHT; row++) {
#pragma unroll
            for (int i = 0; i < PAIR; i++) sums[row][i] = start[i];
        }
        const T* const from = hidden + column * STRIDE * SLICE + pair;
#pragma unroll
        for (int ih = 0; ih < HALO_HEIGHT; ih++) {
            float in[K][PAIR];
#pragma unroll
            for (int kw = 0; kw < K; kw++) load_floats(from + (ih * HALO_WIDTH + kw) * SLICE, in[kw]);
#pragma unroll
            for (int tap = 0; tap < K * K; tap++) {
                const int kh = tap / K, kw = tap % K, row = (ih - kh) / STRIDE;
                if (kh > ih || (ih - kh) % STRIDE != 0 || row >= HEIGHT) continue;
#pragma unroll
                for (int i = 0; i < PAIR; i++) sums[row][i] += in[kw][i] * weights[tap][i];
            }
        }
        T* const to = left + pair / TILE_K * PIXELS * Project::LD_A + column * Project::LD_A + pair % TILE_K;
#pragma unroll
        for (int row = 0; row < HEIGHT; row++) {
#pragma unroll
            for (int i = 0; i < PAIR; i++) sums[row][i] = activate(clamp, sums[row][i]);
            store_floats(to + row * WIDTH * Project::LD_A, sums[row]);
        }
    }
};

/// Blocks that shall fit a multiprocessor without spilling. The fragments of wmma, gathered elements and a second group of
/// sums take more registers than three would leave, and so do the addresses of an expansion in a single pass, which are
/// kept from slice to slice.
template <typename T, int K, int STRIDE, int COLUMNS, bool VECTOR>
constexpr int RESIDENT_BLOCKS =
    VECTOR && ARCH >= 800 && !IS_FLOAT<T> && (STRIDE == 2 || (K > 3 && COLUMNS == 64)) ? 3 : 2;

template <typename T, int K, int STRIDE, int COLUMNS, bool VECTOR>
__global__ void __launch_bounds__(128, (RESIDENT_BLOCKS<T, K, STRIDE, COLUMNS, VECTOR>)) inverted_residual(
    const T* __restrict__ x,                 // [n, h_in, w_in, c_in]
    const T* __restrict__ w_expand,          // [hidden, c_in], or null where hidden = c_in and h = x
    const float* __restrict__ b_expand,      // [hidden], or null
    const T* __restrict__ w_depthwise,       // [K, K, hidden]
    const float* __restrict__ b_depthwise,   // [hidden]
    const T* __restrict__ w_project,         // [c_out, hidden]
    const float* __restrict__ b_project,     // [c_out]
    const T* __restrict__ residual,          // [n, h_out, w_out, c_out] or null; may be x
    float limit_1, float slope_1,            // of the activation after the expansion; slope 1 for none
    float limit_2, float slope_2,            // after the depthwise convolution
    float limit_3, float slope_3,            // after the projection and the residual
    T* __restrict__ y,                       // [n, h_out, w_out, c_out]
    ConvGeometry g, int hidden) {
    using Tile = FusedTile<T, K, STRIDE, COLUMNS, VECTOR>;
    using Project = typename Tile::Project;
    SHARED_ARRAY(T, slice_of_h, Tile::HALO_PIXELS * SLICE);
    SHARED_ARRAY(u8, work, Tile::WORK_BYTES);
    // Blocks that differ in output channels alone are neighbours, and share x in the cache.
    const int across = divide_up(g.w_out, Tile::WIDTH), down = divide_up(g.h_out, Tile::HEIGHT);
    const int index = static_cast<int>(blockIdx.x) / divide_up(g.c_out, COLUMNS);
    const int first_channel = static_cast<int>(blockIdx.x) % divide_up(g.c_out, COLUMNS) * COLUMNS;
    const int image = index / across / down;
    const int ow = index % across * Tile::WIDTH, oh = index / across % down * Tile::HEIGHT;
    const typename Tile::Pixels pixels{x + static_cast<i64>(image) * g.h_in * g.w_in * g.c_in, g.h_in, g.w_in, g.c_in,
                                       oh * STRIDE - g.pad_top, ow * STRIDE - g.pad_left};

    T* const left = reinterpret_cast<T*>(work);
    T* const right = left + Tile::LEFT;
    using Weights =
        Stager<Matrix<T>, COLUMNS, Tile::TILE_K, Project::LD_B, false, Tile::THREADS, VECTOR, Project::DIRECT>;
    Weights weights(Matrix<T>{w_project, g.c_out, hidden, hidden}, first_channel, 0);
    Project products[Tile::GROUPS];
    const int left_at = opaque(Project::Sums::left_at()), right_at = opaque(Project::Sums::right_at());
#pragma unroll
    for (int j = 0; j < Tile::GROUPS; j++) products[j].sums.clear();
#pragma unroll 1
    for (int slice = 0; slice < hidden; slice += SLICE) {
        if (w_expand != nullptr) {
            Tile::expand(pixels, Matrix<T>{w_expand, hidden, g.c_in, g.c_in}, b_expand, slice, Clamp{limit_1, slope_1},
                         slice_of_h, work);
        } else {
            Tile::copy(pixels, slice, slice_of_h);
        }
        if constexpr (VECTOR) weights.fetch();
        __syncthreads();
        Tile::depthwise(slice_of_h, w_depthwise, b_depthwise, slice, hidden, Clamp{limit_2, slope_2}, left);
#pragma unroll
        for (int step = 0; step < Tile::STEPS; step++) {
            if (!VECTOR || step > 0) weights.fetch();
            if (step > 0) __syncthreads();
            weights.deposit(right);
            __syncthreads();
#pragma unroll
            for (int j = 0; j < Tile::GROUPS; j++) {
                products[j].sums.template accumulate<Tile::TILE_K>(left + left_at + step * Tile::PIXELS * Project::LD_A,
                                                                   right + right_at + j * Tile::GROUP * Project::LD_B);
            }
        }
    }
    const ForwardWriter<T> writer{y, b_project, 1, residual, Clamp{limit_3, slope_3}, g.c_out};
    const TileWriter<T, Tile::WIDTH> tile{writer, (image * g.h_out + oh) * g.w_out + ow, g.h_out - oh, g.w_out - ow,
                                          g.w_out};
#pragma unroll
    for (int j = 0; j < Tile::GROUPS; j++) {
        products[j].write(tile, {0, first_channel + j * Tile::GROUP}, Tile::PIXELS, g.c_out, work);
    }
}
