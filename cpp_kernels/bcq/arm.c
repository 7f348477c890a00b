#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_NEON)

#include "tesseraq/bcq/encode.h"

// codewords of groups g and g + 1 of a block, whose indices are given: each group looks up its own codebook
static TESSERAQ_INLINE int8x16_t bcq4_lookup(uint8x16_t index, uint32_t sel, int g) {
    const int8x8_t c0 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel >> 3*g & 7]),       vget_low_u8 (index));
    const int8x8_t c1 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel >> 3*(g + 1) & 7]), vget_high_u8(index));
    return vcombine_s8(c0, c1);
}

// the codewords of a block, 64 weights in their order
static TESSERAQ_INLINE int8x16x4_t bcq4_load_codes(const block_bcq4 * GGML_RESTRICT x) {
    uint32_t sel;
    memcpy(&sel, x, sizeof(sel));
    sel >>= 8;

    const uint8x16_t m15 = vdupq_n_u8(15);
    const uint8x16_t l   = vld1q_u8(x->qs);
    const uint8x16_t h   = vld1q_u8(x->qs + 16);

    const int8x16x4_t c = {{ bcq4_lookup(vandq_u8(l, m15), sel, 0), bcq4_lookup(vandq_u8(h, m15), sel, 2),
                             bcq4_lookup(vshrq_n_u8(l, 4), sel, 4), bcq4_lookup(vshrq_n_u8(h, 4), sel, 6) }};
    return c;
}

// sums of 64 products in four lanes
static TESSERAQ_INLINE int32x4_t bcq_dot_block(int8x16x4_t c, const int8_t * GGML_RESTRICT a) {
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

// All codebooks of BCQ2 are one table of 16 bytes. A group of 16 weights is a plane, so its selector stands above all of its indices.
static TESSERAQ_INLINE int8x16x4_t bcq2_load_codes(const block_bcq2 * GGML_RESTRICT x) {
    const int8x16_t  table = vld1q_s8(bcq2_tables.codeword[0]);
    const uint8x16_t m3    = vdupq_n_u8(3);
    const uint8x16_t q     = vld1q_u8(x->qs);

#define BCQ2_PLANE(index, k) vqtbl1q_s8(table, vorrq_u8(index, vdupq_n_u8((x->sel >> 2*(k) & 3) << 2)))
    const int8x16x4_t c = {{ BCQ2_PLANE(vandq_u8(q, m3), 0), BCQ2_PLANE(vandq_u8(vshrq_n_u8(q, 2), m3), 1),
                             BCQ2_PLANE(vandq_u8(vshrq_n_u8(q, 4), m3), 2), BCQ2_PLANE(vshrq_n_u8(q, 6), 3) }};
#undef BCQ2_PLANE
    return c;
}

#define BCQ_ROWS(layout)                                                                                                               \
    static inline float layout##_vec_dot(int n, const block_##layout * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {             \
        assert(n % QK_BCQ == 0);                                                                                                       \
        const int nb = n / QK_BCQ;                                                                                                     \
                                                                                                                                       \
        float32x4_t acc = vdupq_n_f32(0.0f);                                                                                           \
                                                                                                                                       \
        for (int i = 0; i < nb; i += Q8_GROUP) {                                                                                       \
            const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;                                                                       \
                                                                                                                                       \
            for (int b = 0; b < m; b++, x++) {                                                                                         \
                float da;                                                                                                              \
                memcpy(&da, y + 4*b, sizeof(da));                                                                                      \
                const int32x4_t p = bcq_dot_block(layout##_load_codes(x), (const int8_t *) y + 8*m + b*QK_BCQ);                        \
                acc = vfmaq_n_f32(acc, vcvtq_f32_s32(p), e5m3_decode(x->d)*da);                                                        \
            }                                                                                                                          \
            y += m*Q8_TSQ_BLOCK_SIZE;                                                                                                  \
        }                                                                                                                              \
                                                                                                                                       \
        return vaddvq_f32(acc);                                                                                                        \
    }                                                                                                                                  \
                                                                                                                                       \
    static TESSERAQ_INLINE void layout##_dequantize_row(const block_##layout * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {  \
        assert(k % QK_BCQ == 0);                                                                                                       \
        const int64_t nb = k / QK_BCQ;                                                                                                 \
                                                                                                                                       \
        for (int64_t i = 0; i < nb; i++, y += QK_BCQ) {                                                                                \
            const float       d = e5m3_decode(x[i].d);                                                                                 \
            const int8x16x4_t c = layout##_load_codes(x + i);                                                                          \
                                                                                                                                       \
            for (int j = 0; j < 4; j++) {                                                                                              \
                const int16x8_t h0 = vmovl_s8(vget_low_s8(c.val[j]));                                                                  \
                const int16x8_t h1 = vmovl_high_s8(c.val[j]);                                                                          \
                vst1q_f32(y + 16*j +  0, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(h0))), d));                                  \
                vst1q_f32(y + 16*j +  4, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(h0)),          d));                                  \
                vst1q_f32(y + 16*j +  8, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(h1))), d));                                  \
                vst1q_f32(y + 16*j + 12, vmulq_n_f32(vcvtq_f32_s32(vmovl_high_s16(h1)),          d));                                  \
            }                                                                                                                          \
        }                                                                                                                              \
    }

BCQ_ROWS(bcq2)
BCQ_ROWS(bcq4)

#define KERNEL(name) name
#define BCQ_ENCODE   bcq_encode
#include "tesseraq/bcq/kernels.h"

#endif // defined(TESSERAQ_NEON)
