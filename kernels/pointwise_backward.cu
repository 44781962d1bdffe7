// Both gradients of a pointwise convolution between batch-norms (on_load.cuh) of one walk over dy, which is formed once for
// them (level D of docs/kernels.md a): for products with few weights, whose sums a block keeps in registers.
//
//   dx[pixel, c_in] = Σ_c_out dy[pixel, c_out]·w[c_out, c_in]      dw[c_out, c_in] = Σ_pixel dy[pixel, c_out]·x[pixel, c_in]
//
// A block has TILE_N channels of x and a slab of pixels, which it takes 64 at a time (32 in float), and of those the channels
// of dy in chunks of 64. A chunk of dy is staged in shared memory once, as it lies in memory, and multiplied twice: its rows with the
// chunk's lines of w, and its columns with x. The sums of dx are complete behind the last chunk and leave through shared
// memory, as those of pointwise.cu do; the sums of dw stay in registers over the slab, CHUNKS times 16 of them in a thread.
// While a chunk is multiplied the next is loaded to registers, on every architecture: dy takes two loads an element, so that
// 16 KB a block are under way.
//
// pointwise_bn_backward<T, TILE_N, CHUNKS>
//   (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//    const float* x_slope_at, const T* dz, const T* y, const float* coefficients [4, c_out], float limit, float slope,
//    const float* slope_at, const T* w, T* dx, int accumulate, float* dx_sums [slabs, 2, c_in], float* scores [blocks],
//    float* partials [slabs, c_out, c_in], int slab, int pixels, int c_in, int c_out)
//
//   channels   c_in and c_out are multiples of 16 bytes of T, pointers are aligned to 16, and c_out <= 64·CHUNKS
//   block      4·TILE_N threads.   dynamic shared memory: none
//   grid       (tiles of c_in, slabs, 1), a slab being a multiple of 32 pixels
//
// The sums of dw over pixels, and those that the batch-norm before needs, go through partial sums by slab, as everywhere
// (slab.cuh). `GemmConfig` of src/ops/config/gemm.rs has the choice of tile and slab.
//
// instances: pointwise_bn_backward<{float,f16,bf16}, 32, {1,3}>
// instances: pointwise_bn_backward<{float,f16,bf16}, 64, {1,3,6}>

#include "conv_gemm.cuh"
#include "epilogue.cuh"

/// Channels of dy that are multiplied at a time.
constexpr int CHUNK = 64;

/// What a block stages, and its products.
template <typename T, int TILE_N>
struct GradientTiles {
    static constexpr int THREADS = 4 * TILE_N;
    /// Pixels that are multiplied at a time; floats take twice the registers on their way to shared memory.
    static constexpr int PIXELS = IS_FLOAT<T> ? 32 : 64;
    static constexpr int LD_DY = CHUNK + VECTOR_LEN<T>, LD_N = TILE_N + VECTOR_LEN<T>;

    template <int TILE_M, Major A>
    using Sums = typename Either<IS_FLOAT<T>, FloatSums<TILE_M, TILE_N, A, Major::Row, LD_DY, LD_N, THREADS>,
                                 TensorSums<T, TILE_M, TILE_N, A, Major::Row, LD_DY, LD_N, THREADS>>::Type;
    // A line of a chunk is a pixel: dx sums along the lines, dw across them.
    using InputSums = Sums<PIXELS, Major::Row>;
    using WeightSums = Sums<CHUNK, Major::Column>;

    using GradientStager = Stager<Matrix<T, Formed<T>>, PIXELS, CHUNK, LD_DY, false, THREADS, true>;
    using WeightStager = Stager<Matrix<T>, CHUNK, TILE_N, LD_N, false, THREADS, true>;
    using InputStager = Stager<Matrix<T, Normalised<T>>, PIXELS, TILE_N, LD_N, false, THREADS, true>;

