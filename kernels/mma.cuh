// Tensor-core tiles: one warp multiplies a 16x16 by a 16x16 tile of `f16` or `bf16` and accumulates in `float`.
//
// The operands lie in shared memory, row-major or column-major, so that a convolution need not transpose anything. The
// accumulator's elements are spread over the lanes: a lane has those (i mod 2) of two neighbouring columns, of two rows
// LANE_ROWS_APART (i / 2 mod 2), and the same 8 columns further on (i / 4). Which rows and columns differs among
// architectures, and first_row_of_lane and first_column_of_lane tell. All functions are for whole warps.
//
//   ARCH >= 750   ldmatrix (transposing where the order asks for it) and mma.m16n8k16, at 750 as two mma.m16n8k8
//   below         mma.m8n8k4 on fragments that lanes load themselves: those of wmma, whose lines are 8 apart where eight
//                 lanes read them, lie in the same banks whatever `ld` is
//
// A lane reads a tile at the tile's first element plus `lane_offset` of the fragment. Keep what you add of it, `opaque`: the compiler
// would reckon it again for every tile.
//
// bf16 needs ARCH >= 800. Alignment: a tile begins at a multiple of 16 bytes and `ld` is a multiple of 8 elements; the eight
// rows of a quarter lie in distinct banks where `ld` is 8 modulo 16 elements.

#pragma once

#include "reduce.cuh"
#include "vector.cuh"

/// The order of a tile in shared memory: element (i, j) lies at i·ld + j (Row) or at j·ld + i (Column).
enum class Major { Row, Column };

/// 32-bit registers that a lane holds of an operand.
constexpr int FRAGMENT_WORDS = ARCH >= 750 ? 4 : 8;

/// The left operand, 16 x 16 (m x k).
template <typename T, Major M>
struct FragmentA {
    u32 words[FRAGMENT_WORDS];
    __device__ __forceinline__ static int lane_offset(int ld);
};

/// The right operand, 16 x 16 (k x n).
template <typename T, Major M>
struct FragmentB {
    u32 words[FRAGMENT_WORDS];
    __device__ __forceinline__ static int lane_offset(int ld);
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

#if ARCH >= 750

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

#ifdef __CUDA_ARCH__
/// d (16 x 8) += a (16 x 8) · b (8 x 8), of f16.
__device__ __forceinline__ void mma_m16n8k8(float* d, u32 a0, u32 a1, u32 b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}
#endif

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
    } else if constexpr (ARCH < 800) {
        mma_m16n8k8(d, a[0], a[1], b0);
        mma_m16n8k8(d, a[2], a[3], b1);
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
__device__ __forceinline__ int down_first(int ld) {
    const int lane = lane_in_warp();
    return (lane % 16) * ld + (lane / 16) * 8;
}
__device__ __forceinline__ int across_first(int ld) {
    const int lane = lane_in_warp();
    return (lane % 8 + lane / 16 * 8) * ld + (lane / 8 % 2) * 8;
}

template <typename T, Major M>
__device__ __forceinline__ int FragmentA<T, M>::lane_offset(int ld) {
    return M == Major::Row ? down_first(ld) : across_first(ld);
}
template <typename T, Major M>
__device__ __forceinline__ int FragmentB<T, M>::lane_offset(int ld) {
    return M == Major::Row ? down_first(ld) : across_first(ld);
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentA<T, M>& a, const T* lane, int) {
    ldmatrix_x4<M == Major::Column>(a.words, lane);
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentB<T, M>& b, const T* lane, int) {
    ldmatrix_x4<M == Major::Row>(b.words, lane);
}

/// Where a lane's elements of two products side by side, 16 x 32, lie: two rows, 8 apart, and of each the columns
/// 8j + 2(lane mod 4) and the next, for j of 0..4. Not below ARCH 750.
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

/// Row and column of the lane's first element.
__device__ __forceinline__ int first_row_of_lane() { return static_cast<int>(static_cast<u32>(lane_in_warp()) >> 2); }
__device__ __forceinline__ int first_column_of_lane() { return (lane_in_warp() & 3) * 2; }
/// Rows between the lane's two.
constexpr int LANE_ROWS_APART = 8;

#else

// Four groups of eight lanes, the lanes 4q .. 4q + 3 and those 16 further on, each multiply 8x4 by 4x8 with one instruction.
// Group q is given the four rows from 4·(q / 2) on and those 8 below, and the columns likewise from 4·(q mod 2) on: the
// lines that eight neighbouring lanes read then lie in distinct banks, or are the same.

/// The lane's row of A, and its column of B.
__device__ __forceinline__ int fragment_row() {
    const u32 lane = static_cast<u32>(lane_in_warp());
    return static_cast<int>((lane & 3) | (lane >> 1 & 12));
}
__device__ __forceinline__ int fragment_column() {
    const u32 lane = static_cast<u32>(lane_in_warp());
    return static_cast<int>((lane & 7) | (lane >> 1 & 8));
}

/// Reads the 16 elements of a line, a step of four behind the other.
template <typename T>
__device__ __forceinline__ void load_along(u32 (&words)[8], const T* line) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Vector<u32, 4> four = load_vector<u32, 4>(reinterpret_cast<const u32*>(line + 8 * half));
#pragma unroll
        for (int i = 0; i < 4; i++) words[4 * half + i] = four[i];
    }
}

