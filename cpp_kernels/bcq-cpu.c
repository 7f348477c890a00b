#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "arch-fallback.h"

#include "tesseraq/bcq.h"
#include "tesseraq/bcq-cpu.h"

#include <assert.h>
#include <math.h>

#define UNUSED GGML_UNUSED

static_assert((int) GGML_TYPE_BCQ4    == BCQ4_TYPE_ID,    "wrong bcq4 id");
static_assert((int) GGML_TYPE_BCQ4_A4 == BCQ4_A4_TYPE_ID, "wrong bcq4_a4 id");
static_assert((int) GGML_TYPE_A4_BCQ  == A4_BCQ_TYPE_ID,  "wrong a4_bcq id");

void quantize_row_bcq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    quantize_row_bcq4_ref(x, (block_bcq4 *) y, k);
}

int bcq_encode_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float amax = 0.0f;
    for (int j = 0; j < QK_BCQ; j++) {
        amax = tsq_max_magnitude(amax, x[j]);
    }
    float id4;
    *d = bcq_activation_scale(amax, &id4);

    int total = 0;
    for (int g = 0; g < QK_BCQ; g += BCQ_GROUP) {
        int u[BCQ_GROUP];
        for (int j = 0; j < BCQ_GROUP; j++) {
            const float v = rintf(x[g + j]*id4);
            u[j] = v >= -128.0f && v <= 127.0f ? (int) v : v > 0.0f ? 127 : -128;
        }

        int best_b = 0;
        int best   = INT32_MAX;
        for (int b = 0; b < BCQ_CODEBOOKS; b++) {
            int sum = 0;
            for (int j = 0; j < BCQ_GROUP; j++) {
                const int e = abs(bcq_tables.nearest4[b][u[j] >> 1 & 127] - u[j]);
                sum += e < 127 ? e*e : 127*127;
            }
            if (sum < best) {
                best   = sum;
                best_b = b;
            }
        }
        for (int j = 0; j < BCQ_GROUP; j++) {
            q[g + j] = bcq_tables.nearest4[best_b][u[j] >> 1 & 127]/4;
            total   += q[g + j];
        }
    }
    return total;
}

void quantize_row_a4_bcq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    uint8_t * group = y;

    for (int64_t i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? (int) (nb - i) : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x += QK_BCQ) {
            float d;
            const int     sum  = bcq_encode_generic(x, (int8_t *) group + 8*m + b*QK_BCQ, &d);
            const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
            memcpy(group + 4*b,       &d, sizeof(d));
            memcpy(group + 4*m + 4*b, s,  sizeof(s));
        }
        group += m*Q8_TSQ_BLOCK_SIZE;
    }
}

void ggml_cpu_bcq4_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    dequantize_row_bcq4(x, y, k);
}

void ggml_vec_dot_bcq4_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    assert(n % QK_BCQ == 0);
    const int nb = n / QK_BCQ;

    const block_bcq4 * x = vx;
    const uint8_t    * y = vy;

    float sumf = 0.0f;

    for (int i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? nb - i : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x++) {
            const int8_t * qa = (const int8_t *) y + 8*m + b*QK_BCQ;

            float da;
            memcpy(&da, y + 4*b, sizeof(da));

            int8_t c[QK_BCQ];
            bcq_decode(x, c);

            int sumi = 0;
            for (int j = 0; j < QK_BCQ; j++) {
                sumi += c[j]*qa[j];
            }
            sumf += tsq_decode_d(x->d)*da*sumi;
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }

    *s = sumf;
}
