// The TSQ sources on their own, under AddressSanitizer and UndefinedBehaviorSanitizer: every buffer is exactly as large as
// it must be, inputs are random, extreme and not finite. Whatever has the plain names is compared with the generic reference
// bit for bit, dot products with a sum in double.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "tesseraq/tsq/tsq.h"
#include "tesseraq/common/cpu.h"
#include "tesseraq/common/q8.h"

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

// kinds of numbers: the last gives blocks with a scale of 1, in which half of the numbers are halfway between two integers
enum { VALUES = 8 };

static float value(int kind) {
    const float u = (float) next()/(1 << 24) - 0.5f;
    switch (kind) {
        case 0:  return 0.0f;
        case 1:  return u;
        case 2:  return u*1e30f;
        case 3:  return u*1e-38f;
        case 4:  return next() % 8 ? u : NAN;
        case 5:  return next() % 8 ? u : INFINITY;
        case 6:  return next() % 8 ? u : -INFINITY;
        default: return next() % 4 ? ((int) (next() % 507) - 253)/2.0f : 127.0f;
    }
}

// the functions of a type
struct type {
    int    nbits;
    void   (*from_float)(const float * x, void * y, int64_t k);
    void   (*to_float)  (const void * x, float * y, int64_t k);
    void   (*to_fp32)   (const void * x, float * y, int64_t k);
    size_t (*quantize)  (const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
    void   (*vec_dot)   (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
    void   (*generic)   (int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
};

#define TYPE(name, nbits) { nbits, quantize_row_##name##_ref, dequantize_row_##name, ggml_cpu_##name##_to_fp32, quantize_##name, \
                            ggml_vec_dot_##name##_q8_tsq, ggml_vec_dot_##name##_q8_tsq_generic }

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type) {
    (void) type;
    return NULL;
}

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

static const struct type types[] = { TYPE(tsq2, 2), TYPE(tsq3, 3), TYPE(tsq4, 4) };

// kinds of rows and activations of dot products
enum { RANDOM, LARGEST, LOWEST, SMALLEST, HUGE_SCALES, KINDS };

// activations of a row, not from numbers but as extreme as they may be
static void fill_activations(uint8_t * y, int nb, int kind) {
    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++) {
            const float u = (float) (next() % 1000 + 1)/1000;
            const float d = kind == SMALLEST ? u*1e-38f : kind == HUGE_SCALES ? u*1e30f : u;

            int sum = 0;
            for (int j = 0; j < QK_TSQ; j++) {
                const int q = kind == LARGEST ? 127 : kind == LOWEST ? -128 : (int8_t) next();
                y[8*m + b*QK_TSQ + j] = (uint8_t) q;
                sum += q;
            }
            const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
            memcpy(y + 4*b,       &d, sizeof(d));
            memcpy(y + 4*m + 4*b, s,  sizeof(s));
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }
}

// the dot product, and the sum of the magnitudes of what is added up
static double exact_dot(const uint8_t * x, int nbits, const uint8_t * y, int nb, double * magnitude) {
    double sum = 0.0;
    *magnitude = 0.0;
    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++, x += TSQ_BLOCK_SIZE(nbits)) {
            float da;
            memcpy(&da, y + 4*b, sizeof(da));
            uint8_t q[QK_TSQ];
            tsq_unpack(x + TSQ_CODES, nbits, q);
            for (int j = 0; j < QK_TSQ; j++) {
                const double a = (double) da*(int8_t) y[8*m + b*QK_TSQ + j]*e5m3_decode(x[0]);
                const double z = tsq_decode_z(x[1], nbits);
                sum        += a*(q[j] - z);
                *magnitude += fabs(a*q[j]) + fabs(a*z);
            }
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }
    return sum;
}

static int check_vec_dot(const struct type * type) {
    for (int kind = 0; kind < KINDS; kind++) {
        for (int nb = 1; nb <= 2*Q8_GROUP + 3; nb++) {
            const size_t size = nb*TSQ_BLOCK_SIZE(type->nbits);
            uint8_t * x = malloc(size);
            uint8_t * y = malloc(nb*Q8_TSQ_BLOCK_SIZE);

            for (size_t i = 0; i < size; i++) {
                const int head = i % TSQ_BLOCK_SIZE(type->nbits) < 2;
                x[i] = kind == LARGEST || kind == LOWEST ? 0xFF : kind == SMALLEST && head ? 0 : (uint8_t) next();
            }
            fill_activations(y, nb, kind);

            double magnitude;
            const double expected = exact_dot(x, type->nbits, y, nb, &magnitude);
            float simd, generic;
            type->vec_dot(nb*QK_TSQ, &simd,    0, x, 0, y, 0, 1);
            type->generic(nb*QK_TSQ, &generic, 0, x, 0, y, 0, 1);
            free(x);
            free(y);

            const double tolerance = 1e-6*magnitude + 1e-37;
            if (!(fabs(simd - expected) <= tolerance) || !(fabs(generic - expected) <= tolerance)) {
                fprintf(stderr, "vec_dot, kind %d, %d blocks: %g, generic %g, should be %g +- %g\n", kind, nb, simd, generic, expected, tolerance);
                return 1;
            }
        }
    }
    return 0;
}

