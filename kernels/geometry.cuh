// The geometry of a convolution, passed to kernels by value; the Rust side has the same struct under `repr(C)`.

#pragma once

#include "numeric.cuh"

/// y[o, u] = Σ w[o, c, v] · x[c, stride·u + v − pad]. The padding may be asymmetric: that at the bottom and at the
/// right follows from the output's size.
struct ConvGeometry {
    int n;
    int h_in, w_in, c_in;
    int h_out, w_out, c_out;
    int k_h, k_w;
    int stride_h, stride_w;
    int pad_top, pad_left;
    int groups;
};

/// Some columns of some rows of one image.
struct Patch {
    int image, first_row, last_row, column;
};

/// Patch `index` of those of at most `rows` x `columns` that cover images of h x w.
__device__ __forceinline__ Patch patch(int index, int h, int w, int rows, int columns) {
    const int across = divide_up(w, columns), down = divide_up(h, rows);
    const int column = index % across * columns, first_row = index / across % down * rows;
    return Patch{index / across / down, first_row, min_of(first_row + rows, h), column};
}

/// The number of such patches.
__device__ __forceinline__ int patches(int n, int h, int w, int rows, int columns) {
    return n * divide_up(h, rows) * divide_up(w, columns);
}
