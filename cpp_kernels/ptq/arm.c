#include "tesseraq/ptq/ptq.h"
#include "tesseraq/ptq/cpu.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_NEON)

#include "tesseraq/ptq/arm-round.h"

// The 24 codes of a block in their order; after them zeros.
static TESSERAQ_INLINE uint8x16x2_t ptq_load_codes(const block_ptq1_61 * GGML_RESTRICT x) {
    const uint8x16_t b    = vld1q_u8((const uint8_t *) x); // d, s, 12 bytes of codes, two of signs
    const uint8x16_t low  = vandq_u8(b, vdupq_n_u8(15));
    const uint8x16_t high = vshrq_n_u8(b, 4);

    // bytes 2 to 13 of the low ones and then of the high ones, which a table has from 16 on
    static const uint8_t place[32] = {
        2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 255, 255, 255, 255, 255, 255, 255, 255,
    };
    const uint8x16x2_t both = {{ low, high }};
    const uint8x16x2_t q    = {{ vqtbl2q_u8(both, vld1q_u8(place)), vqtbl2q_u8(both, vld1q_u8(place + 16)) }};
    return q;
}

// adds products in four lanes; without dotprod a lane of 16 bits
#if defined(__ARM_FEATURE_DOTPROD)
typedef int32x4_t ptq_sums;

static TESSERAQ_INLINE ptq_sums ptq_no_sums(void) { return vdupq_n_s32(0); }

static TESSERAQ_INLINE ptq_sums ptq_mul_sum(ptq_sums sum, int8x16_t q, int8x16_t a) { return vdotq_s32(sum, q, a); }

static TESSERAQ_INLINE float32x4_t ptq_float(ptq_sums sum) { return vcvtq_f32_s32(sum); }
#else
typedef int16x8_t ptq_sums;

static TESSERAQ_INLINE ptq_sums ptq_no_sums(void) { return vdupq_n_s16(0); }

static TESSERAQ_INLINE ptq_sums ptq_mul_sum(ptq_sums sum, int8x16_t q, int8x16_t a) {
    return vmlal_high_s8(vmlal_s8(sum, vget_low_s8(q), vget_low_s8(a)), q, a);
}

static TESSERAQ_INLINE float32x4_t ptq_float(ptq_sums sum) { return vcvtq_f32_s32(vpaddlq_s16(sum)); }
#endif

static inline float ptq_vec_dot(int n, const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_PTQ == 0);
    const int nb = n / QK_PTQ;

    float32x4_t acc0 = vdupq_n_f32(0.0f);
    float32x4_t acc1 = vdupq_n_f32(0.0f);
    float       accl = 0.0f; // what the products lack

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        for (int b = 0; b < m; b++, x++) {
            const int8_t * a = (const int8_t *) y + 16*m + b*QK_PTQ;

            float   da[2];
            int32_t sa[2];
            for (int kind = 0; kind < 2; kind++) {
                memcpy(&da[kind], y + 4*(kind*m + b),       sizeof(float));
                memcpy(&sa[kind], y + 4*((2 + kind)*m + b), sizeof(int32_t));
            }
            const float salient = e5m3_decode(x->s)*da[0];
            const float binary  = e5m3_decode(x->d)*da[1];

            // the last of the 104 binary numbers share a register with salient ones, whose last 16 are in another
            ptq_sums s1 = ptq_no_sums();
            TESSERAQ_UNROLL
            for (int j = 0; j < 6; j++) {
                s1 = ptq_mul_sum(s1, ptq_spread(x->signs[2*j], x->signs[2*j + 1], 1), vld1q_s8(a + 16*j));
            }
            s1 = ptq_mul_sum(s1, ptq_spread(x->signs[12], 0, 1), vld1q_s8(a + 96));

            const uint8x16x2_t q = ptq_load_codes(x);
            ptq_sums s0 = ptq_mul_sum(ptq_no_sums(), vreinterpretq_s8_u8(vextq_u8(vdupq_n_u8(0), q.val[0], 8)), vld1q_s8(a + 96));
            s0 = ptq_mul_sum(s0, vreinterpretq_s8_u8(vextq_u8(q.val[0], q.val[1], 8)), vld1q_s8(a + 112));

            acc0  = vfmaq_n_f32(acc0, ptq_float(s0), salient);
            acc1  = vfmaq_n_f32(acc1, ptq_float(s1), binary);
            accl += PTQ_UNIT_SALIENT*salient*sa[0] + PTQ_UNIT_BINARY*binary*sa[1];
        }
        y += m*Q8_PTQ_BLOCK_SIZE;
    }

    return vaddvq_f32(vfmaq_n_f32(acc0, acc1, 2.0f)) + accl;
}

static TESSERAQ_INLINE void ptq_dequantize_row(const block_ptq1_61 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_PTQ == 0);
    const int64_t nb = k / QK_PTQ;

    for (int64_t i = 0; i < nb; i++, y += QK_PTQ) {
        // all products are exact, so 2*q - 15 comes to the same as q - 7.5
        const float        s    = e5m3_decode(x[i].s);
        const float32x4_t  half = vdupq_n_f32(7.5f);
        const uint8x16x2_t q    = ptq_load_codes(&x[i]);
        for (int j = 0; j < PTQ_SALIENT; j += 8) {
            const uint16x8_t h = vmovl_u8(j == 8 ? vget_high_u8(q.val[0]) : vget_low_u8(q.val[j / 16]));
            vst1q_f32(y + j,     vmulq_n_f32(vsubq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16 (h))), half), s));
            vst1q_f32(y + j + 4, vmulq_n_f32(vsubq_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(h))), half), s));
        }

        // where the bit is 1, the sign of -d changes
        static const int32_t up[8] = { 31, 30, 29, 28, 27, 26, 25, 24 };
        const uint32x4_t minus = vreinterpretq_u32_f32(vdupq_n_f32(-e5m3_decode(x[i].d)));
        const uint32x4_t sign  = vdupq_n_u32(0x80000000);
        for (int j = 0; j < PTQ_BINARY/8; j++) {
            const uint32x4_t bits = vdupq_n_u32(x[i].signs[j]);
            for (int k4 = 0; k4 < 8; k4 += 4) {
                const uint32x4_t v = veorq_u32(minus, vandq_u32(vshlq_u32(bits, vld1q_s32(up + k4)), sign));
                vst1q_f32(y + PTQ_SALIENT + 8*j + k4, vreinterpretq_f32_u32(v));
            }
        }
    }
}

#define KERNEL(name)   name
#define PTQ_ROUND_PART ptq_round_part
#include "tesseraq/ptq/kernels.h"

#endif // defined(TESSERAQ_NEON)
