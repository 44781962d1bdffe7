// Losses on logits and on feature maps, each with its gradient in the same pass.
//
// With p = softmax(z), K classes: cross-entropy with label smoothing ε is −Σ_k t_k·log p_k, t = (1 − ε)·onehot(label)
// + ε/K, and its gradient p − t. Distillation at temperature τ is α·τ²·CE(softmax(z_t/τ), p) + (1 − α)·CE(label, p)
// with p = softmax(z_s/τ). Gradients are those of the mean over the batch, times a loss scale that is read from the
// device, and are written in the network's type T, as logits are read. A block has one row, whose logits come
// from memory once and then from cache. Losses and hits of the rows are added in a fixed order, in double, to the sums
// of an epoch, which stay on the device. A hit is a row whose highest logit, the first of equal ones, is the label's.
//
// Blocks have 256 threads; no dynamic shared memory. `scale`, where not null, is the loss scale. Labels are below K.
//
// cross_entropy<T>                                                                                         3 instances
//     grid (n): (const T* logits [n, K], const u32* labels [n], T* d_logits [n, K] or null, float* losses [n],
//                float* hits [n], int classes, float smoothing, const float* scale or null)
// distillation<T>                                                                                          3 instances
//     grid (n): (const T* logits [n, K], const T* teacher [n, K], const u32* labels [n], T* d_logits [n, K],
//                float* losses [n], float* hits [n], int classes, float alpha, float temperature,
//                const float* scale or null)
// feature_mse<T>         weight·mean (s − t)²; tensors aligned to 16 bytes                                 3 instances
//     grid (G), the blocks of `WalkConfig` in src/ops/config/walk.rs:
//     (const T* student [n], const T* teacher [n], T* d_student [n], float* losses [G], float weight,
//      const float* scale or null, long long n)
// loss_finish            grid (1)                                                                          1 instance
//     (const float* losses [count], const float* hits [count] or null, LossSums* sums, int count, double factor,
//      int images): sums.loss += factor·Σ losses, sums.correct += Σ hits, sums.images += images.
//     factor is 1 for rows, and images · weight / n with images 0 for features, whose mean counts once per image.
//
// instances: {cross_entropy,distillation}<{float,f16,bf16}>
// instances: feature_mse<{float,f16,bf16}>
// instances: loss_finish

#include "elements.cuh"
#include "reduce.cuh"
#include "slab.cuh"

/// The sums of an epoch; the Rust side has the same struct under `repr(C)`.
struct LossSums {
    double loss;
    u64 correct;
    u64 images;
};

/// A row's highest logit and where it first occurs.
struct Highest {
    float value;
    int at;

    __device__ __forceinline__ void take(float other, int other_at) {
        if (other > value || (other == value && other_at < at)) {
            value = other;
            at = other_at;
        }
    }
};

/// The highest of a row, for all threads of the block. The shared arrays are `[32]` and may be used again at once.
template <typename T>
__device__ __forceinline__ Highest row_highest(const T* row, int classes, float* values, int* places) {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % WARP_SIZE;
    Highest highest{-INFINITY_F, classes};
#pragma unroll 1
    for (int k = thread; k < classes; k += BLOCK_THREADS) highest.take(to_float(row[k]), k);
    auto over_warp = [&] {
#pragma unroll
        for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) {
            const float value = __shfl_xor_sync(FULL_WARP, highest.value, offset);
            highest.take(value, __shfl_xor_sync(FULL_WARP, highest.at, offset));
        }
    };
    over_warp();
    if (lane == 0) {
        values[thread / WARP_SIZE] = highest.value;
        places[thread / WARP_SIZE] = highest.at;
    }
    __syncthreads();
    highest = Highest{-INFINITY_F, classes};
    if (lane < BLOCK_THREADS / WARP_SIZE) highest = Highest{values[lane], places[lane]};
    over_warp();
    __syncthreads();
    return highest;
}

/// Σ term(k) over the classes, for all threads of the block. `shared` is `[32]`.
template <typename Term>
__device__ __forceinline__ float row_sum(int classes, float* shared, Term term) {
    float sum = 0.0f;
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += BLOCK_THREADS) sum += term(k);
    return block_sum(sum, shared);
}

/// 1 where the highest logit is the label's, else 0. `sum` is one over all distances to the highest: a row with a logit
/// that is not finite has no highest, and its sum is not finite either.
__device__ __forceinline__ float is_hit(const Highest& highest, int label, float sum) {
    return highest.at == label && is_finite(sum) ? 1.0f : 0.0f;
}

