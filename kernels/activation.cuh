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

/// Two numbers of 16 bits side by side, the first in the lower half, rounded from floats.
template <typename T>
__device__ __forceinline__ u32 packed(float first, float second) {
    return from_float<T>(first).bits | static_cast<u32>(from_float<T>(second).bits) << 16;
}

/// The activation with slope 0 of two packed numbers, of which `limit` has the bound twice. To bound what is rounded gives the same as
/// to round what is bounded, in half the instructions. f16; from ARCH 800 on bf16, too.
template <typename T>
__device__ __forceinline__ u32 clamped(u32 x, u32 limit) {
#if !defined(__CUDA_ARCH__)
    u32 out = 0;
    for (int at = 0; at < 32; at += 16) {
        const float value = to_float(T{static_cast<u16>(x >> at)}), most = to_float(T{static_cast<u16>(limit >> at)});
        const float low = value < 0.0f ? 0.0f : value;
        out |= static_cast<u32>(from_float<T>(low > most ? most : low).bits) << at;
    }
    return out;
#elif ARCH >= 800
    if constexpr (IS_BF16<T>) {
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(0u));
        asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(x) : "r"(limit));
    } else {
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(0u));
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(x) : "r"(limit));
    }
    return x;
#else
    // All bits of a half where a comparison holds; not-a-number stays.
    u32 kept, above;
    asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(kept) : "r"(x), "r"(0u));
    x &= kept;
    asm("set.gt.u32.f16x2 %0, %1, %2;" : "=r"(above) : "r"(x), "r"(limit));
    return (x & ~above) | (limit & above);
#endif
}
