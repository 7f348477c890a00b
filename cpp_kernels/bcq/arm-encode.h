#pragma once

// Blocks of 64 activations to codewords, for activations in rows (A4_BCQ) and in panels.

#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/round.h"

#include <arm_neon.h>

// Encode 64 numbers: codewords go to q, the scale to d. Returns the sum of the codewords. The nearest codewords of a codebook are
// looked up in a table of 128.
static inline int bcq_encode(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float id4;
    *d = bcq_activation_scale(q8_amax(x), &id4);
    q8_round(x, id4, q);

    int8x16_t  u[QK_BCQ/16];
    uint8x16_t half[QK_BCQ/16];
    for (int k = 0; k < QK_BCQ/16; k++) {
        u[k]    = vld1q_s8(q + 16*k);
        half[k] = vandq_u8(vreinterpretq_u8_s8(vshrq_n_s8(u[k], 1)), vdupq_n_u8(127));
    }

    int       best [QK_BCQ/BCQ4_GROUP];
    int8x16_t found[QK_BCQ/16];
    for (int g = 0; g < QK_BCQ/BCQ4_GROUP; g++) {
        best[g] = INT32_MAX;
    }
    for (int k = 0; k < QK_BCQ/16; k++) {
        found[k] = vdupq_n_s8(0);
    }
    for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
        const int8_t * table = bcq4_tables.nearest4[b];
        const int8x16x4_t t0 = {{ vld1q_s8(table +  0), vld1q_s8(table + 16), vld1q_s8(table + 32), vld1q_s8(table +  48) }};
        const int8x16x4_t t1 = {{ vld1q_s8(table + 64), vld1q_s8(table + 80), vld1q_s8(table + 96), vld1q_s8(table + 112) }};

        for (int k = 0; k < QK_BCQ/16; k++) {
            // an index outside of a table leaves the other one's answer
            const int8x16_t c4 = vqtbx4q_s8(vqtbl4q_s8(t0, half[k]), t1, vsubq_u8(half[k], vdupq_n_u8(64)));
            const int8x16_t e  = vqabsq_s8(vqsubq_s8(c4, u[k]));

            const int sum0 = (int) vaddlvq_s16(vmull_s8(vget_low_s8(e), vget_low_s8(e)));
            const int sum1 = (int) vaddlvq_s16(vmull_high_s8(e, e));
            const uint8x16_t less = vcombine_u8(vdup_n_u8(sum0 < best[2*k] ? 255 : 0), vdup_n_u8(sum1 < best[2*k + 1] ? 255 : 0));
            found[k]       = vbslq_s8(less, c4, found[k]);
            best[2*k]      = sum0 < best[2*k]     ? sum0 : best[2*k];
            best[2*k + 1]  = sum1 < best[2*k + 1] ? sum1 : best[2*k + 1];
        }
    }

    int16x8_t sum = vdupq_n_s16(0);
    for (int k = 0; k < QK_BCQ/16; k++) {
        const int8x16_t c = vshrq_n_s8(found[k], 2); // codewords are a quarter of what was found
        vst1q_s8(q + 16*k, c);
        sum = vpadalq_s8(sum, c);
    }
    return vaddvq_s16(sum);
}
