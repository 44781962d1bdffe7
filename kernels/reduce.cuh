// Sums over a warp and over a block, in an order that does not depend on timing, so that equal inputs give
// equal bits. Every thread gets the result.

#pragma once

#include "numeric.cuh"

/// The thread's index in its block, x innermost, as warps are counted.
__device__ __forceinline__ int thread_rank() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

/// The thread's lane in its warp.
__device__ __forceinline__ int lane_in_warp() {
#ifdef __CUDA_ARCH__
    int lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
#else
    return thread_rank() % WARP_SIZE;
#endif
}

/// The sum over the warp's 32 lanes, all of which must take part.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

/// The sum over the block. `shared` is `[32]`; it may be used again at once after the call. The block's size must be a
/// multiple of 32, and all of its threads must take part.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    const int rank = thread_rank(), warps = static_cast<int>(blockDim.x * blockDim.y * blockDim.z) / WARP_SIZE;
    x = warp_sum(x);
    if (rank % WARP_SIZE == 0) shared[rank / WARP_SIZE] = x;
    __syncthreads();
    x = warp_sum(rank % WARP_SIZE < warps ? shared[rank % WARP_SIZE] : 0.0f);
    __syncthreads();
    return x;
}