template <typename T>
__global__ void __launch_bounds__(256) cross_entropy(
    const T* __restrict__ logits,     // [n, classes]
    const u32* __restrict__ labels,   // [n]
    T* __restrict__ d_logits,         // [n, classes] or null
    float* __restrict__ losses,       // [n]
    float* __restrict__ hits,         // [n]
    int classes, float smoothing,
    const float* __restrict__ scale) {   // [1] or null
    SHARED_ARRAY(float, shared, WARP_SIZE);
    SHARED_ARRAY(int, places, WARP_SIZE);
    const T* const z = logits + static_cast<i64>(blockIdx.x) * classes;
    const int label = static_cast<int>(labels[blockIdx.x]);
    const Highest highest = row_highest(z, classes, shared, places);
    auto relative = [&](int k) { return to_float(z[k]) - highest.value; };
    const float norm = row_sum(classes, shared, [&](int k) { return exp_f(relative(k)); });
    const float mean = row_sum(classes, shared, relative) / static_cast<float>(classes);
    if (threadIdx.x == 0) {
        const float hard = log_f(norm) - relative(label), uniform = log_f(norm) - mean;
        losses[blockIdx.x] = (1.0f - smoothing) * hard + smoothing * uniform;
        hits[blockIdx.x] = is_hit(highest, label, mean);
    }
    if (d_logits == nullptr) return;
    T* const d = d_logits + static_cast<i64>(blockIdx.x) * classes;
    const float factor = (scale != nullptr ? *scale : 1.0f) / static_cast<float>(gridDim.x);
    const float others = smoothing / static_cast<float>(classes);
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += BLOCK_THREADS) {
        const float target = k == label ? 1.0f - smoothing + others : others;
        d[k] = from_float<T>((exp_f(relative(k)) / norm - target) * factor);
    }
}

template <typename T>
__global__ void __launch_bounds__(256) distillation(
    const T* __restrict__ logits,     // [n, classes]
    const T* __restrict__ teacher,    // [n, classes]
    const u32* __restrict__ labels,   // [n]
    T* __restrict__ d_logits,         // [n, classes]
    float* __restrict__ losses,       // [n]
    float* __restrict__ hits,         // [n]
    int classes, float alpha, float temperature,
    const float* __restrict__ scale) {   // [1] or null
    SHARED_ARRAY(float, shared, WARP_SIZE);
    SHARED_ARRAY(int, places, WARP_SIZE);
    const i64 row = static_cast<i64>(blockIdx.x) * classes;
    const T *const student = logits + row, *const guide = teacher + row;
    const int label = static_cast<int>(labels[blockIdx.x]);
    const Highest highest = row_highest(student, classes, shared, places);
    const Highest highest_guide = row_highest(guide, classes, shared, places);
    auto relative = [&](int k) { return (to_float(student[k]) - highest.value) / temperature; };
    auto relative_guide = [&](int k) { return (to_float(guide[k]) - highest_guide.value) / temperature; };
    const float norm = row_sum(classes, shared, [&](int k) { return exp_f(relative(k)); });
    const float norm_guide = row_sum(classes, shared, [&](int k) { return exp_f(relative_guide(k)); });
    const float log_norm = log_f(norm), weight = alpha * temperature * temperature;
    const float soft = row_sum(classes, shared, [&](int k) {
        return exp_f(relative_guide(k)) / norm_guide * (log_norm - relative(k));
    });
    const float sum = row_sum(classes, shared, relative);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = weight * soft + (1.0f - alpha) * (log_norm - relative(label));
        hits[blockIdx.x] = is_hit(highest, label, sum);
    }
    T* const d = d_logits + row;
    // One 1/τ comes from differentiating z/τ.
    const float factor = (scale != nullptr ? *scale : 1.0f) / (static_cast<float>(gridDim.x) * temperature);
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += BLOCK_THREADS) {
        const float p = exp_f(relative(k)) / norm, q = exp_f(relative_guide(k)) / norm_guide;
        d[k] = from_float<T>((weight * (p - q) + (1.0f - alpha) * (p - (k == label ? 1.0f : 0.0f))) * factor);
    }
}

template <typename T>
__global__ void __launch_bounds__(256) feature_mse(
    const T* __restrict__ student,   // [n]
    const T* __restrict__ teacher,   // [n]
    T* __restrict__ d_student,       // [n]
    float* __restrict__ losses,      // [blocks]: Σ (s − t)²
    float weight,
    const float* __restrict__ scale,   // [1] or null
    long long n) {
    SHARED_ARRAY(float, shared, WARP_SIZE);
    const float factor = 2.0f * weight / static_cast<float>(n) * (scale != nullptr ? *scale : 1.0f);
    float sum = 0.0f;
    combine(n, student, teacher, d_student, false, [&](i64, float s, float t) {
        sum += (s - t) * (s - t);
        return factor * (s - t);
    });
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) losses[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(256) loss_finish(
    const float* __restrict__ losses,   // [count]
    const float* __restrict__ hits,     // [count] or null
    LossSums* __restrict__ sums,        // [1]
    int count, double factor, int images) {
    SHARED_ARRAY(double, shared, BLOCK_THREADS);
    const double loss = sum_array(losses, count, shared);
    const double correct = hits != nullptr ? sum_array(hits, count, shared) : 0.0;
    if (threadIdx.x != 0) return;
    sums->loss += factor * loss;
    sums->correct += static_cast<u64>(correct);
    sums->images += static_cast<u64>(images);
}
