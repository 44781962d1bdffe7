// Tensor-core tiles: one warp multiplies a 16x16 by a 16x16 tile of `f16` or `bf16` and accumulates in `float`.
//
// The operands lie in shared memory, row-major or column-major, so that a convolution need not transpose anything. The
// accumulator's elements are spread over the lanes in a layout that differs among architectures: it may be scaled and
// added to element by element; `store` and, where there is one, `lane_row` tell row and column. All functions are for
// whole warps.
//
//   ARCH >= 800   ldmatrix (transposing where the order asks for it) and two mma.m16n8k16 per step
//   below         wmma.m16n16k16, `f16` only
//
// Alignment: a tile begins at a multiple of 16 bytes (32 below ARCH 800) and `ld` is a multiple of 8 elements; the
// eight rows of a quarter lie in distinct banks where `ld` is 8 modulo 16 elements.

#pragma once

#include "reduce.cuh"
#include "vector.cuh"

/// The order of a tile in shared memory: element (i, j) lies at i·ld + j (Row) or at j·ld + i (Column).
enum class Major { Row, Column };

/// 32-bit registers that a lane holds of an operand.
constexpr int FRAGMENT_WORDS = ARCH >= 800 ? 4 : 8;

/// The left operand, 16 x 16 (m x k).
template <typename T, Major M>
struct FragmentA {
    u32 words[FRAGMENT_WORDS];
};

/// The right operand, 16 x 16 (k x n).
template <typename T, Major M>
struct FragmentB {
    u32 words[FRAGMENT_WORDS];
};

/// The product, 16 x 16 (m x n).
struct Accumulator {
    float v[8];
};

__device__ __forceinline__ void zero(Accumulator& acc) {
#pragma unroll
    for (int i = 0; i < 8; i++) acc.v[i] = 0.0f;
}

/// Whether T has tensor-core tiles on the architecture being compiled for.
template <typename T>
constexpr bool HAS_MMA = false;
template <>
constexpr bool HAS_MMA<f16> = true;
template <>
constexpr bool HAS_MMA<bf16> = ARCH >= 800;

#if ARCH >= 800

template <typename T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bf16> = true;

/// Loads four 8x8 matrices of 16-bit elements. The lanes 8i .. 8i + 7 give the addresses of matrix i's eight rows, and
/// lane l gets in words[i] the elements 2(l mod 4) and 2(l mod 4) + 1 of row l/4; of column l/4 with TRANSPOSE.
template <bool TRANSPOSE>
__device__ __forceinline__ void ldmatrix_x4(u32 (&words)[4], const void* row) {
#ifdef __CUDA_ARCH__
    const u32 from = static_cast<u32>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSE) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(from)
                     : "memory");
    }
#else
    emulator::ldmatrix_x4(words, row, TRANSPOSE);
#endif
}

/// d (16 x 8) += a (16 x 16) · b (16 x 8).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
    static_assert(HAS_MMA<T>, "tensor-core tiles are for f16 and bf16");
#ifdef __CUDA_ARCH__
    if constexpr (IS_BF16<T>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
#else
    emulator::mma_m16n8k16<T>(d, a, b0, b1);
#endif
}

// The row whose address a lane gives to ldmatrix, for the quarters of the tile as it lies in memory taken in the order
// top left, bottom left, top right, bottom right (down first) or top left, top right, bottom left, bottom right (across
// first). A's words are the quarters (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8); B's are (k, n), (k + 8, n),
// (k, n + 8), (k + 8, n + 8).
template <typename T>
__device__ __forceinline__ const T* down_first(const T* tile, int ld) {
    const int lane = lane_in_warp();
    return tile + (lane % 16) * ld + (lane / 16) * 8;
}

template <typename T>
__device__ __forceinline__ const T* across_first(const T* tile, int ld) {
    const int lane = lane_in_warp();
    return tile + (lane % 8 + lane / 16 * 8) * ld + (lane / 8 % 2) * 8;
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentA<T, M>& a, const T* shared, int ld) {
    if constexpr (M == Major::Row) {
        ldmatrix_x4<false>(a.words, down_first(shared, ld));
    } else {
        ldmatrix_x4<true>(a.words, across_first(shared, ld));
    }
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentB<T, M>& b, const T* shared, int ld) {
    if constexpr (M == Major::Row) {
        ldmatrix_x4<true>(b.words, down_first(shared, ld));
    } else {
        ldmatrix_x4<false>(b.words, across_first(shared, ld));
    }
}

/// Where a lane's elements of two products side by side, 16 x 32, lie: two rows, 8 apart, and of each the columns
/// 8j + 2(lane mod 4) and the next, for j of 0..4. Only the instructions of ARCH >= 800 say so.
__device__ __forceinline__ void lane_row(const Accumulator (&pair)[2], int half, float (&values)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = pair[i / 4].v[i / 2 % 2 * 4 + half * 2 + i % 2];
}

/// acc += a · b.
template <typename T, Major MA, Major MB>
__device__ __forceinline__ void mma(Accumulator& acc, const FragmentA<T, MA>& a, const FragmentB<T, MB>& b) {
    mma_m16n8k16<T>(acc.v, a.words, b.words[0], b.words[1]);
    mma_m16n8k16<T>(acc.v + 4, a.words, b.words[2], b.words[3]);
}

