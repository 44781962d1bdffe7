// Clamped activations with a slope outside the bounds.
//
// y = x inside (0, limit), q·x below 0, limit + q·(x − limit) above; q = 0 is ReLU or ReLU6, q = 1 the identity. The
// derivative is 1 strictly inside the bounds and q elsewhere.

#pragma once

#include "numeric.cuh"

/// An activation with its present slope.
struct Clamp {
    /// Upper bound; infinite for ReLU.
    float limit;
    /// Slope outside the bounds.
    float slope;

    /// The value. Not-a-number stays so; a distance from the bounds is taken as finite, since slope 0 would make
    /// not-a-number of an infinite one.
    __device__ __forceinline__ float apply(float x) const {
        const float low = x < 0.0f ? max_f(x, -LARGEST_FLOAT) * slope : x;
        return x > limit ? limit + slope * min_f(x - limit, LARGEST_FLOAT) : low;
    }

    /// The values of several elements. With slope 0, as ReLU and ReLU6 have it, two comparisons and two selections do.
    template <int N>
    __device__ __forceinline__ void apply(float (&values)[N]) const {
        if (slope == 0.0f) {
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float low = values[i] < 0.0f ? 0.0f : values[i];
                values[i] = low > limit ? limit : low;
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) values[i] = apply(values[i]);
        }
    }

    /// The derivative.
    __device__ __forceinline__ float derivative(float x) const { return x > 0.0f && x < limit ? 1.0f : slope; }

    /// x − φ(x) for the activation without slope: what the straight-through score gradient weighs.
    __device__ __forceinline__ float excess(float x) const {
        const float low = x < 0.0f ? x : 0.0f;
        return x > limit ? x - limit : low;
    }
};

/// The activation whose slope lies on the device where `slope_at` is not null, and is `slope` otherwise.
__device__ __forceinline__ Clamp make_clamp(float limit, float slope, const float* slope_at = nullptr) {
    return Clamp{limit, slope_at != nullptr ? *slope_at : slope};
}
