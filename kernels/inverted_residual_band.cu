// The inverted residual as one kernel for the small, wide maps behind the first half of a network: inference, f16 and bf16,
// with an expansion, a 3x3 window and stride 1 or 2. Function and operands are those of inverted_residual.cu.
//
// There a block has a tile of 8x8 output pixels, brings x to the tensor cores again for each slice of hidden channels, and
// forms hidden values on all sides of the tile for itself. Where hidden channels are many, that is most of its work. Here a
// block has a band: all columns of some rows of an image, or all of several small images. Its x stays in shared memory for
// all slices, hidden values are formed again in two rows or none, and a band of 14x14 or 7x7 fills the tiles of the tensor
// cores to 0.77 to 0.98.
//
// Memory: x is read once, and y written once. Weights are read by every band, from the second-level cache. What remains is
// bound by tensor cores and by shared memory, from which their operands come.
//
// For each slice of 32 hidden channels, with a barrier behind each part, eight warps
//
//   expand      h = φ₁(x·w_expandᵀ + b), each with its own rows of pixels
//   depthwise   d = φ₂(…): a thread has two channels of a column of up to CHUNK rows
//   project     sums of y, which stay in registers over all slices, += d·w_projectᵀ
//
// and weights of the next part are on their way from global memory during the one before.
//
//   inverted_residual_band<T, IN, OUT, STRIDE, COLUMNS>
//     IN, OUT   input and output pixels of a band at most: 128 and 128 with STRIDE 1, 208 and 64 with STRIDE 2
//     COLUMNS   output channels at most
//     channels  c_in, hidden and c_out are multiples of 8, all pointers aligned to 16
//     block     256 threads
//     grid      (⌈n / images⌉ · ⌈h_out / rows⌉)
//     shared    dynamic, 96 KiB at most: `BandConfig` of src/ops/inverted_residual/config.rs
//     (as inverted_residual, then int rows, int images)
//     `rows` of output are a band's, of `images` images; of more than one where rows = h_out
//
// instances: inverted_residual_band<{f16,bf16}, 128, 128, 1, {64,96,160}>
// instances: inverted_residual_band<{f16,bf16}, 208, 64, 2, {96,160}>

#include "epilogue.cuh"
#include "geometry.cuh"
#include "mma.cuh"

/// Hidden channels that are on chip at a time: two steps of the tensor cores.
constexpr int SLICE = 32;
/// Channels of a thread in the depthwise part.
constexpr int PAIR = 2;
constexpr int WARPS = 8, THREADS = WARPS * WARP_SIZE;
/// Elements of a 16-byte vector, and elements between the lines of a tile: one vector of padding puts what a warp reads at once
/// in distinct banks.
constexpr int N = 8, LD = SLICE + N;
/// Floats of a row of sums that pass through shared memory, and bytes of a warp's 16 rows.
constexpr int LD_SUMS = 20, SUMS_BYTES = 16 * LD_SUMS * 4;
/// Panels of 32 channels that an expansion has at most, and so vectors of its weights for each thread.
constexpr int PANELS = 8, EXPAND_VECTORS = PANELS * SLICE * SLICE / N / THREADS;
constexpr int K = 3;

/// Which pixels a block has. Those of x lie side by side, and those of y too. h has a place for every pixel that the depthwise
/// convolution reads, so that those outside of the image are zeros there.
struct Band {
    int images;                // whole ones, or 1
    int rows_in, rows_out;     // rows of x and y in an image
    i64 x, y;                  // first pixel
    int above;                 // rows of h that lie above x; below 0 where rows of x are not read
    int h_rows, h_width;       // places of an image
};

/// Rows, or columns, of the input under so many of the output.
template <int STRIDE>
__device__ __forceinline__ int under(int outputs) {
    return (outputs - 1) * STRIDE + K;
}

