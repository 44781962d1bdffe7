// Batch normalisation over images and pixels, with the residual and the activation that follow it.
//
//   forward    z = φ(γ·(y − μ)·ρ + β + residual),   ρ = 1 / √(σ² + ε)
//   backward   g = dz·φ'(v), v the input of φ;   dβ = Σ g,   dγ = ρ·Σ g·(y − μ),   d_residual (+)= g,
//              dy (+)= γ·ρ·(g − dβ/P − (y − μ)·ρ·dγ/P) = a·g + s·y + o
//
// y, z, the residual and their gradients are `[pixels, c]` of type T, P = n·h·w pixels; all that belongs to channels is
// float, statistics are `saved` = μ, ρ `[2, c]`. Every pass reads each tensor once and is bound by memory. Nothing but
// y and `saved` is kept for the backward pass: v is formed again, by the same operations, so that φ' is that of the
// forward pass to the last bit.
//
// A training step is statistics → normalise, and backward backward_sums → backward_finish → backward_apply. The statistics
// of a slab are its mean and its centred second moment, summed as differences to the slab's first pixel, so that a large
// mean does not swallow the variance; slabs are merged in double, likewise about the first one's mean (statistics.cuh).
// Gradients may carry a loss scale; then so do dγ, dβ and the score.
//
// Launches. Blocks have 256 threads, no dynamic shared memory. With VECTOR, N = 16 / sizeof(T), c is a multiple of N
// and tensors are aligned to 16 bytes; without, N = 1. `lanes` and tiles are as slab.cuh says. `slab` is in pixels, one
// for the two-stage sums and another for the other kernels: `NormConfig` of src/ops/config/norm.rs has them, grids and
// the sizes of the partial results between stages.
// No activation is limit = infinity, slope 1. `slope_at`, where not null, holds the slope on the device. A residual
// under slope 1 need not be given to the backward pass.
//
// batch_norm_statistics<T, VECTOR>        grid (tiles, slabs)                                             6 instances
//     (const T* y, float* partials [slabs, 2, c], float* groups, u32* tickets, int group, float* running_mean [c],
//      float* running_var [c], float* saved [2, c], float eps, float momentum, long long pixels, int slab, int c,
//      int lanes)
//     groups, tickets and group are those of StatisticsOut in statistics.cuh
// batch_norm_running_statistics           grid (⌈c / 256⌉)                                                 1 instance
//     (const float* running_mean, const float* running_var, float* saved [2, c], float eps, int c)
//     for inference: normalise then takes this `saved`
// batch_norm_normalise<T, VECTOR>         grid (tiles, slabs)                                             6 instances
//     (const T* y, const float* gamma [c], const float* beta [c], const float* saved, const T* residual or null,
//      float limit, float slope, const float* slope_at or null, T* z, long long pixels, int slab, int c, int lanes)
// batch_norm_backward_sums<T, VECTOR>     grid (tiles, slabs)                                             6 instances
//     (const T* y, const T* dz, const float* gamma, const float* beta, const float* saved, const T* residual or null,
//      float limit, float slope, const float* slope_at or null, T* d_residual or null, int accumulate,
//      float* partials [slabs, 2, c], float* scores [slabs, tiles] or null, long long pixels, int slab, int c,
//      int lanes)
//     scores are partial sums of dz·(v − φ₀(v)), φ₀ being φ with slope 0; activation.cu's score_finish adds them
// batch_norm_backward_finish              grid (⌈c / 8⌉ + ⌈weights / 32⌉)                                  1 instance
//     (const float* partials, const float* gamma, const float* beta, const float* saved, float* d_gamma [c],
//      float* d_beta [c], float* coefficients [4, c], long long pixels, int slabs, int c,
//      const float* weight_partials or null, float* d_weights or null, int weight_slabs, long long weights)
//     the last four are the gradient of a convolution's weights whose kernel had both sums: further blocks add its slabs, as
//     sum_slabs of conv_reduce.cu does
// batch_norm_backward_apply<T, VECTOR>    grid (tiles, slabs)                                             6 instances
//     (const T* y, const T* dz, const float* coefficients, const T* residual or null, float limit, float slope,
//      const float* slope_at or null, T* dy, int accumulate, long long pixels, int slab, int c, int lanes)
//
// instances: batch_norm_{statistics,normalise,backward_sums,backward_apply}<{float,f16,bf16}, {true,false}>
// instances: batch_norm_{running_statistics,backward_finish}

