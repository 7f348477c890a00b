#include "tesseraq/bcq/repack.h"

#if TESSERAQ_NROWS > 0

#include <arm_neon.h>

#include "tesseraq/bcq/tile.h"

static_assert(TESSERAQ_NROWS == 4 && BCQ_DEPTH == 8, "a vector pair has 8 columns of 4 rows");

// The codewords of a group of 8 columns of 4 rows, row after row; each row looks up its own codebook.
//   - sel: selectors of the rows, the group's in the lowest bits
static TESSERAQ_INLINE void bcq4_lookup(uint8x16_t i0, uint8x16_t i1, const uint32_t * sel, int group, int8x16_t * c0, int8x16_t * c1) {
    const int8x8_t r0 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel[0] >> 3*group & 7]), vget_low_u8 (i0));
    const int8x8_t r1 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel[1] >> 3*group & 7]), vget_high_u8(i0));
    const int8x8_t r2 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel[2] >> 3*group & 7]), vget_low_u8 (i1));
    const int8x8_t r3 = vqtbl1_s8(vld1q_s8(bcq4_tables.codeword[sel[3] >> 3*group & 7]), vget_high_u8(i1));
    *c0 = vcombine_s8(r0, r1);
    *c1 = vcombine_s8(r2, r3);
}

// Sums of a group of 8 columns for one column of activations
#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_DOTPROD)
// two columns of activations at once, as the lanes of a product of matrices: rows 0 and 1, and rows 2 and 3, times both columns
template <int w> struct bcq_sums {
    static const int pairs = (w + 1)/2;

    int32x4_t sum[2*pairs];

    TESSERAQ_INLINE bcq_sums() {
        TESSERAQ_UNROLL
        for (int k = 0; k < 2*pairs; k++) {
            sum[k] = vdupq_n_s32(0);
        }
    }

    TESSERAQ_INLINE void add(int8x16_t c0, int8x16_t c1, const int8_t * a) {
        TESSERAQ_UNROLL
        for (int p = 0; p < pairs; p++) {
            const int8x8_t  first = vld1_s8(a + 16*p);
            const int8x16_t b     = 2*p + 1 < w ? vcombine_s8(first, vld1_s8(a + 16*p + 8)) : vcombine_s8(first, first);
            sum[2*p + 0] = vmmlaq_s32(sum[2*p + 0], c0, b);
            sum[2*p + 1] = vmmlaq_s32(sum[2*p + 1], c1, b);
        }
    }

    TESSERAQ_INLINE int32x4_t rows(int c) const {
        const int32x4_t x = sum[c/2*2], y = sum[c/2*2 + 1];
        return c % 2 == 0 ? vuzp1q_s32(x, y) : vuzp2q_s32(x, y);
    }
};
#else
template <int w> struct bcq_sums {
    int32x4_t sum[w];

    TESSERAQ_INLINE bcq_sums() {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = vdupq_n_s32(0);
        }
    }

    TESSERAQ_INLINE void add(int8x16_t c0, int8x16_t c1, const int8_t * a) {
        // 4 columns of all rows
        const int8x16_t q0 = vreinterpretq_s8_s32(vuzp1q_s32(vreinterpretq_s32_s8(c0), vreinterpretq_s32_s8(c1)));
        const int8x16_t q1 = vreinterpretq_s8_s32(vuzp2q_s32(vreinterpretq_s32_s8(c0), vreinterpretq_s32_s8(c1)));
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = dot(sum[c], q0, a + 4*c);
            sum[c] = dot(sum[c], q1, a + 4*w + 4*c);
        }
    }

    static TESSERAQ_INLINE int32x4_t dot(int32x4_t sum, int8x16_t q, const int8_t * a) {
        int32_t four;
        memcpy(&four, a, sizeof(four));
        const int8x16_t b = vreinterpretq_s8_s32(vdupq_n_s32(four));
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, q, b);
#else
        const int16x8_t p0 = vmull_s8(vget_low_s8(q), vget_low_s8(b));
        const int16x8_t p1 = vmull_high_s8(q, b);
        return vpadalq_s16(sum, vpaddq_s16(p0, p1));
#endif
    }

    TESSERAQ_INLINE int32x4_t rows(int c) const { return sum[c]; }
};
#endif

// What a layout has to say of a block of 4 rows: its scales, and its products.
struct bcq4_rows {
    static const int size = 4*sizeof(block_bcq4);

    static TESSERAQ_INLINE void scales(const uint8_t * x, float * d) {
        for (int r = 0; r < 4; r++) {
            d[r] = e5m3_decode(x[4*r]);
        }
    }

