// Depthwise k×k convolution.
//
//   forward   y[n, oh, ow, c] = φ(Σ w[kh, kw, c] · x[n, s·oh + kh − pad, s·ow + kw − pad, c] + bias + residual)
//   dgrad     dx (+)= the transpose of that sum
//   wgrad     dw[kh, kw, c] = Σ over images and output pixels of dy · x
//
// x, y and their gradients are NHWC of type T, w is `[k_h, k_w, c]` of type T, dw is the same in float. Nine or
// twenty-five products per element are too few to keep a GPU's arithmetic busy, so that all passes are bound by memory
// and the design is about reading every element once. Lanes run over channels, two to a thread, which leaves registers
// for everything else: a thread keeps the k·k weights of its channels and marches down a strip of 2 columns. It reads
// each row of the input once and multiplies it with all kernel rows at the same time; the products go to the sums of
// the ⌈k / stride⌉ output rows that the row reaches, which stay in registers until they are complete. The weight
// gradient marches likewise, with rows of dy in the place of rows of sums.
//
// The strided input gradient is a gather: rows and columns of dx fall into two parities, each with taps of its own, so
// that a thread makes 2×2 pixels of dx from one window of dy and never tests a remainder.
//
// The kernels named *_any take any kernel size, stride and channel count, one element per thread.
//
// The weight gradient writes one float partial of dw per slab of output; `sum_slabs` of conv_reduce.cu adds them. With
// one slab, dw itself may be given as `partials`.
//
// Launches. All blocks have 256 threads and no dynamic shared memory. `lanes` is as slab.cuh says, with N = 2, or 1 for
// *_any. The fast kernels need an even c, and all pointers aligned to two elements. ConvGeometry is that of the forward
// pass, except where it says otherwise; offsets inside one image are below 2^31, and so is the number of pixels. `rows`
// is how far a thread marches; only wgrad's result depends on it, so there it must follow from the problem alone.
// Grids, rows, slabs and the size of `partials` are those of `DepthwiseConfig` in src/ops/config/depthwise.rs.
//
// depthwise_forward<T, K, STRIDE>    K 3, 5, 7; STRIDE 1, 2                                              18 instances
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry, int rows, int lanes, int flipped)
//     flipped is 0. With STRIDE 1 this is dgrad too: x = dy, y = dx, flipped = 1, the geometry with input and output
//     exchanged and each pad replaced by K − 1 − pad (which may be negative), no bias, slope 1; residual = dx, or null
//     where dx is not accumulated.
// depthwise_dgrad<T, K>              K 3, 5, 7; both strides 2                                           9 instances
//     a thread marches down rows of pairs of dx, ⌊(h_in − 1 + pad_top) / 2⌋ − ⌊pad_top / 2⌋ + 1 of them, columns alike
//     (const T* dy, const T* w, T* dx, int accumulate, ConvGeometry, int rows, int lanes)
// depthwise_wgrad<T, K, STRIDE>      K 3, 5, 7; STRIDE 1, 2                                              18 instances
//     grid (tiles, slabs), a slab being of strips of `rows` × 2 pixels
//     (const T* x, const T* dy, float* partials [slabs, K, K, c], int slab, ConvGeometry, int rows, int lanes)
// Between batch-norms (on_load.cuh): x is normalised on load where γ is given, dy formed on load where coefficients are;
// the forward pass takes moments of y, the backward pass has both gradients of one walk over dy, and where γ is given the
// sums over dx = dz that the batch-norm before needs. For K 3 and 5. Slabs of the moments are the blocks of one tile of
// channels.
//
// depthwise_bn_forward<T, K, STRIDE>    grid as depthwise_forward                                        12 instances
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* w, T* y, float* partials [slabs, 2, c], float* counts [slabs], ConvGeometry,
//      int rows, int lanes)
// depthwise_bn_backward<T, K, STRIDE>   grid (tiles, slabs), a slab being of strips, or pairs, of dx     12 instances
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* dz, const T* y, const float* coefficients [4, c], float limit, float slope,
//      const float* slope_at, const T* w, T* dx, int accumulate, float* dx_sums [slabs, 2, c], float* scores [blocks],
//      float* partials [slabs, K, K, c], int slab, ConvGeometry, int rows, int lanes)
//
// depthwise_forward_any<T>                                                                               3 instances
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      ConvGeometry, int lanes)
// depthwise_dgrad_any<T>                                                                                 3 instances
//     (const T* dy, const T* w, T* dx, int accumulate, ConvGeometry, int lanes)
// depthwise_wgrad_any<T>             grid (tiles, slabs, k_h · k_w)                                      3 instances
//     (const T* x, const T* dy, float* partials [slabs, k_h, k_w, c], int slab, ConvGeometry, int lanes)
//     a slab is of pixels
//
// instances: depthwise_{forward,wgrad}<{float,f16,bf16}, {3,5,7}, {1,2}>
// instances: depthwise_dgrad<{float,f16,bf16}, {3,5,7}>
// instances: depthwise_bn_{forward,backward}<{float,f16,bf16}, {3,5}, {1,2}>
// instances: depthwise_{forward,dgrad,wgrad}_any<{float,f16,bf16}>