/// Band `index` of bands of `rows` output rows of `images` images.
template <int STRIDE>
__device__ __forceinline__ Band band(int index, const ConvGeometry& g, int rows, int images) {
    const int down = divide_up(g.h_out, rows), image = index / down * images, first_out = index % down * rows;
    const int rows_out = min_of(rows, g.h_out - first_out), begin = first_out * STRIDE - g.pad_top;
    const int first_in = max_of(begin, 0), end = min_of(begin + under<STRIDE>(rows_out), g.h_in);
    return {min_of(images, g.n - image), max_of(end - first_in, 0), rows_out,
            (static_cast<i64>(image) * g.h_in + first_in) * g.w_in,
            (static_cast<i64>(image) * g.h_out + first_out) * g.w_out,
            first_in - begin, under<STRIDE>(rows), under<STRIDE>(g.w_out)};
}

/// A vector of a matrix as one word; zeros where `valid` is false.
using Word16 = Word<16>::Type;
template <typename T>
__device__ __forceinline__ Word16 word_at(const T* from, bool valid) {
    return valid ? load_vector<Word16, 1>(reinterpret_cast<const Word16*>(from))[0] : Word16{0, 0, 0, 0};
}
template <typename T>
__device__ __forceinline__ void store_word(T* to, Word16 word) {
    store_vector<Word16, 1>(reinterpret_cast<Word16*>(to), {{word}});
}

/// Rounds values behind their activation, in pairs.
template <typename T, int COUNT>
__device__ __forceinline__ void activated(float (&values)[COUNT], const Clamp& clamp, u32 (&pairs)[COUNT / PAIR]) {
    if (clamp.slope != 0.0f && clamp.slope != 1.0f) clamp.apply(values);
#pragma unroll
    for (int i = 0; i < COUNT / PAIR; i++) pairs[i] = packed<T>(values[PAIR * i], values[PAIR * i + 1]);
    if (clamp.slope != 0.0f) return;
    const u32 limit = packed<T>(clamp.limit, clamp.limit);
#pragma unroll
    for (int i = 0; i < COUNT / PAIR; i++) pairs[i] = clamped<T>(pairs[i], limit);
}
template <typename T>
__device__ __forceinline__ void store_pair(T* to, u32 pair) {
    store_vector<u32, 1>(reinterpret_cast<u32*>(to), {{pair}});
}

// Of a panel, lines of 32 elements, a thread has one vector of every 64th line. Neighbouring lanes have neighbouring lines, which
// lie in distinct banks; the four vectors of two lines would not.
__device__ __forceinline__ int panel_line(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    return i * (THREADS * N / SLICE) + thread / WARP_SIZE * 8 + thread % 8;
}
__device__ __forceinline__ int in_panel_line() { return static_cast<int>(threadIdx.x) % WARP_SIZE / 8 * N; }

/// A step of weights on its way to shared memory: LINES lines of 32 elements of each of some panels, which are neighbouring
/// runs of 32 elements along the lines. Where a thread's vectors lie in global memory it reckons once.
template <typename T, int LINES, int COUNT>
struct WeightVectors {
    Word16 staged[COUNT];
    int from[COUNT];    // below 0 where there is none
    int element[COUNT];

    /// Panel and line of vector `i` of a thread.
    __device__ __forceinline__ static int panel(int i) {
        return (static_cast<int>(threadIdx.x) + i * THREADS) / (LINES * SLICE / N);
    }
    __device__ __forceinline__ static int line(int i) { return panel_line(i) % LINES; }

    /// Of a matrix `[lines, length]`.
    __device__ __forceinline__ WeightVectors(int lines, int length, int panels) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            element[i] = panel(i) * SLICE + in_panel_line();
            const bool is = panel(i) < panels && line(i) < lines && element[i] < length;
            from[i] = opaque(is ? line(i) * length + element[i] : -1);
        }
    }

    /// Fetches the lines that begin at `w`, of which `lines` are left, and `length` elements of each, in `panels`.
    __device__ __forceinline__ void fetch(const T* w, int lines, int length, int panels) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i * THREADS / (LINES * SLICE / N) >= panels) break;
            staged[i] = word_at(w + from[i], from[i] >= 0 && line(i) < lines && element[i] < length);
        }
    }

    __device__ __forceinline__ void deposit(T* to, int panels) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (panel(i) < panels) store_word(to + (panel(i) * LINES + line(i)) * LD + in_panel_line(), staged[i]);
        }
    }
};

