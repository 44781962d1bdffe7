// One block at a time: its threads, their order, barriers, warp operations and shared memory.
//
// Each host thread has a Machine of its own, so that a launch's blocks may be spread over host threads. Within a block
// threads run one after another, each until it ends or has to wait. A thread that never waits therefore needs no stack
// of its own, and the next one starts on the same fiber without a switch; only waiting threads keep theirs.
//
// Threads run in index order, or with a seed in a shuffled order that is drawn anew at each barrier. Both are orders
// that the hardware might take; a kernel whose result depends on the order lacks a barrier.

#pragma once

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "counters.h"
#include "fiber.h"

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned WARP_LANES = 32;
constexpr unsigned MAX_SHARED_ARRAYS = 32;
constexpr unsigned SHARED_ALIGNMENT = 128;

/// Shared memory that a block may have, and the part of it that may be static.
constexpr unsigned SHARED_LIMIT =
    (ARCH < 750 ? 96 : ARCH < 800 ? 64 : ARCH == 800 || ARCH == 870 ? 163 : ARCH < 900 ? 99 : 227) * 1024;
constexpr unsigned STATIC_SHARED_LIMIT = 48 * 1024;
/// The arena also holds a gap after each array, and one before the first.
constexpr size_t ARENA_PADDING = 4096;
constexpr size_t ARENA_BYTES = SHARED_LIMIT + (MAX_SHARED_ARRAYS + 2) * 2 * SHARED_ALIGNMENT;

constexpr size_t STACKS_BYTES = STACKS_PADDING + MAX_THREADS * STACK_STRIDE;

enum class Status : unsigned char { New, Ready, AtBarrier, InWarp, Exited };

/// What a lane brings to a warp operation. The operation is done by the last lane to arrive, for all of them:
/// `combine` gets the data of the lanes that take part, null for the others.
using Combine = void (*)(void* const (&data)[WARP_LANES]);
struct Request {
    unsigned mask;
    Combine combine;
    void* data;
};

/// A copy from global to shared memory that has not been done yet.
struct Copy {
    void* to;
    const void* from;
    unsigned group;
};

struct Thread {
    uint3 index;
    unsigned rank;
    Fiber* fiber;
    Request request;
    Copy* copies;
    unsigned copy_count, copy_capacity, groups;
#ifdef EMULATOR_COUNTS
    Accesses accesses;
#endif
};

struct Warp {
    unsigned exited, waiting;
};

struct SharedArray {
    const void* site;
    void* data;
};

struct Machine {
    Thread* thread;
    uint3 block_index;
    dim3 block_dim, grid_dim;

    void (*kernel)(void**);
    void** args;
    const char* kernel_name;
    uint64_t order_seed;

    unsigned count, cursor, live, at_barrier;
    unsigned short order[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP_LANES];
    Thread threads[MAX_THREADS];
    Status status[MAX_THREADS];

    Fiber scheduler, fibers[MAX_THREADS];
    Fiber *running, *free;
    unsigned fibers_made;
    unsigned char* stacks;

    unsigned char* arena;
    size_t arena_used, dynamic_bytes, static_bytes;
    SharedArray arrays[MAX_SHARED_ARRAYS];
    unsigned array_count;

    char* error;
    int error_len;
    bool failed;
#ifdef EMULATOR_COUNTS
    Recorder recorder;
#endif
};

static thread_local Machine* machine = nullptr;

/// Gives the machine's memory back when its host thread ends.
struct MachineOwner {
    Machine* owned = nullptr;
    UNCOUNTED ~MachineOwner() {
        if (owned == nullptr) return;
        machine = nullptr;
        for (Thread& thread : owned->threads) free(thread.copies);
#ifdef EMULATOR_COUNTS
        for (Thread& thread : owned->threads) free(thread.accesses.data);
        release(owned->recorder);
#endif
#ifdef EMULATOR_ASAN
        __asan_unpoison_memory_region(owned->arena - ARENA_PADDING, ARENA_PADDING + ARENA_BYTES);
        __asan_unpoison_memory_region(owned->stacks, STACKS_BYTES);
#endif
        munmap(owned->stacks, STACKS_BYTES);
        munmap(owned->arena - ARENA_PADDING, ARENA_PADDING + ARENA_BYTES);
        munmap(owned, sizeof(Machine));
    }
};

