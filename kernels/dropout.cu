// Dropout: y (+)= x·mask / (1 − p), and with the same mask the gradient, dx (+)= dy·mask / (1 − p).
//
// The mask is a function of (seed, step, element), the same one as on the CPU, so that nothing is kept for the backward
// pass and a resumed run repeats it. The stream, mix(seed ^ mix(step)), is read from the device, so that a recorded pass
// goes on to new masks.
// Tensors are of type T, aligned to 16 bytes. Bound by memory on large tensors, by integer products on small ones.
//
// dropout<T>     block 256, any number of blocks (`WalkConfig`), no dynamic shared memory                  3 instances
//     (const T* x, T* y, float scale = 1 / (1 − p), unsigned long long threshold = ⌊p · 2^32⌋,
//      const unsigned long long* stream [1], int accumulate, long long n)
//
// instances: dropout<{float,f16,bf16}>

#include "elements.cuh"
#include "random.cuh"

template <typename T>
__global__ void __launch_bounds__(256) dropout(
    const T* __restrict__ x,   // [n]
    T* __restrict__ y,         // [n]
    float scale,
    unsigned long long threshold,                     // of 2^32: elements below it are dropped
    const unsigned long long* __restrict__ stream,    // [1]
    int accumulate,                                   // 1 adds to what is in y
    long long n) {
    const u64 start = *stream;
    const T* const none = nullptr;
    combine(n, x, none, y, accumulate != 0, [&](i64 i, float x, float) {
        return mix(start + static_cast<u64>(i)) >> 32 >= threshold ? x * scale : 0.0f;
    });
}
