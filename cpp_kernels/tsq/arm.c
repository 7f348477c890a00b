#include "tesseraq/tsq/tsq.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_NEON)

#include "tesseraq/common/round.h"

// the codes of a block, 64 weights in their order
static TESSERAQ_INLINE int8x16x4_t tsq_load_codes(const uint8_t * GGML_RESTRICT codes, int nbits) {
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

// sums of 64 products in four lanes; a lane of 16 bits gets 8 of them, which are never above 15*128
static TESSERAQ_INLINE int32x4_t tsq_dot_block(int8x16x4_t q, const int8_t * GGML_RESTRICT a) {
#if defined(__ARM_FEATURE_DOTPROD)
    int32x4_t sum = vdotq_s32(vdupq_n_s32(0), q.val[0], vld1q_s8(a));
    sum = vdotq_s32(sum, q.val[1], vld1q_s8(a + 16));
    sum = vdotq_s32(sum, q.val[2], vld1q_s8(a + 32));
    return vdotq_s32(sum, q.val[3], vld1q_s8(a + 48));
#else
    int16x8_t sum = vdupq_n_s16(0);
    for (int k = 0; k < 4; k++) {
        const int8x16_t b = vld1q_s8(a + 16*k);
        sum = vmlal_s8     (sum, vget_low_s8(q.val[k]), vget_low_s8(b));
        sum = vmlal_high_s8(sum, q.val[k], b);
    }
    return vpaddlq_s16(sum);
#endif
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    float32x4_t acc  = vdupq_n_f32(0.0f);
    float       accz = 0.0f; // -d*z*sum(a)

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++, x += TSQ_BLOCK_SIZE(nbits)) {
            const int8_t * qa = (const int8_t *) y + 8*m + b*QK_TSQ;

            float   da;
            int16_t s;
            memcpy(&da, y + 4*b,       sizeof(da));
            memcpy(&s,  y + 4*m + 4*b, sizeof(s));

            const float     d = e5m3_decode(x[0])*da;
            const int32x4_t p = tsq_dot_block(tsq_load_codes(x + TSQ_CODES, nbits), qa);

            acc   = vfmaq_n_f32(acc, vcvtq_f32_s32(p), d);
            accz += d*(tsq_decode_z(x[1], nbits)*s);
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }

    return vaddvq_f32(acc) + accz;
}

// 4 weights from their codes
static TESSERAQ_INLINE void tsq_store_weights(float * GGML_RESTRICT y, int16x4_t q, float32x4_t d, float32x4_t zd) {
    vst1q_f32(y, vfmaq_f32(zd, vcvtq_f32_s32(vmovl_s16(q)), d));
}

// d*(q - z) for all codes is exact, so q*d - z*d has the bits of the reference
static TESSERAQ_INLINE void tsq_dequantize_row(const uint8_t * GGML_RESTRICT x, int nbits, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    for (int64_t i = 0; i < nb; i++, x += TSQ_BLOCK_SIZE(nbits), y += QK_TSQ) {
        const float       scale = e5m3_decode(x[0]);
        const float32x4_t d     = vdupq_n_f32(scale);
        const float32x4_t zd    = vdupq_n_f32(-(tsq_decode_z(x[1], nbits)*scale));
        const int8x16x4_t q     = tsq_load_codes(x + TSQ_CODES, nbits);

        TESSERAQ_UNROLL
        for (int j = 0; j < 4; j++) {
            const int16x8_t h0 = vmovl_s8(vget_low_s8(q.val[j]));
            const int16x8_t h1 = vmovl_high_s8(q.val[j]);
            tsq_store_weights(y + 16*j +  0, vget_low_s16 (h0), d, zd);
            tsq_store_weights(y + 16*j +  4, vget_high_s16(h0), d, zd);
            tsq_store_weights(y + 16*j +  8, vget_low_s16 (h1), d, zd);
            tsq_store_weights(y + 16*j + 12, vget_high_s16(h1), d, zd);
        }
    }
}

#define KERNEL(name) name
#define Q8_BLOCK     q8_block
#include "tesseraq/tsq/kernels.h"

#endif // defined(TESSERAQ_NEON)