/// Sets `machine` for this host thread; false where the system gives no memory.
inline bool ensure_machine() {
    static thread_local MachineOwner owner;
    if (machine != nullptr) return true;
    Machine* made = static_cast<Machine*>(map_memory(sizeof(Machine)));
    if (made == nullptr) return false;
    made->stacks = static_cast<unsigned char*>(map_memory(STACKS_BYTES));
    made->arena = static_cast<unsigned char*>(map_memory(ARENA_PADDING + ARENA_BYTES));
    if (made->stacks == nullptr || made->arena == nullptr) return false;
    made->arena += ARENA_PADDING;
    owner.owned = machine = made;
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Errors. An error ends the launch: the fibers of the block are abandoned where they are, which is sound because
// kernels own nothing that must be destroyed.

inline void write_error(const Thread* thread, const char* format, va_list values) {
    Machine& m = *machine;
    m.failed = true;
    if (m.error == nullptr || m.error_len <= 0) return;
    const size_t size = static_cast<size_t>(m.error_len);
    int used = snprintf(m.error, size, "kernel %s, block (%u, %u, %u)", m.kernel_name, m.block_index.x, m.block_index.y,
                        m.block_index.z);
    if (thread != nullptr && used >= 0 && static_cast<size_t>(used) < size) {
        used += snprintf(m.error + used, size - static_cast<size_t>(used), ", thread (%u, %u, %u)", thread->index.x,
                         thread->index.y, thread->index.z);
    }
    if (used >= 0 && static_cast<size_t>(used) < size) {
        used += snprintf(m.error + used, size - static_cast<size_t>(used), ": ");
    }
    if (used >= 0 && static_cast<size_t>(used) < size) {
        vsnprintf(m.error + used, size - static_cast<size_t>(used), format, values);
    }
}

/// Notes an error of the block as a whole; called by the scheduler.
__attribute__((format(printf, 1, 2))) inline void block_error(const char* format, ...) {
    va_list values;
    va_start(values, format);
    write_error(nullptr, format, values);
    va_end(values);
}

/// Notes an error of the running thread and ends the launch.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline, cold)) inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    write_error(machine->thread, format, values);
    va_end(values);
    switch_fiber(*machine->running, machine->scheduler);
    __builtin_unreachable();
}

// ---------------------------------------------------------------------------------------------------------------------
// Counting.

#ifdef EMULATOR_COUNTS

/// Notes an access of the running thread, if it is one to the device's memory.
UNCOUNTED inline void note_access(const void* pointer, size_t bytes, bool write, const void* site) {
    if (machine == nullptr || machine->recorder.counters == nullptr) return;
    Machine& m = *machine;
    const unsigned char* const at = static_cast<const unsigned char*>(pointer);
    const bool shared = at >= m.arena && at < m.arena + ARENA_BYTES;
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    if (!shared) {
        if (at >= m.stacks && at < m.stacks + STACKS_BYTES) return;
        if (allocation_of(m.recorder, address) == nullptr) return;
    }
    Accesses& to = m.thread->accesses;
    ensure_room(to.data, to.count, to.capacity);
    const unsigned place = static_cast<unsigned>(reinterpret_cast<uint64_t>(site));
    to.data[to.count++] = Access{shared ? static_cast<uint64_t>(at - m.arena) : address, place,
                                 static_cast<unsigned char>(bytes), write, shared};
}

/// Notes an access to a vector, as so many of the width of a word as it takes.
UNCOUNTED inline void note_vector(const void* pointer, size_t bytes, size_t width, bool write, const void* site) {
    for (size_t at = 0; at < bytes; at += width) {
        const char* const place = static_cast<const char*>(site) + at / width;
        note_access(static_cast<const char*>(pointer) + at, width, write, place);
    }
}

/// Counts what the block's threads did since the last barrier.
UNCOUNTED inline void count_block() {
    Machine& m = *machine;
    if (m.recorder.counters == nullptr) return;
    for (unsigned first = 0; first < m.count; first += WARP_LANES) {
        count_warp(m.recorder, m.threads + first, m.count - first < WARP_LANES ? m.count - first : WARP_LANES);
    }
}

UNCOUNTED inline void count_barrier() {
    count_block();
    if (machine->recorder.counters != nullptr) machine->recorder.counters->barriers++;
}

UNCOUNTED inline void count_tensor_macs(unsigned macs) {
    if (machine->recorder.counters != nullptr) machine->recorder.counters->tensor_macs += macs;
}

#else

inline void note_vector(const void*, size_t, size_t, bool, const void*) {}
inline void count_block() {}
inline void count_barrier() {}
inline void count_tensor_macs(unsigned) {}

#endif

/// The place of the call of an uncounted function.
#define PLACE __builtin_return_address(0)

// ---------------------------------------------------------------------------------------------------------------------
// Waiting.

