// The TSQ sources on their own, under AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is exactly as large as
// it must be, inputs are random, extreme and not finite.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

// what the sources need of ggml
void ggml_abort(const char * file, int line, const char * fmt, ...) {
    (void) fmt;
    fprintf(stderr, "%s:%d: assertion failed\n", file, line);
    abort();
}
float ggml_table_f32_f16[1 << 16];

static uint32_t state = 1;

static uint32_t next(void) {
    state = state*1664525u + 1013904223u;
    return state >> 8;
}

static float value(int kind) {
    const float u = (float) next()/(1 << 24) - 0.5f;
    switch (kind) {
        case 0:  return 0.0f;
        case 1:  return u;
        case 2:  return u*1e30f;
        case 3:  return u*1e-38f;
        case 4:  return next() % 8 ? u : NAN;
        case 5:  return next() % 8 ? u : INFINITY;
        default: return next() % 8 ? u : -INFINITY;
    }
}

int main(void) {
    for (int kind = 0; kind < 7; kind++) {
        for (int nb = 1; nb <= 9; nb++) {
            const int n = nb*QK_TSQ;

            float      * x = malloc(n*sizeof(float));
            float      * w = malloc(n*sizeof(float));
            float      * y = malloc(n*sizeof(float));
            block_tsq2 * q = malloc(nb*sizeof(block_tsq2));
            block_q8_1 * a = malloc(2*nb*sizeof(block_q8_1));

            for (int i = 0; i < n; i++) {
                x[i] = value(kind);
                w[i] = fabsf(value(1));
            }
            for (size_t i = 0; i < 2*nb*sizeof(block_q8_1); i++) {
                ((uint8_t *) a)[i] = next();
            }

            quantize_row_tsq2(x, q, n);
            dequantize_row_tsq2(q, y, n);
            quantize_tsq2(x, q, 1, n, w);
            dequantize_row_tsq2(q, y, n);
            for (int i = 0; i < n; i++) {
                if (!isfinite(y[i])) {
                    fprintf(stderr, "kind %d: weight %d is %f\n", kind, i, y[i]);
                    return 1;
                }
            }

            float s;
            ggml_vec_dot_tsq2_q8_1(n, &s, 0, q, 0, a, 0, 1);
#if !defined(GGML_CPU_GENERIC)
            ggml_vec_dot_tsq2_q8_1_generic(n, &s, 0, q, 0, a, 0, 1);
#endif

            free(x);
            free(w);
            free(y);
            free(q);
            free(a);
        }
    }
    return 0;
}
