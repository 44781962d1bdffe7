// Writers: where the sums of a tile go.
//
// `write(m, n, values)` gets N neighbouring sums of row m from column n on, N being a 16-byte vector of `Output` or 1,
// and is called once for every element of the result.

#pragma once

#include "on_load.cuh"
#include "statistics.cuh"

/// y = φ(sum + bias + residual), rounded once.
template <typename T>
struct ForwardWriter {
    using Output = T;

    T* y;                // [m, c]
    const float* bias;   // [bias_pixels, c] or null; pixel m has the bias of m modulo bias_pixels
    int bias_pixels;     // 1 for a bias per channel, h_out·w_out for a bias map
    const T* residual;   // [m, c] or null
    Clamp clamp;         // slope 1 for none
    int c;

    template <int N>
    __device__ __forceinline__ void write(int m, int n, float (&values)[N]) const {
        const i64 at = static_cast<i64>(m) * c + n;
        if (bias != nullptr) {
            const int pixel = bias_pixels > 1 ? m % bias_pixels : 0;
            add(values, bias + static_cast<i64>(pixel) * c + n);
        }
        if (residual != nullptr) add(values, residual + at);
        if (clamp.slope != 1.0f) clamp.apply(values);
        store_floats<N>(y + at, values);
    }

    template <int N, typename U>
    __device__ __forceinline__ static void add(float (&values)[N], const U* from) {
        float more[N];
        load_floats<N>(from, more);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] += more[i];
    }
};

/// Row m is pixel m.
struct EveryPixel {
    __device__ __forceinline__ int operator()(int m) const { return m; }
};

/// dx = sum, or dx += sum; `Pixels` maps row m to its pixel.
template <typename T, class Pixels = EveryPixel>
struct InputGradientWriter {
    using Output = T;

    T* dx;   // [pixels, c]
    bool accumulate;
    int c;
    Pixels pixels;

    template <int N>
    __device__ __forceinline__ void write(int m, int n, float (&values)[N]) const {
        T* const to = dx + static_cast<i64>(pixels(m)) * c + n;
        if (accumulate) {
            float before[N];
            load_floats<N>(to, before);
#pragma unroll
            for (int i = 0; i < N; i++) values[i] += before[i];
        }
        store_floats<N>(to, values);
    }
};

/// y = sum, and its moments by column.
template <typename T, int COLUMNS>
struct MomentsWriter {
    using Output = T;

    T* y;   // [m, c]
    int c;
    Moments<COLUMNS> moments;

    __device__ __forceinline__ void write(int m, int n, const float (&values)[COLUMNS]) {
        moments.add(values);
        store_floats<COLUMNS>(y + static_cast<i64>(m) * c + n, values);
    }
};

/// dz = sum, and what the batch-norm before needs of it.
template <typename T, int COLUMNS>
struct MaskedGradientWriter {
    using Output = T;

    T* dz;        // [m, c]
    const T* y;   // [m, c]: what was normalised
    int c;
    bool with_score;
    Clamp clamp;
    NormCoefficients<COLUMNS> of;
    GradientSums<COLUMNS> sums;

    __device__ __forceinline__ void write(int m, int n, const float (&values)[COLUMNS]) {
        const i64 at = static_cast<i64>(m) * c + n;
        float raw[COLUMNS];
        load_floats<COLUMNS>(y + at, raw);
        sums.add(values, raw, of, clamp, with_score);
        store_floats<COLUMNS>(dz + at, values);
    }
};

/// One slab's share of dw.
struct WeightGradientWriter {
    using Output = float;

    float* partial;   // [m, length]
    int length;

    template <int N>
    __device__ __forceinline__ void write(int m, int n, float (&values)[N]) const {
        store_floats<N>(partial + static_cast<i64>(m) * length + n, values);
    }
};
