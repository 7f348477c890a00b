#pragma once

// Q8_PTQ, the activations of PTQ1_61.

#include "ggml.h"
#include "tesseraq/ptq/ptq.h"

#include <assert.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// Round a block of 128 numbers to int8, in their order; its two scales and sums are those of Q8_PTQ.
void ptq_round_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d, int32_t * GGML_RESTRICT s);

// Rounds n numbers to int8 with one scale d; s is their sum, lack times.
typedef void (*ptq_round_part_t)(const float * GGML_RESTRICT x, int n, int lack, int8_t * GGML_RESTRICT q, float * d, int32_t * s);

// A row of Q8_PTQ by what rounds the parts of a block: the groups of the layout stand here alone.
static inline void ptq_quantize_row(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k, ptq_round_part_t round_part) {
    assert(k % QK_PTQ == 0);
    const int64_t nb = k / QK_PTQ;

    uint8_t * group = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? (int) (nb - i) : Q8_GROUP;

        for (int b = 0; b < m; b++, x += QK_PTQ) {
            int8_t * q = (int8_t *) group + 16*m + b*QK_PTQ;
            float    d[2];
            int32_t  s[2];
            round_part(x,               PTQ_SALIENT, PTQ_LACK_SALIENT, q + PTQ_BINARY, &d[0], &s[0]);
            round_part(x + PTQ_SALIENT, PTQ_BINARY,  PTQ_LACK_BINARY,  q,              &d[1], &s[1]);

            for (int kind = 0; kind < 2; kind++) {
                memcpy(group + 4*(kind*m + b),       &d[kind], sizeof(float));
                memcpy(group + 4*((2 + kind)*m + b), &s[kind], sizeof(int32_t));
            }
        }
        group += m*Q8_PTQ_BLOCK_SIZE;
    }
}

#ifdef __cplusplus
}
#endif
