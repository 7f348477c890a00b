// Matrix multiplications with TSQ, BCQ and PTQ1_61 weights in the buffer type that repacks them, compared with the dequantised weights.
// Prints one line per operator; exits with 1 if one of them is wrong.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#if defined(ALONE)
// compiled with what products need of the backend: there is no other buffer type that repacks
ggml_backend_buffer_type_t ggml_backend_cpu_repack_buffer_type(void);

ggml_backend_buffer_type_t ggml_backend_cpu_repack_buffer_type(void) {
    return nullptr;
}
#endif

static std::mt19937 rng(0);

static ggml_backend_buffer_type_t find_buffer_type() {
    ggml_backend_dev_t dev = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    auto get_extra_bufts = (ggml_backend_dev_get_extra_bufts_t)
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * buft = get_extra_bufts ? get_extra_bufts(dev) : nullptr; buft && *buft; buft++) {
        if (strcmp(ggml_backend_buft_name(*buft), "CPU_TESSERAQ") == 0) {
            return *buft;
        }
    }
    return nullptr;
}

// Whether the processor that the backend was compiled for has kernels of repacked rows: on x86 those of BCQ4 need a table of 128 bytes.
static bool has_kernels(ggml_type type) {
    if (ggml_cpu_has_neon()) {
        return true;
    }
    const bool avx512 = ggml_cpu_has_avx512() && ggml_cpu_has_avx512_vnni();
    switch (type) {
        case GGML_TYPE_BCQ4:
        case GGML_TYPE_BCQ4_A4:
            return avx512 && ggml_cpu_has_avx512_vbmi();
        default:
            return avx512 || (ggml_cpu_has_avx2() && ggml_cpu_has_fma());
    }
}

struct shape {
    int64_t k, rows, experts, n, n2;
};

static ggml_context * make_context() {
    ggml_init_params params = { 1024*1024, nullptr, true };
    return ggml_init(params);
}

// the product in a type and a buffer type; weights are dequantised into floats for F32
static std::vector<float> compute(const shape & s, ggml_type type, ggml_backend_buffer_type_t buft, const void * weights,
                                  const std::vector<float> & x, const std::vector<int32_t> & ids, int n_threads, bool * supported) {
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, n_threads);

    ggml_context * ctx_w = make_context();
    ggml_context * ctx   = make_context();

    ggml_tensor * w  = ggml_new_tensor_3d(ctx_w, type, s.k, s.rows, s.experts);
    ggml_tensor * a  = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.k, s.n, s.n2);
    ggml_tensor * id = nullptr;
    ggml_tensor * y;
    if (ids.empty()) {
        y = ggml_mul_mat(ctx, w, a);
    } else {
        id = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, (int64_t) ids.size()/s.n2, s.n2);
        y  = ggml_mul_mat_id(ctx, w, a, id);
    }
    ggml_backend_buffer_t buf_w = ggml_backend_alloc_ctx_tensors_from_buft(ctx_w, buft);
    ggml_backend_buffer_t buf   = ggml_backend_alloc_ctx_tensors(ctx, backend);

    std::vector<float> out;
    *supported = ggml_backend_supports_op(backend, y);
    if (*supported) {
        ggml_backend_tensor_set(w, weights, 0, ggml_nbytes(w));
        ggml_backend_tensor_set(a, x.data(), 0, ggml_nbytes(a));
        if (id) {
            ggml_backend_tensor_set(id, ids.data(), 0, ggml_nbytes(id));
        }
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, y);
        ggml_backend_graph_compute(backend, graph);
        out.resize(ggml_nelements(y));
        ggml_backend_tensor_get(y, out.data(), 0, ggml_nbytes(y));
    }
    ggml_backend_buffer_free(buf);
    ggml_backend_buffer_free(buf_w);
    ggml_free(ctx);
    ggml_free(ctx_w);
    ggml_backend_free(backend);
    return out;
}

