// The geometry of a convolution, passed to kernels by value; the Rust side has the same struct under `repr(C)`.

#pragma once

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
