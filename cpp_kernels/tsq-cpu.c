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

void ggml_vec_dot_tsq2_q8_1_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    const int nb = n / QK_TSQ;

    assert(n % QK_TSQ == 0);
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    const block_tsq2 * GGML_RESTRICT x = vx;
    const block_q8_1 * GGML_RESTRICT y = vy;

    float sumf = 0.0f;

    // sum of d*(q - z)*a over a block = d*(da*sum(q*qa) - z*s), and Q8_1 brings s = da*sum(qa)
    for (int i = 0; i < nb; i++) {
        const float d = tsq_decode_d(x[i].d);
        const float z = tsq_decode_z(x[i].z, 2);

        float sumb = 0.0f;

        // one block of 64 weights maps to two Q8_1 blocks; planes 2*k and 2*k + 1 belong to the k-th
        for (int k = 0; k < 2; k++) {
            const block_q8_1 * GGML_RESTRICT yb = &y[2*i + k];

            int sumi = 0;

            for (int j = 0; j < 16; j++) {
                const int q = x[i].qs[j] >> 4*k;
                sumi += (q & 3) * yb->qs[j] + ((q >> 2) & 3) * yb->qs[j + 16];
            }

            sumb += GGML_CPU_FP16_TO_FP32(yb->d)*sumi - z*GGML_CPU_FP16_TO_FP32(yb->s);
        }

        sumf += d*sumb;
    }

    *s = sumf;
}
