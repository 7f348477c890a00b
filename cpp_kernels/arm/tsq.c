#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__ARM_NEON) && defined(__aarch64__)
#define TSQ_VEC_DOT_NEON

// the codes of a block, 64 weights in their order
static inline int8x16x4_t tsq_load_codes_neon(const uint8_t * GGML_RESTRICT codes, int nbits) {
    uint8x16_t q0, q1, q2, q3;

    if (nbits == 4) {
        const uint8x16_t m15 = vdupq_n_u8(15);
        const uint8x16_t l   = vld1q_u8(codes);
        const uint8x16_t h   = vld1q_u8(codes + 16);

        q0 = vandq_u8(l, m15);
        q1 = vandq_u8(h, m15);
        q2 = vshrq_n_u8(l, 4);
        q3 = vshrq_n_u8(h, 4);
    } else {
        const uint8x16_t m3 = vdupq_n_u8(3);
        const uint8x16_t l  = vld1q_u8(codes);

        q0 = vandq_u8(l, m3);
        q1 = vandq_u8(vshrq_n_u8(l, 2), m3);
        q2 = vandq_u8(vshrq_n_u8(l, 4), m3);
        q3 = vshrq_n_u8(l, 6);

        if (nbits == 3) {
            // bit 2 of 16 weights comes out of two planes of 8, which stand at neighbouring bits
            const uint8x16_t m4 = vdupq_n_u8(4);
            const int8x16_t  s0 = vcombine_s8(vdup_n_s8(2), vdup_n_s8(1));
            const uint8x8_t  hh = vld1_u8(codes + QK_TSQ/4);
            const uint8x16_t h  = vcombine_u8(hh, hh);

            q0 = vbslq_u8(m4, vshlq_u8(h, s0), q0);
            q1 = vbslq_u8(m4, vshlq_u8(h, vsubq_s8(s0, vdupq_n_s8(2))), q1);
            q2 = vbslq_u8(m4, vshlq_u8(h, vsubq_s8(s0, vdupq_n_s8(4))), q2);
            q3 = vbslq_u8(m4, vshlq_u8(h, vsubq_s8(s0, vdupq_n_s8(6))), q3);
        }
    }

    const int8x16x4_t q = {{ vreinterpretq_s8_u8(q0), vreinterpretq_s8_u8(q1), vreinterpretq_s8_u8(q2), vreinterpretq_s8_u8(q3) }};
    return q;
}

// sums of 32 products in four lanes; codes are never above 15, so that pairs of products fit into 16 bits
static inline int32x4_t tsq_dot32(int8x16_t q0, int8x16_t q1, const int8_t * GGML_RESTRICT a) {
    const int8x16_t a0 = vld1q_s8(a);
    const int8x16_t a1 = vld1q_s8(a + 16);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(vdotq_s32(vdupq_n_s32(0), q0, a0), q1, a1);
#else
    int16x8_t p = vmull_s8(vget_low_s8(q0), vget_low_s8(a0));
    p = vmlal_high_s8(p, q0, a0);
    p = vmlal_s8     (p, vget_low_s8(q1), vget_low_s8(a1));
    p = vmlal_high_s8(p, q1, a1);
    return vpaddlq_s16(p);
#endif
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const block_q8_1 * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    float32x4_t acc0 = vdupq_n_f32(0.0f);
    float32x4_t acc1 = vdupq_n_f32(0.0f);
    float       accz = 0.0f; // d*z*s

    for (int i = 0; i < nb; i++) {
        const uint8_t * b = x + i*TSQ_BLOCK_SIZE(nbits);
        const float     d = tsq_decode_d(b[0]);
        const float     z = tsq_decode_z(b[1], nbits);

        const int8x16x4_t q = tsq_load_codes_neon(b + TSQ_CODES, nbits);

        // one block of 64 weights maps to two Q8_1 blocks
        const block_q8_1 * GGML_RESTRICT y0 = &y[2*i + 0];
        const block_q8_1 * GGML_RESTRICT y1 = &y[2*i + 1];

        const float32x4_t p0 = vcvtq_f32_s32(tsq_dot32(q.val[0], q.val[1], y0->qs));
        const float32x4_t p1 = vcvtq_f32_s32(tsq_dot32(q.val[2], q.val[3], y1->qs));

        acc0  = vfmaq_n_f32(acc0, p0, d*GGML_CPU_FP16_TO_FP32(y0->d));
        acc1  = vfmaq_n_f32(acc1, p1, d*GGML_CPU_FP16_TO_FP32(y1->d));
        accz += d*z*(GGML_CPU_FP16_TO_FP32(y0->s) + GGML_CPU_FP16_TO_FP32(y1->s));
    }

    return vaddvq_f32(vaddq_f32(acc0, acc1)) - accz;
}
#endif

void ggml_vec_dot_tsq2_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_NEON)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 2, vy);
#else
    ggml_vec_dot_tsq2_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}

void ggml_vec_dot_tsq3_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_NEON)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 3, vy);
#else
    ggml_vec_dot_tsq3_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}

void ggml_vec_dot_tsq4_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_NEON)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 4, vy);
#else
    ggml_vec_dot_tsq4_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
