#include "tesseraq/bcq/bcq.h"
#include "tesseraq/bcq/cpu.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>

int bcq_encode_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float amax = 0.0f;
    for (int j = 0; j < QK_BCQ; j++) {
        amax = q8_max_magnitude(amax, x[j]);
    }
    float id4;
    *d = bcq_activation_scale(amax, &id4);

    int total = 0;
    for (int g = 0; g < QK_BCQ; g += BCQ4_GROUP) {
        int u[BCQ4_GROUP];
        for (int j = 0; j < BCQ4_GROUP; j++) {
            const float v = rintf(x[g + j]*id4);
            u[j] = v >= -128.0f && v <= 127.0f ? (int) v : v > 0.0f ? 127 : -128;
        }

        int best_b = 0;
        int best   = INT32_MAX;
        for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
            int sum = 0;
            for (int j = 0; j < BCQ4_GROUP; j++) {
                const int e = abs(bcq4_tables.nearest4[b][u[j] >> 1 & 127] - u[j]);
                sum += e < 127 ? e*e : 127*127;
            }
            if (sum < best) {
                best   = sum;
                best_b = b;
            }
        }
        for (int j = 0; j < BCQ4_GROUP; j++) {
            q[g + j] = bcq4_tables.nearest4[best_b][u[j] >> 1 & 127]/4;
            total   += q[g + j];
        }
    }
    return total;
}

#define BCQ_GENERIC(layout)                                                                                                         \
    static inline float layout##_vec_dot(int n, const block_##layout * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {          \
        assert(n % QK_BCQ == 0);                                                                                                    \
        const int nb = n / QK_BCQ;                                                                                                  \
                                                                                                                                    \
        float sumf = 0.0f;                                                                                                          \
                                                                                                                                    \
        for (int i = 0; i < nb; i += Q8_GROUP) {                                                                                    \
            const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;                                                                    \
                                                                                                                                    \
            for (int b = 0; b < m; b++, x++) {                                                                                      \
                int8_t c[QK_BCQ];                                                                                                   \
                layout##_decode(x, c);                                                                                              \
                sumf += bcq_dot(c, e5m3_decode(x->d), y, m, b);                                                                     \
            }                                                                                                                       \
            y += m*Q8_TSQ_BLOCK_SIZE;                                                                                               \
        }                                                                                                                           \
                                                                                                                                    \
        return sumf;                                                                                                                \
    }                                                                                                                               \
    static inline void layout##_dequantize_row(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {                  \
        dequantize_row_##layout(x, y, k);                                                                                           \
    }

// codewords times block b of a group of m blocks of activations
static inline float bcq_dot(const int8_t * GGML_RESTRICT c, float d, const uint8_t * GGML_RESTRICT y, int m, int b) {
    const int8_t * qa = (const int8_t *) y + 8*m + b*QK_BCQ;

    float da;
    memcpy(&da, y + 4*b, sizeof(da));

    int sumi = 0;
    for (int j = 0; j < QK_BCQ; j++) {
        sumi += c[j]*qa[j];
    }
    return d*da*sumi;
}

BCQ_GENERIC(bcq2)
BCQ_GENERIC(bcq4)

#define KERNEL(name) name##_generic
#define BCQ_ENCODE   bcq_encode_generic
#include "tesseraq/bcq/kernels.h"

#if !defined(TESSERAQ_SIMD)
#define KERNEL(name) name
#define BCQ_ENCODE   bcq_encode_generic
#include "tesseraq/bcq/kernels.h"
#endif
