#pragma once

// Blocks of 64 activations to int8 on ARM.

#include "tesseraq/common/q8.h"

#include <arm_neon.h>

// Largest magnitude of 64 numbers, NaN if one of them is, as vmax has it (vmaxnm drops it). Four maxima, since each waits for the one before.
static inline float q8_amax(const float * GGML_RESTRICT x) {
    float32x4_t m0 = vdupq_n_f32(0.0f);
    float32x4_t m1 = m0;
    float32x4_t m2 = m0;
    float32x4_t m3 = m0;
    for (int j = 0; j < QK8_TSQ; j += 16) {
        m0 = vmaxq_f32(m0, vabsq_f32(vld1q_f32(x + j +  0)));
        m1 = vmaxq_f32(m1, vabsq_f32(vld1q_f32(x + j +  4)));
        m2 = vmaxq_f32(m2, vabsq_f32(vld1q_f32(x + j +  8)));
        m3 = vmaxq_f32(m3, vabsq_f32(vld1q_f32(x + j + 12)));
    }
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(m0, m1), vmaxq_f32(m2, m3)));
}

// 4 numbers times id, rounded; NaN becomes -128
static inline int32x4_t q8_round_4(const float * GGML_RESTRICT x, float id) {
    return vcvtnq_s32_f32(vmaxnmq_f32(vmulq_n_f32(vld1q_f32(x), id), vdupq_n_f32(-128.0f)));
}

// 64 numbers times id, rounded to int8; returns their sum
static inline int q8_round(const float * GGML_RESTRICT x, float id, int8_t * GGML_RESTRICT q) {
    int16x8_t sum = vdupq_n_s16(0);
    for (int j = 0; j < QK8_TSQ; j += 16) {
        const int16x8_t h0 = vqmovn_high_s32(vqmovn_s32(q8_round_4(x + j + 0, id)), q8_round_4(x + j +  4, id));
        const int16x8_t h1 = vqmovn_high_s32(vqmovn_s32(q8_round_4(x + j + 8, id)), q8_round_4(x + j + 12, id));
        const int8x16_t b  = vqmovn_high_s16(vqmovn_s16(h0), h1);
        vst1q_s8(q + j, b);
        sum = vpadalq_s8(sum, b);
    }
    return vaddvq_s16(sum);
}
