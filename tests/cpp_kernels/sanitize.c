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

// the functions of a type
struct type {
    size_t block_size;
    void   (*from_float)(const float * x, void * y, int64_t k);
    void   (*to_float)  (const void * x, float * y, int64_t k);
    size_t (*quantize)  (const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
    void   (*vec_dot)   (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
    void   (*generic)   (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
};

#define TO_FLOAT(name) static void to_float_##name(const void * x, float * y, int64_t k) { dequantize_row_##name(x, y, k); }
#define TYPE(name) { sizeof(block_##name), quantize_row_##name, to_float_##name, quantize_##name, \
                     ggml_vec_dot_##name##_q8_1, GENERIC(ggml_vec_dot_##name##_q8_1) }
#if defined(GGML_CPU_GENERIC)
#define GENERIC(name) name
#else
#define GENERIC(name) name##_generic
#endif

TO_FLOAT(tsq2)
TO_FLOAT(tsq3)
TO_FLOAT(tsq4)

#if !defined(GGML_CPU_GENERIC) && !defined(__aarch64__)
// SIMD of stock Q2_0 is ours, but for ARM; its generic kernel is ggml's and not linked here, so the sum is written out
void ggml_vec_dot_q2_0_q8_0(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

void ggml_vec_dot_q2_0_q8_0_generic(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc) {
    (void) n; (void) s; (void) bs; (void) vx; (void) bx; (void) vy; (void) by; (void) nrc;
    abort();
}

static int check_q2_0(void) {
    ggml_table_f32_f16[0x3C00] = 1.0f;
    ggml_table_f32_f16[0x4000] = 2.0f;

    for (int nb = 1; nb <= 9; nb++) {
        for (int kind = 0; kind < 2; kind++) {
            block_q2_0 * x = malloc(nb*sizeof(block_q2_0));
            block_q8_0 * y = malloc(2*nb*sizeof(block_q8_0));
            float expected = 0.0f;

            for (int i = 0; i < nb; i++) {
                x[i].d = 0x3C00; // 1.0
                for (int j = 0; j < QK2_0/4; j++) {
                    x[i].qs[j] = kind ? 0xFF : next();
                }
                for (int k = 0; k < 2; k++) {
                    y[2*i + k].d = k ? 0x4000 : 0x3C00; // 2.0, 1.0
                    for (int j = 0; j < QK8_0; j++) {
                        y[2*i + k].qs[j] = kind ? -127 : (int8_t) next();
                        expected += (k + 1)*(((x[i].qs[8*k + j/4] >> 2*(j % 4)) & 3) - 1)*y[2*i + k].qs[j];
                    }
                }
            }

            float s;
            ggml_vec_dot_q2_0_q8_0(nb*QK2_0, &s, 0, x, 0, y, 0, 1);
            free(x);
            free(y);
            if (s != expected) {
                fprintf(stderr, "q2_0, %d blocks: %f, should be %f\n", nb, s, expected);
                return 1;
            }
        }
    }
    return 0;
}
#endif

static const struct type types[] = { TYPE(tsq2), TYPE(tsq3), TYPE(tsq4) };

// half-precision float of a power of two, 2^-24 to 2^15; below 2^-14 it is denormal
static uint16_t power(int e) {
    return (uint16_t) (e < -14 ? 1 << (e + 24) : (e + 15) << 10);
}

// random and extreme rows with activations that have a sum: SIMD against a sum in double
static int check_dot(const struct type * type, int nb) {
    const int nbits = (int) (type->block_size - TSQ_CODES)*8/QK_TSQ;

    for (int kind = 0; kind < 4; kind++) {
        uint8_t    * x = malloc(nb*type->block_size);
        block_q8_1 * a = malloc(2*nb*sizeof(block_q8_1));

        double sum = 0.0, magnitude = 0.0;
        for (int i = 0; i < nb; i++) {
            uint8_t * b = x + i*type->block_size;
            for (size_t j = 0; j < type->block_size; j++) {
                b[j] = kind == 1 || kind == 2 ? 0xFF : kind == 3 && j == 0 ? 0 : next();
            }
            uint8_t q[QK_TSQ];
            tsq_unpack(b + TSQ_CODES, nbits, q);

            for (int k = 0; k < 2; k++) {
                block_q8_1 * y = &a[2*i + k];

                // the sum has a scale of its own here, and is a power of two, too: that it is taken from the right place shows
                const int e = kind == 3 ? -24 + (int) (next() % 8) : (int) (next() % 8) - 4;
                const int f = kind == 3 ? -24 + (int) (next() % 8) : (int) (next() % 8) + 4;
                const uint16_t d = power(e), s = power(f);
                ggml_table_f32_f16[d] = ldexpf(1.0f, e);
                ggml_table_f32_f16[s] = ldexpf(1.0f, f);
                memcpy((char *) y,     &d, sizeof(d));
                memcpy((char *) y + 2, &s, sizeof(s));
                for (int j = 0; j < QK8_1; j++) {
                    y->qs[j] = kind == 1 ? 127 : kind == 2 ? -128 : (int8_t) next();
                    const double v = ldexp(tsq_decode_d(b[0])*q[k*QK8_1 + j]*y->qs[j], e);
                    sum       += v;
                    magnitude += fabs(v);
                }
                const double v = ldexp(tsq_decode_d(b[0])*tsq_decode_z(b[1], nbits), f);
                sum       -= v;
                magnitude += fabs(v);
            }
        }

        float s;
        type->vec_dot(nb*QK_TSQ, &s, 0, x, 0, a, 0, 1);
        free(x);
        free(a);
        if (!(fabs(s - sum) <= 1e-6*magnitude)) {
            fprintf(stderr, "vec_dot, kind %d, %d blocks: %g, should be %g\n", kind, nb, s, sum);
            return 1;
        }
    }
    return 0;
}

static int check(const struct type * type) {
    for (int kind = 0; kind < 7; kind++) {
        for (int nb = 1; nb <= 9; nb++) {
            const int n = nb*QK_TSQ;

            float      * x = malloc(n*sizeof(float));
            float      * w = malloc(n*sizeof(float));
            float      * y = malloc(n*sizeof(float));
            void       * q = malloc(nb*type->block_size);
            block_q8_1 * a = malloc(2*nb*sizeof(block_q8_1));

            for (int i = 0; i < n; i++) {
                x[i] = value(kind);
                w[i] = fabsf(value(1));
            }
            for (size_t i = 0; i < 2*nb*sizeof(block_q8_1); i++) {
                ((uint8_t *) a)[i] = next();
            }

            type->from_float(x, q, n);
            type->to_float(q, y, n);
            type->quantize(x, q, 1, n, w);
            type->to_float(q, y, n);
            for (int i = 0; i < n; i++) {
                if (!isfinite(y[i])) {
                    fprintf(stderr, "kind %d: weight %d is %f\n", kind, i, y[i]);
                    return 1;
                }
            }

            float s;
            type->vec_dot(n, &s, 0, q, 0, a, 0, 1);
            type->generic(n, &s, 0, q, 0, a, 0, 1);

            if (check_dot(type, nb)) {
                return 1;
            }

            free(x);
            free(w);
            free(y);
            free(q);
            free(a);
        }
    }
    return 0;
}

int main(void) {
#if !defined(GGML_CPU_GENERIC) && !defined(__aarch64__)
    if (check_q2_0()) {
        return 1;
    }
#endif
    for (size_t i = 0; i < sizeof(types)/sizeof(types[0]); i++) {
        if (check(&types[i])) {
            fprintf(stderr, "type %d of the list failed\n", (int) i);
            return 1;
        }
    }
    return 0;
}
