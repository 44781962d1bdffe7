// Random numbers as functions of a stream and an index: the same bits on every device, and nothing to keep.

#pragma once

#include "numeric.cuh"

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
__device__ __forceinline__ u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/// Nearly normal noise: the sum of twelve uniform numbers of 16 bits, whose variance is 1. In integers until the end, so
/// that it is exact.
__device__ __forceinline__ float noise(u64 stream, u64 index) {
    u32 sum = 0;
#pragma unroll
    for (u64 part = 0; part < 3; part++) {
        const u64 bits = mix(stream + 3 * index + part);
        sum += static_cast<u32>(bits & 0xffff) + static_cast<u32>(bits >> 16 & 0xffff) +
               static_cast<u32>(bits >> 32 & 0xffff) + static_cast<u32>(bits >> 48);
    }
    // The twelve means are 65535 / 2.
    return static_cast<float>(static_cast<int>(sum) - 6 * 65535) * (1.0f / 65536.0f);
}
