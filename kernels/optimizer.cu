// Optimizer steps over flat buffers of n floats: master weights w, gradients g, and the optimizer's own.
//
//   SGD     g ← g·f + λ·w;   v ← μ·v + g;   w ← w − lr·(g + μ·v) with Nesterov, else w − lr·v
//   AdamW   g ← g·f;   m, s ← moving averages of g and g²;   w ← (1 − lr·λ)·w − lr·m̂ / (√ŝ + ε)
//
// The factor f takes the loss scale out and clips by the global norm. Each element has a group: 0 is never touched, 1
// has no weight decay, 2 decays with λ. The same pass writes the copy of the weights in the network's type T for the
// next step, at the same places. What changes from step to step lies in an OptimizerState on the device, so that a
// captured graph needs no new arguments: `optimizer_prepare` writes it between the backward pass and the step, and the host
// writes the learning rate beside it and reads the state, perhaps a step late. Where a gradient is not finite, that step changes no weight, and the
// loss scale is halved; after 2000 good steps in a row it is doubled. The norm is summed in two stages, in a fixed
// order.
//
// Bound by memory: SGD moves 21 bytes per weight and those of T, AdamW 29. Buffers are aligned to 16 bytes, and n is a
// multiple of 4: they are padded, with group 0.
//
// Blocks have 256 threads; no dynamic shared memory. G and W are the blocks of the norm and of the
// step of `OptimizerConfig` in src/ops/config/walk.rs.
//
// gradient_squares       grid (G)                                                                          1 instance
//     (const float* g, const u8* groups, float* partials [G], long long n)
// optimizer_prepare      grid (1)                                                                          1 instance
//     (OptimizerState* state, const float* learning_rate [1], const float* partials [count], int count, float max_norm,
//      float beta1, float beta2, int dynamic_scale)
//     count 0 where neither clipping nor loss scaling wants the norm; max_norm 0 does not clip; betas are 0 for SGD
// optimizer_sgd<T>       grid (W)                                                                          3 instances
//     (const OptimizerState* state, float* w, const float* g, float* v, const u8* groups, T* copy or null,
//      float momentum, float weight_decay, int nesterov, long long n)
// optimizer_adamw<T>     grid (W)                                                                          3 instances
//     (const OptimizerState* state, float* w, const float* g, float* m, float* s, const u8* groups, T* copy or null,
//      float beta1, float beta2, float eps, float weight_decay, long long n)
//
// instances: gradient_squares
// instances: optimizer_prepare
// instances: optimizer_{sgd,adamw}<{float,f16,bf16}>

#include "reduce.cuh"
#include "slab.cuh"

/// The state of the optimizer on the device; the Rust side has the same struct under `repr(C)`. 56 bytes.
struct OptimizerState {
    /// Batches seen, those skipped included: the step of dropout.
    u64 seen;
    /// Steps taken.
    u64 taken;
    /// Of the present step.
    float learning_rate;
    /// Factor on the loss of the next step; 1 without loss scaling.
    float loss_scale;
    /// Steps since the loss scale changed, and batches that were skipped.
    u32 good_steps, skipped;
    // Of the present step:
    /// Norm of the gradient without the loss scale; not finite where the step is skipped.
    float gradient_norm;
    /// What gradients are multiplied with.
    float factor;
    /// lr / (1 − β₁^taken) and √(1 − β₂^taken).
    float adam_step, adam_root;
    u32 skip;
    u32 reserved;
};

/// Good steps after which the loss scale is doubled, and its bounds.
constexpr u32 GROWTH_STEPS = 2000;
constexpr float SMALLEST_SCALE = 1.0f, LARGEST_SCALE = 16777216.0f;
/// Keeps the clipping quotient finite, as in `clip_grad_norm_`.
constexpr double CLIP_EPS = 1e-6;

/// Elements of a thread: 16 bytes of float.
constexpr int RUN = 4;

/// Calls body(first element, groups) for all runs of 0..n.
template <typename Body>
__device__ __forceinline__ void for_runs(const u8* groups, i64 n, Body body) {
    const i64 step = static_cast<i64>(gridDim.x) * BLOCK_THREADS * RUN;
    const i64 first = (static_cast<i64>(blockIdx.x) * BLOCK_THREADS + threadIdx.x) * RUN;
    for (i64 at = first; at < n; at += step) body(at, load_vector<u8, RUN>(groups + at));
}

__global__ void __launch_bounds__(256) gradient_squares(
    const float* __restrict__ g,     // [n]
    const u8* __restrict__ groups,   // [n]
    float* __restrict__ partials,    // [blocks]
    long long n) {
    SHARED_ARRAY(float, shared, WARP_SIZE);
    float sum = 0.0f;
    for_runs(groups, n, [&](i64 at, const Vector<u8, RUN>& group) {
        float gradients[RUN];
        load_floats(g + at, gradients);
#pragma unroll
        for (int i = 0; i < RUN; i++) sum += group[i] != 0 ? gradients[i] * gradients[i] : 0.0f;
    });
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

/// base^exponent.
__device__ __forceinline__ double power(double base, u64 exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent /= 2, base *= base) {
        if (exponent % 2 == 1) result *= base;
    }
    return result;
}

