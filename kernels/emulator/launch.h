// The interface of a compiled kernel file: a list of instances and a launch.
//
// The generated file reads
//
//     #include "emulator/emulator.h"
//     #include "depthwise.cu"
//     #include "emulator/launch.h"
//     EMULATED_KERNELS(
//         EMULATED_KERNEL(depthwise_forward<f16, 3, 1, true>),
//         EMULATED_KERNEL(depthwise_forward<float, 3, 1, false>))
//
// and the name of an instance is its name expression as written there.

#pragma once

#include "emulator.h"
#include "../numeric.cuh"

/// How a launch is to run. Zero is the default of every field.
struct EmulatorOptions {
    /// Size of the struct as the caller knows it; fields past it count as zero.
    unsigned long long size;
    /// 0: threads run in index order. Otherwise the seed of shuffled orders.
    unsigned long long order_seed;
    /// In the counting flavour where counts go, and the device's memory in order of address. Null counts nothing.
    EmulatorCounters* counters;
    const EmulatorAllocation* allocations;
    unsigned long long allocation_count;
    unsigned long long reserved[3];
};

namespace emulator {

/// The type of an argument as one number: 1 float, 2 double, 3 int, 4 unsigned, 5 long long, 6 unsigned long long,
/// 7 unsigned char, 8 f16, 9 bf16, 10 any other and its size in the upper half; with 0x100 a pointer to it, with 0x200
/// one that may be written through. An argument that points to 0 points to anything.
template <typename T>
struct Code {
    static constexpr unsigned VALUE = 10u | static_cast<unsigned>(sizeof(T)) << 16;
};
template <typename T>
struct Code<T*> {
    static constexpr unsigned VALUE = 0x300u | Code<T>::VALUE;
};
template <typename T>
struct Code<const T*> {
    static constexpr unsigned VALUE = 0x100u | Code<T>::VALUE;
};
#define EMULATED_CODE(type, code)                                                                                      \
    template <>                                                                                                        \
    struct Code<type> {                                                                                                \
        static constexpr unsigned VALUE = code;                                                                        \
    };
EMULATED_CODE(float, 1)
EMULATED_CODE(double, 2)
EMULATED_CODE(int, 3)
EMULATED_CODE(unsigned, 4)
EMULATED_CODE(long long, 5)
EMULATED_CODE(unsigned long long, 6)
EMULATED_CODE(unsigned char, 7)
EMULATED_CODE(f16, 8)
EMULATED_CODE(bf16, 9)

/// Whether an argument can be given where a kernel expects another.
inline bool fits(unsigned got, unsigned expected) {
    // A pointer that may be written through can be read through.
    if ((got & 0x300u) == 0x300u && (expected & 0x300u) == 0x100u) got &= ~0x200u;
    const bool to_anything = (got & 0xffu) == 0 && (got & 0x300u) == (expected & 0x300u);
    return got == expected || to_anything;
}

/// Calls a kernel with its arguments taken from `args`, an array of pointers to them as for cuLaunchKernel.
template <auto KERNEL>
struct Call;
template <typename... P, void (*KERNEL)(P...)>
struct Call<KERNEL> {
    template <size_t... I>
    struct Indices {};
    template <size_t N, size_t... I>
    struct Count : Count<N - 1, N - 1, I...> {};
    template <size_t... I>
    struct Count<0, I...> {
        using Type = Indices<I...>;
    };
    template <size_t... I>
    static void spread([[maybe_unused]] void** args, Indices<I...>) {
        KERNEL(*static_cast<P*>(args[I])...);
    }
    static void run(void** args) { spread(args, typename Count<sizeof...(P)>::Type{}); }