/// Calls take(m, n, values) for the eight neighbouring sums that a lane gets of each half row of a product: of row m of 16 from
/// column n on, 0 or 8. They pass through `sums`, which is the warp's.
template <class Take>
__device__ __forceinline__ void by_rows(const Accumulator& product, float* sums, Take take) {
    const int lane = lane_in_warp(), m = lane / 2, n = lane % 2 * N;
    store(sums + first_row_of_lane() * LD_SUMS + first_column_of_lane(), LD_SUMS, product);
    __syncwarp();
    float values[N];
    load_floats<N>(sums + m * LD_SUMS + n, values);
    take(m, n, values);
    __syncwarp();
}

template <typename T, int IN, int OUT, int STRIDE, int COLUMNS>
struct BandTile {
    // Expansion: a warp has every eighth tile of 16 pixels and all channels of the slice.
    static constexpr int EXPAND_M = (IN / 16 + WARPS - 1) / WARPS, EXPAND_N = SLICE / 16;
    // Projection: 4 x 2 warps.
    static constexpr int PROJECT_WARPS = 4, PROJECT_M = OUT / 16 / PROJECT_WARPS, PROJECT_N = COLUMNS / 32;
    static_assert(IN % 16 == 0 && OUT % 64 == 0 && COLUMNS % 32 == 0, "warps share tiles evenly");
    // Rows of a thread in the depthwise part.
    static constexpr int CHUNK = IN == 128 ? 7 : 4;

    static constexpr int BYTES = static_cast<int>(sizeof(T));
    static constexpr int D_BYTES = OUT * LD * BYTES < WARPS * SUMS_BYTES ? WARPS * SUMS_BYTES : OUT * LD * BYTES;

    using ExpandWeights = WeightVectors<T, SLICE, EXPAND_VECTORS>;
    using ProjectWeights = WeightVectors<T, COLUMNS, (COLUMNS * SLICE / N + THREADS - 1) / THREADS>;

    using Left = FragmentA<T, Major::Row>;
    using Right = FragmentB<T, Major::Column>;

    // Panels of x that a warp keeps the fragments of, while registers last. From the others it reads them for each slice.
    static constexpr int STEPS = SLICE / 16, KEPT = COLUMNS > 96 ? 0 : EXPAND_M == 1 ? 3 : 1;

    Accumulator sums[PROJECT_M][PROJECT_N];
    Left kept[KEPT > 0 ? KEPT * STEPS : 1][EXPAND_M];
    // Where the lane reads its warp's first tiles: of x and d, and of the weights of the expansion and the projection.
    int x_at, d_at, expansion_at, projection_at;

    /// The band's x, as panels `[IN, LD]` of 32 channels.
    __device__ __forceinline__ static void load_x(const T* x, int pixels, int c_in, int panels, T* to) {
        const int element = in_panel_line();
        for (int panel = 0; panel < panels; panel++) {
#pragma unroll
            for (int i = 0; i < (IN * SLICE / N + THREADS - 1) / THREADS; i++) {
                const int pixel = panel_line(i), channel = panel * SLICE + element;
                if (pixel >= IN) break;
                const bool is = pixel < pixels && channel < c_in;
                store_word(to + (panel * IN + pixel) * LD + element, word_at(x + pixel * c_in + channel, is));
            }
        }
    }

    /// The tile of 16 pixels that is number i of a warp in the expansion.
    __device__ __forceinline__ static int expand_tile(int i) {
        return static_cast<int>(threadIdx.x) / WARP_SIZE + i * WARPS;
    }

    /// Whether the warp has tile i, given that it has the first.
    __device__ __forceinline__ static bool has_tile(int i, int pixels) { return i == 0 || expand_tile(i) * 16 < pixels; }

