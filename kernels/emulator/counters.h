// Counters of the counting flavour (EMULATOR_COUNTS): what a launch asks of a GPU's memory, counted on the host.
//
// The compiler calls a hook at every load and store (`-fsanitize=thread`, whose runtime is not linked: the hooks are
// here). A hook is told the address and, by its return address, the place in the program, exact after inlining. Where a
// whole vector moves, or the emulator does what one instruction does, it calls `count_load` or `count_store` itself, and
// functions that do so are UNCOUNTED. Addresses in the device's allocations are global, those in the block's arena
// shared; all others are registers in truth, and dropped.
//
// Threads run one after another, so that a request of a warp is put together afterwards: the k-th access at a place of
// each of its lanes since the last barrier. Lanes that skip a turn of a loop are joined with later ones of the others,
// which is what the hardware does where they have waited for each other, and optimistic where they have not.
//
// Rules: a request moves each 32-byte sector that it touches once, and needs at least as many as hold its bytes. Shared
// memory has 32 banks of 4 bytes. A request of up to 4 bytes a lane goes through at once, one of 8 bytes in halves of 16
// lanes, one of 16 bytes in quarters of 8; each part takes as many wavefronts as its busiest bank has distinct words,
// and at least as many as its distinct words fill.
//
// What is not counted: instructions, since the host's are another program's, and with them fused multiply-adds outside
// of tensor cores; caches.

#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/// Memory of the device, and a bit for each of its bytes that was read and that was written; null where nobody asks.
struct EmulatorAllocation {
    unsigned long long begin, end;
    unsigned long long *read, *written;
};

/// Requests of warps to global memory.
struct EmulatorGlobal {
    unsigned long long requests, lanes, sectors, ideal_sectors, lines;
};

/// Requests of warps to shared memory.
struct EmulatorShared {
    unsigned long long requests, lanes, wavefronts, ideal_wavefronts;
};

/// What some blocks of a launch did.
struct EmulatorCounters {
    EmulatorGlobal loads, stores;
    EmulatorShared shared_loads, shared_stores;
    unsigned long long barriers, tensor_macs;
};

#ifdef EMULATOR_COUNTS

#define UNCOUNTED __attribute__((no_sanitize("thread")))
/// An uncounted function whose return address tells the place of an access.
#define COUNTED_CALL __attribute__((no_sanitize("thread"), noinline))

