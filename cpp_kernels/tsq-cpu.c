#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "arch-fallback.h"

#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

void quantize_row_tsq2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq2_ref(x, (block_tsq2 *) y, k);
}

void quantize_row_tsq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq3_ref(x, (block_tsq3 *) y, k);
}

void quantize_row_tsq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_tsq4_ref(x, (block_tsq4 *) y, k);
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const block_q8_1 * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    float sumf = 0.0f;

    // sum of d*(q - z)*a over a block = d*(da*sum(q*qa) - z*s), and Q8_1 brings s = da*sum(qa)
    for (int i = 0; i < nb; i++) {
        const uint8_t * b = x + i*TSQ_BLOCK_SIZE(nbits);
        const float     d = tsq_decode_d(b[0]);
        const float     z = tsq_decode_z(b[1], nbits);

        uint8_t q[QK_TSQ];
        tsq_unpack(b + TSQ_CODES, nbits, q);

        float sumb = 0.0f;

        // one block of 64 weights maps to two Q8_1 blocks
        for (int k = 0; k < 2; k++) {
            const block_q8_1 * GGML_RESTRICT yb = &y[2*i + k];

            int sumi = 0;

            for (int j = 0; j < QK8_1; j++) {
                sumi += q[k*QK8_1 + j] * yb->qs[j];
            }

            sumb += GGML_CPU_FP16_TO_FP32(yb->d)*sumi - z*GGML_CPU_FP16_TO_FP32(yb->s);
        }

        sumf += d*sumb;
    }

    return sumf;
}

void ggml_vec_dot_tsq2_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 2, vy);
}

void ggml_vec_dot_tsq3_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 3, vy);
}

void ggml_vec_dot_tsq4_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 4, vy);
}