// every scale with every zero-point
static int check_to_fp32(const struct type * type) {
    const int nb = 256;
    const size_t size = nb*TSQ_BLOCK_SIZE(type->nbits);
    uint8_t * x = malloc(size);
    float   * a = malloc(nb*QK_TSQ*sizeof(float));
    float   * b = malloc(nb*QK_TSQ*sizeof(float));
    int differs = 0;

    for (int d = 0; d < 256; d++) {
        for (size_t i = 0; i < size; i++) {
            x[i] = (uint8_t) next();
        }
        for (int z = 0; z < nb; z++) {
            x[z*TSQ_BLOCK_SIZE(type->nbits) + 0] = (uint8_t) d;
            x[z*TSQ_BLOCK_SIZE(type->nbits) + 1] = (uint8_t) z;
        }
        type->to_fp32 (x, a, nb*QK_TSQ);
        type->to_float(x, b, nb*QK_TSQ);
        differs |= memcmp(a, b, nb*QK_TSQ*sizeof(float));
    }
    free(x);
    free(a);
    free(b);
    return differs != 0;
}

// activations from numbers: bit for bit, whole rows and rows in parts of whole groups
static int check_activations(void) {
    for (int kind = 0; kind < VALUES; kind++) {
        for (int nb = 1; nb <= 2*Q8_GROUP + 3; nb++) {
            const size_t size = nb*Q8_TSQ_BLOCK_SIZE;
            float   * x = malloc(nb*QK_TSQ*sizeof(float));
            uint8_t * a = malloc(size);
            uint8_t * b = malloc(size);

            for (int i = 0; i < nb*QK_TSQ; i++) {
                x[i] = value(kind);
            }
            quantize_row_q8_tsq_generic(x, b, nb*QK_TSQ);

            int differs = 0;
            for (int nth = 1; nth <= 4; nth++) {
                memset(a, 0xAA, size);
                for (int ith = 0; ith < nth; ith++) {
                    int64_t first = ith*nb/nth, last = (ith + 1)*nb/nth;
                    ggml_cpu_whole_groups(GGML_TYPE_Q8_TSQ, nb, &first, &last);
                    quantize_row_q8_tsq(x + first*QK_TSQ, a + first*Q8_TSQ_BLOCK_SIZE, (last - first)*QK_TSQ);
                }
                differs |= memcmp(a, b, size);
            }
            free(x);
            free(a);
            free(b);
            if (differs) {
                fprintf(stderr, "activations, kind %d, %d blocks\n", kind, nb);
                return 1;
            }
        }
    }
    return 0;
}

// quantising numbers of any kind gives finite weights
static int check_quantize(const struct type * type) {
    for (int kind = 0; kind < VALUES; kind++) {
        for (int nb = 1; nb <= 9; nb++) {
            const int n = nb*QK_TSQ;

            float * x = malloc(n*sizeof(float));
            float * w = malloc(n*sizeof(float));
            float * y = malloc(n*sizeof(float));
            void  * q = malloc(nb*TSQ_BLOCK_SIZE(type->nbits));

            for (int i = 0; i < n; i++) {
                x[i] = value(kind);
                w[i] = fabsf(value(1));
            }

            int finite = 1;
            for (int weighted = 0; weighted < 2; weighted++) {
                if (weighted) {
                    type->quantize(x, q, 1, n, w);
                } else {
                    type->from_float(x, q, n);
                }
                type->to_float(q, y, n);
                for (int i = 0; i < n; i++) {
                    finite = finite && isfinite(y[i]);
                }
            }
            free(x);
            free(w);
            free(y);
            free(q);
            if (!finite) {
                fprintf(stderr, "quantize, kind %d, %d blocks: a weight is not finite\n", kind, nb);
                return 1;
            }
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
    if (check_activations()) {
        return 1;
    }
    for (size_t i = 0; i < sizeof(types)/sizeof(types[0]); i++) {
        if (check_quantize(&types[i]) || check_to_fp32(&types[i]) || check_vec_dot(&types[i])) {
            fprintf(stderr, "type %d of the list failed\n", (int) i);
            return 1;
        }
    }
    return 0;
}
