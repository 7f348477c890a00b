#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "arch-fallback.h"

#include "tesseraq/bcq-cpu.h"
#include "tesseraq/ptq-cpu.h"
#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <assert.h>
#include <math.h>

#define UNUSED GGML_UNUSED

static_assert((int) GGML_TYPE_TSQ2   == TSQ2_TYPE_ID,   "wrong tsq2 id");
static_assert((int) GGML_TYPE_TSQ3   == TSQ3_TYPE_ID,   "wrong tsq3 id");
static_assert((int) GGML_TYPE_TSQ4   == TSQ4_TYPE_ID,   "wrong tsq4 id");
static_assert((int) GGML_TYPE_Q8_TSQ == Q8_TSQ_TYPE_ID, "wrong q8_tsq id");

void quantize_row_tsq2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq2_ref(x, (block_tsq2 *) y, k);
}

void quantize_row_tsq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq3_ref(x, (block_tsq3 *) y, k);
}

void quantize_row_tsq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq4_ref(x, (block_tsq4 *) y, k);
}

void quantize_row_q8_tsq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    uint8_t * group = y;

    for (int64_t i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? (int) (nb - i) : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x += QK_TSQ) {
            float amax = 0.0f;
            for (int j = 0; j < QK_TSQ; j++) {
                amax = tsq_max_magnitude(amax, x[j]);
            }
            float id;
            const float d = tsq_activation_scale(amax, &id);

            int sum = 0;
            for (int j = 0; j < QK_TSQ; j++) {
                const float v = rintf(x[j]*id);
                const int   q = v >= -128.0f && v <= 127.0f ? (int) v : v > 0.0f ? 127 : -128;
                group[8*m + b*QK_TSQ + j] = (uint8_t) q;
                sum += q;
            }
            const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
            memcpy(group + 4*b,       &d, sizeof(d));
            memcpy(group + 4*m + 4*b, s,  sizeof(s));
        }
        group += m*Q8_TSQ_BLOCK_SIZE;
    }
}

void ggml_cpu_tsq2_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row_tsq2(x, y, k);
}

void ggml_cpu_tsq3_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row_tsq3(x, y, k);
}

void ggml_cpu_tsq4_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row_tsq4(x, y, k);
}

ggml_to_float_t ggml_cpu_to_float(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_TSQ2:    return ggml_cpu_tsq2_to_fp32;
        case GGML_TYPE_TSQ3:    return ggml_cpu_tsq3_to_fp32;
        case GGML_TYPE_TSQ4:    return ggml_cpu_tsq4_to_fp32;
        case GGML_TYPE_BCQ4:
        case GGML_TYPE_BCQ4_A4: return ggml_cpu_bcq4_to_fp32;
        case GGML_TYPE_PTQ1_61: return ggml_cpu_ptq1_61_to_fp32;
        default:                return ggml_get_type_traits(type)->to_float;
    }
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    float sumf = 0.0f;

    for (int i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? nb - i : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x += TSQ_BLOCK_SIZE(nbits)) {
            const float    d  = tsq_decode_d(x[0]);
            const float    z  = tsq_decode_z(x[1], nbits);
            const int8_t * qa = (const int8_t *) y + 8*m + b*QK_TSQ;

            float   da;
            int16_t s[2];
            memcpy(&da, y + 4*b,       sizeof(da));
            memcpy(s,   y + 4*m + 4*b, sizeof(s));

            uint8_t q[QK_TSQ];
            tsq_unpack(x + TSQ_CODES, nbits, q);

            int sumi = 0;
            for (int j = 0; j < QK_TSQ; j++) {
                sumi += q[j]*qa[j];
            }

            // sum of d*(q - z)*da*qa over a block
            sumf += d*da*(sumi - z*s[1]);
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }

    return sumf;
}

void ggml_vec_dot_tsq2_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 2, vy);
}

void ggml_vec_dot_tsq3_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 3, vy);
}

void ggml_vec_dot_tsq4_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 4, vy);
}
