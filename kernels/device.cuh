// The device language as every kernel of this folder sees it.
//
// The same text is compiled by NVRTC, which predefines `__CUDA_ARCH__` and the CUDA built-ins, and by a C++17 compiler
// of the host, where the emulator defines them. This header adds what the two do not share: the architecture as a
// number, and shared memory through two macros. It is included by numeric.cuh, so that no kernel names it.
//
//   ARCH                         700, 750, 800, 860, 890, 900 ...; a macro, for `#if` and `if constexpr` alike. On the
//                                emulator it is whatever `-DARCH=` says, 800 by default.
//   DYNAMIC_SHARED(T, name)      declares `T* name`, the block's dynamic shared memory, aligned to 128 bytes.
//   SHARED_ARRAY(T, name, N...)  declares `T name[N]` (or `[N][M]`, `[N][M][K]`) in static shared memory. The
//                                emulator fills it with NaN at the start of each block and surrounds it with memory
//                                that the address sanitizer watches; it takes no plain `__shared__`.
//   FULL_WARP                    the mask of all 32 lanes.

#pragma once

#ifdef __CUDA_ARCH__

#define ARCH __CUDA_ARCH__

#define DYNAMIC_SHARED(T, name)                                              \
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_memory)

#define SHARED_ARRAY(T, name, ...) __shared__ __align__(128) typename ArrayOf<T, __VA_ARGS__>::Type name

#else

#include "emulator/emulator.h"

#endif

constexpr int WARP_SIZE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;

/// The array type `T[N][M]...`.
template <typename T, int N, int... REST>
struct ArrayOf {
    using Type = typename ArrayOf<T, REST...>::Type[N];
};
template <typename T, int N>
struct ArrayOf<T, N> {
    using Type = T[N];
};

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

/// The same number, about which the compiler knows nothing: what is read at it is read here, and not kept since before a
/// loop.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}

/// The product of two ints, as 64 bits: one instruction with the addition of an address behind it. The compiler extends the one that
/// a loop does not change ahead of it, and multiplies 64 by 64 bits then, which takes four.
__device__ __forceinline__ i64 wide_product(int a, int b) {
#ifdef __CUDA_ARCH__
    i64 product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
#else
    return static_cast<i64>(a) * b;
#endif
}

/// The element `bytes` behind another.
template <typename T>
__device__ __forceinline__ const T* behind(const T* element, i64 bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const u8*>(element) + bytes);
}
