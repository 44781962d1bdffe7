// Pointwise (1x1, stride 1, one group) convolution and fully connected layers: plain matrix products.
//
// x `[pixels, c_in]`, y `[pixels, c_out]`, w `[c_out, c_in]`, where pixels = n·h·w for a convolution and n for a fully
// connected layer. Sums are float and are rounded once, when stored. Bound by memory for most layers of compact
// networks: the blocks that share rows of x run side by side, so that x is read from memory once.
//
// `pointwise_wgrad` writes one float partial of dw per slab of pixels; `sum_slabs` of conv_reduce.cu adds them. With
// one slab, dw itself may be given as `partials`. No output may overlap an input, but for dx where it accumulates.
//
//   VECTOR     needs c_in and c_out to be multiples of 16 bytes of T, and all pointers aligned to 16
//   tiles      64x64 for every T; with VECTOR also 128x32, 128x128 and, forward, 128x64, 128x96 and 256x32 for f16 and bf16
//   block      128 threads; 192 for 128x96 and 256 for 128x128.   dynamic shared memory: none
//   grid       (tiles of the result M x N, slabs, 1)
//
//   kernel                                                   M        N       slabs
//   pointwise_forward<T, TILE_M, TILE_N, VECTOR>             pixels   c_out   1
//     (const T* x, const T* w, const float* bias, int bias_pixels, const T* residual, float limit, float slope, T* y,
//      int pixels, int c_in, int c_out)
//   pointwise_dgrad<T, TILE_M, TILE_N, VECTOR>               pixels   c_in    1
//     (const T* dy, const T* w, T* dx, int accumulate, int pixels, int c_in, int c_out)
//   pointwise_wgrad<T, TILE_M, TILE_N, VECTOR>               c_out    c_in    those of `slab` pixels
//     (const T* x, const T* dy, float* partials, int slab, int pixels, int c_in, int c_out)
//
// Between batch-norms (on_load.cuh) the same products have an x that is normalised on load where γ is given, a dy that is
// formed on load where coefficients are, moments of y, and where γ is given the sums over dx = dz that the batch-norm
// before needs. Slabs of their partial sums are tiles of M. Gradients have no 128x128 tile, whose sums leave no registers
// for all this.
//
//   pointwise_bn_forward<T, TILE_M, TILE_N, VECTOR>
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* w, T* y, float* partials [slabs, 2, c_out]: mean, Σ (y − mean)²,
//      float* groups, u32* tickets, int group, float* running_mean [c_out], float* running_var [c_out],
//      float* saved [2, c_out], float eps, float momentum, int pixels, int c_in, int c_out)
//     partials to momentum are StatisticsOut of statistics.cuh: the kernel also has the second stage of the statistics
//   pointwise_bn_dgrad<T, TILE_M, TILE_N, VECTOR>
//     (const T* dz, const T* y, const float* coefficients [4, c_out], float limit, float slope, const float* slope_at,
//      const T* w, T* dx, int accumulate, const T* x, const float* x_gamma, const float* x_beta, const float* x_saved,
//      float x_limit, float x_slope, const float* x_slope_at, float* partials [slabs, 2, c_in], float* scores [blocks],
//      int pixels, int c_in, int c_out)
//   pointwise_bn_wgrad<T, TILE_M, TILE_N, VECTOR>
//     (const T* x, const float* x_gamma, const float* x_beta, const float* x_saved, float x_limit, float x_slope,
//      const float* x_slope_at, const T* dz, const T* y, const float* coefficients [4, c_out], float limit, float slope,
//      const float* slope_at, float* partials, int slab, int pixels, int c_in, int c_out)
//
// Tiles and slabs are chosen by the problem alone, so that results do not depend on the device, and a slab is a
// multiple of 32 pixels: `GemmConfig` of src/ops/config/gemm.rs has grids, slabs and the size of `partials`.
//
// instances: pointwise_forward<{float,f16,bf16}, 64, 64, {true,false}>
// instances: pointwise_forward<{f16,bf16}, 128, {32,64,96,128}, true>
// instances: pointwise_forward<{f16,bf16}, 256, 32, true>
// instances: pointwise_dgrad<{float,f16,bf16}, 64, 64, {true,false}>
// instances: pointwise_dgrad<{f16,bf16}, 128, {32,128}, true>
// instances: pointwise_wgrad<{float,f16,bf16}, 64, 64, {true,false}>
// instances: pointwise_wgrad<{f16,bf16}, 128, 128, true>
// instances: pointwise_bn_{forward,dgrad,wgrad}<{float,f16,bf16}, 64, 64, {true,false}>
// instances: pointwise_bn_forward<{f16,bf16}, 128, {32,64,96,128}, true>
// instances: pointwise_bn_forward<{f16,bf16}, 256, 32, true>
// instances: pointwise_bn_dgrad<{f16,bf16}, 128, 32, true>

