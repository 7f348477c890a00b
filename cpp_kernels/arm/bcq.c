#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "tesseraq/bcq.h"
#include "tesseraq/bcq-cpu.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__ARM_NEON) && defined(__aarch64__)
#define BCQ_NEON

#include "tesseraq/arm/bcq-encode.h"

#define BCQ_INLINE inline __attribute__((always_inline))

// codewords of groups g and g + 1 of a block, whose indices are given: each group looks up its own codebook
static BCQ_INLINE int8x16_t bcq_lookup(uint8x16_t index, uint32_t sel, int g) {
    const int8x8_t c0 = vqtbl1_s8(vld1q_s8(bcq_tables.codeword[sel >> 3*g & 7]),       vget_low_u8 (index));
    const int8x8_t c1 = vqtbl1_s8(vld1q_s8(bcq_tables.codeword[sel >> 3*(g + 1) & 7]), vget_high_u8(index));
    return vcombine_s8(c0, c1);
}

// the codewords of a block, 64 weights in their order
static BCQ_INLINE int8x16x4_t bcq_load_codes(const block_bcq4 * GGML_RESTRICT x) {
    uint32_t sel;
    memcpy(&sel, x, sizeof(sel));
    sel >>= 8;

    const uint8x16_t m15 = vdupq_n_u8(15);
    const uint8x16_t l   = vld1q_u8(x->qs);
    const uint8x16_t h   = vld1q_u8(x->qs + 16);

    const int8x16x4_t c = {{ bcq_lookup(vandq_u8(l, m15), sel, 0), bcq_lookup(vandq_u8(h, m15), sel, 2),
                             bcq_lookup(vshrq_n_u8(l, 4), sel, 4), bcq_lookup(vshrq_n_u8(h, 4), sel, 6) }};
    return c;
}

// sums of 64 products in four lanes
static BCQ_INLINE int32x4_t bcq_dot_block(int8x16x4_t c, const int8_t * GGML_RESTRICT a) {
#if defined(__ARM_FEATURE_DOTPROD)
    int32x4_t sum = vdotq_s32(vdupq_n_s32(0), c.val[0], vld1q_s8(a));
    sum = vdotq_s32(sum, c.val[1], vld1q_s8(a + 16));
    sum = vdotq_s32(sum, c.val[2], vld1q_s8(a + 32));
    return vdotq_s32(sum, c.val[3], vld1q_s8(a + 48));
#else
    // a lane of 16 bits gets 8 products, which are never above 31*128
    int16x8_t sum = vdupq_n_s16(0);
    for (int k = 0; k < 4; k++) {
        const int8x16_t b = vld1q_s8(a + 16*k);
        sum = vmlal_s8     (sum, vget_low_s8(c.val[k]), vget_low_s8(b));
        sum = vmlal_high_s8(sum, c.val[k], b);
    }
    return vpaddlq_s16(sum);
#endif
}

static inline float bcq_vec_dot(int n, const block_bcq4 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_BCQ == 0);
    const int nb = n / QK_BCQ;

    float32x4_t acc = vdupq_n_f32(0.0f);

    for (int i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? nb - i : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x++) {
            float da;
            memcpy(&da, y + 4*b, sizeof(da));
            const int32x4_t p = bcq_dot_block(bcq_load_codes(x), (const int8_t *) y + 8*m + b*QK_BCQ);
            acc = vfmaq_n_f32(acc, vcvtq_f32_s32(p), tsq_decode_d(x->d)*da);
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }

    return vaddvq_f32(acc);
}

static BCQ_INLINE void bcq_dequantize_row(const block_bcq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    for (int64_t i = 0; i < nb; i++, y += QK_BCQ) {
        const float       d = tsq_decode_d(x[i].d);
        const int8x16x4_t c = bcq_load_codes(x + i);

        for (int j = 0; j < 4; j++) {
            const int16x8_t h0 = vmovl_s8(vget_low_s8(c.val[j]));
            const int16x8_t h1 = vmovl_high_s8(c.val[j]);
            vst1q_f32(y + 16*j +  0, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(h0))), d));
            vst1q_f32(y + 16*j +  4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(h0)),          d));
            vst1q_f32(y + 16*j +  8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(h1))), d));
            vst1q_f32(y + 16*j + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(h1)),          d));
        }
    }
}
#endif

void quantize_row_a4_bcq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
#if defined(BCQ_NEON)
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    uint8_t * group = y;

    for (int64_t i = 0; i < nb; i += Q8_TSQ_GROUP) {
        const int m = nb - i < Q8_TSQ_GROUP ? (int) (nb - i) : Q8_TSQ_GROUP;

        for (int b = 0; b < m; b++, x += QK_BCQ) {
            float d;
            const int     sum  = bcq_encode(x, (int8_t *) group + 8*m + b*QK_BCQ, &d);
            const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
            memcpy(group + 4*b,       &d, sizeof(d));
            memcpy(group + 4*m + 4*b, s,  sizeof(s));
        }
        group += m*Q8_TSQ_BLOCK_SIZE;
    }
#else
    quantize_row_a4_bcq_generic(x, y, k);
#endif
}

void ggml_cpu_bcq4_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
#if defined(BCQ_NEON)
    bcq_dequantize_row(x, y, k);
#else
    ggml_cpu_bcq4_to_fp32_generic(x, y, k);
#endif
}

void ggml_vec_dot_bcq4_q8_tsq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(BCQ_NEON)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = bcq_vec_dot(n, vx, vy);
#else
    ggml_vec_dot_bcq4_q8_tsq_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