    static constexpr int COUNT = static_cast<int>(sizeof...(P));
    static constexpr unsigned CODES[] = {Code<P>::VALUE...};
};

struct Kernel {
    const char* name;
    void (*run)(void**);
    /// Types of its parameters, and their number.
    const unsigned* codes;
    int count;
};

/// Runs the blocks `first_block` .. `first_block + block_count` of a launch, counted with x innermost. Returns 0, or 1
/// with a text in `error`.
inline int launch(const Kernel& kernel, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared_bytes,
                  void** args, const unsigned* codes, int count, unsigned long long first_block,
                  unsigned long long block_count, const EmulatorOptions* options, char* error, int error_len) {
    if (error != nullptr && error_len > 0) error[0] = 0;
    const auto refuse = [&](const char* what) {
        if (error != nullptr && error_len > 0) {
            snprintf(error, static_cast<size_t>(error_len), "kernel %s: %s (grid %u x %u x %u, block %u x %u x %u, "
                     "%u bytes of dynamic shared memory)", kernel.name, what, grid[0], grid[1], grid[2], block[0],
                     block[1], block[2], shared_bytes);
        }
        return 1;
    };
    if (count != kernel.count) return refuse("another number of arguments than it has parameters");
    for (int i = 0; i < count; i++) {
        if (fits(codes[i], kernel.codes[i])) continue;
        char what[96];
        snprintf(what, sizeof what, "argument %d is of another type than its parameter (%#x, not %#x)", i + 1, codes[i],
                 kernel.codes[i]);
        return refuse(what);
    }
    const unsigned long long threads = 1ull * block[0] * block[1] * block[2];
    const unsigned long long blocks = 1ull * grid[0] * grid[1] * grid[2];
    if (grid[0] == 0 || grid[0] > 0x7fffffffu || grid[1] == 0 || grid[1] > 65535 || grid[2] == 0 || grid[2] > 65535) {
        return refuse("the grid is not one that the hardware takes");
    }
    if (threads == 0 || threads > MAX_THREADS || block[0] > 1024 || block[1] > 1024 || block[2] > 64) {
        return refuse("the block is not one that the hardware takes");
    }
    if (shared_bytes > SHARED_LIMIT) return refuse("more dynamic shared memory than the architecture has");
    if (first_block > blocks || block_count > blocks - first_block) return refuse("blocks outside the grid");
    if (machine != nullptr && machine->kernel != nullptr) return refuse("a launch within a launch");
    if (!ensure_machine()) return refuse("out of memory");

    Machine& m = *machine;
    m.kernel = kernel.run;
    m.args = args;
    m.kernel_name = kernel.name;
    m.order_seed = options != nullptr && options->size >= 16 ? options->order_seed : 0;
    m.grid_dim = dim3{grid[0], grid[1], grid[2]};
    m.block_dim = dim3{block[0], block[1], block[2]};
    m.count = static_cast<unsigned>(threads);
    m.dynamic_bytes = shared_bytes;
    m.error = error;
    m.error_len = error_len;
    m.failed = false;
#ifdef EMULATOR_COUNTS
    m.recorder.counters = options->counters;
    m.recorder.allocations = options->allocations;
    m.recorder.allocation_count = options->allocation_count;
    m.recorder.latest = 0;
    for (Thread& thread : m.threads) thread.accesses.count = 0;
#endif
    for (unsigned i = 0; i < m.count; i++) {
        m.threads[i].index = uint3{i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
        m.threads[i].rank = i;
    }
    bool good = true;
    for (unsigned long long b = first_block; good && b < first_block + block_count; b++) {
        m.block_index = uint3{static_cast<unsigned>(b % grid[0]), static_cast<unsigned>(b / grid[0] % grid[1]),
                              static_cast<unsigned>(b / grid[0] / grid[1])};
        // The order of one block must not depend on which blocks this host thread ran before it.
        for (unsigned i = 0; i < m.count; i++) m.order[i] = static_cast<unsigned short>(i);
        good = run_block(b);
    }
    m.kernel = nullptr;
#ifdef EMULATOR_COUNTS
    m.recorder.counters = nullptr;
#endif
    return good ? 0 : 1;
}

}  // namespace emulator

#define EMULATED_KERNEL(...)                                                                                           \
    emulator::Kernel {                                                                                                 \
        #__VA_ARGS__, emulator::Call<__VA_ARGS__>::run, emulator::Call<__VA_ARGS__>::CODES,                            \
            emulator::Call<__VA_ARGS__>::COUNT                                                                         \
    }

#define EMULATED_EXPORT extern "C" __attribute__((visibility("default")))

#define EMULATED_KERNELS(...)                                                                                          \
    static const emulator::Kernel emulated_kernels[] = {__VA_ARGS__};                                                  \
    EMULATED_EXPORT int emulated_arch() { return ARCH; }                                                               \
    EMULATED_EXPORT int emulated_kernel_count() {                                                                      \
        return static_cast<int>(sizeof emulated_kernels / sizeof emulated_kernels[0]);                                 \
    }                                                                                                                  \
    EMULATED_EXPORT const char* emulated_kernel_name(int index) {                                                      \
        return index >= 0 && index < emulated_kernel_count() ? emulated_kernels[index].name : nullptr;                 \
    }                                                                                                                  \
    EMULATED_EXPORT int emulated_launch(int index, const unsigned(&grid)[3], const unsigned(&block)[3],                \
                                        unsigned shared_bytes, void** args, const unsigned* codes, int count,          \
                                        unsigned long long first_block, unsigned long long block_count,                \
                                        const EmulatorOptions* options, char* error, int error_len) {                  \
        if (index < 0 || index >= emulated_kernel_count()) return 1;                                                   \
        return emulator::launch(emulated_kernels[index], grid, block, shared_bytes, args, codes, count, first_block,   \
                                block_count, options, error, error_len);                                               \
    }