#include "epilogue.cuh"
#include "geometry.cuh"
#include "reduce.cuh"
#include "slab.cuh"

/// Channels of a thread.
constexpr int CHANNELS = 2;
/// Columns of a thread.
constexpr int STRIP = 2;
/// Columns of dy, each two of dx, of a thread of the strided input gradient.
constexpr int PAIRS = 2;

/// Rows of output that a row of input reaches.
template <int K, int STRIDE>
constexpr int LIVE = (K + STRIDE - 1) / STRIDE;
/// Columns of input under a strip.
template <int K, int STRIDE>
constexpr int COLUMNS = (STRIP - 1) * STRIDE + K;
/// Steps of a march that are written out, so that the rows under way move on by name instead of from register to
/// register. For K = 7 the code would be too long for the instruction cache.
template <int K, int STRIDE>
constexpr int UNROLL = K < 7 ? LIVE<K, STRIDE> : 1;
/// Blocks that shall fit a multiprocessor: as many as the weights and sums allow without spilling.
constexpr __device__ int resident_blocks(int k) { return k == 3 ? 3 : k == 5 ? 2 : 1; }

/// Some columns of some rows of one image.
struct Patch {
    int image, first_row, last_row, column;
};

/// Patch `index` of those of at most `rows` x `columns` that cover images of h x w.
__device__ __forceinline__ Patch patch(int index, int h, int w, int rows, int columns) {
    const int across = divide_up(w, columns), down = divide_up(h, rows);
    const int column = index % across * columns, first_row = index / across % down * rows;
    return Patch{index / across / down, first_row, min_of(first_row + rows, h), column};
}

/// The number of such patches.
__device__ __forceinline__ int patches(int n, int h, int w, int rows, int columns) {
    return n * divide_up(h, rows) * divide_up(w, columns);
}

/// A thread's channels of a pixel as one word, so that a missing pixel costs one zero and no unpacking in between.
template <typename T>
struct Pixel {
    using Word = u32;
    __device__ __forceinline__ static T channel(Word word, int i) { return T{static_cast<u16>(word >> 16 * i)}; }
    __device__ __forceinline__ static Word rounded(const float (&values)[CHANNELS]) {
        return from_float<T>(values[0]).bits | static_cast<u32>(from_float<T>(values[1]).bits) << 16;
    }
};
template <>
struct Pixel<float> {
    using Word = u64;
    __device__ __forceinline__ static float channel(Word word, int i) {
        return __uint_as_float(static_cast<u32>(word >> 32 * i));
    }
    __device__ __forceinline__ static Word rounded(const float (&values)[CHANNELS]) {
        return __float_as_uint(values[0]) | static_cast<u64>(__float_as_uint(values[1])) << 32;
    }
};

/// Reads neighbouring pixels of a row: those of the columns `first` and following of 0..width, zeros for the others.
/// `row` points at column `first`, wherever that is. All loads are under way before the first is used.
template <int COLUMNS, typename T>
__device__ __forceinline__ void load_row(const T* row, int first, int width, int c, float (&out)[COLUMNS][CHANNELS]) {
    using Word = typename Pixel<T>::Word;
    Word words[COLUMNS];
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
        const bool inside = static_cast<unsigned>(first + j) < static_cast<unsigned>(width);
        words[j] = inside ? load_vector<Word, 1>(reinterpret_cast<const Word*>(row + j * c))[0] : 0;
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) out[j][i] = to_float(Pixel<T>::channel(words[j], i));
    }
}

/// An input that is read as it is stored.
template <typename T>
struct StoredRows {
    template <int COLUMNS>
    __device__ __forceinline__ void load(const T* row, int first, int width, int c,
                                         float (&out)[COLUMNS][CHANNELS]) const {
        load_row(row, first, width, c, out);
    }
};

/// An input that is normalised on load (on_load.cuh) with coefficients that a thread keeps. What lies outside stays zero.
template <typename T>
struct NormalisedRows {
    bool active;
    Clamp clamp;
    Affine affine[CHANNELS] = {};

    __device__ __forceinline__ NormalisedRows(const Normalised<T>& form, int channel)
        : active(form.active()), clamp(form.clamp) {
        if (active) make_affines(form.gamma, form.beta, form.saved, form.c, channel, affine);
    }

    template <int COLUMNS>
    __device__ __forceinline__ void load(const T* row, int first, int width, int c,
                                         float (&out)[COLUMNS][CHANNELS]) const {
        load_row(row, first, width, c, out);
        if (!active) return;
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            if (static_cast<unsigned>(first + j) >= static_cast<unsigned>(width)) continue;
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) out[j][i] = affine[i](out[j][i]);
            clamp.apply(out[j]);
        }
    }
};

/// An input that is formed on load with coefficients that are read again for each row, where a thread has no registers to
/// keep them. What lies outside stays zero.
template <typename T, class Form>
struct FormedRows {
    const T* data;    // what `row` points into
    Form form;
    int channel;