#include "on_load.cuh"
#include "reduce.cuh"
#include "slab.cuh"
#include "statistics.cuh"

/// Channels of a block of the second stage of the gradient's sums. They read little and wait much: few columns make many
/// threads to a column, and many blocks.
constexpr int FINISH_COLUMNS = 8;

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256, 2) batch_norm_statistics(
    const T* __restrict__ y,         // [pixels, c]
    float* partials,                 // [slabs, 2, c]: mean, Σ (y − mean)²
    float* groups,                   // as StatisticsOut
    u32* tickets, int group,
    float* __restrict__ running_mean,     // [c]
    float* __restrict__ running_var,      // [c]
    float* __restrict__ saved,            // [2, c]
    float eps, float momentum,
    long long pixels, int slab, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    SHARED_ARRAY(double, shared, N * BLOCK_THREADS);
    float* const memory = reinterpret_cast<float*>(shared);
    const int index = static_cast<int>(blockIdx.y);
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(pixels, slab, index);
    float origin[N] = {}, sums[N] = {}, squares[N] = {};
    if (tile.active) {
        load_floats(y + range.begin * c + tile.channel, origin);
#pragma unroll 4
        for (i64 pixel = range.begin + tile.row; pixel < range.end; pixel += tile.rows) {
            float values[N];
            load_floats(y + pixel * c + tile.channel, values);
#pragma unroll
            for (int i = 0; i < N; i++) {
                const float difference = values[i] - origin[i];
                sums[i] += difference;
                squares[i] += difference * difference;
            }
        }
    }
    sum_rows(tile, sums, memory);
    sum_rows(tile, squares, memory);
    if (tile.active && tile.row == 0) {
        float* const to = partials + static_cast<i64>(index) * 2 * c + tile.channel;
        const float count = static_cast<float>(range.end - range.begin);
#pragma unroll
        for (int i = 0; i < N; i++) store_moments(origin[i], sums[i], squares[i], count, to + i, c);
    }
    const StatisticsOut out{partials, groups, tickets, group, running_mean, running_var, saved, eps, momentum};
    const auto pixels_of = [&](int other) {
        const Range there = slab_range(pixels, slab, other);
        return static_cast<double>(there.end - there.begin);
    };
    finish_statistics<BLOCK_THREADS, N>(out, tile, static_cast<int>(blockIdx.x), index, static_cast<int>(gridDim.y), c,
                                        pixels_of, shared);
}

__global__ void __launch_bounds__(256) batch_norm_running_statistics(
    const float* __restrict__ running_mean,   // [c]
    const float* __restrict__ running_var,    // [c]
    float* __restrict__ saved,                // [2, c]
    float eps, int c) {
    const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (channel >= c) return;
    saved[channel] = running_mean[channel];
    saved[c + channel] = 1.0f / sqrt_f(running_var[channel] + eps);
}