/// Writes the tile row-major; `ld` is a multiple of 4.
__device__ __forceinline__ void store(float* shared, int ld, const Accumulator& acc) {
    const int lane = lane_in_warp(), row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        float* to = shared + (row + (i / 2 % 2) * 8) * ld + column + i / 4 * 8;
        store_vector<float, 2>(to, {{acc.v[i], acc.v[i + 1]}});
    }
}

#else

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentA<T, M>& a, const T* shared, int ld) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
#ifdef __CUDA_ARCH__
    const u32 from = static_cast<u32>(__cvta_generic_to_shared(shared));
    if constexpr (M == Major::Row) {
        asm volatile("wmma.load.a.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                     : "=r"(a.words[0]), "=r"(a.words[1]), "=r"(a.words[2]), "=r"(a.words[3]), "=r"(a.words[4]),
                       "=r"(a.words[5]), "=r"(a.words[6]), "=r"(a.words[7])
                     : "r"(from), "r"(ld)
                     : "memory");
    } else {
        asm volatile("wmma.load.a.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                     : "=r"(a.words[0]), "=r"(a.words[1]), "=r"(a.words[2]), "=r"(a.words[3]), "=r"(a.words[4]),
                       "=r"(a.words[5]), "=r"(a.words[6]), "=r"(a.words[7])
                     : "r"(from), "r"(ld)
                     : "memory");
    }
#else
    emulator::wmma_load_a(a.words, shared, ld, M == Major::Row);
#endif
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentB<T, M>& b, const T* shared, int ld) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
#ifdef __CUDA_ARCH__
    const u32 from = static_cast<u32>(__cvta_generic_to_shared(shared));
    if constexpr (M == Major::Row) {
        asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                     : "=r"(b.words[0]), "=r"(b.words[1]), "=r"(b.words[2]), "=r"(b.words[3]), "=r"(b.words[4]),
                       "=r"(b.words[5]), "=r"(b.words[6]), "=r"(b.words[7])
                     : "r"(from), "r"(ld)
                     : "memory");
    } else {
        asm volatile("wmma.load.b.sync.aligned.col.m16n16k16.shared.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8], %9;"
                     : "=r"(b.words[0]), "=r"(b.words[1]), "=r"(b.words[2]), "=r"(b.words[3]), "=r"(b.words[4]),
                       "=r"(b.words[5]), "=r"(b.words[6]), "=r"(b.words[7])
                     : "r"(from), "r"(ld)
                     : "memory");
    }
#else
    emulator::wmma_load_b(b.words, shared, ld, M == Major::Row);
#endif
}

#ifdef __CUDA_ARCH__
#define WMMA_MMA(LAYOUTS)                                                                                          \
    asm volatile("wmma.mma.sync.aligned." LAYOUTS ".m16n16k16.f32.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, "          \
                 "{%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19, %20, %21, %22, %23}, "              \
                 "{%0, %1, %2, %3, %4, %5, %6, %7};"                                                               \
                 : "+f"(acc.v[0]), "+f"(acc.v[1]), "+f"(acc.v[2]), "+f"(acc.v[3]), "+f"(acc.v[4]), "+f"(acc.v[5]), \
                   "+f"(acc.v[6]), "+f"(acc.v[7])                                                                  \
                 : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(a.words[4]),            \
                   "r"(a.words[5]), "r"(a.words[6]), "r"(a.words[7]), "r"(b.words[0]), "r"(b.words[1]),            \
                   "r"(b.words[2]), "r"(b.words[3]), "r"(b.words[4]), "r"(b.words[5]), "r"(b.words[6]),            \
                   "r"(b.words[7]))
#endif

/// acc += a · b.
template <typename T, Major MA, Major MB>
__device__ __forceinline__ void mma(Accumulator& acc, const FragmentA<T, MA>& a, const FragmentB<T, MB>& b) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
#ifdef __CUDA_ARCH__
    if constexpr (MA == Major::Row && MB == Major::Row) {
        WMMA_MMA("row.row");
    } else if constexpr (MA == Major::Row) {
        WMMA_MMA("row.col");
    } else if constexpr (MB == Major::Row) {
        WMMA_MMA("col.row");
    } else {
        WMMA_MMA("col.col");
    }
#else
    emulator::wmma_mma<T>(acc.v, a.words, b.words);
#endif
}

#ifdef __CUDA_ARCH__
#undef WMMA_MMA
#endif

/// Writes the tile row-major; `ld` is a multiple of 4.
__device__ __forceinline__ void store(float* shared, int ld, const Accumulator& acc) {
#ifdef __CUDA_ARCH__
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    asm volatile("wmma.store.d.sync.aligned.row.m16n16k16.shared.f32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8}, %9;" ::"r"(
                     to),
                 "f"(acc.v[0]), "f"(acc.v[1]), "f"(acc.v[2]), "f"(acc.v[3]), "f"(acc.v[4]), "f"(acc.v[5]),
                 "f"(acc.v[6]), "f"(acc.v[7]), "r"(ld)
                 : "memory");
#else
    emulator::wmma_store(shared, ld, acc.v);
#endif
}

#endif
