// Tensor-core instructions as the PTX manual lays them out over the lanes of a warp.
//
// Products are summed in `float` in the order of k, while the hardware sums a few at a time with more bits, so results agree
// to rounding.

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
// mma.m8n8k4: the lanes 4q .. 4q + 3 and those 16 further on multiply 8x4 by 4x8, for q of 0..4.

struct GroupMultiply {
    float* d;
    unsigned a[2], b[2];
};

template <typename T, bool ROWS_A, bool ROWS_B>
inline void combine_groups(void* const (&data)[WARP_LANES]) {
    need_whole_warp<GroupMultiply>(data, "mma");
    count_tensor_macs(4 * 8 * 8 * 4);
    for (unsigned group = 0; group < 4; group++) {
        GroupMultiply* lanes[8];
        float a[8][4], b[4][8], d[8][8];
        for (unsigned l = 0; l < 8; l++) {
            lanes[l] = static_cast<GroupMultiply*>(data[group * 4 + l % 4 + l / 4 * 16]);
            for (unsigned i = 0; i < 4; i++) {
                const unsigned across = l / 4 * 4 + i;
                const float left = element_of<T>(lanes[l]->a[i / 2], i % 2), right = element_of<T>(lanes[l]->b[i / 2], i % 2);
                (ROWS_A ? a[l][i] : a[across][l % 4]) = left;
                (ROWS_B ? b[l % 4][across] : b[i][l]) = right;
            }
        }
        const auto at = [&](unsigned l, unsigned i) -> float& {
            return d[l % 2 + i / 2 % 2 * 2 + l / 4 * 4][i / 4 * 4 + l / 2 % 2 * 2 + i % 2];
        };
        for (unsigned l = 0; l < 8; l++) {
            for (unsigned i = 0; i < 8; i++) at(l, i) = lanes[l]->d[i];
        }
        for (unsigned row = 0; row < 8; row++) {
            for (unsigned k = 0; k < 4; k++) {
                for (unsigned column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
            }
        }
        for (unsigned l = 0; l < 8; l++) {
            for (unsigned i = 0; i < 8; i++) lanes[l]->d[i] = at(l, i);
        }
    }
}

template <typename T, bool ROWS_A, bool ROWS_B>
inline void mma_m8n8k4(float* d, const unsigned (&a)[2], const unsigned (&b)[2]) {
    GroupMultiply mine{d, {a[0], a[1]}, {b[0], b[1]}};
    warp_operation(0xffffffffu, combine_groups<T, ROWS_A, ROWS_B>, &mine);
}

}  // namespace emulator