    // Where the tiles begin. Weights lie last, since a block keeps them where there is one chunk.
    static constexpr int X = PIXELS * LD_DY, W = X + PIXELS * LD_N, ELEMENTS = W + CHUNK * LD_N;
    static constexpr int TILE_BYTES = ELEMENTS * static_cast<int>(sizeof(T));
    // Sums leave through the same memory when the products are over: those of dx beside the weights.
    static constexpr int COLUMNS = VECTOR_LEN<T>, ROW_GROUPS = THREADS * COLUMNS / TILE_N;
    static_assert(slice_bytes<InputSums, TILE_N> <= W * static_cast<int>(sizeof(T)), "dx passes through the tiles");
    static_assert(slice_bytes<WeightSums, TILE_N> <= TILE_BYTES, "dw passes through the tiles");
    static_assert(2 * ROW_GROUPS * sums_stride(TILE_N) * 4 <= TILE_BYTES, "sums over rows pass through the tiles");
    static_assert(TILE_BYTES <= 48 * 1024, "static shared memory");
};

template <typename T, int TILE_N, int CHUNKS>
__global__ void __launch_bounds__(4 * TILE_N, TILE_N == 64 && CHUNKS == 1 ? 2 : 1) pointwise_bn_backward(
    const T* __restrict__ x,                // [pixels, c_in]
    const float* __restrict__ x_gamma,      // [c_in] or null where x is stored
    const float* __restrict__ x_beta,       // [c_in] or null
    const float* __restrict__ x_saved,      // [2, c_in] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at,   // [1] or null
    const T* __restrict__ dz,               // [pixels, c_out]: dy where it is stored
    const T* __restrict__ y,                // [pixels, c_out] or null
    const float* __restrict__ coefficients, // [4, c_out] or null where dy is stored
    float limit, float slope,
    const float* __restrict__ slope_at,     // [1] or null
    const T* __restrict__ w,                // [c_out, c_in]
    T* __restrict__ dx,                     // [pixels, c_in]
    int accumulate,                         // 1 adds to what is in dx; without γ
    float* __restrict__ dx_sums,            // [slabs, 2, c_in] or null: Σ g, Σ g·(x − μ)
    float* __restrict__ scores,             // [blocks] or null
    float* __restrict__ partials,           // [slabs, c_out, c_in]
    int slab,                               // pixels per slab
    int pixels, int c_in, int c_out) {
    using Tiles = GradientTiles<T, TILE_N>;
    SHARED_ARRAY(u8, shared, Tiles::TILE_BYTES);
    T* const dy_tile = reinterpret_cast<T*>(shared);
    T* const w_tile = dy_tile + Tiles::W;
    T* const x_tile = dy_tile + Tiles::X;
    const int n = static_cast<int>(blockIdx.x) * TILE_N;
    const int begin = static_cast<int>(blockIdx.y) * slab, end = min_of(begin + slab, pixels);
    const Clamp x_clamp = make_clamp(x_limit, x_slope, x_slope_at);
    const Normalised<T> x_form{x_gamma, x_beta, x_saved, x_clamp, c_in};
    const Formed<T> dy_form{y, coefficients, make_clamp(limit, slope, slope_at), c_out};
    typename Tiles::GradientStager gradients({dz, end, c_out, c_out, dy_form});
    typename Tiles::WeightStager weights({w, c_out, c_in, c_in, {}});
    typename Tiles::InputStager inputs({x, end, c_in, c_in, x_form});

    // Loads what is multiplied next: x once for all chunks of its pixels, the weights of a single chunk once.
    constexpr bool KEEPS_WEIGHTS = CHUNKS == 1;
    constexpr int AT_ONCE = TILE_N == 64 && CHUNKS == 1 ? 1 : 2;   // two would spill in half a multiprocessor's registers
    const auto fetch = [&](int pixel, int chunk) {
        gradients.go_to(pixel, chunk * CHUNK);
        gradients.fetch();
        if constexpr (!KEEPS_WEIGHTS) {
            weights.go_to(chunk * CHUNK, n);
            weights.fetch();
        }
        if (chunk > 0) return;
        inputs.go_to(pixel, n);
        inputs.fetch();
    };
    using InputSums = typename Tiles::InputSums;
    using WeightSums = typename Tiles::WeightSums;
    InputSums dx_part;
    WeightSums dw[CHUNKS];
    const T *const dx_left = dy_tile + InputSums::left_at(), *const dx_right = w_tile + InputSums::right_at();
    const T *const dw_left = dy_tile + WeightSums::left_at(), *const dw_right = x_tile + WeightSums::right_at();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) dw[chunk].clear();
    GradientSums<Tiles::COLUMNS> sums;
    const int column = thread_index() % (TILE_N / Tiles::COLUMNS) * Tiles::COLUMNS;
    if constexpr (KEEPS_WEIGHTS) {
        weights.go_to(0, n);
        weights.fetch();
        weights.deposit(w_tile);
    }
    if (begin < end) fetch(begin, 0);
    for (int pixel = begin; pixel < end; pixel += Tiles::PIXELS) {
        dx_part.clear();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int rest = c_out - chunk * CHUNK;
            if (rest <= 0) break;
            // The products before have left the tiles.
            __syncthreads();
            gradients.deposit(dy_tile);
            if constexpr (!KEEPS_WEIGHTS) weights.deposit(w_tile);
            if (chunk == 0) inputs.deposit(x_tile);
            __syncthreads();
            if (rest > CHUNK) {
                fetch(pixel, chunk + 1);
            } else if (pixel + Tiles::PIXELS < end) {
                fetch(pixel + Tiles::PIXELS, 0);
            }
            // Channels past the end are not multiplied.
#pragma unroll
            for (int k = 0; k < CHUNK; k += 16) {
                if (k < rest) dx_part.template accumulate<16>(dx_left + k, dx_right + k * Tiles::LD_N);
            }
            if (dw[chunk].reaches(rest)) dw[chunk].template accumulate<Tiles::PIXELS>(dw_left, dw_right);
        }
        const Origin at{pixel, n};
        if (x_gamma == nullptr) {
            InputGradientWriter<T> writer{dx, accumulate != 0, c_in, {}};
            write_slices<TILE_N, Tiles::THREADS, true>(dx_part, writer, at, end, c_in, shared);
            continue;
        }
        // Coefficients are read again for each tile, where keeping them would take registers from the sums.
        const int channel = opaque(min_of(n + column, c_in - Tiles::COLUMNS));
        MaskedGradientWriter<T, Tiles::COLUMNS> writer{
            dx, x, c_in, scores != nullptr, x_clamp, {x_gamma, x_beta, x_saved, c_in, channel}, sums};
        write_slices<TILE_N, Tiles::THREADS, true, AT_ONCE>(dx_part, writer, at, end, c_in, shared);
        sums = writer.sums;
    }
    float* const partial = partials + static_cast<i64>(blockIdx.y) * c_out * c_in;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (chunk * CHUNK >= c_out) break;
        WeightGradientWriter writer{partial, c_in};
        write_slices<TILE_N, Tiles::THREADS, true>(dw[chunk], writer, Origin{chunk * CHUNK, n}, c_out, c_in, shared);
    }
    if (dx_sums == nullptr) return;
    float* const memory = reinterpret_cast<float*>(shared);
    float* const to = dx_sums + static_cast<i64>(blockIdx.y) * 2 * c_in + n;
    const int group = thread_index() / (TILE_N / Tiles::COLUMNS);
    sum_columns<TILE_N, Tiles::ROW_GROUPS>(sums.sums, sums.products, group, column, memory,
                                           [&](int at, float sum, float product) {
        if (n + at >= c_in) return;
        to[at] = sum;
        to[c_in + at] = product;
    });
    if (scores == nullptr) return;
    __syncthreads();
    const float score = block_sum(sums.score, memory);
    if (thread_index() == 0) scores[blockIdx.y * gridDim.x + blockIdx.x] = score;
}
