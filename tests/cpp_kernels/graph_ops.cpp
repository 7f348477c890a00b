// ggml operators with TSQ, BCQ and PTQ1_61 weights on the CPU backend, compared with the same operators on the dequantised weights.
// Prints one line per operator; exits with 1 if one of them is wrong.

#include "ggml.h"
#include "ggml-cpu.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

static std::mt19937 rng(0);

static ggml_context * make_context() {
    ggml_init_params params = { 64u*1024*1024, nullptr, false };
    return ggml_init(params);
}

static void fill(ggml_tensor * t) {
    std::normal_distribution<float> normal;
    float * data = (float *) t->data;
    for (int64_t i = 0; i < ggml_nelements(t); i++) {
        data[i] = normal(rng);
    }
}

// weights in a type and what they dequantise to
struct weights {
    ggml_tensor * q;
    ggml_tensor * f;
};

static weights make_weights(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1) {
    weights w = { ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2), ggml_new_tensor_3d(ctx, GGML_TYPE_F32, ne0, ne1, ne2) };
    fill(w.f);
    ggml_quantize_chunk(type, (const float *) w.f->data, w.q->data, 0, ne1*ne2, ne0, nullptr);
    ggml_get_type_traits(type)->to_float(w.q->data, (float *) w.f->data, ggml_nelements(w.f));
    return w;
}

static ggml_tensor * compute(ggml_context * ctx, ggml_tensor * out, int n_threads) {
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    ggml_graph_compute_with_ctx(ctx, graph, n_threads);
    return out;
}

// normalised mean squared error between what the operator gives for quantised and for float weights
static bool check(const char * name, double max_nmse, const std::function<ggml_tensor * (ggml_context *, bool)> & op) {
    bool ok = true;
    double worst = 0.0;
    for (int n_threads = 1; n_threads <= 3; n_threads += 2) {
        rng.seed(1);
        ggml_context * ctx_q = make_context();
        ggml_tensor * a = compute(ctx_q, op(ctx_q, true), n_threads);
        rng.seed(1);
        ggml_context * ctx_f = make_context();
        ggml_tensor * b = compute(ctx_f, op(ctx_f, false), n_threads);

        double err = 0.0;
        double sum = 0.0;
        ok = ok && ggml_are_same_shape(a, b);
        for (int64_t i = 0; ok && i < ggml_nelements(b); i++) {
            const double x = ((const float *) a->data)[i];
            const double y = ((const float *) b->data)[i];
            err += (x - y)*(x - y);
            sum += y*y;
        }
        worst = std::fmax(worst, err/sum);
        ok    = ok && sum > 0.0 && err/sum <= max_nmse;
        ggml_free(ctx_q);
        ggml_free(ctx_f);
    }
    printf("%-24s nmse %.2e %s\n", name, worst, ok ? "ok" : "FAILED");
    return ok;
}

static bool check_type(ggml_type type) {
    const double activations = type == GGML_TYPE_BCQ4_A4 ? 2e-2 : 1e-4; // of 4 or 8 bits
    const int64_t block = ggml_blck_size(type);
    bool ok = true;

    // the longest rows are of several groups of activations, which threads share
    for (int64_t k : {1*block, 3*block, 10*block, 37*block}) {
        for (int64_t n : {1, 2, 7, 33}) {
            char name[64];
            snprintf(name, sizeof(name), "mul_mat k=%d n=%d", (int) k, (int) n);
            ok &= check(name, activations, [=](ggml_context * ctx, bool quantised) {
                weights w = make_weights(ctx, type, k, 48);
                ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, n);
                fill(x);
                return ggml_mul_mat(ctx, quantised ? w.q : w.f, x);
            });
        }
    }

    for (int64_t k : {3*block, 37*block}) {
        ok &= check("mul_mat_id", activations, [=](ggml_context * ctx, bool quantised) {
            weights w = make_weights(ctx, type, k, 32, 4);
            ggml_tensor * x   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, 2, 5);
            ggml_tensor * ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 5);
            fill(x);
            for (int i = 0; i < 10; i++) {
                ((int32_t *) ids->data)[i] = (3*i + i/2) % 4;
            }
            return ggml_mul_mat_id(ctx, quantised ? w.q : w.f, x, ids);
        });
    }

    ok &= check("get_rows", 0.0, [=](ggml_context * ctx, bool quantised) {
        weights w = make_weights(ctx, type, 3*block, 32);
        ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 9);
        for (int i = 0; i < 9; i++) {
            ((int32_t *) rows->data)[i] = (7*i + 3) % 32;
        }
        return ggml_get_rows(ctx, quantised ? w.q : w.f, rows);
    });

    ok &= check("cpy to f32", 0.0, [=](ggml_context * ctx, bool quantised) {
        weights w = make_weights(ctx, type, 3*block, 32);
        return ggml_cpy(ctx, quantised ? w.q : w.f, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 3*block, 32, 1));
    });

    // quantising in the graph gives the bytes of the reference, here seen through get_rows
    ok &= check("cpy from f32", 0.0, [=](ggml_context * ctx, bool quantised) {
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3*block, 8);
        fill(x);
        ggml_tensor * q = ggml_new_tensor_2d(ctx, type, 3*block, 8);
        if (quantised) {
            q = ggml_cpy(ctx, x, q);
        } else {
            ggml_quantize_chunk(type, (const float *) x->data, q->data, 0, 8, 3*block, nullptr);
        }
        ggml_tensor * rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 8);
        for (int i = 0; i < 8; i++) {
            ((int32_t *) rows->data)[i] = i;
        }
        return ggml_get_rows(ctx, q, rows);
    });

    ok &= check("out_prod", 1e-12, [=](ggml_context * ctx, bool quantised) {
        weights w = make_weights(ctx, type, 128, 16);
        ggml_tensor * x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 12, 16);
        fill(x);
        return ggml_out_prod(ctx, quantised ? w.q : w.f, x);
    });

    return ok;
}

int main() {
    bool ok = true;
    for (ggml_type type : { TESSERAQ_TYPES(TESSERAQ_ITEM) }) {
        printf("%s\n", ggml_type_name(type));
        ok &= check_type(type);
    }
    printf("%s\n", ok ? "all ok" : "FAILED");
    return ok ? 0 : 1;
}