    template <int COLUMNS>
    __device__ __forceinline__ void load(const T* row, int first, int width, int c,
                                         float (&out)[COLUMNS][CHANNELS]) const {
        load_row(row, first, width, c, out);
        if (!form.active()) return;
        float others[COLUMNS][CHANNELS] = {};
        if constexpr (Form::READS_TWO) load_row(form.y + (row - data), first, width, c, others);
        const int here = opaque(channel);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const bool inside = static_cast<unsigned>(first + j) < static_cast<unsigned>(width);
            if (inside) form.form(out[j], others[j], here);
        }
    }
};

/// Adds pixels of a strip, as many as there are.
template <typename T>
__device__ __forceinline__ void add_strip(const T* row, int columns, int c, float (&values)[STRIP][CHANNELS]) {
    float more[STRIP][CHANNELS];
    load_row(row, 0, columns, c, more);
#pragma unroll
    for (int j = 0; j < STRIP; j++) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) values[j][i] += more[j][i];
    }
}

/// The weights of a thread's channels, with the last tap first if `flipped`.
template <int TAPS>
struct Weights {
    float v[TAPS][CHANNELS];

    template <typename T>
    __device__ __forceinline__ Weights(const T* w, int c, bool flipped) {
        const T* at = flipped ? w + (TAPS - 1) * c : w;
        const int step = flipped ? -c : c;
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) load_floats(at + tap * step, v[tap]);
    }

    __device__ __forceinline__ float operator()(int tap, int i) const { return v[tap][i]; }
};

/// The same as they are stored, which in 16 bits takes half the registers and a conversion at each use.
template <typename T, int TAPS>
struct StoredWeights {
    typename Pixel<T>::Word v[TAPS];

    __device__ __forceinline__ StoredWeights(const T* w, int c, bool flipped) {
        using Word = typename Pixel<T>::Word;
        const T* at = flipped ? w + (TAPS - 1) * c : w;
        const int step = flipped ? -c : c;
#pragma unroll
        for (int tap = 0; tap < TAPS; tap++) {
            v[tap] = load_vector<Word, 1>(reinterpret_cast<const Word*>(at + tap * step))[0];
        }
    }

    __device__ __forceinline__ float operator()(int tap, int i) const {
        return to_float(Pixel<T>::channel(v[tap], i));
    }
};

/// Moves every row of a march one further and puts `fresh` in the place of the first.
template <int ROWS>
__device__ __forceinline__ void move_on(float (&rows)[ROWS][STRIP][CHANNELS], const float (&fresh)[CHANNELS]) {
#pragma unroll
    for (int row = ROWS - 1; row >= 0; row--) {
#pragma unroll
        for (int j = 0; j < STRIP; j++) {
#pragma unroll
            for (int i = 0; i < CHANNELS; i++) rows[row][j][i] = row > 0 ? rows[row - 1][j][i] : fresh[i];
        }
    }
}

/// What else is done with the products of a march: nothing.
struct NothingElse {
    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void add(int, int, int, const float (&)[CHANNELS]) {}
};

/// Marches down a patch of the result. `start` is what sums begin with; `finish(values, to, in_image, columns)`
/// gets a strip of complete sums, where it begins in the result and in the image, and how many of its columns there are.
/// `also.begin(row)` is told when the sums of a row begin, `also.add(row, tap, column, values)` every input that is
/// multiplied, `row` being counted from the youngest.
template <typename T, int K, int STRIDE, class Input, class Filter, class Finish, class Also>
__device__ __forceinline__ void march(const Input& input, const T* x, const Filter& weights,
                                      const float (&start)[CHANNELS], const ConvGeometry& g, const Patch& at,
                                      int channel, Finish finish, Also&& also) {
    constexpr int LIVE = ::LIVE<K, STRIDE>;
    const int c = g.c_out;
    // The next row of input at the strip's left end, and where the next row of output goes.
    const int left = at.column * STRIDE - g.pad_left, columns = min_of(g.w_out - at.column, STRIP);
    int ih = at.first_row * STRIDE - g.pad_top;
    const T* in_row = x + static_cast<i64>(at.image) * g.h_in * g.w_in * c + (ih * g.w_in + left) * c + channel;
    int in_image = (at.first_row * g.w_out + at.column) * c + channel;
    i64 out = static_cast<i64>(at.image) * g.h_out * g.w_out * c + in_image;

    // sums[i] belong to the row i above the youngest one.
    float sums[LIVE][STRIP][CHANNELS] = {};
    auto add_input = [&](int q) {
        float in[COLUMNS<K, STRIDE>][CHANNELS];
        input.load(in_row, left, g.w_in, c, in);
#pragma unroll
        for (int tap = q * K; tap < K * K; tap++) {
            const int kh = tap / K, kw = tap % K;
            if (kh % STRIDE != q) continue;
#pragma unroll
            for (int j = 0; j < STRIP; j++) {
#pragma unroll
                for (int i = 0; i < CHANNELS; i++) sums[kh / STRIDE][j][i] += in[j * STRIDE + kw][i] * weights(tap, i);
                also.add(kh / STRIDE, tap, j, in[j * STRIDE + kw]);
            }
        }
    };
    const int steps = at.last_row - at.first_row + LIVE - 1;
    for (int step = 0; step < steps;) {
#pragma unroll
        for (int unrolled = 0; unrolled < UNROLL<K, STRIDE>; unrolled++, step++) {
            if (step >= steps) return;
            move_on(sums, start);
            also.begin(at.first_row + step);
#pragma unroll
            for (int q = 0; q < STRIDE; q++, ih++, in_row += g.w_in * c) {
                if (ih >= 0 && ih < g.h_in) add_input(q);
            }
            if (step >= LIVE - 1) {
                finish(sums[LIVE - 1], out, in_image, columns);
                out += g.w_out * c;
                in_image += g.w_out * c;
            }
        }
    }
}

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_forward(
    const T* __restrict__ x,          // [n, h_in, w_in, c]
    const T* __restrict__ w,          // [K, K, c]
    const float* __restrict__ bias,   // [bias_pixels, c] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* residual,                // [n, h_out, w_out, c] or null; may be y
    float limit, float slope,         // of the activation; slope 1 for none
    T* y,                             // [n, h_out, w_out, c]
    ConvGeometry g, int rows, int lanes, int flipped) {
    const int c = g.c_out, tiles = divide_up(c, lanes * CHANNELS);
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int index = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || index >= patches(g.n, g.h_out, g.w_out, rows, STRIP)) return;
    const Patch at = patch(index, g.h_out, g.w_out, rows, STRIP);
    const Clamp clamp{limit, slope};
    const Weights<K * K> weights(w + tile.channel, c, flipped != 0);
    float start[CHANNELS] = {};
    if (bias != nullptr && bias_pixels == 1) load_floats(bias + tile.channel, start);
    march<T, K, STRIDE>(StoredRows<T>{}, x, weights, start, g, at, tile.channel,
                        [&](float (&values)[STRIP][CHANNELS], i64 to, int in_image, int columns) {
        if (bias != nullptr && bias_pixels > 1) add_strip(bias + in_image, columns, c, values);
        if (residual != nullptr) add_strip(residual + to, columns, c, values);
        if (slope != 1.0f) {
#pragma unroll
            for (int j = 0; j < STRIP; j++) clamp.apply(values[j]);
        }
#pragma unroll
        for (int j = 0; j < STRIP; j++) {
            if (j < columns) store_floats(y + to + j * c, values[j]);
        }
    }, NothingElse{});
}

