// Element-wise operations on tensors of any shape: conversion between element types, addition.
//
// Called for the copies of weights in the network's precision, for residual connections and for
// the sum of gradients that meet at a branch. Every output element is written by one thread. Each kernel reads and
// writes its tensors once and computes next to nothing, so memory bandwidth bounds it; hence 16-byte accesses and as
// many blocks as keep the memory busy, each thread going on a grid's width further until the end.
//
// With VECTOR a thread takes VECTOR_LEN<T> elements at a time, of the wider type where there are two, and the elements
// past the last whole vector are done singly by the first threads of the grid: every length is right, but all pointers
// must be aligned to 16 bytes. Without VECTOR a thread takes one element, and pointers need only the element's
// alignment.
//
// Block 256; grid any number of blocks, those of `WalkConfig` in src/ops/config/walk.rs; no shared memory. `n` counts
// elements. A result may be the same tensor as an operand of the same type, but not overlap it otherwise.
//
//   kernel          template                arguments
//   cast            <TO, FROM, VECTOR>      const FROM* x [n], TO* y [n], long long n
//   add             <T, VECTOR>             const T* a [n], const T* b [n], T* z [n], long long n          z = a + b
//   accumulate      <T, VECTOR>             T* a [n], const T* b [n], long long n                          a += b
//
// instances: {add,accumulate}<{float,f16,bf16}, {true,false}>
// instances: cast<{float,f16,bf16}, float, {true,false}>
// instances: cast<f16, f16, {true,false}>
// instances: cast<bf16, bf16, {true,false}>

#include "vector.cuh"

constexpr int ELEMENTWISE_BLOCK = 256;

/// The elements of one access: as many as make 16 bytes of the wider type.
template <bool VECTOR, typename A, typename B = A>
constexpr int ACCESS = VECTOR ? VECTOR_LEN<A> < VECTOR_LEN<B> ? VECTOR_LEN<A> : VECTOR_LEN<B> : 1;

/// Runs `operation` on all elements, N at a time and the rest singly.
template <int N, typename OPERATION>
__device__ __forceinline__ void for_elements(long long n, const OPERATION& operation) {
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long groups = n / N;
    for (long long group = thread; group < groups; group += threads) operation.template run<N>(group * N);
    if constexpr (N > 1) {
        for (long long i = groups * N + thread; i < n; i += threads) operation.template run<1>(i);
    }
}

template <typename TO, typename FROM>
struct Cast {
    const FROM* x;
    TO* y;

    template <int N>
    __device__ __forceinline__ void run(long long at) const {
        float v[N];
        load_floats<N>(x + at, v);
        store_floats<N>(y + at, v);
    }
};

template <typename T>
struct Add {
    const T *a, *b;
    T* z;

    template <int N>
    __device__ __forceinline__ void run(long long at) const {
        float va[N], vb[N];
        load_floats<N>(a + at, va);
        load_floats<N>(b + at, vb);
#pragma unroll
        for (int i = 0; i < N; i++) va[i] += vb[i];
        store_floats<N>(z + at, va);
    }
};

template <typename TO, typename FROM, bool VECTOR>
__global__ void __launch_bounds__(ELEMENTWISE_BLOCK) cast(const FROM* x, TO* y, long long n) {
    for_elements<ACCESS<VECTOR, TO, FROM>>(n, Cast<TO, FROM>{x, y});
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(ELEMENTWISE_BLOCK) add(const T* a, const T* b, T* z, long long n) {
    for_elements<ACCESS<VECTOR, T>>(n, Add<T>{a, b, z});
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(ELEMENTWISE_BLOCK) accumulate(T* a, const T* b, long long n) {
    for_elements<ACCESS<VECTOR, T>>(n, Add<T>{a, b, a});
}
