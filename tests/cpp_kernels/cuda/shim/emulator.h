#pragma once

// CUDA on the host, for tests: just what upstream's kernels and ours use. A thread block runs as fibers, one for each of its threads;
// one fiber runs until it waits at a barrier or for the other lanes of its warp. Not fast, and not concurrent, so it finds no races;
// it finds wrong indices (under a sanitizer), wrong values and missing barriers' values.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int    warp       = 32;
constexpr size_t stack_size = 128*1024;

struct fiber {
    ucontext_t        context;
    uint3             thread;
    bool              done;
    uint64_t          lane_value[4]; // what this lane shows to the others
    int               lane_steps;    // exchanges it has taken part in
    int               barriers;      // barriers it has reached
    void *            fake_stack;
};

// stack of the fiber of a thread, for one block after the other
inline char * stack_of(size_t thread) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= thread) {
        stacks.emplace_back(new char[stack_size]);
    }
    return stacks[thread].get();
}

struct block {
    dim3                    grid, dim;
    uint3                   index;
    std::vector<fiber>      fibers;
    size_t                  current;
    ucontext_t              scheduler;
    std::function<void()>   kernel;
    std::vector<char>       shared;   // of the size that the launch names
    const void *            stack_bottom;
    size_t                  stack_bytes;
};

extern block * running;

inline fiber & self() { return running->fibers[running->current]; }

inline void switch_from(fiber & from, bool last) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, running->stack_bottom, running->stack_bytes);
#endif
    if (last) {
        setcontext(&running->scheduler);
    }
    swapcontext(&from.context, &running->scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

inline void wait() { switch_from(self(), false); }

inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->stack_bottom, &running->stack_bytes);
#endif
    running->kernel();
    self().done = true;
    switch_from(self(), true);
}

// all threads of the block that have not returned
inline void barrier() {
    fiber & f = self();
    const int mine = ++f.barriers;
    for (;;) {
        bool all = true;
        for (const fiber & other : running->fibers) {
            all = all && (other.done || other.barriers >= mine);
        }
        if (all) {
            return;
        }
        wait();
    }
}

// the lanes of this thread's warp
inline fiber * warp_fibers(int & lane) {
    const size_t first = running->current / warp * warp;
    lane = (int) (running->current - first);
    return &running->fibers[first];
}

// Show a value to the other lanes, wait for theirs, read them, and wait until all have read. Lanes that have returned show their last.
template <typename T, typename read_t>
inline auto exchange(const T & value, read_t read) {
    static_assert(sizeof(T) <= sizeof(fiber::lane_value), "too large");
    int lane;
    fiber * lanes = warp_fibers(lane);
    memcpy(lanes[lane].lane_value, &value, sizeof(T));
    const auto everyone = [&](int steps) {
        for (;;) {
            bool all = true;
            for (int i = 0; i < warp; ++i) {
                all = all && (lanes[i].done || lanes[i].lane_steps >= steps);
            }
            if (all) {
                return;
            }
            wait();
        }
    };
    const int shown = ++lanes[lane].lane_steps;
    everyone(shown);
    const auto result = read(lane, [&](int i) {
        T other;
        memcpy(&other, lanes[i].lane_value, sizeof(T));
        return other;
    });
    ++lanes[lane].lane_steps;
    everyone(shown + 1);
    return result;
}

inline void run_block(block & b) {
    const size_t n = (size_t) b.dim.x*b.dim.y*b.dim.z;
    if (n % warp != 0) {
        fprintf(stderr, "the emulator wants whole warps\n");
        abort();
    }
    running = &b;
    b.fibers.resize(n);
    for (size_t i = 0; i < n; ++i) {
        fiber & f = b.fibers[i];
        f.thread     = { unsigned(i % b.dim.x), unsigned(i / b.dim.x % b.dim.y), unsigned(i / b.dim.x / b.dim.y) };
        f.done       = false;
        f.lane_steps = 0;
        f.barriers   = 0;
        f.fake_stack = nullptr;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp   = stack_of(i);
        f.context.uc_stack.ss_size = stack_size;
        f.context.uc_link          = nullptr;
        makecontext(&f.context, (void (*)()) entry, 0);
    }
    for (size_t left = n; left > 0;) {
        left = 0;
        for (b.current = 0; b.current < n; ++b.current) {
            fiber & f = b.fibers[b.current];
            if (!f.done) {
#if defined(__SANITIZE_ADDRESS__)
                void * fake_stack = nullptr;
                __sanitizer_start_switch_fiber(&fake_stack, stack_of(b.current), stack_size);
#endif
                swapcontext(&b.scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
                __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
                left += !f.done;
            }
        }
    }
}

// the launch kernel<<<grid, dim, shared_bytes, stream>>>(arguments), with EMULATED(kernel) for the kernel
template <typename kernel_t>
auto launch(kernel_t kernel, dim3 grid, dim3 dim, size_t shared_bytes) {
    return [=](auto... arguments) {
        block b;
        b.grid   = grid;
        b.dim    = dim;
        b.kernel = [&] { kernel(arguments...); };
        for (unsigned z = 0; z < grid.z; ++z) {
            for (unsigned y = 0; y < grid.y; ++y) {
                for (unsigned x = 0; x < grid.x; ++x) {
                    b.index = { x, y, z };
                    b.shared.assign(shared_bytes, (char) 0x5A);
                    run_block(b);
                }
            }
        }
        running = nullptr;
    };
}

inline int8_t byte_of(int word, int i) { return (int8_t) (word >> 8*i); }

// prmt.b32: selectors have three bits for the byte and one that fills with its sign
inline unsigned prmt(unsigned a, unsigned b, unsigned selectors) {
    const uint64_t bytes = a | (uint64_t) b << 32;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned selector = selectors >> 4*i;
        const unsigned byte     = (unsigned) (bytes >> 8*(selector & 7)) & 0xFF;
        result |= (selector & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8*i;
    }
    return result;
}

// lop3.b32: bit 4*a + 2*b + c of the table, for each bit of a, b and c
template <unsigned table>
inline unsigned lop3(unsigned a, unsigned b, unsigned c) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) {
        result |= (table >> (4*(a >> i & 1) + 2*(b >> i & 1) + (c >> i & 1)) & 1) << i;
    }
    return result;
}

// mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32: lane 4*i + k/4 has row i of A and column i of B, four numbers from k on, and lane
// 4*i + j/2 has row i of the result, columns j and j + 1
inline void mma_m8n8k16(int * d, int a, int b) {
    struct fragments { int a, b; };
    exchange(fragments{ a, b }, [&](int lane, auto of) {
        for (int l = 0; l < 2; ++l) {
            for (int k = 0; k < 16; ++k) {
                const int row = of(lane/4*4             + k/4).a;
                const int col = of((2*(lane%4) + l)*4 + k/4).b;
                d[l] += byte_of(row, k%4) * byte_of(col, k%4);
            }
        }
        return 0;
    });
}

// ldmatrix.sync.aligned.m8n8.x2/x4.b16: lanes 8*m ... 8*m + 7 name the rows of matrix m
template <int matrices>
inline void ldmatrix(int * x, const void * row) {
    exchange(row, [&](int lane, auto of) {
        for (int m = 0; m < matrices; ++m) {
            memcpy(&x[m], (const char *) of(8*m + lane/4) + 4*(lane%4), 4);
        }
        return 0;
    });
}

// what no test has reached yet
[[noreturn]] inline void unknown() {
    fprintf(stderr, "an instruction that the emulator does not have\n");
    abort();
}

} // namespace emulator

#define EMULATED(...) [&](auto... arguments) { __VA_ARGS__(arguments...); }
