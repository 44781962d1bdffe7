// The device language on the host: what kernels of this folder use of CUDA C++, for a C++17 compiler.
//
// A generated file includes this header, the kernel file and `launch.h`, and is compiled to a shared library, through
// which the emulator device launches kernels (see launch.h). `-DARCH=` chooses the architecture whose data movement is
// followed (800 by default). Shared memory is filled with NaN at the start of each block and watched by the address
// sanitizer, which is why it is declared with SHARED_ARRAY and DYNAMIC_SHARED (device.cuh) and not with `__shared__`:
// an object with a name of its own could be neither found at the start of a block nor surrounded by a gap.

#pragma once

#ifndef ARCH
#define ARCH 800
#endif

#include "block.h"

// Qualifiers.
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ _Pragma("GCC error \"static shared memory is declared with SHARED_ARRAY(T, name, N)\"")
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::machine->arena)

#define SHARED_ARRAY(T, name, ...)                                             \
    static char name##_site;                                                   \
    auto& name = *static_cast<typename ArrayOf<T, __VA_ARGS__>::Type*>(        \
        emulator::shared_array(&name##_site, sizeof(typename ArrayOf<T, __VA_ARGS__>::Type)))

// Built-in variables.
#define threadIdx (static_cast<const uint3&>(emulator::machine->thread->index))
#define blockIdx (static_cast<const uint3&>(emulator::machine->block_index))
#define blockDim (static_cast<const dim3&>(emulator::machine->block_dim))
#define gridDim (static_cast<const dim3&>(emulator::machine->grid_dim))
constexpr int warpSize = 32;

// Vector types.
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return float2{x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
inline int2 make_int2(int x, int y) { return int2{x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return int4{x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

// Bits.
namespace emulator {
template <typename TO, typename FROM>
inline TO bits_as(FROM from) {
    static_assert(sizeof(TO) == sizeof(FROM), "the same number of bits");
    TO to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emulator
inline unsigned __float_as_uint(float x) { return emulator::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// Memory.
template <typename T>
inline T __ldg(const T* from) {
    return *from;
}
inline void __threadfence() {}
/// Blocks run on several threads of the host, and what one wrote before is seen by those that come after it.
UNCOUNTED inline unsigned atomicAdd(unsigned* to, unsigned by) { return __atomic_fetch_add(to, by, __ATOMIC_ACQ_REL); }
inline void __threadfence_block() {}

// Barriers, votes and shuffles. A lane whose source takes no part gets bits that are all set.
inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::warp_operation(mask, nullptr, nullptr); }

namespace emulator {

struct Vote {
    bool predicate;
    unsigned ballot, present;
};

inline void combine_votes(void* const (&data)[WARP_LANES]) {
    unsigned ballot = 0, present = 0;
    for (unsigned i = 0; i < WARP_LANES; i++) {
        if (data[i] == nullptr) continue;
        present |= 1u << i;
        if (static_cast<Vote*>(data[i])->predicate) ballot |= 1u << i;
    }
    for (unsigned i = 0; i < WARP_LANES; i++) {
        if (data[i] == nullptr) continue;
        static_cast<Vote*>(data[i])->ballot = ballot;
        static_cast<Vote*>(data[i])->present = present;
    }
}

inline Vote vote(unsigned mask, bool predicate) {
    Vote mine{predicate, 0, 0};
    warp_operation(mask, combine_votes, &mine);
    return mine;
}

template <typename T>
struct Exchange {
    T value, result;
    unsigned source;
};

template <typename T>
inline void combine_exchange(void* const (&data)[WARP_LANES]) {
    for (unsigned i = 0; i < WARP_LANES; i++) {
        if (data[i] == nullptr) continue;
        Exchange<T>& mine = *static_cast<Exchange<T>*>(data[i]);
        if (data[mine.source] == nullptr) {
            __builtin_memset(&mine.result, 0xff, sizeof(T));
        } else {
            mine.result = static_cast<Exchange<T>*>(data[mine.source])->value;
        }
    }
}

template <typename T>
inline T exchange(unsigned mask, T value, unsigned source) {
    Exchange<T> mine{value, value, source};
    warp_operation(mask, combine_exchange<T>, &mine);
    return mine.result;
}

inline int lane() { return static_cast<int>(machine->thread->rank % WARP_LANES); }

inline void check_width(int width) {
    if (width <= 0 || width > 32 || (width & (width - 1)) != 0) fail("a shuffle of width %d", width);
}

}  // namespace emulator

inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0).ballot; }
inline int __any_sync(unsigned mask, int predicate) { return emulator::vote(mask, predicate != 0).ballot != 0; }
inline int __all_sync(unsigned mask, int predicate) {
    const emulator::Vote vote = emulator::vote(mask, predicate != 0);
    return vote.ballot == vote.present;
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    emulator::check_width(width);
    const int first = emulator::lane() & ~(width - 1);
    return emulator::exchange(mask, value, static_cast<unsigned>(first | (source & (width - 1))));
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    emulator::check_width(width);
    const int lane = emulator::lane(), first = lane & ~(width - 1), source = lane - static_cast<int>(delta);
    return emulator::exchange(mask, value, static_cast<unsigned>(source < first ? lane : source));
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    emulator::check_width(width);
    const int lane = emulator::lane(), last = lane | (width - 1), source = lane + static_cast<int>(delta);
    return emulator::exchange(mask, value, static_cast<unsigned>(source > last ? lane : source));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    emulator::check_width(width);
    const int lane = emulator::lane(), last = lane | (width - 1), source = (lane ^ bits) & 31;
    return emulator::exchange(mask, value, static_cast<unsigned>(source > last ? lane : source));
}

#include "tensor_core.h"
