// Clamped activations on their own: where no convolution or batch-norm precedes them to which they could be fused.
//
//   forward    y = φ(x)
//   backward   dx (+)= dy·φ'(x), and where asked for the score Σ dy·(x − φ₀(x)), φ₀ being φ with slope 0
//
// All tensors have one shape and type T, and are aligned to 16 bytes. Bound by memory: each is read or written once, by
// vectors. The score is summed in two stages: a partial sum per block, whose number depends on n alone, then one block
// that adds them in order in double. It is added to the previous value, since a block of the network may have several
// activations; batch-norms with an activation form the same partial sums. Gradients may carry a loss scale, then the
// score does too. `slope_at`, where not null, holds the slope on the device.
//
// Blocks have 256 threads; no dynamic shared memory. G is the number of blocks of `WalkConfig` in src/ops/config/walk.rs.
//
// activation_forward<T>     grid (G)                                                                       3 instances
//     (const T* x, float limit, float slope, const float* slope_at or null, T* y, long long n)
// activation_backward<T>    grid (G)                                                                       3 instances
//     (const T* x, const T* dy, float limit, float slope, const float* slope_at or null, T* dx, int accumulate,
//      float* scores [G] or null, long long n)
// score_finish              grid (1)                                                                       1 instance
//     (const float* scores [count], float* score, int count)
//
// instances: activation_{forward,backward}<{float,f16,bf16}>
// instances: score_finish

#include "activation.cuh"
#include "elements.cuh"
#include "reduce.cuh"
#include "slab.cuh"

template <typename T>
__global__ void __launch_bounds__(256) activation_forward(
    const T* __restrict__ x,   // [n]
    float limit, float slope,
    const float* __restrict__ slope_at,   // [1] or null
    T* __restrict__ y,         // [n]
    long long n) {
    const Clamp clamp = make_clamp(limit, slope, slope_at);
    const T* const none = nullptr;
    combine(n, x, none, y, false, [&](i64, float x, float) { return clamp.apply(x); });
}

template <typename T>
__global__ void __launch_bounds__(256) activation_backward(
    const T* __restrict__ x,        // [n]
    const T* __restrict__ dy,       // [n]
    float limit, float slope,
    const float* __restrict__ slope_at,   // [1] or null
    T* __restrict__ dx,             // [n]
    int accumulate,                 // 1 adds to what is in dx
    float* __restrict__ scores,     // [blocks] or null
    long long n) {
    SHARED_ARRAY(float, shared, WARP_SIZE);
    const Clamp clamp = make_clamp(limit, slope, slope_at);
    float score = 0.0f;
    combine(n, x, dy, dx, accumulate != 0, [&](i64, float x, float dy) {
        if (scores != nullptr) score += dy * clamp.excess(x);
        return dy * clamp.derivative(x);
    });
    if (scores == nullptr) return;
    score = block_sum(score, shared);
    if (threadIdx.x == 0) scores[blockIdx.x] = score;
}

__global__ void __launch_bounds__(256) score_finish(
    const float* __restrict__ scores,   // [count]
    float* __restrict__ score,          // [1]
    int count) {
    SHARED_ARRAY(double, shared, BLOCK_THREADS);
    const double sum = sum_array(scores, count, shared);
    if (threadIdx.x == 0) *score += static_cast<float>(sum);
}