/// Reads four neighbours of one line for each step.
template <typename T>
__device__ __forceinline__ void load_across(u32 (&words)[8], const T* from, int ld) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const Vector<u32, 2> two = load_vector<u32, 2>(reinterpret_cast<const u32*>(from + 4 * step * ld));
        words[2 * step] = two[0];
        words[2 * step + 1] = two[1];
    }
}

template <typename T, Major M>
__device__ __forceinline__ int FragmentA<T, M>::lane_offset(int ld) {
    return M == Major::Row ? fragment_row() * ld : (lane_in_warp() & 3) * ld + (fragment_row() & 12);
}
template <typename T, Major M>
__device__ __forceinline__ int FragmentB<T, M>::lane_offset(int ld) {
    return M == Major::Column ? fragment_column() * ld : (lane_in_warp() & 3) * ld + (fragment_column() & 12);
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentA<T, M>& a, const T* lane, int ld) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
    if constexpr (M == Major::Row) {
        load_along(a.words, lane);
    } else {
        load_across(a.words, lane, ld);
    }
}

template <typename T, Major M>
__device__ __forceinline__ void load(FragmentB<T, M>& b, const T* lane, int ld) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
    if constexpr (M == Major::Column) {
        load_along(b.words, lane);
    } else {
        load_across(b.words, lane, ld);
    }
}

#ifdef __CUDA_ARCH__
#define MMA_M8N8K4(LAYOUTS)                                                                                        \
    asm volatile("mma.sync.aligned.m8n8k4." LAYOUTS ".f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, " \
                 "{%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"                                                    \
                 : "+f"(acc.v[0]), "+f"(acc.v[1]), "+f"(acc.v[2]), "+f"(acc.v[3]), "+f"(acc.v[4]), "+f"(acc.v[5]), \
                   "+f"(acc.v[6]), "+f"(acc.v[7])                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]))
#endif

/// acc += a · b over four of k.
template <typename T, Major MA, Major MB>
__device__ __forceinline__ void mma_m8n8k4(Accumulator& acc, const u32 (&a)[2], const u32 (&b)[2]) {
    static_assert(HAS_MMA<T>, "below compute capability 8.0 tensor cores take f16 only");
#ifdef __CUDA_ARCH__
    if constexpr (MA == Major::Row && MB == Major::Row) {
        MMA_M8N8K4("row.row");
    } else if constexpr (MA == Major::Row) {
        MMA_M8N8K4("row.col");
    } else if constexpr (MB == Major::Row) {
        MMA_M8N8K4("col.row");
    } else {
        MMA_M8N8K4("col.col");
    }
#else
    emulator::mma_m8n8k4<T, MA == Major::Row, MB == Major::Row>(acc.v, a, b);
#endif
}

#ifdef __CUDA_ARCH__
#undef MMA_M8N8K4
#endif

/// acc += a · b.
template <typename T, Major MA, Major MB>
__device__ __forceinline__ void mma(Accumulator& acc, const FragmentA<T, MA>& a, const FragmentB<T, MB>& b) {
#pragma unroll
    for (int step = 0; step < 4; step++) {
        const u32 left[2] = {a.words[2 * step], a.words[2 * step + 1]};
        const u32 right[2] = {b.words[2 * step], b.words[2 * step + 1]};
        mma_m8n8k4<T, MA, MB>(acc, left, right);
    }
}

/// Row and column of the lane's first element.
__device__ __forceinline__ int first_row_of_lane() {
    const u32 lane = static_cast<u32>(lane_in_warp());
    return static_cast<int>((lane & 1) | (lane >> 1 & 12));
}
__device__ __forceinline__ int first_column_of_lane() { return lane_in_warp() & 6; }
/// Rows between the lane's two.
constexpr int LANE_ROWS_APART = 2;

#endif

/// Writes the lane's elements of a tile that is row-major, `ld` apart, `to` being where its first one lies; `ld` is a multiple of 4.
__device__ __forceinline__ void store(float* to, int ld, const Accumulator& acc) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        store_vector<float, 2>(to + i / 2 % 2 * LANE_ROWS_APART * ld + i / 4 * 8, {{acc.v[i], acc.v[i + 1]}});
    }
}