/// Adds N elements to `values`.
template <int N, typename T>
__device__ __forceinline__ void add_floats(const T* from, float (&values)[N]) {
    float more[N];
    load_floats(from, more);
#pragma unroll
    for (int i = 0; i < N; i++) values[i] += more[i];
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) batch_norm_normalise(
    const T* __restrict__ y,           // [pixels, c]
    const float* __restrict__ gamma,   // [c]
    const float* __restrict__ beta,    // [c]
    const float* __restrict__ saved,   // [2, c]
    const T* __restrict__ residual,    // [pixels, c] or null
    float limit, float slope,
    const float* __restrict__ slope_at,   // [1] or null
    T* __restrict__ z,                 // [pixels, c]
    long long pixels, int slab, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(pixels, slab, static_cast<int>(blockIdx.y));
    if (!tile.active) return;
    const Clamp clamp = make_clamp(limit, slope, slope_at);
    Affine affine[N];
#pragma unroll
    for (int i = 0; i < N; i++) affine[i] = make_affine(gamma, beta, saved, c, tile.channel + i);
#pragma unroll 2
    for (i64 pixel = range.begin + tile.row; pixel < range.end; pixel += tile.rows) {
        const i64 at = pixel * c + tile.channel;
        float values[N];
        load_floats(y + at, values);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = affine[i](values[i]);
        if (residual != nullptr) add_floats(residual + at, values);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = clamp.apply(values[i]);
        store_floats(z + at, values);
    }
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) batch_norm_backward_sums(
    const T* __restrict__ y,           // [pixels, c]
    const T* __restrict__ dz,          // [pixels, c]
    const float* __restrict__ gamma,   // [c]
    const float* __restrict__ beta,    // [c]
    const float* __restrict__ saved,   // [2, c]
    const T* __restrict__ residual,    // [pixels, c] or null
    float limit, float slope,
    const float* __restrict__ slope_at,   // [1] or null
    T* __restrict__ d_residual,        // [pixels, c] or null
    int accumulate,                    // 1 adds to what is in d_residual
    float* __restrict__ partials,      // [slabs, 2, c]: Σ g, Σ g·(y − μ)
    float* __restrict__ scores,        // [slabs, tiles] or null
    long long pixels, int slab, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    SHARED_ARRAY(float, shared, N * BLOCK_THREADS);
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(pixels, slab, static_cast<int>(blockIdx.y));
    const Clamp clamp = make_clamp(limit, slope, slope_at);
    float sums[N] = {}, products[N] = {}, score = 0.0f;
    if (tile.active) {
        Affine affine[N];
        float mean[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            affine[i] = make_affine(gamma, beta, saved, c, tile.channel + i);
            mean[i] = saved[tile.channel + i];
        }
        for (i64 pixel = range.begin + tile.row; pixel < range.end; pixel += tile.rows) {
            const i64 at = pixel * c + tile.channel;
            float inputs[N], gradients[N], values[N];
            load_floats(y + at, inputs);
            load_floats(dz + at, gradients);
#pragma unroll
            for (int i = 0; i < N; i++) values[i] = affine[i](inputs[i]);
            if (residual != nullptr) add_floats(residual + at, values);
#pragma unroll
            for (int i = 0; i < N; i++) {
                if (scores != nullptr) score += gradients[i] * clamp.excess(values[i]);
                gradients[i] *= clamp.derivative(values[i]);
                sums[i] += gradients[i];
                products[i] += gradients[i] * (inputs[i] - mean[i]);
            }
            if (d_residual == nullptr) continue;
            if (accumulate != 0) add_floats(d_residual + at, gradients);
            store_floats(d_residual + at, gradients);
        }
    }
    sum_rows(tile, sums, shared);
    sum_rows(tile, products, shared);
    if (tile.active && tile.row == 0) {
        float* const to = partials + static_cast<i64>(blockIdx.y) * 2 * c + tile.channel;
#pragma unroll
        for (int i = 0; i < N; i++) {
            to[i] = sums[i];
            to[c + i] = products[i];
        }
    }
    if (scores == nullptr) return;
    __syncthreads();
    const float sum = block_sum(score, shared);
    if (threadIdx.x == 0) scores[static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x] = sum;
}

