#include "tesseraq/tsq/tsq.h"
#include "tesseraq/common/q8.h"

#include <assert.h>

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    float sumf = 0.0f;

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++, x += TSQ_BLOCK_SIZE(nbits)) {
            const float    d  = e5m3_decode(x[0]);
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

static inline void tsq_dequantize_row(const void * GGML_RESTRICT x, int nbits, float * GGML_RESTRICT y, int64_t k) {
    switch (nbits) {
        case 2:  dequantize_row_tsq2(x, y, k); break;
        case 3:  dequantize_row_tsq3(x, y, k); break;
        default: dequantize_row_tsq4(x, y, k); break;
    }
}

#define KERNEL(name) name##_generic
#define Q8_BLOCK     q8_block_generic
#include "tesseraq/tsq/kernels.h"

#if !defined(TESSERAQ_SIMD)
#define KERNEL(name) name
#define Q8_BLOCK     q8_block_generic
#include "tesseraq/tsq/kernels.h"
#endif