    /// Where a lane's two rows of each of its tiles go in h; below 0 where nobody reads them.
    struct Places {
        int at[EXPAND_M][2];

        __device__ __forceinline__ Places(const Band& of, const ConvGeometry& g) {
#pragma unroll
            for (int i = 0; i < EXPAND_M * 2; i++) {
                const int m = expand_tile(i / 2) * 16 + first_row_of_lane() + i % 2 * LANE_ROWS_APART;
                const int column = m % g.w_in + g.pad_left, rest = m / g.w_in;
                const int row = rest % max_of(of.rows_in, 1) + of.above, image = rest / max_of(of.rows_in, 1);
                const bool is = image < of.images && row < of.h_rows && column < of.h_width;
                const int pixel = (image * of.h_rows + row) * of.h_width + column;
                at[i / 2][i % 2] = opaque(is ? pixel * SLICE + first_column_of_lane() : -1);
            }
        }
    };

    /// The warp's fragments of x for a step of the tensor cores.
    __device__ __forceinline__ void load_step(Left (&left)[EXPAND_M], const T* x, int step, int pixels) const {
        x += x_at + step / STEPS * IN * LD + step % STEPS * 16;
#pragma unroll
        for (int i = 0; i < EXPAND_M; i++) {
            if (has_tile(i, pixels)) load(left[i], x + i * WARPS * 16 * LD, LD);
        }
    }
    __device__ __forceinline__ void keep(const T* x, int panels, int pixels) {
#pragma unroll
        for (int step = 0; step < KEPT * STEPS; step++) {
            if (step / STEPS < panels) load_step(kept[step], x, step, pixels);
        }
    }

    /// Adds the products of a step, `w` being where the lane reads its weights.
    __device__ __forceinline__ static void multiply(const Left (&left)[EXPAND_M], const T* w, int pixels,
                                                    Accumulator (&products)[EXPAND_M][EXPAND_N]) {
        Right right[EXPAND_N];
#pragma unroll
        for (int j = 0; j < EXPAND_N; j++) load(right[j], w + 16 * j * LD, LD);
#pragma unroll
        for (int i = 0; i < EXPAND_M; i++) {
            if (!has_tile(i, pixels)) continue;
#pragma unroll
            for (int j = 0; j < EXPAND_N; j++) mma(products[i][j], left[i], right[j]);
        }
    }

    /// h of the slice from channel `slice` of `hidden` on.
    __device__ __forceinline__ void expand(const T* x, const T* w, int panels, int pixels, const float* bias, int channels,
                                           const Clamp& clamp, const Places& places, T* h) const {
        if (expand_tile(0) * 16 >= pixels) return;
        Accumulator products[EXPAND_M][EXPAND_N];
#pragma unroll
        for (int i = 0; i < EXPAND_M * EXPAND_N; i++) zero(products[i / EXPAND_N][i % EXPAND_N]);
        const T* right = w + expansion_at;
#pragma unroll
        for (int step = 0; step < KEPT * STEPS; step++) {
            if (step / STEPS < panels) multiply(kept[step], right + step / STEPS * SLICE * LD + step % STEPS * 16, pixels, products);
        }
        right += KEPT * SLICE * LD;
#pragma unroll 1
        for (int panel = KEPT; panel < panels; panel++, right += SLICE * LD) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                Left left[EXPAND_M];
                load_step(left, x, panel * STEPS + step, pixels);
                multiply(left, right + step * 16, pixels, products);
            }
        }
#pragma unroll
        for (int j = 0; j < EXPAND_N; j++) {
            float more[4] = {};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int column = 16 * j + first_column_of_lane() + half * 8;
                float pair[PAIR] = {};
                if (column < channels) load_floats(bias + column, pair);
                more[2 * half] = pair[0];
                more[2 * half + 1] = pair[1];
            }
