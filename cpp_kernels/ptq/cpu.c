#include "tesseraq/ptq/ptq.h"
#include "tesseraq/ptq/cpu.h"

#include <assert.h>
#include <math.h>

static void ptq_round_part_generic(const float * GGML_RESTRICT x, int n, int lack, int8_t * GGML_RESTRICT q, float * d, int32_t * s) {
    float amax = 0.0f;
    for (int j = 0; j < n; j++) {
        amax = q8_max_magnitude(amax, x[j]);
    }
    float id;
    *d = q8_scale(amax, &id);

    int sum = 0;
    for (int j = 0; j < n; j++) {
        const float v = rintf(x[j]*id);
        q[j] = (int8_t) (v >= -128.0f && v <= 127.0f ? (int) v : v > 0.0f ? 127 : -128);
        sum += q[j];
    }
    *s = sum*lack;
}

void ptq_round_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d, int32_t * GGML_RESTRICT s) {
    ptq_round_part_generic(x,               PTQ_SALIENT, PTQ_LACK_SALIENT, q,               &d[0], &s[0]);
    ptq_round_part_generic(x + PTQ_SALIENT, PTQ_BINARY,  PTQ_LACK_BINARY,  q + PTQ_SALIENT, &d[1], &s[1]);
}

static inline float ptq_vec_dot(int n, const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_PTQ == 0);
    const int nb = n / QK_PTQ;

    float sumf = 0.0f;

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++, x++) {
            const int8_t * binary  = (const int8_t *) y + 16*m + b*QK_PTQ;
            const int8_t * salient = binary + PTQ_BINARY;

            float   d[2];
            int32_t sum[2]; // of the products: codes times 8, bits times 64
            for (int kind = 0; kind < 2; kind++) {
                memcpy(&d[kind],   y + 4*(kind*m + b),       sizeof(float));
                memcpy(&sum[kind], y + 4*((2 + kind)*m + b), sizeof(int32_t));
            }
            for (int j = 0; j < PTQ_SALIENT; j++) {
                sum[0] += 8*ptq_code(x, j)*salient[j];
            }
            for (int j = 0; j < PTQ_BINARY; j++) {
                sum[1] += 64*ptq_sign(x, j)*binary[j];
            }

            sumf += PTQ_UNIT_SALIENT*e5m3_decode(x->s)*d[0]*sum[0];
            sumf += PTQ_UNIT_BINARY *e5m3_decode(x->d)*d[1]*sum[1];
        }
        y += m*Q8_PTQ_BLOCK_SIZE;
    }

    return sumf;
}

static inline void ptq_dequantize_row(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row_ptq1_61(x, y, k);
}

#define KERNEL(name)   name##_generic
#define PTQ_ROUND_PART ptq_round_part_generic
#include "tesseraq/ptq/kernels.h"

#if !defined(TESSERAQ_SIMD)
#define KERNEL(name)   name
#define PTQ_ROUND_PART ptq_round_part_generic
#include "tesseraq/ptq/kernels.h"
#endif
