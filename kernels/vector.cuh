// Wide loads and stores: several elements in one memory transaction.
//
// A pointer given here is aligned to the size of the vector, or to 16 bytes where the vector is larger; with channels
// innermost and a multiple of VECTOR_LEN<T>, every pixel of a tensor is. The emulator stops at a pointer that is not.

#pragma once

#include "numeric.cuh"

/// Elements of type T in 16 bytes, the widest access of one thread.
template <typename T>
constexpr int VECTOR_LEN = 16 / static_cast<int>(sizeof(T));

/// Bytes of one access to a vector of `bytes` bytes.
constexpr __device__ int access_width(int bytes) {
    return bytes % 16 == 0 ? 16 : bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : bytes % 2 == 0 ? 2 : 1;
}

/// N elements that are loaded and stored together.
template <typename T, int N>
struct alignas(access_width(N * static_cast<int>(sizeof(T)))) Vector {
    T v[N];
    __device__ __forceinline__ T& operator[](int i) { return v[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return v[i]; }
};

/// A machine word of the given width in bytes.
template <int WIDTH>
struct Word;
template <>
struct Word<16> {
    using Type = uint4;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<4> {
    using Type = unsigned int;
};
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<1> {
    using Type = unsigned char;
};

/// Reads N elements from global or shared memory.
template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
    constexpr int BYTES = N * static_cast<int>(sizeof(T)), WIDTH = access_width(BYTES);
    Vector<T, N> out;
#ifdef __CUDA_ARCH__
    using W = typename Word<WIDTH>::Type;
#pragma unroll
    for (int i = 0; i < BYTES / WIDTH; i++) reinterpret_cast<W*>(&out)[i] = reinterpret_cast<const W*>(from)[i];
#else
    emulator::load_bytes<BYTES, WIDTH>(&out, from);
#endif
    return out;
}

/// Writes N elements to global or shared memory.
template <typename T, int N>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& value) {
    constexpr int BYTES = N * static_cast<int>(sizeof(T)), WIDTH = access_width(BYTES);
#ifdef __CUDA_ARCH__
    using W = typename Word<WIDTH>::Type;
#pragma unroll
    for (int i = 0; i < BYTES / WIDTH; i++) reinterpret_cast<W*>(to)[i] = reinterpret_cast<const W*>(&value)[i];
#else
    emulator::store_bytes<BYTES, WIDTH>(to, &value);
#endif
}

/// Reads N elements and widens them.
template <int N, typename T>
__device__ __forceinline__ void load_floats(const T* from, float (&out)[N]) {
    const Vector<T, N> v = load_vector<T, N>(from);
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(v.v[i]);
}

/// Rounds N elements and writes them.
template <int N, typename T>
__device__ __forceinline__ void store_floats(T* to, const float (&values)[N]) {
    Vector<T, N> v;
#pragma unroll
    for (int i = 0; i < N; i++) v.v[i] = from_float<T>(values[i]);
    store_vector<T, N>(to, v);
}