namespace emulator {

constexpr unsigned LANES = 32, BANKS = 32, SECTOR = 32, LINE = 128;
constexpr unsigned SITES = 4096;

/// An access of a lane.
struct Access {
    uint64_t address;
    unsigned site;
    unsigned char bytes;
    bool write, shared;
};

/// The accesses of a lane since the last barrier.
struct Accesses {
    Access* data;
    unsigned count, capacity;
};

/// A warp's request: the address that each lane of the mask gives.
struct Joined {
    uint64_t addresses[LANES];
    unsigned mask;
    unsigned char bytes;
    bool write, shared;
};

/// A place in the program: its requests, in order, and how many of them the present lane has made.
struct Site {
    unsigned site, round, made, count, capacity;
    unsigned* requests;
};

struct Recorder {
    EmulatorCounters* counters;
    const EmulatorAllocation* allocations;
    uint64_t allocation_count, latest;
    Joined* joined;
    unsigned joined_count, joined_capacity, round;
    Site sites[SITES];
    unsigned used[SITES];
    unsigned used_count;
};

/// Room for one more in an array that grows; aborts where the host has none.
template <typename T>
UNCOUNTED inline void ensure_room(T*& data, unsigned count, unsigned& capacity) {
    if (count < capacity) return;
    capacity = capacity == 0 ? 64 : 2 * capacity;
    data = static_cast<T*>(realloc(data, capacity * sizeof(T)));
    if (data == nullptr) abort();
}

/// The allocation that holds an address; null where none does.
UNCOUNTED inline const EmulatorAllocation* allocation_of(Recorder& r, uint64_t address) {
    const auto holds = [&](uint64_t i) __attribute__((no_sanitize("thread"))) {
        return r.allocations[i].begin <= address && address < r.allocations[i].end;
    };
    if (r.latest < r.allocation_count && holds(r.latest)) return r.allocations + r.latest;
    uint64_t low = 0, high = r.allocation_count;
    while (low < high) {
        const uint64_t middle = (low + high) / 2;
        if (r.allocations[middle].end <= address) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low == r.allocation_count || !holds(low)) return nullptr;
    r.latest = low;
    return r.allocations + low;
}

/// Sets the bits of the bytes from `begin` up to `end`, which lie in one allocation.
UNCOUNTED inline void mark(Recorder& r, uint64_t begin, uint64_t end, bool write) {
    const EmulatorAllocation* const of = allocation_of(r, begin);
    unsigned long long* const bits = of == nullptr ? nullptr : write ? of->written : of->read;
    if (bits == nullptr) return;
    begin -= of->begin;
    end -= of->begin;
    while (begin < end) {
        const uint64_t until = begin / 64 * 64 + 64 < end ? begin / 64 * 64 + 64 : end;
        const unsigned long long ones = until - begin == 64 ? ~0ull : ((1ull << (until - begin)) - 1) << begin % 64;
        unsigned long long* const word = bits + begin / 64;
        if ((__atomic_load_n(word, __ATOMIC_RELAXED) & ones) != ones) __atomic_fetch_or(word, ones, __ATOMIC_RELAXED);
        begin = until;
    }
}

UNCOUNTED inline void count_global(Recorder& r, const Joined& request) {
    uint64_t sorted[LANES];
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < LANES; lane++) {
        if ((request.mask >> lane & 1u) == 0) continue;
        unsigned at = lanes++;
        for (; at > 0 && sorted[at - 1] > request.addresses[lane]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = request.addresses[lane];
    }
    // An access is aligned to its size, so that it lies in one sector.
    uint64_t bytes = 0, sectors = 0, lines = 0, begin = sorted[0], end = begin, sector = ~0ull, line = ~0ull;
    for (unsigned i = 0; i < lanes; i++) {
        if (sorted[i] / SECTOR != sector) sectors++;
        if (sorted[i] / LINE != line) lines++;
        sector = sorted[i] / SECTOR;
        line = sorted[i] / LINE;
        if (sorted[i] > end) {
            mark(r, begin, end, request.write);
            bytes += end - begin;
            begin = sorted[i];
        }
        if (sorted[i] + request.bytes > end) end = sorted[i] + request.bytes;
    }
    mark(r, begin, end, request.write);
    bytes += end - begin;
    EmulatorGlobal& to = request.write ? r.counters->stores : r.counters->loads;
    to.requests++;
    to.lanes += lanes;
    to.sectors += sectors;
    to.lines += lines;
    to.ideal_sectors += (bytes + SECTOR - 1) / SECTOR;
}

UNCOUNTED inline void count_shared(Recorder& r, const Joined& request) {
    EmulatorShared& to = request.write ? r.counters->shared_stores : r.counters->shared_loads;
    to.requests++;
    to.lanes += static_cast<unsigned>(__builtin_popcount(request.mask));
    const unsigned parts = request.bytes <= 4 ? 1 : request.bytes / 4, width = LANES / parts;
    for (unsigned part = 0; part < parts; part++) {
        uint64_t words[BANKS][LANES];
        unsigned distinct[BANKS] = {}, all = 0, busiest = 0;
        for (unsigned lane = part * width; lane < (part + 1) * width; lane++) {
            if ((request.mask >> lane & 1u) == 0) continue;
            for (unsigned byte = 0; byte < request.bytes; byte += 4) {
                const uint64_t word = (request.addresses[lane] + byte) / 4;
                const unsigned bank = word % BANKS;
                unsigned at = 0;
                while (at < distinct[bank] && words[bank][at] != word) at++;
                if (at < distinct[bank]) continue;
                words[bank][distinct[bank]++] = word;
                all++;
                if (distinct[bank] > busiest) busiest = distinct[bank];
            }
        }
        to.wavefronts += busiest;
        to.ideal_wavefronts += (all + BANKS - 1) / BANKS;
    }
}

/// The place's entry, which is made anew in every round of joining.
UNCOUNTED inline Site& site_of(Recorder& r, unsigned site) {
    for (unsigned at = (site * 2654435761u) >> 20;; at = (at + 1) % SITES) {
        Site& entry = r.sites[at];
        if (entry.round == r.round && entry.site == site) return entry;
        if (entry.round == r.round) continue;
        entry.site = site;
        entry.round = r.round;
        entry.made = entry.count = 0;
        if (r.used_count == SITES / 2) abort();
        r.used[r.used_count++] = at;
        return entry;
    }
}

/// Joins the accesses of a warp's lanes to requests, counts these, and forgets both.
template <class Thread>
UNCOUNTED inline void count_warp(Recorder& r, Thread* threads, unsigned lanes) {
    r.round++;
    r.used_count = r.joined_count = 0;
    for (unsigned lane = 0; lane < lanes; lane++) {
        Accesses& accesses = threads[lane].accesses;
        for (unsigned i = 0; i < r.used_count; i++) r.sites[r.used[i]].made = 0;
        for (unsigned i = 0; i < accesses.count; i++) {
            const Access& access = accesses.data[i];
            Site& site = site_of(r, access.site);
            if (site.made == site.count) {
                ensure_room(site.requests, site.count, site.capacity);
                ensure_room(r.joined, r.joined_count, r.joined_capacity);
                site.requests[site.count++] = r.joined_count;
                Joined& made = r.joined[r.joined_count++];
                made.mask = 0;
                made.bytes = access.bytes;
                made.write = access.write;
                made.shared = access.shared;
            }
            Joined& request = r.joined[site.requests[site.made++]];
            request.addresses[lane] = access.address;
            request.mask |= 1u << lane;
        }
        accesses.count = 0;
    }
    for (unsigned i = 0; i < r.joined_count; i++) {
        if (r.joined[i].shared) {
            count_shared(r, r.joined[i]);
        } else {
            count_global(r, r.joined[i]);
        }
    }
}

/// Gives back what the recorder has allocated.
UNCOUNTED inline void release(Recorder& r) {
    free(r.joined);
    for (Site& site : r.sites) free(site.requests);
}

}  // namespace emulator

#else

#define UNCOUNTED
#define COUNTED_CALL

#endif
