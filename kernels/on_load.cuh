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
