// Depthwise k×k convolution between two batch-norms (on_load.cuh), for K 3 and 5.
//
// x is normalised on load where γ is given, dy formed on load where coefficients are; the forward pass takes moments of y,
// the backward pass has both gradients of one walk over dy, and where γ is given the sums over dx = dz that the batch-norm
// before needs. Tensors, launches and marches are those of depthwise.cu. Slabs of the moments are the blocks of one tile
// of channels.
//
// depthwise_bn_forward<T, K, STRIDE>    grid as depthwise_forward                                        12 instances
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* w, T* y, float* partials [slabs, 2, c], float* counts [tiles, slabs],
//      float* groups, u32* tickets, int group, float* running_mean [c], float* running_var [c], float* saved [2, c],
//      float eps, float momentum, ConvGeometry, int rows, int lanes)
//     partials and groups to momentum are StatisticsOut of statistics.cuh
// depthwise_bn_backward<T, K, STRIDE>   grid (tiles, slabs), a slab being of strips, or pairs, of dx     12 instances
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* dz, const T* y, const float* coefficients [4, c], float limit, float slope,
//      const float* slope_at, const T* w, T* dx, int accumulate, float* dx_sums [slabs, 2, c], float* scores [blocks],
//      float* partials [slabs, K, K, c], int slab, ConvGeometry, int rows, int lanes)
//
// instances: depthwise_bn_{forward,backward}<{float,f16,bf16}, {3,5}, {1,2}>

#include "depthwise.cuh"
#include "on_load.cuh"
#include "statistics.cuh"

/// Blocks that shall fit a multiprocessor between batch-norms, where a thread keeps coefficients too. The backward pass
/// keeps weights in the type of activations, and so has room for two in 16 bits only.
constexpr __device__ int resident_bn_blocks(int k, int bytes = 2) { return k == 3 && bytes == 2 ? 2 : 1; }

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
    float* partials,                        // [slabs, 2, c]: mean, Σ (y − mean)²
    float* counts,                          // [tiles, slabs]: pixels
    float* groups,                          // as StatisticsOut of statistics.cuh
    u32* tickets, int group,
    float* __restrict__ running_mean,       // [c]
    float* __restrict__ running_var,        // [c]
    float* __restrict__ saved,              // [2, c]
    float eps, float momentum,
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
    const StatisticsOut out{partials, groups, tickets, group, running_mean, running_var, saved, eps, momentum};
    const SlabPlace place{first, slab, static_cast<int>(gridDim.x) / tiles};
    finish_slab_moments(tile, moments, out, counts, place, c, memory);
}

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