/// Leaves the running thread in the given status and lets others run until it is made ready.
__attribute__((noinline)) inline void wait(Status status) {
    Machine& m = *machine;
    Thread& thread = *m.thread;
    Fiber& fiber = *m.running;
    if (!fiber.has_room(__builtin_frame_address(0))) fail("the kernel needs more stack than the emulator has");
    m.status[thread.rank] = status;
    thread.fiber = &fiber;
    switch_fiber(fiber, m.scheduler);
}

inline void barrier() {
    machine->at_barrier++;
    wait(Status::AtBarrier);
}

/// Does the warp operation that `lane` waits for if all lanes it names that still live wait for the same.
inline bool complete(unsigned warp_index, unsigned lane) {
    Machine& m = *machine;
    Warp& warp = m.warps[warp_index];
    Thread* lanes = m.threads + warp_index * WARP_LANES;
    const Request& request = lanes[lane].request;
    const unsigned needed = request.mask & ~warp.exited;
    if ((needed & ~warp.waiting) != 0) return false;
    void* data[WARP_LANES];
    for (unsigned i = 0; i < WARP_LANES; i++) {
        const Request& other = lanes[i].request;
        const bool named = needed >> i & 1u;
        if (named && (other.mask != request.mask || other.combine != request.combine)) return false;
        data[i] = named ? other.data : nullptr;
    }
    if (request.combine != nullptr) request.combine(data);
    warp.waiting &= ~needed;
    for (unsigned i = 0; i < WARP_LANES; i++) {
        if (needed >> i & 1u) m.status[warp_index * WARP_LANES + i] = Status::Ready;
    }
    return true;
}

/// Takes part in a warp operation and returns when it is done.
inline void warp_operation(unsigned mask, Combine combine, void* data) {
    Machine& m = *machine;
    Thread& thread = *m.thread;
    const unsigned lane = thread.rank % WARP_LANES, warp_index = thread.rank / WARP_LANES;
    if ((mask >> lane & 1u) == 0) fail("the mask 0x%08x of a warp operation does not name the calling lane", mask);
    thread.request = Request{mask, combine, data};
    m.warps[warp_index].waiting |= 1u << lane;
    if (!complete(warp_index, lane)) wait(Status::InWarp);
}

// ---------------------------------------------------------------------------------------------------------------------
// The scheduler.

inline void thread_exited() {
    Machine& m = *machine;
    Thread& thread = *m.thread;
    m.status[thread.rank] = Status::Exited;
    m.live--;
    Warp& warp = m.warps[thread.rank / WARP_LANES];
    warp.exited |= 1u << thread.rank % WARP_LANES;
    // The lanes that waited for this one need not any more.
    for (unsigned i = 0; warp.waiting != 0 && i < WARP_LANES; i++) {
        if (warp.waiting >> i & 1u) complete(thread.rank / WARP_LANES, i);
    }
}

/// Makes the next thread in order the running one if it has not begun yet.
inline bool start_next() {
    Machine& m = *machine;
    if (m.cursor >= m.count) return false;
    const unsigned rank = m.order[m.cursor];
    if (m.status[rank] != Status::New) return false;
    m.cursor++;
    m.status[rank] = Status::Ready;
    m.thread = &m.threads[rank];
    return true;
}

/// What a fiber runs, for as long as the machine exists: threads that begin, one after another.
[[noreturn]] inline void fiber_main() {
    fiber_entered(machine->scheduler);
    for (;;) {
        do {
            machine->kernel(machine->args);
            thread_exited();
        } while (start_next());
        Machine& m = *machine;
        m.running->next = m.free;
        m.free = m.running;
        switch_fiber(*m.running, m.scheduler);
    }
}

inline Fiber* take_fiber() {
    Machine& m = *machine;
    Fiber* fiber = m.free;
    if (fiber != nullptr) {
        m.free = fiber->next;
        return fiber;
    }
    // No block has more than MAX_THREADS waiting threads.
    fiber = &m.fibers[m.fibers_made];
    fiber->stack = m.stacks + STACKS_PADDING + m.fibers_made * STACK_STRIDE;
    fiber->stack_bytes = STACK_BYTES;
    fiber->prepare(fiber_main);
    m.fibers_made++;
    return fiber;
}

/// A generator whose every output is a function of its state (splitmix64).
inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

inline void shuffle_order(uint64_t seed) {
    Machine& m = *machine;
    for (unsigned i = m.count - 1; i > 0; i--) {
        seed = mix(seed);
        const unsigned j = static_cast<unsigned>((seed >> 32) * (i + 1) >> 32);
        const unsigned short swapped = m.order[i];
        m.order[i] = m.order[j];
        m.order[j] = swapped;
    }
}