    template <int w> static TESSERAQ_INLINE void add(const uint8_t * x, const int8_t * aq, bcq_sums<w> & sums) {
        const uint8x16_t m15 = vdupq_n_u8(15);

        uint32_t sel[4];
        memcpy(sel, x, sizeof(sel));
        for (int r = 0; r < 4; r++) {
            sel[r] >>= 8;
        }

        TESSERAQ_UNROLL
        for (int v = 0; v < 4; v++) {
            const uint8x16_t q0 = vld1q_u8(x + 16 + 32*v);
            const uint8x16_t q1 = vld1q_u8(x + 16 + 32*v + 16);

            int8x16_t c0, c1;
            bcq4_lookup(vandq_u8(q0, m15), vandq_u8(q1, m15), sel, 2*v, &c0, &c1);
            sums.add(c0, c1, aq + 16*v*w);
            bcq4_lookup(vshrq_n_u8(q0, 4), vshrq_n_u8(q1, 4), sel, 2*v + 1, &c0, &c1);
            sums.add(c0, c1, aq + 16*v*w + 8*w);
        }
    }
};

// All codebooks are a table of 16 bytes; the selector of a row and of a plane stands above the indices.
struct bcq2_rows {
    static const int size = 4*sizeof(block_bcq2);

    static TESSERAQ_INLINE void scales(const uint8_t * x, float * d) {
        for (int r = 0; r < 4; r++) {
            d[r] = e5m3_decode(x[r]);
        }
    }

    template <int k, int w> static TESSERAQ_INLINE void add_plane(const uint8x16_t * q, uint8x16_t s0, uint8x16_t s1, const int8_t * aq, bcq_sums<w> & sums) {
        const int8x16_t  table = vld1q_s8(bcq2_tables.codeword[0]);
        const uint8x16_t m3    = vdupq_n_u8(3);
        const int8x16_t  down  = vdupq_n_s8(-2*k);

        const uint8x16_t t0 = vshlq_n_u8(vandq_u8(vshlq_u8(s0, down), m3), 2);
        const uint8x16_t t1 = vshlq_n_u8(vandq_u8(vshlq_u8(s1, down), m3), 2);
        TESSERAQ_UNROLL
        for (int v = 0; v < 2; v++) {
            const int8x16_t c0 = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshlq_u8(q[2*v + 0], down), m3), t0));
            const int8x16_t c1 = vqtbl1q_s8(table, vorrq_u8(vandq_u8(vshlq_u8(q[2*v + 1], down), m3), t1));
            sums.add(c0, c1, aq + (16*k + 8*v)*w);
        }
    }

    template <int w> static TESSERAQ_INLINE void add(const uint8_t * x, const int8_t * aq, bcq_sums<w> & sums) {
        // vectors of rows 0 and 1, and of rows 2 and 3
        const uint8x16_t q[4] = { vld1q_u8(x + 8), vld1q_u8(x + 24), vld1q_u8(x + 40), vld1q_u8(x + 56) };
        const uint8x16_t s0   = vcombine_u8(vdup_n_u8(x[4]), vdup_n_u8(x[5]));
        const uint8x16_t s1   = vcombine_u8(vdup_n_u8(x[6]), vdup_n_u8(x[7]));
        add_plane<0>(q, s0, s1, aq, sums);
        add_plane<1>(q, s0, s1, aq, sums);
        add_plane<2>(q, s0, s1, aq, sums);
        add_plane<3>(q, s0, s1, aq, sums);
    }
};

template <typename rows, int w> static void bcq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb = n / QK_BCQ;

    float32x4_t acc[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        acc[c] = vdupq_n_f32(0.0f);
    }

    for (int i = 0; i < nb; i++) {
        bcq_sums<w> sums;
        rows::template add<w>(x, (const int8_t *) a + 8*w, sums);

        float d[4];
        rows::scales(x, d);
        const float32x4_t dx = vld1q_f32(d);
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            float da;
            memcpy(&da, a + 4*c, sizeof(da));
            acc[c] = vfmaq_n_f32(acc[c], vmulq_f32(vcvtq_f32_s32(sums.rows(c)), dx), da);
        }

        x += rows::size;
        a += w*Q8_TSQ_BLOCK_SIZE;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        vst1q_f32(s[c], acc[c]);
    }
}

template <int w> static void bcq2_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) { bcq_gemm_panel<bcq2_rows, w>(n, s, x, a); }
template <int w> static void bcq4_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) { bcq_gemm_panel<bcq4_rows, w>(n, s, x, a); }

BCQ_GEMM(bcq2)
BCQ_GEMM(bcq4)

#endif // TESSERAQ_NROWS > 0
