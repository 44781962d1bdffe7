// What depthwise convolutions are made of: a thread has two channels of a strip of two columns and marches down it, reading
// each row of the input once (depthwise.cu).
//
// The input of a march loads a row of pixels, `load(row, first, width, c, out)` as load_row does; its filter gives the
// weight of a tap and a channel.

#pragma once

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