#pragma unroll
            for (int i = 0; i < EXPAND_M; i++) {
                if (has_tile(i, pixels)) store_hidden(products[i][j], more, clamp, places.at[i], h + 16 * j);
            }
        }
    }

    /// Stores a product of the expansion: two rows of two pairs of columns, 8 apart, of which `bias` has four.
    __device__ __forceinline__ static void store_hidden(const Accumulator& product, const float (&bias)[4],
                                                        const Clamp& clamp, const int (&places)[2], T* h) {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = product.v[i] + bias[i / 4 * 2 + i % 2];
        u32 pairs[4];
        activated<T>(values, clamp, pairs);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (places[i % 2] >= 0) store_pair(h + places[i % 2] + i / 2 * 8, pairs[i]);
        }
    }

    /// Zeros wherever h is outside of the image.
    __device__ __forceinline__ static void clear_border(const Band& of, const ConvGeometry& g, T* h) {
        const int places = of.images * of.h_rows * of.h_width;
        for (int i = static_cast<int>(threadIdx.x); i < places * (SLICE / N); i += THREADS) {
            const int place = i / (SLICE / N), column = place % of.h_width - g.pad_left;
            const int row = place / of.h_width % of.h_rows - of.above;
            const bool inside = static_cast<u32>(row) < static_cast<u32>(of.rows_in) &&
                                static_cast<u32>(column) < static_cast<u32>(g.w_in);
            if (!inside) store_word(h + i * N, Word16{0, 0, 0, 0});
        }
    }

    /// Which outputs a thread has of a slice: up to CHUNK rows of a column. Reckoned once for the first, which for most threads is
    /// the only one.
    struct Column {
        int h, d, rows;   // the first pixel under it, and its first pixel; rows, 0 where there are none

        /// How many there are.
        __device__ __forceinline__ static int count(const Band& of, int w_out) {
            return of.images * divide_up(of.rows_out, CHUNK) * w_out;
        }

        __device__ __forceinline__ Column(int unit, const Band& of, int w_out) {
            const int chunks = divide_up(of.rows_out, CHUNK), rest = unit / w_out, column = unit - rest * w_out;
            const int image = rest / chunks, first = (rest - image * chunks) * CHUNK;
            rows = opaque(image < of.images ? min_of(CHUNK, of.rows_out - first) : 0);
            h = opaque(((image * of.h_rows + first * STRIDE) * of.h_width + column * STRIDE) * SLICE);
            d = opaque(((image * of.rows_out + first) * w_out + column) * LD);
        }
    };
    /// Threads that share the pairs of a slice's channels, and so outputs that are formed at a time.
    static constexpr int ABREAST = THREADS / (SLICE / PAIR);

    /// Sums of a column that begin at `start`. The first element under it lies `at` bytes behind `h`, and a row is `pitch` bytes. With
    /// WHOLE there are CHUNK `rows`, and nothing is to be asked between them.
    template <bool WHOLE>
    __device__ __forceinline__ static void filter(const T* h, int at, int pitch, const float (&weights)[K * K][PAIR],
                                                  const float (&start)[PAIR], int rows, float (&sums)[CHUNK * PAIR]) {
#pragma unroll
        for (int i = 0; i < CHUNK * PAIR; i++) sums[i] = start[i % PAIR];
#pragma unroll
        for (int ih = 0; ih < (CHUNK - 1) * STRIDE + K; ih++) {
            // Past the last row nothing is read.
            if (!WHOLE && ih >= K && ih >= (rows - 1) * STRIDE + K) continue;
            float in[K][PAIR];
#pragma unroll
            for (int kw = 0; kw < K; kw++) load_floats(behind(h, at) + kw * SLICE, in[kw]);
            at += pitch;
#pragma unroll
            for (int tap = 0; tap < K * K; tap++) {
                const int kh = tap / K, kw = tap % K, row = (ih - kh) / STRIDE;
                if (kh > ih || (ih - kh) % STRIDE != 0 || row >= CHUNK) continue;
#pragma unroll
                for (int i = 0; i < PAIR; i++) {
                    float& sum = sums[row * PAIR + i];
                    sum = fma_f(in[kw][i], weights[tap][i], sum);
                }
            }
        }
    }

    /// d of the slice, `[OUT, LD]`; `channels` are left of `hidden`. `memory` is where shared memory begins, which addresses are
    /// reckoned from.
    __device__ __forceinline__ static void depthwise(const T* memory, const T* h, const T* w, const float* bias, int channels, int hidden,
                                                     Column column, const Band& of, int w_out, const Clamp& clamp, T* d) {
        const int pair = static_cast<int>(threadIdx.x) % (SLICE / PAIR) * PAIR;
        // Channels past the last take its filter: h is zero there, and so are the weights of the projection.
        const int channel = min_of(pair, channels - PAIR);
        float weights[K * K][PAIR], start[PAIR];
#pragma unroll
        for (int tap = 0; tap < K * K; tap++) load_floats(w + tap * hidden + channel, weights[tap]);
        load_floats(bias + channel, start);
        const int pitch = of.h_width * SLICE * BYTES, first = static_cast<int>(h - memory) + pair, units = Column::count(of, w_out);
        int unit = static_cast<int>(threadIdx.x) / (SLICE / PAIR);
#pragma unroll 1
        while (column.rows > 0) {
            const int rows = column.rows, at = opaque((first + column.h) * BYTES);
            float sums[CHUNK * PAIR];
            if (rows == CHUNK) {
                filter<true>(memory, at, pitch, weights, start, rows, sums);
            } else {
                filter<false>(memory, at, pitch, weights, start, rows, sums);
            }
            u32 pairs[CHUNK];
            activated<T>(sums, clamp, pairs);
            T* to = d + column.d + pair;
#pragma unroll
            for (int row = 0; row < CHUNK; row++) {
                if (row < rows) store_pair(to, pairs[row]);
                to += w_out * LD;
            }
            unit += ABREAST;
            if (unit >= units) break;
            column = Column(unit, of, w_out);
        }
    }

    __device__ __forceinline__ static int first_row() {
        return static_cast<int>(threadIdx.x) / WARP_SIZE % PROJECT_WARPS * PROJECT_M * 16;
    }
    __device__ __forceinline__ static int first_column() {
        return static_cast<int>(threadIdx.x) / WARP_SIZE / PROJECT_WARPS * PROJECT_N * 16;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PROJECT_M * PROJECT_N; i++) zero(sums[i / PROJECT_N][i % PROJECT_N]);
        x_at = opaque(expand_tile(0) * 16 * LD + Left::lane_offset(LD));
        d_at = opaque(first_row() * LD + Left::lane_offset(LD));
        expansion_at = opaque(Right::lane_offset(LD));
        projection_at = opaque(first_column() * LD + Right::lane_offset(LD));
    }

    /// Adds the slice's share of y.
    __device__ __forceinline__ void project(const T* d, const T* w, int pixels) {
        if (first_row() >= pixels) return;
        d += d_at;
        w += projection_at;
#pragma unroll
        for (int k = 0; k < SLICE; k += 16) {
            Left left[PROJECT_M];
#pragma unroll
            for (int i = 0; i < PROJECT_M; i++) load(left[i], d + 16 * i * LD + k, LD);
#pragma unroll
            for (int j = 0; j < PROJECT_N; j++) {
                Right right;
                load(right, w + 16 * j * LD + k, LD);
#pragma unroll
                for (int i = 0; i < PROJECT_M; i++) mma(sums[i][j], left[i], right);
            }
        }
    }

    /// Hands y to the writer, `first` being its first pixel. `memory` is WARPS · SUMS_BYTES.
    template <class Writer>
    __device__ __forceinline__ void write(const Writer& writer, i64 first, int pixels, int c_out,
                                          u8* memory) const {
        float* const mine = reinterpret_cast<float*>(memory + threadIdx.x / WARP_SIZE * SUMS_BYTES);
#pragma unroll
        for (int i = 0; i < PROJECT_M; i++) {
#pragma unroll
            for (int j = 0; j < PROJECT_N; j++) {
                by_rows(sums[i][j], mine, [&](int row, int column, float (&values)[N]) {
                    const int m = first_row() + 16 * i + row, n = first_column() + 16 * j + column;
                    if (m < pixels && n < c_out) writer.write(static_cast<int>(first) + m, n, values);
                });
            }
        }
    }
};