/// What the threads of the strided input gradient share: pairs of rows and columns of dx.
struct Pairs {
    int first_row, rows, first_column, columns;

    __device__ __forceinline__ explicit Pairs(const ConvGeometry& g)
        : first_row(g.pad_top / 2), rows((g.h_in - 1 + g.pad_top) / 2 - first_row + 1), first_column(g.pad_left / 2),
          columns((g.w_in - 1 + g.pad_left) / 2 - first_column + 1) {}
};

/// Marches down pairs of rows of dx under strides of 2; `finish(values, to)` gets a pixel, element `to` of dx. `also` is as
/// in `march`: `begin` is told the pair of rows, `add` the row and column within the pairs.
template <typename T, int K, class Input, class Filter, class Finish, class Also>
__device__ __forceinline__ void march_pairs(const Input& input, const T* dy, const Filter& weights,
                                            const ConvGeometry& g, const Pairs& pairs, const Patch& at, int channel,
                                            Finish finish, Also&& also) {
    // With ih + pad = 2·q + p the taps that reach row ih are kh = 2·j + p, from row q − j of dy; columns alike.
    constexpr int REACH = (K + 1) / 2, COLUMNS = PAIRS + REACH - 1;
    const int c = g.c_in, column = pairs.first_column + at.column;
    const T* const image = dy + static_cast<i64>(at.image) * g.h_out * g.w_out * c + channel;
    const i64 out = static_cast<i64>(at.image) * g.h_in * g.w_in * c + channel;
    for (int q = pairs.first_row + at.first_row; q < pairs.first_row + at.last_row; q++) {
        float sums[2][2 * PAIRS][CHANNELS] = {};
        also.begin(q);
#pragma unroll
        for (int j = 0; j < REACH; j++) {
            const int oh = q - j;
            if (oh < 0 || oh >= g.h_out) continue;
            float in[COLUMNS][CHANNELS];
            input.load(image + (oh * g.w_out + column - (REACH - 1)) * c, column - (REACH - 1), g.w_out, c, in);
#pragma unroll
            for (int tap = 2 * j * K; tap < min_of(2 * j + 2, K) * K; tap++) {
                const int kh = tap / K, kw = tap % K;
#pragma unroll
                for (int pair = 0; pair < PAIRS; pair++) {
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++) {
                        sums[kh % 2][2 * pair + kw % 2][i] += in[pair - kw / 2 + REACH - 1][i] * weights(tap, i);
                    }
                    also.add(kh % 2, tap, 2 * pair + kw % 2, in[pair - kw / 2 + REACH - 1]);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < 2; p++) {
            const int ih = 2 * q + p - g.pad_top;
            if (ih < 0 || ih >= g.h_in) continue;
#pragma unroll
            for (int j = 0; j < 2 * PAIRS; j++) {
                const int iw = 2 * column + j - g.pad_left;
                if (iw >= 0 && iw < g.w_in) finish(sums[p][j], out + (ih * g.w_in + iw) * c);
            }
        }
    }
}

/// Stores a pixel of dx, or adds it to what is there.
template <typename T>
__device__ __forceinline__ void store_gradient(T* to, bool accumulate, float (&values)[CHANNELS]) {
    if (accumulate) {
        float before[CHANNELS];
        load_floats(to, before);
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) values[i] += before[i];
    }
    store_floats(to, values);
}

