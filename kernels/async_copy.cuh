// Copies from global to shared memory that run while the thread computes.
//
// The usual pattern: issue the copies of a stage, `copy_async_commit()`, go on with an earlier stage, and before
// reading `copy_async_wait<N>()`, which returns when at most the N youngest commits of the *calling thread* are still
// under way; then `__syncthreads()`, since the other threads' copies are theirs to wait for. Below ARCH 800 a copy is
// done at once. The emulator does it at the wait and no earlier, and leaves NaN in shared memory until then.

#pragma once

#include "numeric.cuh"

/// Starts copying 16 bytes, or zeros where `valid` is false (`global` is not read then). Both pointers are aligned to
/// 16 bytes. REUSED bytes, which the same multiprocessor will copy again soon, are kept in its cache; others pass it by.
template <bool REUSED>
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid) {
#if !defined(__CUDA_ARCH__)
    emulator::copy_async_16(shared, global, valid);
#elif ARCH >= 800
    const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    const size_t from = __cvta_generic_to_global(global);
    const int bytes = valid ? 16 : 0;
    if constexpr (REUSED) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    }
#else
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

/// Closes the group of copies started since the last commit.
__device__ __forceinline__ void copy_async_commit() {
#if !defined(__CUDA_ARCH__)
    emulator::copy_async_commit();
#elif ARCH >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most N of the thread's groups are under way.
template <int N>
__device__ __forceinline__ void copy_async_wait() {
#if !defined(__CUDA_ARCH__)
    emulator::copy_async_wait(N);
#elif ARCH >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}
