// Rates of dot products on one thread with all data in cache, and what the machine can do at most. Prints one line
//     name weights-per-second
// for each kernel, and `read` (bytes per second, all threads) and `peak` (8-bit products per second, one thread). All kernels
// take turns, many times; the best turn of each counts, so that other work on the machine matters little to their ratios.

#include "ggml.h"
#include "ggml-cpu.h"
#include "tesseraq/bcq/repack.h"
#include "tesseraq/common/get-cols.h"
#include "tesseraq/ptq/repack.h"
#include "tesseraq/tsq/repack.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

typedef void (*vec_dot_t)(int, float *, size_t, const void *, size_t, const void *, size_t, int);

extern "C" void ggml_vec_dot_q2_0_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

static const int N     = 4096;
static const int TURNS = 300;

static volatile float sink;

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct kernel {
    std::string           name;
    double                work; // weights of a call
    std::function<void()> call;
    double                best;
};

static std::vector<float> numbers(size_t n) {
    static std::mt19937 rng(0);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// memory that begins where a cache line does, as that of upstream's test-quantize-perf
static std::shared_ptr<char> aligned(size_t size) {
    char * p = (char *) ::operator new(size, std::align_val_t(64));
    return std::shared_ptr<char>(p, [](char * q) { ::operator delete(q, std::align_val_t(64)); });
}

static void add_vec_dot(std::vector<kernel> & kernels, const std::string & name, ggml_type type, vec_dot_t vec_dot) {
    const ggml_type vec_dot_type = ggml_get_type_traits_cpu(type)->vec_dot_type;

    const std::shared_ptr<char> x = aligned(ggml_row_size(type, N)), y = aligned(ggml_row_size(vec_dot_type, N));
    const std::vector<float> importance(N, 1.0f); // some types cannot be without
    ggml_quantize_chunk(type, numbers(N).data(), x.get(), 0, 1, N, importance.data());
    ggml_get_type_traits_cpu(vec_dot_type)->from_float(numbers(N).data(), y.get(), N);

    kernels.push_back({ name, N, [=] {
        float s;
        vec_dot(N, &s, 0, x.get(), 0, y.get(), 0, 1);
        sink = s;
    }, 1e9 });
}

#if TESSERAQ_NROWS > 0
typedef void (*repack_t)(int nrows, int64_t nb, const void * x, void * y);
typedef void (*quantize_panel_t)(const float * x, void * y, int64_t nb, int w, int c);
typedef void (*gemm_t)(int n, float * const * s, const void * vx, const void * vy, int w);

static void add_repacked(std::vector<kernel> & kernels, ggml_type type, repack_t repack, quantize_panel_t quantize_panel, gemm_t gemm) {
    const int nb = N/ggml_blck_size(type);

    for (int w : { 1, 2, 4, TESSERAQ_NCOLS }) {
        std::vector<char> rows(ggml_row_size(type, N)*TESSERAQ_NROWS);
        std::vector<char> panel(ggml_row_size(ggml_get_type_traits_cpu(type)->vec_dot_type, N)*w);
        ggml_quantize_chunk(type, numbers((size_t) N*TESSERAQ_NROWS).data(), rows.data(), 0, TESSERAQ_NROWS, N, nullptr);
        const std::shared_ptr<char> x = aligned(rows.size()); // as the buffer type aligns tensors
        repack(TESSERAQ_NROWS, nb, rows.data(), x.get());
        for (int c = 0; c < w; c++) {
            quantize_panel(numbers(N).data(), panel.data(), nb, w, c);
        }
        std::vector<float> out(w*TESSERAQ_NROWS);

        kernels.push_back({ std::string(ggml_type_name(type)) + "_x" + std::to_string(w), (double) N*TESSERAQ_NROWS*w, [=]() mutable {
            float * s[TESSERAQ_NCOLS];
            for (int c = 0; c < w; c++) {
                s[c] = out.data() + c*TESSERAQ_NROWS;
            }
            gemm(N, s, x.get(), panel.data(), w);
            sink = out[0];
        }, 1e9 });
    }
}

#define ADD_REPACKED(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, ...)                            \
    if (GGML_TYPE_##TYPE == GGML_TYPE_##LAYOUT) {                                                               \
        add_repacked(kernels, GGML_TYPE_##TYPE, layout##_repack, quantize_panel_##acts, ggml_gemm_##layout);    \
    }
#endif

// a row of activations in the order of a matrix's columns
static void add_gather(std::vector<kernel> & kernels) {
    const std::vector<float> x = numbers(N);
    std::vector<int32_t> order(N);
    for (int i = 0; i < N; i++) {
        order[i] = (int32_t) ((uint32_t) i*2654435761u % N); // an odd number times all of 2^12
    }
    std::vector<float> y(N);

    kernels.push_back({ "gather", N, [=]() mutable {
        ggml_vec_get_cols(N, y.data(), x.data(), order.data());
        sink = y[0];
    }, 1e9 });
}

// encoding a row of activations into what meets the weights of a type
static void add_encoder(std::vector<kernel> & kernels, const std::string & name, ggml_type type) {
    const ggml_from_float_t from_float = ggml_get_type_traits_cpu(ggml_get_type_traits_cpu(type)->vec_dot_type)->from_float;

    const std::vector<float> x = numbers(N);
    const std::shared_ptr<char> y = aligned(ggml_row_size(ggml_get_type_traits_cpu(type)->vec_dot_type, N));
    kernels.push_back({ name, N, [=] {
        from_float(x.data(), y.get(), N);
        sink = y.get()[0];
    }, 1e9 });
}

// bytes per second that threads read together
static double read_rate(int n_threads) {
    const size_t n = (size_t) 64 << 20; // 512 MiB
    // in large pages, as repacked weights are
    uint64_t * data = (uint64_t *) aligned_alloc(2 << 20, n*sizeof(uint64_t));
#if defined(__linux__)
    madvise(data, n*sizeof(uint64_t), MADV_HUGEPAGE);
#endif
    std::fill(data, data + n, 1);
    double best = 1e9;
    for (int turn = 0; turn < 10; turn++) {
        std::vector<std::thread> threads;
        const double start = now();
        for (int t = 0; t < n_threads; t++) {
            threads.emplace_back([&, t] {
                uint64_t sum[64] = {};
                for (size_t i = n/64*t/n_threads*64; i + 64 <= n/64*(t + 1)/n_threads*64; i += 64) {
                    for (int j = 0; j < 64; j++) {
                        sum[j] += data[i + j];
                    }
                }
                sink = (float) *std::max_element(sum, sum + 64);
            });
        }
        for (std::thread & thread : threads) {
            thread.join();
        }
        best = std::min(best, now() - start);
    }
    free(data);
    return n*sizeof(uint64_t)/best;
}

// 8-bit products per second: 12 sums that do not wait for each other
static double peak_rate() {
#if defined(__GNUC__) && TESSERAQ_NROWS == 16
#define STEP(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n"
    const double products = 64;
#elif defined(__GNUC__) && TESSERAQ_NROWS == 8 && defined(__AVXVNNI__)
#define STEP(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
    const double products = 32;
#elif defined(__GNUC__) && TESSERAQ_NROWS == 8
#define STEP(i) "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\nvpaddw %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
    const double products = 32;
#endif
#if defined(STEP)
    double best = 1e9;
    for (int turn = 0; turn < TURNS; turn++) {
        const double start = now();
        for (int i = 0; i < 2000; i++) {
            __asm__ volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) : :
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm13");
        }
        best = std::min(best, now() - start);
    }
    return 2000*12*products/best;
#else
    return 0.0;
#endif
}

int main(int argc, char ** argv) {
    ggml_cpu_init();

    std::vector<kernel> kernels;
    for (ggml_type type : { GGML_TYPE_TQ2_0, GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_0, GGML_TYPE_Q2_0,
                            GGML_TYPE_IQ1_S, GGML_TYPE_IQ1_M,
                            TESSERAQ_TYPES(TESSERAQ_ITEM) }) {
        if (type == GGML_TYPE_BCQ4_A4) {
            continue; // other activations, and BCQ4's kernels
        }
        add_vec_dot(kernels, ggml_type_name(type), type, ggml_get_type_traits_cpu(type)->vec_dot);
    }
    add_vec_dot(kernels, "q2_0_stock", GGML_TYPE_Q2_0, ggml_vec_dot_q2_0_q8_0_generic);
#if TESSERAQ_NROWS > 0
    TESSERAQ_TSQ_TYPES(ADD_REPACKED)
#if BCQ4_NROWS > 0
    TESSERAQ_BCQ_TYPES(ADD_REPACKED)
#endif
    TESSERAQ_PTQ_TYPES(ADD_REPACKED)
#endif
    add_gather(kernels);
    add_encoder(kernels, "activations_8_bits", GGML_TYPE_BCQ4);
    add_encoder(kernels, "activations_codebooks", GGML_TYPE_BCQ4_A4);
    for (int turn = 0; turn < TURNS; turn++) {
        for (kernel & k : kernels) {
            const int calls = turn == 0 ? 1 : std::max(1, (int) (40e-6/k.best));
            const double start = now();
            for (int i = 0; i < calls; i++) {
                k.call();
            }
            k.best = turn == 0 ? 1e-5 : std::min(turn == 1 ? 1e9 : k.best, (now() - start)/calls);
        }
    }
    for (const kernel & k : kernels) {
        printf("%s %.6g\n", k.name.c_str(), k.work/k.best);
    }
    printf("read %.6g\n", read_rate(argc > 1 ? atoi(argv[1]) : 1));
    printf("peak %.6g\n", peak_rate());
    return 0;
}