template <typename T, int K>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_dgrad(
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    const T* __restrict__ w,    // [K, K, c]
    T* dx,                      // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int rows, int lanes) {
    const int c = g.c_in, tiles = divide_up(c, lanes * CHANNELS);
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const Pairs pairs(g);
    const int index = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || index >= patches(g.n, pairs.rows, pairs.columns, rows, PAIRS)) return;
    const Patch at = patch(index, pairs.rows, pairs.columns, rows, PAIRS);
    const Weights<K * K> weights(w + tile.channel, c, false);
    march_pairs<T, K>(StoredRows<T>{}, dy, weights, g, pairs, at, tile.channel, [&](float (&values)[CHANNELS], i64 to) {
        store_gradient(dx + to, accumulate != 0, values);
    }, NothingElse{});
}

/// Adds a thread's share of dw over the rows of its block and writes the block's. `memory` is `[K · CHANNELS · 256]`.
template <int K>
__device__ __forceinline__ void write_weight_sums(const ChannelTile& tile, float (&sums)[K][K * CHANNELS],
                                                  float* partials, int c, float* memory) {
#pragma unroll
    for (int kh = 0; kh < K; kh++) {
        sum_rows(tile, sums[kh], memory);
        if (!tile.active || tile.row > 0) continue;
        float* const to = partials + (static_cast<i64>(blockIdx.y) * K * K + kh * K) * c + tile.channel;
#pragma unroll
        for (int k = 0; k < K * CHANNELS; k++) to[k / CHANNELS * c + k % CHANNELS] = sums[kh][k];
    }
}

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_blocks(K)) depthwise_wgrad(
    const T* __restrict__ x,         // [n, h_in, w_in, c]
    const T* __restrict__ dy,        // [n, h_out, w_out, c]
    float* __restrict__ partials,    // [slabs, K, K, c]
    int slab,                        // patches per slab
    ConvGeometry g, int rows, int lanes) {
    constexpr int LIVE = ::LIVE<K, STRIDE>;
    SHARED_ARRAY(float, memory, K * CHANNELS * BLOCK_THREADS);
    const int c = g.c_out;
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(patches(g.n, g.h_out, g.w_out, rows, STRIP), slab, static_cast<int>(blockIdx.y));
    float sums[K][K * CHANNELS] = {};
    const int end = tile.active ? static_cast<int>(range.end) : 0;
    for (int index = static_cast<int>(range.begin) + tile.row; index < end; index += tile.rows) {
        const Patch at = patch(index, g.h_out, g.w_out, rows, STRIP);
        // The next rows of x and dy, at the strip's left end.
        int ih = at.first_row * STRIDE - g.pad_top, oh = at.first_row;
        const int left = at.column * STRIDE - g.pad_left;
        const T* x_row = x + static_cast<i64>(at.image) * g.h_in * g.w_in * c + (ih * g.w_in + left) * c + tile.channel;
        const T* dy_row =
            dy + static_cast<i64>(at.image) * g.h_out * g.w_out * c + (oh * g.w_out + at.column) * c + tile.channel;
        // d[i] is the row of dy i above the youngest one.
        float d[LIVE][STRIP][CHANNELS] = {};
        auto add_input = [&](int q) {
            float in[COLUMNS<K, STRIDE>][CHANNELS];
            load_row(x_row, left, g.w_in, c, in);
#pragma unroll
            for (int kh = q; kh < K; kh += STRIDE) {
#pragma unroll
                for (int k = 0; k < K * CHANNELS; k++) {
                    const int kw = k / CHANNELS, i = k % CHANNELS;
#pragma unroll
                    for (int j = 0; j < STRIP; j++) sums[kh][k] += in[j * STRIDE + kw][i] * d[kh / STRIDE][j][i];
                }
            }
        };
        const int last = at.last_row + LIVE - 1;
        while (oh < last) {
#pragma unroll
            for (int unrolled = 0; unrolled < UNROLL<K, STRIDE>; unrolled++, oh++, dy_row += g.w_out * c) {
                if (oh >= last) break;
                move_on(d, {});
                if (oh < at.last_row) load_row(dy_row, at.column, g.w_out, c, d[0]);
#pragma unroll
                for (int q = 0; q < STRIDE; q++, ih++, x_row += g.w_in * c) {
                    if (ih >= 0 && ih < g.h_in) add_input(q);
                }
            }
        }
    }
    write_weight_sums<K>(tile, sums, partials, c, memory);
}