template <typename T, int IN, int OUT, int STRIDE, int COLUMNS>
__global__ void __launch_bounds__(256) inverted_residual_band(
    const T* __restrict__ x,                 // [n, h_in, w_in, c_in]
    const T* __restrict__ w_expand,          // [hidden, c_in]
    const float* __restrict__ b_expand,      // [hidden]
    const T* __restrict__ w_depthwise,       // [3, 3, hidden]
    const float* __restrict__ b_depthwise,   // [hidden]
    const T* __restrict__ w_project,         // [c_out, hidden]
    const float* __restrict__ b_project,     // [c_out]
    const T* __restrict__ residual,          // [n, h_out, w_out, c_out] or null; may be x
    float limit_1, float slope_1,            // of the activation after the expansion; slope 1 for none
    float limit_2, float slope_2,            // after the depthwise convolution
    float limit_3, float slope_3,            // after the projection and the residual
    T* __restrict__ y,                       // [n, h_out, w_out, c_out]
    ConvGeometry g, int hidden, int rows, int images) {
    using Tile = BandTile<T, IN, OUT, STRIDE, COLUMNS>;
    DYNAMIC_SHARED(u8, shared);
    const int panels = divide_up(g.c_in, SLICE);
    const Band of = band<STRIDE>(static_cast<int>(blockIdx.x), g, rows, images);
    const int pixels_in = of.images * of.rows_in * g.w_in, pixels_out = of.images * of.rows_out * g.w_out;

    // x, weights of the expansion, those of the projection, d (or sums on their way), h.
    T* const x_panels = reinterpret_cast<T*>(shared);
    T* const expansion = x_panels + panels * IN * LD;
    T* const projection = expansion + panels * SLICE * LD;
    T* const d = projection + COLUMNS * LD;
    u8* const sums = reinterpret_cast<u8*>(d);
    T* const h = reinterpret_cast<T*>(sums + Tile::D_BYTES);

    typename Tile::ExpandWeights expand_weights(hidden, g.c_in, panels);
    typename Tile::ProjectWeights project_weights(g.c_out, hidden, 1);
    const typename Tile::Places places(of, g);
    const typename Tile::Column column(static_cast<int>(threadIdx.x) / (SLICE / PAIR), of, g.w_out);
    expand_weights.fetch(w_expand, hidden, g.c_in, panels);
    Tile::load_x(x + of.x * g.c_in, pixels_in, g.c_in, panels, x_panels);
    Tile::clear_border(of, g, h);
    expand_weights.deposit(expansion, panels);
    Tile tile;
    tile.clear();
    __syncthreads();
    tile.keep(x_panels, panels, pixels_in);
#pragma unroll 1
    for (int left = hidden; left > 0; left -= SLICE) {
        project_weights.fetch(w_project, COLUMNS, left, 1);
        tile.expand(x_panels, expansion, panels, pixels_in, b_expand, left, Clamp{limit_1, slope_1}, places, h);
        __syncthreads();
        project_weights.deposit(projection, 1);
        w_project += SLICE;
        w_expand += SLICE * g.c_in;
        b_expand += SLICE;
        if (left > SLICE) expand_weights.fetch(w_expand, left - SLICE, g.c_in, panels);
        Tile::depthwise(x_panels, h, w_depthwise, b_depthwise, left, hidden, column, of, g.w_out, Clamp{limit_2, slope_2}, d);
        w_depthwise += SLICE;
        b_depthwise += SLICE;
        if (left > SLICE) expand_weights.deposit(expansion, panels);
        __syncthreads();
        tile.project(d, projection, pixels_out);
    }
    __syncthreads();
    const ForwardWriter<T> writer{y, b_project, 1, residual, Clamp{limit_3, slope_3}, g.c_out};
    tile.write(writer, of.y, pixels_out, g.c_out, sums);
}
