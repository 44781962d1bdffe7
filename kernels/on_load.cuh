// Batch normalisation at the edges of a convolution: operands that are formed while they are loaded, and sums over a
// result that are taken before it leaves the registers (level OnLoad of docs/kernels.md a).
//
//   normalised   z = φ(a·y + b) of the stored raw result y of the convolution before
//   formed       dy = a·g + s·y + o, g = dz·φ'(a·y + b), of the stored gradient dz behind batch-norm and activation
//
// Products in shared memory take what is formed rounded to T, as it would be if it were stored; those in registers take it
// as it is. Padding and everything else past the ends of an operand stays zero: only what is stored is formed.

#pragma once

#include "activation.cuh"
#include "slab.cuh"
#include "vector.cuh"

/// γ·(y − μ)·ρ + β as a·y + b.
struct Affine {
    float a, b;

    /// One operation, that forward and backward agree on φ'.
    __device__ __forceinline__ float operator()(float y) const { return fma_f(a, y, b); }
};

__device__ __forceinline__ Affine make_affine(
    const float* gamma, const float* beta, const float* saved, int c, int channel) {
    const float a = gamma[channel] * saved[c + channel];
    return Affine{a, beta[channel] - a * saved[channel]};
}

/// Those of N neighbouring channels.
template <int N>
__device__ __forceinline__ void make_affines(
    const float* gamma, const float* beta, const float* saved, int c, int channel, Affine (&out)[N]) {
    float scale[N], shift[N], mean[N], rstd[N];
    load_floats<N>(gamma + channel, scale);
    load_floats<N>(beta + channel, shift);
    load_floats<N>(saved + channel, mean);
    load_floats<N>(saved + c + channel, rstd);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float a = scale[i] * rstd[i];
        out[i] = Affine{a, shift[i] - a * mean[i]};
    }
}

/// An operand that is read as it is stored.
struct AsStored {
    static constexpr bool FORMS = false, READS_TWO = false;
};

/// z of a stored y; without γ, what is stored.
template <typename T>
struct Normalised {
    static constexpr bool FORMS = true, READS_TWO = false;

    const float* gamma;   // [c] or null
    const float* beta;    // [c]
    const float* saved;   // [2, c]: μ, ρ
    Clamp clamp;
    int c;

    __device__ __forceinline__ bool active() const { return gamma != nullptr; }

    /// Forms N neighbouring channels.
    template <int N>
    __device__ __forceinline__ void form(float (&values)[N], const float (&)[N], int channel) const {
        Affine affine[N];
        make_affines(gamma, beta, saved, c, channel, affine);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = affine[i](values[i]);
        clamp.apply(values);
    }
};

/// dy of a stored dz and y; without coefficients, what is stored.
template <typename T>
struct Formed {
    static constexpr bool FORMS = true, READS_TWO = true;

    const T* y;                  // like dz
    const float* coefficients;   // [4, c]: a, b, s, o; or null
    Clamp clamp;
    int c;

    __device__ __forceinline__ bool active() const { return coefficients != nullptr; }

    template <int N>
    __device__ __forceinline__ void form(float (&values)[N], const float (&y)[N], int channel) const {
        float a[N], b[N], s[N], o[N];
        load_floats<N>(coefficients + channel, a);
        load_floats<N>(coefficients + c + channel, b);
        load_floats<N>(coefficients + 2 * c + channel, s);
        load_floats<N>(coefficients + 3 * c + channel, o);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = values[i] * clamp.derivative(fma_f(a[i], y[i], b[i]));
            values[i] = a[i] * g + s[i] * y[i] + o[i];
        }
    }
};

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

/// Adds the moments of a block's threads, which share a slab of pixels, and writes mean and centred second moment of its
/// channels to `partials` `[slabs, 2, c]`, and how many pixels there were to `counts` `[slabs]`. The first row of threads has
/// pixels. `memory` is `[2·N + 1, 256]`. All threads of the block take part.
template <int N>
__device__ __forceinline__ void write_slab_moments(const ChannelTile& tile, Moments<N>& moments, float* partials,
                                                   float* counts, int slab, int c, float* memory) {
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
    if (!tile.active || tile.row > 0) return;
    const float count = sums[2 * N];
    float* const to = partials + static_cast<i64>(slab) * 2 * c + tile.channel;
#pragma unroll
    for (int i = 0; i < N; i++) store_moments(origin[i], sums[i], sums[N + i], count, to + i, c);
    if (tile.channel == 0) counts[slab] = count;
}

/// Coefficients of N neighbouring channels of a batch-norm.
template <int N>
struct NormCoefficients {
    Affine affine[N];
    float mean[N];

    __device__ __forceinline__ NormCoefficients(
        const float* gamma, const float* beta, const float* saved, int c, int channel) {
        make_affines(gamma, beta, saved, c, channel, affine);
        load_floats<N>(saved + channel, mean);
    }
};

/// What the batch-norm before a convolution needs of its input's gradient dz: Σ g and Σ g·(y − μ) of N columns, with
/// g = dz·φ'(v), and ⟨dz, v − φ(v)⟩.
template <int N>
struct GradientSums {
    float sums[N] = {}, products[N] = {}, score = 0.0f;

    __device__ __forceinline__ void add(const float (&dz)[N], const float (&y)[N], const NormCoefficients<N>& of,
                                        const Clamp& clamp, bool with_score) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float v = of.affine[i](y[i]), g = dz[i] * clamp.derivative(v);
            if (with_score) score += dz[i] * clamp.excess(v);
            sums[i] += g;
            products[i] += g * (y[i] - of.mean[i]);
        }
    }
};