/// Blocks that shall fit a multiprocessor between batch-norms, where a thread keeps coefficients too. The backward pass
/// keeps weights in the type of activations, and so has room for two in 16 bits only.
constexpr __device__ int resident_bn_blocks(int k, int bytes = 2) { return k == 3 && bytes == 2 ? 2 : 1; }

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_bn_blocks(K)) depthwise_bn_forward(
    const T* __restrict__ x,                // [n, h_in, w_in, c]
    const float* __restrict__ x_gamma,      // [c] or null where x is stored
    const float* __restrict__ x_beta,       // [c] or null
    const float* __restrict__ x_saved,      // [2, c] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at,   // [1] or null
    const T* __restrict__ w,                // [K, K, c]
    T* __restrict__ y,                      // [n, h_out, w_out, c]
    float* __restrict__ partials,           // [slabs, 2, c]: mean, Σ (y − mean)²
    float* __restrict__ counts,             // [slabs]: pixels
    ConvGeometry g, int rows, int lanes) {
    SHARED_ARRAY(float, memory, (2 * CHANNELS + 1) * BLOCK_THREADS);
    const int c = g.c_out, tiles = divide_up(c, lanes * CHANNELS);
    const int slab = static_cast<int>(blockIdx.x) / tiles, first = static_cast<int>(blockIdx.x) % tiles;
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, first);
    const int index = slab * tile.rows + tile.row;
    Moments<CHANNELS> moments;
    if (tile.active && index < patches(g.n, g.h_out, g.w_out, rows, STRIP)) {
        const Patch at = patch(index, g.h_out, g.w_out, rows, STRIP);
        const Weights<K * K> weights(w + tile.channel, c, false);
        const Normalised<T> form{x_gamma, x_beta, x_saved, make_clamp(x_limit, x_slope, x_slope_at), c};
        march<T, K, STRIDE>(NormalisedRows<T>(form, tile.channel), x, weights, {}, g, at, tile.channel,
                            [&](float (&values)[STRIP][CHANNELS], i64 to, int, int columns) {
#pragma unroll
            for (int j = 0; j < STRIP; j++) {
                if (j >= columns) continue;
                moments.add(values[j]);
                store_floats(y + to + j * c, values[j]);
            }
        }, NothingElse{});
    }
    // All about the origin of the first row of threads, which always has pixels.
    const int lane = static_cast<int>(threadIdx.x) % lanes;
    if (tile.active && tile.row == 0) {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) memory[lane * CHANNELS + i] = moments.origin[i];
    }
    __syncthreads();
    float origin[CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) origin[i] = memory[lane * CHANNELS + i];
    moments.move_to(origin);
    float sums[2 * CHANNELS + 1];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        sums[i] = moments.sums[i];
        sums[CHANNELS + i] = moments.squares[i];
    }
    sums[2 * CHANNELS] = static_cast<float>(moments.count);
    sum_rows(tile, sums, memory);
    if (!tile.active || tile.row > 0) return;
    const float count = sums[2 * CHANNELS];
    float* const to = partials + static_cast<i64>(slab) * 2 * c + tile.channel;
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) store_moments(origin[i], sums[i], sums[CHANNELS + i], count, to + i, c);
    if (tile.channel == 0) counts[slab] = count;
}

/// The convolution that an input gradient of stride 1 is: input and output exchanged.
__device__ __forceinline__ ConvGeometry transposed(ConvGeometry g) {
    const int h = g.h_in, w = g.w_in;
    g.h_in = g.h_out;
    g.w_in = g.w_out;
    g.h_out = h;
    g.w_out = w;
    g.pad_top = g.k_h - 1 - g.pad_top;
    g.pad_left = g.k_w - 1 - g.pad_left;
    return g;
}

/// Products of the gradient of the result with the input under it, by tap, for the input's pixels of a thread. Their rows
/// are those of the sums of the input's gradient, and are kept rounded, which in 16 bits takes half the registers. With
/// FLIPPED taps count from the last.
template <typename T, int K, int ROWS, int COLUMNS, bool FLIPPED>
struct WeightSums {
    typename Pixel<T>::Word rows[ROWS][COLUMNS] = {};
    float sums[K][K * CHANNELS] = {};

    /// Moves the rows on, and loads the youngest where there is one.
    template <class Input>
    __device__ __forceinline__ void next_row(const Input& input, const T* row, int first, int width, int c,
                                             bool inside) {
#pragma unroll
        for (int r = ROWS - 1; r >= 0; r--) {
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) rows[r][j] = r > 0 ? rows[r - 1][j] : 0;
        }
        if (!inside) return;
        float values[COLUMNS][CHANNELS];
        input.load(row, first, width, c, values);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) rows[0][j] = Pixel<T>::rounded(values[j]);
    }

    __device__ __forceinline__ void add(int row, int tap, int column, const float (&values)[CHANNELS]) {
        const int at = FLIPPED ? K * K - 1 - tap : tap;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            sums[at / K][at % K * CHANNELS + i] += values[i] * to_float(Pixel<T>::channel(rows[row][column], i));
        }
    }
};