__global__ void __launch_bounds__(256) optimizer_prepare(
    OptimizerState* __restrict__ state,        // [1]
    const float* __restrict__ learning_rate,   // [1]
    const float* __restrict__ partials,        // [count]; not read where count is 0
    int count, float max_norm, float beta1, float beta2, int dynamic_scale) {
    SHARED_ARRAY(double, shared, BLOCK_THREADS);
    const double squares = sum_array(partials, count, shared);
    if (threadIdx.x != 0) return;
    OptimizerState now = *state;
    const double scale = now.loss_scale;
    now.learning_rate = *learning_rate;
    now.seen++;
    now.gradient_norm = sqrt_f(static_cast<float>(squares / (scale * scale)));
    now.skip = is_finite(now.gradient_norm) ? 0 : 1;
    if (now.skip != 0) {
        now.skipped++;
        now.good_steps = 0;
        if (dynamic_scale != 0) now.loss_scale = max_f(now.loss_scale * 0.5f, SMALLEST_SCALE);
    } else {
        const double clip = max_norm > 0.0f ? min_of(max_norm / (now.gradient_norm + CLIP_EPS), 1.0) : 1.0;
        now.factor = static_cast<float>(static_cast<float>(clip) / scale);
        now.taken++;
        now.adam_step = static_cast<float>(now.learning_rate / (1.0 - power(beta1, now.taken)));
        now.adam_root = sqrt_f(static_cast<float>(1.0 - power(beta2, now.taken)));
        now.good_steps++;
        if (dynamic_scale != 0 && now.good_steps == GROWTH_STEPS) {
            now.good_steps = 0;
            now.loss_scale = min_f(now.loss_scale * 2.0f, LARGEST_SCALE);
        }
    }
    *state = now;
}

template <typename T>
__global__ void __launch_bounds__(256) optimizer_sgd(
    const OptimizerState* __restrict__ state,
    float* __restrict__ w,           // [n]
    const float* __restrict__ g,     // [n]
    float* __restrict__ v,           // [n]
    const u8* __restrict__ groups,   // [n]
    T* __restrict__ copy,            // [n] or null
    float momentum, float weight_decay, int nesterov, long long n) {
    if (state->skip != 0) return;
    const float factor = state->factor, rate = state->learning_rate;
    for_runs(groups, n, [&](i64 at, const Vector<u8, RUN>& group) {
        float weights[RUN], gradients[RUN], velocities[RUN];
        load_floats(w + at, weights);
        load_floats(g + at, gradients);
        load_floats(v + at, velocities);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (group[i] == 0) continue;
            const float gradient = gradients[i] * factor + (group[i] == 2 ? weight_decay : 0.0f) * weights[i];
            velocities[i] = momentum * velocities[i] + gradient;
            weights[i] -= rate * (nesterov != 0 ? gradient + momentum * velocities[i] : velocities[i]);
        }
        store_floats(w + at, weights);
        store_floats(v + at, velocities);
        if (copy != nullptr) store_floats(copy + at, weights);
    });
}

template <typename T>
__global__ void __launch_bounds__(256) optimizer_adamw(
    const OptimizerState* __restrict__ state,
    float* __restrict__ w,           // [n]
    const float* __restrict__ g,     // [n]
    float* __restrict__ m,           // [n]: average of g
    float* __restrict__ s,           // [n]: average of g²
    const u8* __restrict__ groups,   // [n]
    T* __restrict__ copy,            // [n] or null
    float beta1, float beta2, float eps, float weight_decay, long long n) {
    if (state->skip != 0) return;
    const float factor = state->factor, rate = state->learning_rate, step = state->adam_step, root = state->adam_root;
    for_runs(groups, n, [&](i64 at, const Vector<u8, RUN>& group) {
        float weights[RUN], gradients[RUN], means[RUN], squares[RUN];
        load_floats(w + at, weights);
        load_floats(g + at, gradients);
        load_floats(m + at, means);
        load_floats(s + at, squares);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            if (group[i] == 0) continue;
            const float gradient = gradients[i] * factor, keep = 1.0f - rate * (group[i] == 2 ? weight_decay : 0.0f);
            means[i] += (1.0f - beta1) * (gradient - means[i]);
            squares[i] = beta2 * squares[i] + (1.0f - beta2) * gradient * gradient;
            weights[i] = weights[i] * keep - step * (means[i] / (sqrt_f(squares[i]) / root + eps));
        }
        store_floats(w + at, weights);
        store_floats(m + at, means);
        store_floats(s + at, squares);
        if (copy != nullptr) store_floats(copy + at, weights);
    });
}
