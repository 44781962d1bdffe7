// Tensor-core instructions as the PTX manual lays them out over the lanes of a warp.
//
// ldmatrix and mma.m16n8k16 follow the manual's figures. The fragments of wmma are opaque there; the ones here are
// those of compute capability 7.0, where two lanes hold each element of an operand. Products are summed in `float` in
// the order of k, while the hardware sums a few at a time with more bits, so results agree to rounding.

#pragma once

namespace emulator {

template <typename DATA>
inline void need_whole_warp(void* const (&data)[WARP_LANES], const char* what) {
    for (unsigned i = 0; i < WARP_LANES; i++) {
        if (data[i] == nullptr) fail("%s without lane %u", what, i);
    }
}

/// Element `half` (0 or 1) of a register that holds two of type T.
template <typename T>
inline float element_of(unsigned word, unsigned half) {
    return to_float(T{static_cast<unsigned short>(word >> 16 * half)});
}

struct MatrixLoad {
    unsigned* words;
    const unsigned short* row;
};

template <bool TRANSPOSE>
UNCOUNTED inline void combine_ldmatrix(void* const (&data)[WARP_LANES]) {
    need_whole_warp<MatrixLoad>(data, "ldmatrix");
    for (unsigned i = 0; i < 4; i++) {
        for (unsigned lane = 0; lane < WARP_LANES; lane++) {
            unsigned halves[2];
            for (unsigned h = 0; h < 2; h++) {
                const unsigned line = lane / 4, place = lane % 4 * 2 + h;
                const unsigned row = TRANSPOSE ? place : line, column = TRANSPOSE ? line : place;
                halves[h] = static_cast<const MatrixLoad*>(data[8 * i + row])->row[column];
            }
            static_cast<MatrixLoad*>(data[lane])->words[i] = halves[0] | halves[1] << 16;
        }
    }
}

COUNTED_CALL inline void ldmatrix_x4(unsigned (&words)[4], const void* row, bool transpose) {
    check_alignment(row, 16);
    note_vector(row, 16, 16, false, PLACE);
    MatrixLoad mine{words, static_cast<const unsigned short*>(row)};
    warp_operation(0xffffffffu, transpose ? combine_ldmatrix<true> : combine_ldmatrix<false>, &mine);
}

/// Four neighbouring elements of a row; what every processor of interest computes with at once.
typedef float Four __attribute__((vector_size(16)));

struct MatrixMultiply {
    float* d;
    const unsigned* a;
    unsigned b[2];
};

template <typename T>
inline void combine_mma(void* const (&data)[WARP_LANES]) {
    need_whole_warp<MatrixMultiply>(data, "mma");
    count_tensor_macs(16 * 8 * 16);
    float a[16][16];
    Four b[16][2];
    for (unsigned lane = 0; lane < WARP_LANES; lane++) {
        const MatrixMultiply& mine = *static_cast<const MatrixMultiply*>(data[lane]);
        const unsigned group = lane / 4, place = lane % 4 * 2;
        for (unsigned h = 0; h < 2; h++) {
            for (unsigned i = 0; i < 4; i++) {
                a[group + i % 2 * 8][place + h + i / 2 * 8] = element_of<T>(mine.a[i], h);
            }
            for (unsigned i = 0; i < 2; i++) b[place + h + i * 8][group / 4][group % 4] = element_of<T>(mine.b[i], h);
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        float* d[4];
        for (unsigned i = 0; i < 4; i++) d[i] = static_cast<MatrixMultiply*>(data[row % 8 * 4 + i])->d + row / 8 * 2;
        Four left = {d[0][0], d[0][1], d[1][0], d[1][1]}, right = {d[2][0], d[2][1], d[3][0], d[3][1]};
        for (unsigned k = 0; k < 16; k++) {
            left += a[row][k] * b[k][0];
            right += a[row][k] * b[k][1];
        }
        for (unsigned i = 0; i < 4; i++) {
            const Four& half = i < 2 ? left : right;
            d[i][0] = half[i % 2 * 2];
            d[i][1] = half[i % 2 * 2 + 1];
        }
    }
}

template <typename T>
inline void mma_m16n8k16(float* d, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    MatrixMultiply mine{d, a, {b0, b1}};
    warp_operation(0xffffffffu, combine_mma<T>, &mine);
}

// ---------------------------------------------------------------------------------------------------------------------
// wmma.m16n16k16. A lane holds a whole row of A and a whole column of B, and eight elements of the product.

inline unsigned wmma_a_row(unsigned lane) { return lane % 4 + lane / 16 * 4 + lane / 4 % 2 * 8; }
inline unsigned wmma_b_column(unsigned lane) { return lane % 4 + lane / 16 * 4 + lane / 8 % 2 * 8; }
inline unsigned wmma_row(unsigned lane, unsigned i) {
    return lane % 2 + i / 2 % 2 * 2 + lane / 16 * 4 + lane / 4 % 2 * 8;
}
inline unsigned wmma_column(unsigned lane, unsigned i) {
    return i % 2 + lane / 2 % 2 * 2 + i / 4 * 4 + lane / 8 % 2 * 8;
}

/// A tile's address, which all lanes must give alike.
struct Tile {
    const void* base;
    int ld;
};

inline void combine_tiles(void* const (&data)[WARP_LANES]) {
    need_whole_warp<Tile>(data, "wmma");
    const Tile& first = *static_cast<const Tile*>(data[0]);
    for (unsigned i = 1; i < WARP_LANES; i++) {
        const Tile& other = *static_cast<const Tile*>(data[i]);
        if (other.base != first.base || other.ld != first.ld) fail("lane %u gives wmma another tile than lane 0", i);
    }
}

inline void meet_at_tile(const void* base, int ld, int ld_multiple) {
    check_alignment(base, 32);
    if (ld % ld_multiple != 0) fail("wmma with a leading dimension of %d, not a multiple of %d", ld, ld_multiple);
    Tile mine{base, ld};
    warp_operation(0xffffffffu, combine_tiles, &mine);
}

/// Loads 16 elements that lie `step` apart.
template <typename T>
UNCOUNTED inline void load_line(unsigned (&words)[8], const T* from, long step) {
    for (int i = 0; i < 8; i++) {
        words[i] = from[2 * i * step].bits | static_cast<unsigned>(from[(2 * i + 1) * step].bits) << 16;
    }
}

/// Notes how the hardware fetches a fragment. Where a lane's 16 elements lie side by side it takes two words of 16
/// bytes; else, since two lanes hold each element, the lane exchanges rows with three others: four words of 8 bytes, which
/// are four neighbours of every fourth line.
template <typename T>
UNCOUNTED inline void note_fragment(const T* tile, int ld, unsigned line, bool along, const void* place) {
    const unsigned first = line / 4 * 4, quarter = line % 4;
    for (unsigned i = 0; i < (along ? 2u : 4u); i++) {
        const T* const from = along ? tile + line * static_cast<unsigned>(ld) + 8 * i
                                    : tile + (quarter + 4 * i) * static_cast<unsigned>(ld) + first;
        note_vector(from, along ? 16 : 8, along ? 16 : 8, false, static_cast<const char*>(place) + i);
    }
}

template <typename T>
COUNTED_CALL inline void wmma_load_a(unsigned (&words)[8], const T* tile, int ld, bool rows) {
    meet_at_tile(tile, ld, 8);
    const long row = wmma_a_row(static_cast<unsigned>(lane()));
    note_fragment(tile, ld, static_cast<unsigned>(row), rows, PLACE);
    load_line(words, tile + (rows ? row * ld : row), rows ? 1 : ld);
}

template <typename T>
COUNTED_CALL inline void wmma_load_b(unsigned (&words)[8], const T* tile, int ld, bool rows) {
    meet_at_tile(tile, ld, 8);
    const long column = wmma_b_column(static_cast<unsigned>(lane()));
    note_fragment(tile, ld, static_cast<unsigned>(column), !rows, PLACE);
    load_line(words, tile + (rows ? column : column * ld), rows ? ld : 1);
}

struct WarpMultiply {
    float* d;
    const unsigned *a, *b;
};

template <typename T>
inline void combine_wmma(void* const (&data)[WARP_LANES]) {
    need_whole_warp<WarpMultiply>(data, "wmma");
    count_tensor_macs(16 * 16 * 16);
    float a[16][16];
    Four b[16][4], d[16][4];
    for (unsigned lane = 0; lane < WARP_LANES; lane++) {
        const WarpMultiply& mine = *static_cast<const WarpMultiply*>(data[lane]);
        const unsigned row = wmma_a_row(lane), column = wmma_b_column(lane);
        for (unsigned k = 0; k < 16; k++) {
            a[row][k] = element_of<T>(mine.a[k / 2], k % 2);
            b[k][column / 4][column % 4] = element_of<T>(mine.b[k / 2], k % 2);
        }
        for (unsigned i = 0; i < 8; i++) {
            d[wmma_row(lane, i)][wmma_column(lane, i) / 4][wmma_column(lane, i) % 4] = mine.d[i];
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned i = 0; i < 4; i++) d[row][i] += a[row][k] * b[k][i];
        }
    }
    for (unsigned lane = 0; lane < WARP_LANES; lane++) {
        for (unsigned i = 0; i < 8; i++) {
            static_cast<WarpMultiply*>(data[lane])->d[i] =
                d[wmma_row(lane, i)][wmma_column(lane, i) / 4][wmma_column(lane, i) % 4];
        }
    }
}

template <typename T>
inline void wmma_mma(float* d, const unsigned (&a)[8], const unsigned (&b)[8]) {
    WarpMultiply mine{d, a, b};
    warp_operation(0xffffffffu, combine_wmma<T>, &mine);
}

COUNTED_CALL inline void wmma_store(float* tile, int ld, const float (&d)[8]) {
    meet_at_tile(tile, ld, 4);
    const unsigned mine = static_cast<unsigned>(lane());
    for (unsigned i = 0; i < 8; i += 2) {
        const float* const to = tile + wmma_row(mine, i) * static_cast<unsigned>(ld) + wmma_column(mine, i);
        note_vector(to, 8, 8, true, static_cast<const char*>(PLACE) + i / 2);
    }
    for (unsigned i = 0; i < 8; i++) {
        tile[wmma_row(mine, i) * static_cast<unsigned>(ld) + wmma_column(mine, i)] = d[i];
    }
}

}  // namespace emulator