template <typename T, int K, int STRIDE>
__global__ void __launch_bounds__(256, resident_bn_blocks(K, sizeof(T))) depthwise_bn_backward(
    const T* __restrict__ x,                // [n, h_in, w_in, c]
    const float* __restrict__ x_gamma,      // [c], or null where x is stored
    const float* __restrict__ x_beta,       // [c] or null
    const float* __restrict__ x_saved,      // [2, c] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at,   // [1] or null
    const T* __restrict__ dz,               // [n, h_out, w_out, c]: dy where it is stored
    const T* __restrict__ y,                // [n, h_out, w_out, c] or null
    const float* __restrict__ coefficients, // [4, c], or null where dy is stored
    float limit, float slope,
    const float* __restrict__ slope_at,     // [1] or null
    const T* __restrict__ w,                // [K, K, c]
    T* __restrict__ dx,                     // [n, h_in, w_in, c] or null
    int accumulate,                         // 1 adds to what is in dx; without γ
    float* __restrict__ dx_sums,            // [slabs, 2, c] or null: Σ g, Σ g·(x − μ)
    float* __restrict__ scores,             // [blocks] or null
    float* __restrict__ partials,           // [slabs, K, K, c]
    int slab,                               // patches per slab
    ConvGeometry g, int rows, int lanes) {
    SHARED_ARRAY(float, memory, K * CHANNELS * BLOCK_THREADS);
    const int c = g.c_in;
    const ChannelTile tile = channel_tile<CHANNELS>(c, lanes, static_cast<int>(blockIdx.x));
    const Pairs pairs(g);
    const int h = STRIDE == 1 ? g.h_in : pairs.rows, width = STRIDE == 1 ? g.w_in : pairs.columns;
    const Range range = slab_range(patches(g.n, h, width, rows, STRIP), slab, static_cast<int>(blockIdx.y));
    const int end = tile.active ? static_cast<int>(range.end) : 0, channel = tile.active ? tile.channel : 0;
    const Normalised<T> x_form{x_gamma, x_beta, x_saved, make_clamp(x_limit, x_slope, x_slope_at), c};
    const Formed<T> dy_form{y, coefficients, make_clamp(limit, slope, slope_at), c};
    const FormedRows<T, Normalised<T>> inputs{x, x_form, channel};
    const FormedRows<T, Formed<T>> gradients{dz, dy_form, channel};
    const StoredWeights<T, K * K> weights(w + channel, c, STRIDE == 1);
    GradientSums<CHANNELS> of;
    WeightSums<T, K, STRIDE == 1 ? K : 2, STRIDE == 1 ? STRIP : 2 * PAIRS, STRIDE == 1> dw;

    auto finish = [&](float (&values)[CHANNELS], i64 to) {
        if (dx == nullptr) return;
        store_gradient(dx + to, accumulate != 0, values);
        if (x_gamma == nullptr) return;
        float raw[CHANNELS];
        load_floats(x + to, raw);
        of.add(values, raw, {x_gamma, x_beta, x_saved, c, opaque(channel)}, x_form.clamp, scores != nullptr);
    };
    for (int index = static_cast<int>(range.begin) + tile.row; index < end; index += tile.rows) {
        const Patch at = patch(index, h, width, rows, STRIP);
        const T* const image = x + static_cast<i64>(at.image) * g.h_in * g.w_in * c + channel;
        if constexpr (STRIDE == 1) {
            struct {
                decltype(dw)& sums;
                const FormedRows<T, Normalised<T>>& inputs;
                const T* next;
                const Patch& at;
                int width, c;
                __device__ __forceinline__ void begin(int row) {
                    sums.next_row(inputs, next, at.column, width, c, row < at.last_row);
                    next += width * c;
                }
                __device__ __forceinline__ void add(int row, int tap, int column, const float (&values)[CHANNELS]) {
                    sums.add(row, tap, column, values);
                }
            } also{dw, inputs, image + (at.first_row * g.w_in + at.column) * c, at, g.w_in, c};
            march<T, K, 1>(gradients, dz, weights, {}, transposed(g), at, channel,
                           [&](float (&values)[STRIP][CHANNELS], i64 to, int, int columns) {
#pragma unroll
                for (int j = 0; j < STRIP; j++) {
                    if (j < columns) finish(values[j], to + j * c);
                }
            }, also);
        } else {
            struct {
                decltype(dw)& sums;
                const FormedRows<T, Normalised<T>>& inputs;
                const T* image;
                const ConvGeometry& g;
                int column, c;
                __device__ __forceinline__ void begin(int q) {
#pragma unroll
                    for (int p = 1; p >= 0; p--) {
                        const int ih = 2 * q + p - g.pad_top;
                        const T* const from = image + (ih * g.w_in + column) * c;
                        sums.next_row(inputs, from, column, g.w_in, c, ih >= 0 && ih < g.h_in);
                    }
                }
                __device__ __forceinline__ void add(int row, int tap, int column, const float (&values)[CHANNELS]) {
                    sums.add(row, tap, column, values);
                }
            } also{dw, inputs, image, g, 2 * (pairs.first_column + at.column) - g.pad_left, c};
            march_pairs<T, K>(gradients, dz, weights, g, pairs, at, channel, finish, also);
        }
    }
    write_weight_sums<K>(tile, dw.sums, partials, c, memory);
    if (dx_sums == nullptr) return;
    float sums[2 * CHANNELS];
#pragma unroll
    for (int i = 0; i < CHANNELS; i++) {
        sums[i] = of.sums[i];
        sums[CHANNELS + i] = of.products[i];
    }
    sum_rows(tile, sums, memory);
    if (tile.active && tile.row == 0) {
        float* const to = dx_sums + static_cast<i64>(blockIdx.y) * 2 * c + channel;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            to[i] = sums[i];
            to[c + i] = sums[CHANNELS + i];
        }
    }
    if (scores == nullptr) return;
    __syncthreads();
    const float score = block_sum(of.score, memory);
    if (threadIdx.x == 0) scores[static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x] = score;
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_forward_any(
    const T* __restrict__ x,          // [n, h_in, w_in, c]
    const T* __restrict__ w,          // [k_h, k_w, c]
    const float* __restrict__ bias,   // [bias_pixels, c] or null
    int bias_pixels,                  // 1, or h_out·w_out where every pixel of an image has its own bias
    const T* residual,                // [n, h_out, w_out, c] or null
    float limit, float slope,         // of the activation; slope 1 for none
    T* y,                             // [n, h_out, w_out, c]
    ConvGeometry g, int lanes) {
    const int c = g.c_out, tiles = divide_up(c, lanes);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int pixel = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || pixel >= g.n * g.h_out * g.w_out) return;
    const int top = pixel / g.w_out % g.h_out * g.stride_h - g.pad_top;
    const int left = pixel % g.w_out * g.stride_w - g.pad_left;
    const T* const image = x + static_cast<i64>(pixel / g.w_out / g.h_out) * g.h_in * g.w_in * c + tile.channel;
    float sums[1] = {};
    for (int kh = max_of(0, -top); kh < min_of(g.k_h, g.h_in - top); kh++) {
        for (int kw = max_of(0, -left); kw < min_of(g.k_w, g.w_in - left); kw++) {
            const T in = image[((top + kh) * g.w_in + left + kw) * c];
            sums[0] += to_float(in) * to_float(w[(kh * g.k_w + kw) * c + tile.channel]);
        }
    }
    const ForwardWriter<T> writer{y, bias, bias_pixels, residual, Clamp{limit, slope}, c};
    writer.write(pixel, tile.channel, sums);
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_dgrad_any(
    const T* __restrict__ dy,   // [n, h_out, w_out, c]
    const T* __restrict__ w,    // [k_h, k_w, c]
    T* dx,                      // [n, h_in, w_in, c]
    int accumulate,             // 1 adds to what is in dx
    ConvGeometry g, int lanes) {
    const int c = g.c_in, tiles = divide_up(c, lanes);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x) % tiles);
    const int pixel = static_cast<int>(blockIdx.x) / tiles * tile.rows + tile.row;
    if (!tile.active || pixel >= g.n * g.h_in * g.w_in) return;
    const int bottom = pixel / g.w_in % g.h_in + g.pad_top, right = pixel % g.w_in + g.pad_left;
    const T* const image = dy + static_cast<i64>(pixel / g.w_in / g.h_in) * g.h_out * g.w_out * c + tile.channel;
    float sums[1] = {};
    for (int kh = bottom % g.stride_h; kh < min_of(g.k_h, bottom + 1); kh += g.stride_h) {
        const int oh = (bottom - kh) / g.stride_h;
        if (oh >= g.h_out) continue;
        for (int kw = right % g.stride_w; kw < min_of(g.k_w, right + 1); kw += g.stride_w) {
            const int ow = (right - kw) / g.stride_w;
            if (ow >= g.w_out) continue;
            const T in = image[(oh * g.w_out + ow) * c];
            sums[0] += to_float(in) * to_float(w[(kh * g.k_w + kw) * c + tile.channel]);
        }
    }
    const InputGradientWriter<T> writer{dx, accumulate != 0, c, {}};
    writer.write(pixel, tile.channel, sums);
}

