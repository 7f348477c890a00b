#pragma once

// Blocks of 128 activations to int8, for activations in rows (Q8_PTQ) and in panels.

#include "tesseraq/ptq/ptq.h"

#include <arm_neon.h>

// 4 numbers times id, rounded; NaN becomes -128
static inline int32x4_t ptq_round_4(const float * GGML_RESTRICT x, float id) {
    return vcvtnq_s32_f32(vmaxnmq_f32(vmulq_n_f32(vld1q_f32(x), id), vdupq_n_f32(-128.0f)));
}

// a part of a block, n numbers, a multiple of 8, gets one scale and one sum; the largest magnitude is NaN if one number is, as vmax has it
static inline void ptq_round_part(const float * GGML_RESTRICT x, int n, int lack, int8_t * GGML_RESTRICT q, float * d, int32_t * s) {
    float32x4_t m0 = vdupq_n_f32(0.0f);
    float32x4_t m1 = m0;
    for (int j = 0; j < n; j += 8) {
        m0 = vmaxq_f32(m0, vabsq_f32(vld1q_f32(x + j)));
        m1 = vmaxq_f32(m1, vabsq_f32(vld1q_f32(x + j + 4)));
    }
    float id;
    *d = q8_scale(vmaxvq_f32(vmaxq_f32(m0, m1)), &id);

    int16x8_t sum = vdupq_n_s16(0);
    for (int j = 0; j < n; j += 8) {
        const int16x8_t h = vqmovn_high_s32(vqmovn_s32(ptq_round_4(x + j, id)), ptq_round_4(x + j + 4, id));
        const int8x8_t  b = vqmovn_s16(h);
        vst1_s8(q + j, b);
        sum = vaddw_s8(sum, b);
    }
    *s = lack*vaddlvq_s16(sum);
}

static inline void ptq_round(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d, int32_t * GGML_RESTRICT s) {
    ptq_round_part(x,               PTQ_SALIENT, PTQ_LACK_SALIENT, q,               &d[0], &s[0]);
    ptq_round_part(x + PTQ_SALIENT, PTQ_BINARY,  PTQ_LACK_BINARY,  q + PTQ_SALIENT, &d[1], &s[1]);
}

// 16 bits, bit i of 2 bytes, to bytes of `one` and 0
static inline int8x16_t ptq_spread(uint8_t first, uint8_t second, uint8_t one) {
    const uint8x16_t bit  = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    const uint8x16_t bits = vcombine_u8(vdup_n_u8(first), vdup_n_u8(second));
    return vreinterpretq_s8_u8(vandq_u8(vtstq_u8(bits, bit), vdupq_n_u8(one)));
}