static bool check(const char * name, ggml_type type, ggml_backend_buffer_type_t buft, const shape & s, int n_used) {
    std::normal_distribution<float> normal;
    std::vector<float> w(s.k*s.rows*s.experts), x(s.k*s.n*s.n2);
    for (float & v : w) { v = normal(rng); }
    for (float & v : x) { v = normal(rng); }
    std::vector<int32_t> ids(n_used*s.n2);
    for (size_t i = 0; i < ids.size(); i++) {
        ids[i] = (i + i/n_used*(1 + i % 3)) % s.experts;
    }

    std::vector<uint8_t> q(ggml_row_size(type, s.k)*s.rows*s.experts);
    ggml_quantize_chunk(type, w.data(), q.data(), 0, s.rows*s.experts, s.k, nullptr);
    ggml_get_type_traits(type)->to_float(q.data(), w.data(), w.size());

    bool ok = true;
    double worst = 0.0;
    std::vector<float> first;
    for (int n_threads : { 1, 3 }) {
        bool supported;
        const std::vector<float> b = compute(s, GGML_TYPE_F32, ggml_backend_cpu_buffer_type(), w.data(), x, ids, n_threads, &supported);
        const std::vector<float> a = compute(s, type, buft, q.data(), x, ids, n_threads, &supported);
        double err = 0.0, sum = 0.0;
        ok = ok && supported && a.size() == b.size();
        for (size_t i = 0; ok && i < b.size(); i++) {
            err += (a[i] - b[i])*(a[i] - b[i]);
            sum += b[i]*b[i];
        }
        worst = std::fmax(worst, err/sum);
        ok    = ok && sum > 0.0 && err/sum <= (type == GGML_TYPE_BCQ4_A4 ? 2e-2 : 1e-4); // activations of 4 or 8 bits
        // the number of threads does not change a result
        first = first.empty() ? a : first;
        ok    = ok && a == first;
    }
    printf("%s %-10s k=%d rows=%d n=%dx%d nmse %.2e %s\n", ggml_type_name(type), name, (int) s.k, (int) s.rows, (int) s.n, (int) s.n2,
           worst, ok ? "ok" : "FAILED");
    return ok;
}

int main() {
    ggml_backend_buffer_type_t buft = find_buffer_type();
    if (!buft) {
        const bool ok = !has_kernels(GGML_TYPE_TSQ2);
        printf("no kernels for repacked tensors\n%s\n", ok ? "all ok" : "FAILED");
        return ok ? 0 : 1;
    }
    bool ok = true;
    for (ggml_type type : { TESSERAQ_TYPES(TESSERAQ_ITEM) }) {
        const int64_t block = ggml_blck_size(type);
        if (!has_kernels(type)) {
            // all of its tensors stay where they are
            bool supported;
            std::vector<float> x(block);
            compute({ block, 48, 1, 1, 1 }, type, buft, nullptr, x, {}, 1, &supported);
            ok &= !supported;
            printf("%s is not repacked: %s\n", ggml_type_name(type), supported ? "FAILED" : "ok");
            continue;
        }
        for (int64_t k : { 1*block, 3*block, 10*block }) {
            for (int64_t n : { 1, 2, 7, 13, 33 }) {
                ok &= check("mul_mat", type, buft, { k, 48, 1, n, 1 }, 0);
            }
        }
        ok &= check("mul_mat", type, buft, { 16*block, 512, 1, 70, 3 }, 0);
        ok &= check("mul_mat", type, buft, { 2*block, 16, 1, 5, 2 }, 0);
        ok &= check("mul_mat_id", type, buft, { 3*block, 32, 4, 1, 1 }, 2);
        ok &= check("mul_mat_id", type, buft, { 3*block, 32, 4, 2, 50 }, 2);
        ok &= check("mul_mat_id", type, buft, { 2*block, 48, 8, 1, 40 }, 3);

        // the loader leaves such tensors where they are
        bool supported;
        std::vector<float> x(block);
        compute({ block, 20, 1, 1, 1 }, type, buft, nullptr, x, {}, 1, &supported);
        ok &= !supported;
    }
    printf("%s\n", ok ? "all ok" : "FAILED");
    return ok ? 0 : 1;
}
