// Fibers: a stack each, and a switch between them that stays in user space.
//
// `swapcontext` would do the same but makes a system call per switch to save the signal mask, which costs more than
// the work between two barriers. The switch below saves what the calling convention asks a function to preserve and
// nothing else; floating-point control words, which the caller sets, are not changed by kernels. The address sanitizer
// is told of each switch.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

#ifdef EMULATOR_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_poison_memory_region(const volatile void* address, size_t size);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif

/// Saves the running context on its stack and the stack pointer in `*save`, then goes on with the context whose stack
/// pointer is `load`. It jumps rather than returns where that makes a difference: a return to another place than that
/// of the latest call is always mispredicted.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch(void** save, void* load)
    __asm__("emulator_switch");

#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl emulator_switch\n"
    "emulator_switch:\n"
    "  pushq %rbp\n"
    "  pushq %rbx\n"
    "  pushq %r12\n"
    "  pushq %r13\n"
    "  pushq %r14\n"
    "  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n"
    "  popq %r14\n"
    "  popq %r13\n"
    "  popq %r12\n"
    "  popq %rbx\n"
    "  popq %rbp\n"
    "  popq %rcx\n"
    "  jmpq *%rcx\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".globl emulator_switch\n"
    "emulator_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n"
    "  stp x21, x22, [sp, #16]\n"
    "  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n"
    "  stp x27, x28, [sp, #64]\n"
    "  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n"
    "  stp d10, d11, [sp, #112]\n"
    "  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n"
    "  str x9, [x0]\n"
    "  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n"
    "  ldp x21, x22, [sp, #16]\n"
    "  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n"
    "  ldp x27, x28, [sp, #64]\n"
    "  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n"
    "  ldp d10, d11, [sp, #112]\n"
    "  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  br x30\n");
#else
#error "the emulator's fibers are written for x86_64 and aarch64"
#endif

namespace emulator {

#ifdef EMULATOR_ASAN
constexpr size_t STACK_BYTES = 256 * 1024;
#else
constexpr size_t STACK_BYTES = 64 * 1024;
#endif
/// Distance of two stacks. Were it a power of two, the live ends of all stacks would fall into the same few sets of
/// the processor's caches.
constexpr size_t STACK_STRIDE = STACK_BYTES + 1024 + 64;
/// Bytes at a stack's low end that hold a pattern, which a kernel that needs more stack destroys.
constexpr size_t CANARY_BYTES = 64;
constexpr uint64_t CANARY = 0x5ca1ab1e0ddba11full;
/// Bytes below the stacks, into which the lowest one may overflow.
constexpr size_t STACKS_PADDING = 1024 * 1024;
/// What a fiber keeps free below the frame in which it waits, for the calls that the scheduler's side makes there.
constexpr size_t STACK_MARGIN = 512;

struct Fiber {
    /// Stack pointer while suspended.
    void* context = nullptr;
    /// Lowest address of the stack; null for the host's own stack.
    unsigned char* stack = nullptr;
    size_t stack_bytes = 0;
    Fiber* next = nullptr;
    void* fake_stack = nullptr;

    bool intact() const {
        const uint64_t* words = reinterpret_cast<const uint64_t*>(stack);
        for (size_t i = 0; i < CANARY_BYTES / 8; i++) {
            if (words[i] != CANARY) return false;
        }
        return true;
    }

    /// Whether `frame`, an address in the present frame, leaves room on the stack.
    bool has_room(const void* frame) const {
        return static_cast<const unsigned char*>(frame) > stack + CANARY_BYTES + STACK_MARGIN;
    }

    /// Makes the fiber begin with `entry`, which must not return, at the next switch to it.
    void prepare(void (*entry)()) {
#ifdef EMULATOR_ASAN
        __asan_unpoison_memory_region(stack, stack_bytes);
#endif
        uint64_t* words = reinterpret_cast<uint64_t*>(stack);
        for (size_t i = 0; i < CANARY_BYTES / 8; i++) words[i] = CANARY;
        const uintptr_t end = reinterpret_cast<uintptr_t>(stack) + stack_bytes;
        uint64_t* top = reinterpret_cast<uint64_t*>(end / 64 * 64);
#if defined(__x86_64__)
        // Six registers, the entry as return address, and above it none: the entry finds the stack as after a call.
        uint64_t* frame = top - 8;
        for (int i = 0; i < 8; i++) frame[i] = 0;
        frame[6] = reinterpret_cast<uint64_t>(entry);
#else
        // Twelve integer and eight floating-point registers, of which x30 holds the entry.
        uint64_t* frame = top - 20;
        for (int i = 0; i < 20; i++) frame[i] = 0;
        frame[11] = reinterpret_cast<uint64_t>(entry);
#endif
        context = frame;
        fake_stack = nullptr;
    }
};

/// Suspends `from`, the running fiber, and goes on with `to`.
inline void switch_fiber(Fiber& from, Fiber& to) {
#ifdef EMULATOR_ASAN
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
    emulator_switch(&from.context, to.context);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
    emulator_switch(&from.context, to.context);
#endif
}

/// The first thing a fiber does: notes where the stack of the switching side lies.
inline void fiber_entered([[maybe_unused]] Fiber& from) {
#ifdef EMULATOR_ASAN
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    from.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
    from.stack_bytes = size;
#endif
}

/// Memory straight from the system, which takes pages only as they are touched.
inline void* map_memory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE);
#endif
    return memory;
}

}  // namespace emulator