__global__ void __launch_bounds__(256) batch_norm_backward_finish(
    const float* __restrict__ partials,   // [slabs, 2, c]
    const float* __restrict__ gamma,      // [c]
    const float* __restrict__ beta,       // [c]
    const float* __restrict__ saved,      // [2, c]
    float* __restrict__ d_gamma,          // [c]
    float* __restrict__ d_beta,           // [c]
    float* __restrict__ coefficients,     // [4, c]: v = a·y + b, dy = a·g + s·y + o, as a, b, s, o
    long long pixels, int slabs, int c,
    const float* __restrict__ weight_partials,   // [weight_slabs, weights] or null
    float* __restrict__ d_weights,               // [weights] or null
    int weight_slabs, long long weights) {
    SHARED_ARRAY(double, shared, 2 * BLOCK_THREADS);
    const int further = static_cast<int>(blockIdx.x) - divide_up(c, FINISH_COLUMNS);
    if (further >= 0) {
        add_slabs(weight_partials, d_weights, weight_slabs, weights, further, shared);
        return;
    }
    const int channel = static_cast<int>(blockIdx.x) * FINISH_COLUMNS + static_cast<int>(threadIdx.x) % FINISH_COLUMNS;
    const float* const column = partials + min_of(channel, c - 1);
    double sums[2];
    sum_over_slabs<FINISH_COLUMNS>(slabs, shared, sums, [&](int index, double (&term)[2]) {
        const float* const of_slab = column + 2LL * index * c;
        term[0] = of_slab[0];
        term[1] = of_slab[c];
    });
    if (channel >= c || threadIdx.x >= FINISH_COLUMNS) return;
    const Affine affine = make_affine(gamma, beta, saved, c, channel);
    const float mean = saved[channel], scale = saved[c + channel], count = static_cast<float>(pixels);
    const float d_beta_here = static_cast<float>(sums[0]), d_gamma_here = static_cast<float>(sums[1] * scale);
    const float s = -affine.a * scale * d_gamma_here / count;
    d_beta[channel] = d_beta_here;
    d_gamma[channel] = d_gamma_here;
    coefficients[channel] = affine.a;
    coefficients[c + channel] = affine.b;
    coefficients[2 * c + channel] = s;
    coefficients[3 * c + channel] = -affine.a * d_beta_here / count - s * mean;
}

template <typename T, bool VECTOR>
__global__ void __launch_bounds__(256) batch_norm_backward_apply(
    const T* __restrict__ y,                  // [pixels, c]
    const T* __restrict__ dz,                 // [pixels, c]
    const float* __restrict__ coefficients,   // [4, c]
    const T* __restrict__ residual,           // [pixels, c] or null
    float limit, float slope,
    const float* __restrict__ slope_at,   // [1] or null
    T* __restrict__ dy,                       // [pixels, c]
    int accumulate,                           // 1 adds to what is in dy
    long long pixels, int slab, int c, int lanes) {
    constexpr int N = LANE_CHANNELS<T, VECTOR>;
    const ChannelTile tile = channel_tile<N>(c, lanes, static_cast<int>(blockIdx.x));
    const Range range = slab_range(pixels, slab, static_cast<int>(blockIdx.y));
    if (!tile.active) return;
    const Clamp clamp = make_clamp(limit, slope, slope_at);
    Affine affine[N];
    float s[N], o[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float* const from = coefficients + tile.channel + i;
        affine[i].a = from[0];
        affine[i].b = from[c];
        s[i] = from[2 * c];
        o[i] = from[3 * c];
    }
    for (i64 pixel = range.begin + tile.row; pixel < range.end; pixel += tile.rows) {
        const i64 at = pixel * c + tile.channel;
        float inputs[N], gradients[N], values[N];
        load_floats(y + at, inputs);
        load_floats(dz + at, gradients);
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = affine[i](inputs[i]);
        if (residual != nullptr) add_floats(residual + at, values);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float g = gradients[i] * clamp.derivative(values[i]);
            values[i] = affine[i].a * g + s[i] * inputs[i] + o[i];
        }
        if (accumulate != 0) add_floats(dy + at, values);
        store_floats(dy + at, values);
    }
}