__attribute__((cold, noinline)) inline void deadlock() {
    Machine& m = *machine;
    unsigned in_warp = 0;
    const Thread *at_barrier = nullptr, *in_warp_first = nullptr;
    for (unsigned i = 0; i < m.count; i++) {
        const Thread& thread = m.threads[i];
        if (m.status[i] == Status::AtBarrier && at_barrier == nullptr) at_barrier = &thread;
        if (m.status[i] == Status::InWarp) {
            if (in_warp == 0) in_warp_first = &thread;
            in_warp++;
        }
    }
    char barrier_text[64] = "", warp_text[96] = "";
    if (at_barrier != nullptr) {
        snprintf(barrier_text, sizeof barrier_text, " (the first is (%u, %u, %u))", at_barrier->index.x,
                 at_barrier->index.y, at_barrier->index.z);
    }
    if (in_warp_first != nullptr) {
        snprintf(warp_text, sizeof warp_text, " (the first is (%u, %u, %u) with mask 0x%08x)", in_warp_first->index.x,
                 in_warp_first->index.y, in_warp_first->index.z, in_warp_first->request.mask);
    }
    block_error("deadlock: %u threads wait at a barrier%s, %u in warp operations%s, %u have ended", m.at_barrier,
                barrier_text, in_warp, warp_text, m.count - m.live);
}

/// Runs each thread that can run once, in order. Returns whether any did.
inline bool run_pass() {
    Machine& m = *machine;
    bool any = false;
    for (m.cursor = 0; m.cursor < m.count && !m.failed;) {
        const unsigned rank = m.order[m.cursor++];
        Fiber* fiber = nullptr;
        if (m.status[rank] == Status::New) {
            m.status[rank] = Status::Ready;
            fiber = take_fiber();
        } else if (m.status[rank] == Status::Ready) {
            fiber = m.threads[rank].fiber;
        } else {
            continue;
        }
        any = true;
        m.thread = &m.threads[rank];
        m.running = fiber;
        switch_fiber(m.scheduler, *fiber);
        // A fiber that has come free has run a thread to its end.
        if (m.free == fiber && !fiber->intact()) block_error("a thread needs more stack than the emulator has");
    }
    return any;
}

