// Number types and scalar math, on the device and on the host alike.
//
// `f16` and `bf16` are storage only: 16 bits without arithmetic and without constructors, so that they may lie in
// shared memory and in vectors. Kernels read them with `to_float`, compute in `float`, and write with `from_float<T>`,
// which rounds to nearest even; not-a-number becomes 0x7fff in both types, as the hardware's `cvt` does.
//
// Subnormal floats count as zero in all arithmetic (`--ftz=true`, and the emulator's threads are set so); the subnormal
// numbers of `f16`, which are normal floats, do not.

#pragma once

#include "device.cuh"

/// IEEE 754 half precision.
struct f16 {
    unsigned short bits;
};

/// The upper half of a `float`.
struct bf16 {
    unsigned short bits;
};

template <typename T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

#define INFINITY_F __int_as_float(0x7f800000)
#define LARGEST_FLOAT __int_as_float(0x7f7fffff)

__device__ __forceinline__ float to_float(float x) { return x; }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#elif defined(__F16C__)
    typedef short Halves __attribute__((vector_size(16)));
    return __builtin_ia32_vcvtph2ps(Halves{static_cast<short>(x.bits)})[0];
#else
    // The exponent and the mantissa move into the places of a float, whose bias is larger by 112. A subnormal number is
    // its mantissa times 2^-24, a normal float: on the way there is no subnormal float, which would count as zero.
    const u32 magnitude = x.bits & 0x7fffu;
    u32 y = (magnitude << 13) + (112u << 23);
    if (magnitude < 0x0400u) y = __float_as_uint(static_cast<float>(magnitude) * __uint_as_float((127u - 24u) << 23));
    if (magnitude >= 0x7c00u) y = 0x7f800000u | (magnitude << 13);
    return __uint_as_float(y | (static_cast<u32>(x.bits & 0x8000u) << 16));
#endif
}

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#if defined(__CUDA_ARCH__) && ARCH >= 800
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
    return bf16{static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
#ifdef __CUDA_ARCH__
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const u32 sign = (__float_as_uint(x) >> 16) & 0x8000u;
    const u32 bits = __float_as_uint(x) & 0x7fffffffu;
    u32 half;
    if (bits > 0x7f800000u) return f16{0x7fff};
    if (bits >= 0x477ff000u) {
        // 65520 and more round to infinity.
        half = 0x7c00u;
    } else if (bits < 0x38800000u) {
        // Below 2^-14 the result is subnormal: adding 0.5 puts its last bit at the last bit of the sum, so that the
        // addition itself rounds.
        half = __float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000u;
    } else {
        half = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    }
    return f16{static_cast<u16>(sign | half)};
#endif
}

// `one_over` is within one unit of the last place: exact division is a subroutine, and what lives across its call spills.
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float exp_f(float x) { return expf(x); }
__device__ __forceinline__ float log_f(float x) { return logf(x); }
__device__ __forceinline__ float sqrt_f(float x) { return sqrtf(x); }
__device__ __forceinline__ float rsqrt_f(float x) { return rsqrtf(x); }
__device__ __forceinline__ float pow_f(float x, float y) { return powf(x, y); }
__device__ __forceinline__ float fma_f(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float min_f(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float max_f(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float abs_f(float x) { return fabsf(x); }
__device__ __forceinline__ float floor_f(float x) { return floorf(x); }
__device__ __forceinline__ float one_over(int count) { return __fdividef(1.0f, static_cast<float>(count)); }
#else
inline float exp_f(float x) { return __builtin_expf(x); }
inline float log_f(float x) { return __builtin_logf(x); }
inline float sqrt_f(float x) { return __builtin_sqrtf(x); }
inline float rsqrt_f(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float pow_f(float x, float y) { return __builtin_powf(x, y); }
inline float fma_f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float min_f(float a, float b) { return __builtin_fminf(a, b); }
inline float max_f(float a, float b) { return __builtin_fmaxf(a, b); }
inline float abs_f(float x) { return __builtin_fabsf(x); }
inline float floor_f(float x) { return __builtin_floorf(x); }
inline float one_over(int count) { return 1.0f / static_cast<float>(count); }
#endif

/// Neither infinite nor not-a-number; holds under fast-math options too, since it looks at the bits.
__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

/// The smaller and the larger of two integers, and a quotient rounded up.
template <typename T>
__device__ __forceinline__ T min_of(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
__device__ __forceinline__ T max_of(T a, T b) {
    return a < b ? b : a;
}
template <typename T>
__device__ __forceinline__ T divide_up(T a, T b) {
    return (a + b - 1) / b;
}