#include "conv_gemm.cuh"
#include "epilogue.cuh"

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_forward(
    const T* __restrict__ x,          // [pixels, c_in]
    const T* __restrict__ w,          // [c_out, c_in]
    const float* __restrict__ bias,   // [bias_pixels, c_out] or null
    int bias_pixels,                  // 1, or h·w where every pixel of an image has its own bias
    const T* __restrict__ residual,   // [pixels, c_out] or null
    float limit, float slope,         // of the activation; slope 1 for none
    T* __restrict__ y,                // [pixels, c_out]
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Column, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_out);
    Product product;
    product.multiply(Matrix<T>{x, pixels, c_in, c_in}, Matrix<T>{w, c_out, c_in, c_in}, at, 0, c_in, shared);
    const ForwardWriter<T> writer{y, bias, bias_pixels, residual, make_clamp(limit, slope), c_out};
    product.write(writer, at, pixels, c_out, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_dgrad(
    const T* __restrict__ dy,   // [pixels, c_out]
    const T* __restrict__ w,    // [c_out, c_in]
    T* __restrict__ dx,         // [pixels, c_in]
    int accumulate,             // 1 adds to what is in dx
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_in);
    Product product;
    product.multiply(Matrix<T>{dy, pixels, c_out, c_out}, Matrix<T>{w, c_out, c_in, c_in}, at, 0, c_out, shared);
    product.write(InputGradientWriter<T>{dx, accumulate != 0, c_in, {}}, at, pixels, c_in, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_wgrad(
    const T* __restrict__ x,        // [pixels, c_in]
    const T* __restrict__ dy,       // [pixels, c_out]
    float* __restrict__ partials,   // [slabs, c_out, c_in]
    int slab,                       // pixels per slab
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Column, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_in);
    const int begin = static_cast<int>(blockIdx.y) * slab, end = min_of(begin + slab, pixels);
    Product product;
    product.multiply(Matrix<T>{dy, end, c_out, c_out}, Matrix<T>{x, end, c_in, c_in}, at, begin, end, shared);
    float* const partial = partials + static_cast<i64>(blockIdx.y) * c_out * c_in;
    product.write(WeightGradientWriter{partial, c_in}, at, c_out, c_in, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_bn_forward(
    const T* __restrict__ x,              // [pixels, c_in]
    const float* __restrict__ x_gamma,    // [c_in] or null where x is stored
    const float* __restrict__ x_beta,     // [c_in] or null
    const float* __restrict__ x_saved,    // [2, c_in] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at, // [1] or null
    const T* __restrict__ w,              // [c_out, c_in]
    T* __restrict__ y,                    // [pixels, c_out]
    float* partials,                      // [slabs, 2, c_out]
    float* groups,                        // as StatisticsOut of statistics.cuh
    u32* tickets, int group,
    float* __restrict__ running_mean,     // [c_out]
    float* __restrict__ running_var,      // [c_out]
    float* __restrict__ saved,            // [2, c_out]
    float eps, float momentum,
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Column, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_out);
    const Normalised<T> on_load{x_gamma, x_beta, x_saved, make_clamp(x_limit, x_slope, x_slope_at), c_in};
    Product product;
    product.multiply(Matrix<T, Normalised<T>>{x, pixels, c_in, c_in, on_load}, Matrix<T>{w, c_out, c_in, c_in, {}}, at,
                     0, c_in, shared);
    MomentsWriter<T, Product::COLUMNS> writer{y, c_out, {}};
    product.write(writer, at, pixels, c_out, shared);
    const StatisticsOut out{partials, groups, tickets, group, running_mean, running_var, saved, eps, momentum};
    Product::finish_moments(writer.moments, at, pixels, c_out, out, c_out, 0, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_bn_dgrad(
    const T* __restrict__ dz,               // [pixels, c_out]: dy where it is stored
    const T* __restrict__ y,                // [pixels, c_out] or null
    const float* __restrict__ coefficients, // [4, c_out] or null where dy is stored
    float limit, float slope,
    const float* __restrict__ slope_at,     // [1] or null
    const T* __restrict__ w,                // [c_out, c_in]
    T* __restrict__ dx,                     // [pixels, c_in]
    int accumulate,                         // 1 adds to what is in dx; without γ
    const T* __restrict__ x,                // [pixels, c_in]: what was normalised, or null
    const float* __restrict__ x_gamma,      // [c_in] or null where x was stored
    const float* __restrict__ x_beta,       // [c_in] or null
    const float* __restrict__ x_saved,      // [2, c_in] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at,   // [1] or null
    float* __restrict__ partials,           // [slabs, 2, c_in] or null: Σ g, Σ g·(x − μ)
    float* __restrict__ scores,             // [blocks] or null
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Row, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_in);
    const Formed<T> on_load{y, coefficients, make_clamp(limit, slope, slope_at), c_out};
    Product product;
    product.multiply(Matrix<T, Formed<T>>{dz, pixels, c_out, c_out, on_load}, Matrix<T>{w, c_out, c_in, c_in, {}}, at,
                     0, c_out, shared);
    if (x_gamma == nullptr) {
        product.write(InputGradientWriter<T>{dx, accumulate != 0, c_in, {}}, at, pixels, c_in, shared);
        return;
    }
    const int channel = min_of(at.n + Product::written_column(), c_in - Product::COLUMNS);
    const Clamp clamp = make_clamp(x_limit, x_slope, x_slope_at);
    MaskedGradientWriter<T, Product::COLUMNS> writer{
        dx, x, c_in, scores != nullptr, clamp, {x_gamma, x_beta, x_saved, c_in, channel}, {}};
    product.write(writer, at, pixels, c_in, shared);
    Product::write_gradient_sums(writer.sums, at, c_in, partials, scores, c_in, shared);
}

template <typename T, int TILE_M, int TILE_N, bool VECTOR>
__global__ void __launch_bounds__(gemm_threads(TILE_M, TILE_N), (MIN_BLOCKS<TILE_M, TILE_N, VECTOR>)) pointwise_bn_wgrad(
    const T* __restrict__ x,                // [pixels, c_in]
    const float* __restrict__ x_gamma,      // [c_in] or null where x is stored
    const float* __restrict__ x_beta,       // [c_in] or null
    const float* __restrict__ x_saved,      // [2, c_in] or null
    float x_limit, float x_slope,
    const float* __restrict__ x_slope_at,   // [1] or null
    const T* __restrict__ dz,               // [pixels, c_out]: dy where it is stored
    const T* __restrict__ y,                // [pixels, c_out] or null
    const float* __restrict__ coefficients, // [4, c_out] or null where dy is stored
    float limit, float slope,
    const float* __restrict__ slope_at,     // [1] or null
    float* __restrict__ partials,           // [slabs, c_out, c_in]
    int slab,                               // pixels per slab
    int pixels, int c_in, int c_out) {
    using Product = Gemm<T, TILE_M, TILE_N, Major::Column, Major::Row, VECTOR>;
    SHARED_ARRAY(u8, shared, Product::SHARED_BYTES);
    const Origin at = tile_origin<TILE_M, TILE_N>(c_in);
    const int begin = static_cast<int>(blockIdx.y) * slab, end = min_of(begin + slab, pixels);
    const Normalised<T> x_on_load{x_gamma, x_beta, x_saved, make_clamp(x_limit, x_slope, x_slope_at), c_in};
    const Formed<T> dy_on_load{y, coefficients, make_clamp(limit, slope, slope_at), c_out};
    Product product;
    product.multiply(Matrix<T, Formed<T>>{dz, end, c_out, c_out, dy_on_load},
                     Matrix<T, Normalised<T>>{x, end, c_in, c_in, x_on_load}, at, begin, end, shared);
    float* const partial = partials + static_cast<i64>(blockIdx.y) * c_out * c_in;
    product.write(WeightGradientWriter{partial, c_in}, at, c_out, c_in, shared);
}