template <typename T>
__global__ void __launch_bounds__(256) depthwise_wgrad_any(
    const T* __restrict__ x,         // [n, h_in, w_in, c]
    const T* __restrict__ dy,        // [n, h_out, w_out, c]
    float* __restrict__ partials,    // [slabs, k_h, k_w, c]
    int slab,                        // output pixels per slab
    ConvGeometry g, int lanes) {
    SHARED_ARRAY(float, memory, BLOCK_THREADS);
    const int c = g.c_out, tap = static_cast<int>(blockIdx.z);
    const ChannelTile tile = channel_tile<1>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(static_cast<i64>(g.n) * g.h_out * g.w_out, slab, static_cast<int>(blockIdx.y));
    float sums[1] = {};
    for (i64 i = range.begin + tile.row; tile.active && i < range.end; i += tile.rows) {
        const int pixel = static_cast<int>(i);
        const int ih = pixel / g.w_out % g.h_out * g.stride_h - g.pad_top + tap / g.k_w;
        const int iw = pixel % g.w_out * g.stride_w - g.pad_left + tap % g.k_w;
        if (ih < 0 || ih >= g.h_in || iw < 0 || iw >= g.w_in) continue;
        const i64 from = (static_cast<i64>(pixel / g.w_out / g.h_out) * g.h_in + ih) * g.w_in + iw;
        sums[0] += to_float(x[from * c + tile.channel]) * to_float(dy[i * c + tile.channel]);
    }
    sum_rows(tile, sums, memory);
    if (!tile.active || tile.row > 0) return;
    partials[(static_cast<i64>(blockIdx.y) * gridDim.z + tap) * c + tile.channel] = sums[0];
}