/// Begins the block's shared memory: NaN in the dynamic part, and no static arrays yet.
inline void reset_shared() {
    Machine& m = *machine;
    const size_t gap_end = (m.dynamic_bytes + 2 * SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
#ifdef EMULATOR_ASAN
    __asan_poison_memory_region(m.arena - ARENA_PADDING, ARENA_PADDING + ARENA_BYTES);
    __asan_unpoison_memory_region(m.arena, m.dynamic_bytes);
#endif
    __builtin_memset(m.arena, 0xff, m.dynamic_bytes);
    m.arena_used = gap_end;
    m.static_bytes = 0;
    m.array_count = 0;
}

/// Runs the block `machine->block_index`; false after an error.
inline bool run_block(uint64_t linear_block) {
    Machine& m = *machine;
    reset_shared();
    for (unsigned i = 0; i < m.count; i++) {
        m.status[i] = Status::New;
        m.threads[i].copy_count = m.threads[i].groups = 0;
    }
    for (unsigned i = 0; i * WARP_LANES < m.count; i++) {
        const unsigned left = m.count - i * WARP_LANES;
        m.warps[i] = Warp{left >= WARP_LANES ? 0u : ~0u << left, 0u};
    }
    m.live = m.count;
    m.at_barrier = 0;
    uint64_t seed = mix(m.order_seed ^ mix(linear_block));
    for (;;) {
        if (m.order_seed != 0) shuffle_order(seed = mix(seed));
        while (run_pass()) {
        }
        if (m.failed) break;
        if (m.live == 0) {
            count_block();
            return true;
        }
        if (m.at_barrier != m.live) {
            deadlock();
            break;
        }
        m.at_barrier = 0;
        count_barrier();
        for (unsigned i = 0; i < m.count; i++) {
            if (m.status[i] == Status::AtBarrier) m.status[i] = Status::Ready;
        }
    }
    // The abandoned fibers begin anew when they are next needed.
    m.free = nullptr;
    m.fibers_made = 0;
    return false;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shared memory and asynchronous copies.

/// The block's array that the declaration at `site` stands for; all threads get the same.
inline void* shared_array(const void* site, size_t bytes) {
    Machine& m = *machine;
    for (unsigned i = 0; i < m.array_count; i++) {
        if (m.arrays[i].site == site) return m.arrays[i].data;
    }
    m.static_bytes += (bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    if (m.static_bytes > STATIC_SHARED_LIMIT) {
        fail("more than %u bytes of static shared memory", STATIC_SHARED_LIMIT);
    }
    if (m.static_bytes + m.dynamic_bytes > SHARED_LIMIT) {
        fail("%zu bytes of static and %zu of dynamic shared memory; the architecture has %u", m.static_bytes,
             m.dynamic_bytes, SHARED_LIMIT);
    }
    if (m.array_count == MAX_SHARED_ARRAYS) fail("more than %u shared arrays", MAX_SHARED_ARRAYS);
    unsigned char* data = m.arena + m.arena_used;
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(data, bytes);
#endif
    __builtin_memset(data, 0xff, bytes);
    m.arena_used += (bytes + 2 * SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    m.arrays[m.array_count++] = SharedArray{site, data};
    return data;
}

inline void check_alignment(const void* pointer, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("%p is not aligned to %zu bytes", pointer, bytes);
}

/// Reads a vector, which the hardware does in words of WIDTH bytes.
template <int BYTES, int WIDTH>
COUNTED_CALL inline void load_bytes(void* to, const void* from) {
    check_alignment(from, WIDTH);
    note_vector(from, BYTES, WIDTH, false, PLACE);
    __builtin_memcpy(to, from, BYTES);
}

/// Writes one.
template <int BYTES, int WIDTH>
COUNTED_CALL inline void store_bytes(void* to, const void* from) {
    check_alignment(to, WIDTH);
    note_vector(to, BYTES, WIDTH, true, PLACE);
    __builtin_memcpy(to, from, BYTES);
}

/// Notes a copy of 16 bytes (of zeros where not `valid`) and destroys what the destination holds, since the hardware
/// may write there at any time from now on.
COUNTED_CALL inline void copy_async_16(void* shared, const void* global, bool valid) {
    Thread& thread = *machine->thread;
    check_alignment(shared, 16);
    if (valid) {
        check_alignment(global, 16);
        // Read now so that the address sanitizer names this place rather than the wait.
        static_cast<void>(*static_cast<const volatile uint64_t*>(global));
        static_cast<void>(static_cast<const volatile uint64_t*>(global)[1]);
        note_vector(global, 16, 16, false, PLACE);
    }
    note_vector(shared, 16, 16, true, PLACE);
    if (thread.copy_count == thread.copy_capacity) {
        thread.copy_capacity = thread.copy_capacity == 0 ? 32 : 2 * thread.copy_capacity;
        thread.copies = static_cast<Copy*>(realloc(thread.copies, thread.copy_capacity * sizeof(Copy)));
        if (thread.copies == nullptr) fail("out of memory");
    }
    __builtin_memset(shared, 0xff, 16);
    thread.copies[thread.copy_count++] = Copy{shared, valid ? global : nullptr, thread.groups};
}

inline void copy_async_commit() { machine->thread->groups++; }

/// Does the copies of all groups but the youngest `pending`.
UNCOUNTED inline void copy_async_wait(unsigned pending) {
    Thread& thread = *machine->thread;
    unsigned kept = 0;
    for (unsigned i = 0; i < thread.copy_count; i++) {
        const Copy copy = thread.copies[i];
        if (copy.group + pending >= thread.groups) {
            thread.copies[kept++] = copy;
        } else if (copy.from != nullptr) {
            __builtin_memcpy(copy.to, copy.from, 16);
        } else {
            __builtin_memset(copy.to, 0, 16);
        }
    }
    thread.copy_count = kept;
}

}  // namespace emulator

#ifdef EMULATOR_COUNTS

// What the compiler calls. Where it knows less of the alignment it calls another name.
extern "C" {
#define EMULATOR_HOOK(name, bytes, write)                                                              \
    __attribute__((no_sanitize("thread"), noinline)) void __tsan_##name(void* address) {              \
        emulator::note_access(address, bytes, write, PLACE);                                           \
    }
#define EMULATOR_HOOKS(bytes)                                                                          \
    EMULATOR_HOOK(read##bytes, bytes, false)                                                           \
    EMULATOR_HOOK(write##bytes, bytes, true)                                                           \
    EMULATOR_HOOK(unaligned_read##bytes, bytes, false)                                                 \
    EMULATOR_HOOK(unaligned_write##bytes, bytes, true)
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void*, size_t) {}
void __tsan_write_range(void*, size_t) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() {}
#undef EMULATOR_HOOKS
#undef EMULATOR_HOOK
}

#endif
