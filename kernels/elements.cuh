// Element-wise operations with one or two operands, by 16-byte vectors and, at the end, one by one.

#pragma once

#include "vector.cuh"

/// out (+)= body(index, a, b) for N neighbouring elements.
template <int N, typename T, typename Body>
__device__ __forceinline__ void combine_run(i64 at, const T* a, const T* b, T* out, bool accumulate, Body& body) {
    float first[N], second[N] = {}, result[N] = {};
    load_floats(a + at, first);
    if (b != nullptr) load_floats(b + at, second);
    if (accumulate) load_floats(out + at, result);
#pragma unroll
    for (int i = 0; i < N; i++) result[i] += body(at + i, first[i], second[i]);
    store_floats(out + at, result);
}

/// out (+)= body(index, a, b) for all elements 0..n, a grid's width further each time. b may be null and is then 0.
/// Pointers are aligned to 16 bytes.
template <typename T, typename Body>
__device__ __forceinline__ void combine(
    i64 n, const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out, bool accumulate, Body body) {
    constexpr int N = VECTOR_LEN<T>;
    const i64 thread = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const i64 threads = static_cast<i64>(gridDim.x) * blockDim.x;
    for (i64 i = thread; i < n / N; i += threads) combine_run<N>(i * N, a, b, out, accumulate, body);
    for (i64 i = n / N * N + thread; i < n; i += threads) combine_run<1>(i, a, b, out, accumulate, body);
}
