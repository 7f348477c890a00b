#include "tesseraq/ptq/repack.h"

#if TESSERAQ_NROWS > 0

#include "tesseraq/ptq/arm-round.h"

#include <arm_neon.h>

static_assert(TESSERAQ_NROWS == 4, "a register has 4 columns of 4 rows");

// Units are 4 columns wide whatever the processor multiplies: smmla takes 8, which is two units zipped together. Where panels have 8
// columns side by side, these are those of two neighbouring units. Products are signed, so bits come in as 64 at most, codes as q << 3.

typedef uint8x16_t  vint;
typedef float32x4_t vfloat;

static TESSERAQ_INLINE vint v_load(const uint8_t * p) { return vld1q_u8(p); }

// bits move by n within their bytes, left if n > 0, right if not
template <int n> static TESSERAQ_INLINE vint v_shift(vint a) {
    return n > 0 ? vshlq_n_u8(a, n > 0 ? n : 0) : n < 0 ? vshrq_n_u8(a, n < 0 ? -n : 1) : a;
}

template <int nbits, int at, int up> static TESSERAQ_INLINE vint v_bits(vint a) {
    const vint moved = v_shift<up - at>(a);
    return up == 0 && at + nbits == 8 ? moved : vandq_u8(moved, vdupq_n_u8(((1 << nbits) - 1) << up));
}

template <int up> static TESSERAQ_INLINE vint v_mask(const uint8_t * p) {
    return vreinterpretq_u8_s8(ptq_spread(p[0], p[1], 1 << up));
}

static TESSERAQ_INLINE vfloat v_zero()                    { return vdupq_n_f32(0.0f); }
static TESSERAQ_INLINE void   v_prefetch(const uint8_t *) {} // left to the processor: nobody has measured what it gains

#define PTQ_NSUMS(w) (w)

#include "tesseraq/ptq/tile.h"

static TESSERAQ_INLINE void ptq_to_units(const int8_t * q, uint8_t * y) {
    const int8x8x4_t rows = {{ vld1_s8(q), vld1_s8(q + 8), vld1_s8(q + 16), vld1_s8(q + 24) }};
    vst4_s8((int8_t *) y, rows);
}

static TESSERAQ_INLINE int8x16_t v_spread32(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

// Calls f(pair, even, odd) for the pairs of neighbouring units of a kind: codes times 2^up.
template <int up, typename F> static TESSERAQ_INLINE void ptq_pairs_salient(const uint8_t * x, F f) {
    const vint q0 = v_load(x + PTQ_CODES);
    const vint q1 = v_load(x + PTQ_CODES + 1*PTQ_VECTOR);
    const vint q2 = v_load(x + PTQ_CODES + 2*PTQ_VECTOR);
    f(0, v_bits<4, 0, up>(q0), v_bits<4, 0, up>(q1));
    f(1, v_bits<4, 0, up>(q2), v_bits<4, 4, up>(q0));
    f(2, v_bits<4, 4, up>(q1), v_bits<4, 4, up>(q2));
}

template <int up, typename F> static TESSERAQ_INLINE void ptq_pairs_binary(const uint8_t * x, F f) {
    TESSERAQ_UNROLL
    for (int v = 0; v < 3; v++) {
        const vint q = v_load(x + PTQ_SIGNS + v*PTQ_VECTOR);
        const int first = PTQ_SALIENT_UNITS/2 + 4*v;
        f(first + 0, v_bits<1, 0, up>(q), v_bits<1, 1, up>(q));
        f(first + 1, v_bits<1, 2, up>(q), v_bits<1, 3, up>(q));
        f(first + 2, v_bits<1, 4, up>(q), v_bits<1, 5, up>(q));
        f(first + 3, v_bits<1, 6, up>(q), v_bits<1, 7, up>(q));
    }
    f(PTQ_UNITS/2 - 1, v_mask<up>(x + PTQ_LAST), v_mask<up>(x + PTQ_LAST + TESSERAQ_NROWS/2));
}

// Sums of the products of a block with w columns of a panel, row by row in the lanes. They take pairs of units times 2^UP.
#if defined(__ARM_FEATURE_DOTPROD) && TESSERAQ_DEPTH == 8
template <int w> struct ptq_sums {
    // of one column there is no other to multiply at once
    static const int pairs = w == 1 ? 1 : (w + 1)/2;

    static const int UP_SALIENT = 3, UP_BINARY = 6;

    int32x4_t sum[2*pairs];

    TESSERAQ_INLINE ptq_sums() {
        TESSERAQ_UNROLL
        for (int k = 0; k < 2*pairs; k++) {
            sum[k] = vdupq_n_s32(0);
        }
    }

    TESSERAQ_INLINE void add(vint even, vint odd, const uint8_t * a) {
        const int8x16_t e = vreinterpretq_s8_u8(even), o = vreinterpretq_s8_u8(odd);
        if (w == 1) {
            sum[0] = vdotq_s32(sum[0], e, v_spread32(a));
            sum[1] = vdotq_s32(sum[1], o, v_spread32(a + 4));
            return;
        }
        // rows 0 and 1, and rows 2 and 3
        const int8x16_t r01 = vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(e), vreinterpretq_s32_s8(o)));
        const int8x16_t r23 = vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(e), vreinterpretq_s32_s8(o)));
        TESSERAQ_UNROLL
        for (int p = 0; p < pairs; p++) {
            const int8_t  * b    = (const int8_t *) a + 16*p;
            const int8x16_t cols = 2*p + 1 < w ? vld1q_s8(b) : vcombine_s8(vld1_s8(b), vld1_s8(b));
            sum[2*p + 0] = vmmlaq_s32(sum[2*p + 0], r01, cols);
            sum[2*p + 1] = vmmlaq_s32(sum[2*p + 1], r23, cols);
        }
    }

    TESSERAQ_INLINE int32x4_t rows(int c) const {
        if (w == 1) {
            return vaddq_s32(sum[0], sum[1]);
        }
        const int32x4_t r01 = sum[c/2*2], r23 = sum[c/2*2 + 1];
        return c % 2 == 0 ? vuzp1q_s32(r01, r23) : vuzp2q_s32(r01, r23);
    }
};
#elif defined(__ARM_FEATURE_DOTPROD)
template <int w> struct ptq_sums {
    static const int UP_SALIENT = 3, UP_BINARY = 6;

    int32x4_t sum[w];

    TESSERAQ_INLINE ptq_sums() {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = vdupq_n_s32(0);
        }
    }

    static TESSERAQ_INLINE int32x4_t dot(int32x4_t sum, int8x16_t q, int8x16_t b, int lane) {
        return lane == 0 ? vdotq_laneq_s32(sum, q, b, 0) : lane == 1 ? vdotq_laneq_s32(sum, q, b, 1)
             : lane == 2 ? vdotq_laneq_s32(sum, q, b, 2) : vdotq_laneq_s32(sum, q, b, 3);
    }

    TESSERAQ_INLINE void add(vint even, vint odd, const uint8_t * a) {
        TESSERAQ_UNROLL
        for (int k = 0; k < 2; k++) {
            const int8x16_t q = vreinterpretq_s8_u8(k == 0 ? even : odd);
            const int8_t  * b = (const int8_t *) a + 4*w*k;
            TESSERAQ_UNROLL
            for (int c = 0; c < w; c++) {
                if (w < 4) {
                    sum[c] = vdotq_s32(sum[c], q, v_spread32(b + 4*c));
                } else {
                    // four columns are loaded at a time, the last of which may begin among those before
                    const int first = c/4*4 + 4 <= w ? c/4*4 : w - 4;
                    sum[c] = dot(sum[c], q, vld1q_s8(b + 4*first), c - first);
                }
            }
        }
    }

    TESSERAQ_INLINE int32x4_t rows(int c) const { return sum[c]; }
};
#else
template <int w> struct ptq_sums {
    static const int UP_SALIENT = 0, UP_BINARY = 0;

    int16x8_t sum01[w], sum23[w]; // 26 times 128, or 6 times 15*128, have room in 16 bits

    TESSERAQ_INLINE ptq_sums() {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum01[c] = sum23[c] = vdupq_n_s16(0);
        }
    }

    TESSERAQ_INLINE void add(vint even, vint odd, const uint8_t * a) {
        TESSERAQ_UNROLL
        for (int k = 0; k < 2; k++) {
            const int8x16_t q = vreinterpretq_s8_u8(k == 0 ? even : odd);
            TESSERAQ_UNROLL
            for (int c = 0; c < w; c++) {
                const int8x16_t b = v_spread32(a + 4*(w*k + c));
                sum01[c] = vmlal_s8     (sum01[c], vget_low_s8(q), vget_low_s8(b));
                sum23[c] = vmlal_high_s8(sum23[c], q, b);
            }
        }
    }

    TESSERAQ_INLINE int32x4_t rows(int c) const { return vpaddq_s32(vpaddlq_s16(sum01[c]), vpaddlq_s16(sum23[c])); }
};
#endif

// adds the products of a kind to the sums of the row
template <int w> static TESSERAQ_INLINE void ptq_add(const uint8_t * x, const uint8_t * a, int kind, const ptq_sums<w> & sums, vfloat * acc) {
    const int up = kind == 0 ? 3 - ptq_sums<w>::UP_SALIENT : 6 - ptq_sums<w>::UP_BINARY;

    // scales: d stands before s, and the panel has the salient one first
    float d[4];
    for (int r = 0; r < 4; r++) {
        d[r] = e5m3_decode(x[kind == 0 ? TESSERAQ_NROWS + r : r]);
    }
    const float32x4_t dx = vmulq_n_f32(vld1q_f32(d), kind == 0 ? PTQ_UNIT_SALIENT : PTQ_UNIT_BINARY);
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        float   da;
        int32_t lack;
        memcpy(&da,   a + 4*(kind*w + c),       sizeof(da));
        memcpy(&lack, a + 4*((2 + kind)*w + c), sizeof(lack));
        const int32x4_t sum = vaddq_s32(up > 0 ? vshlq_n_s32(sums.rows(c), up > 0 ? up : 0) : sums.rows(c), vdupq_n_s32(lack));
        acc[c] = vfmaq_n_f32(acc[c], vmulq_f32(vcvtq_f32_s32(sum), dx), da);
    }
}

#if defined(__ARM_FEATURE_DOTPROD)
// A single column is not worth shifts: four of the eight bits of a byte are multiplied where they stand, then the other four in their
// place; each place has its own sum.
static TESSERAQ_INLINE void ptq_dot_single(const uint8_t * x, const uint8_t * aq, int32x4_t * sum) {
    int32x4_t s[4];
    TESSERAQ_UNROLL
    for (int k = 0; k < 4; k++) {
        s[k] = vdupq_n_s32(0);
    }
    const auto dot = [&](int k, vint q, int8x16_t b, int lane) TESSERAQ_LAMBDA {
        const int8x16_t c = vreinterpretq_s8_u8(q);
        s[k] = lane == 0 ? vdotq_laneq_s32(s[k], c, b, 0) : lane == 1 ? vdotq_laneq_s32(s[k], c, b, 1)
             : lane == 2 ? vdotq_laneq_s32(s[k], c, b, 2) : vdotq_laneq_s32(s[k], c, b, 3);
    };

    TESSERAQ_UNROLL
    for (int v = 0; v < 3; v++) {
        TESSERAQ_FENCE();
        const vint      low  = v_load(x + PTQ_SIGNS + v*PTQ_VECTOR);
        const vint      high = vshrq_n_u8(low, 4);
        const int8x16_t b0   = vld1q_s8((const int8_t *) aq + 4*(PTQ_SALIENT_UNITS + 8*v));
        const int8x16_t b1   = vld1q_s8((const int8_t *) aq + 4*(PTQ_SALIENT_UNITS + 8*v + 4));
        TESSERAQ_UNROLL
        for (int k = 0; k < 4; k++) {
            dot(k, vandq_u8(low,  vdupq_n_u8(1 << k)), b0, k);
            dot(k, vandq_u8(high, vdupq_n_u8(1 << k)), b1, k);
        }
    }
    dot(0, v_mask<0>(x + PTQ_LAST),               v_spread32(aq + 4*(PTQ_UNITS - 2)), 0);
    dot(1, v_mask<1>(x + PTQ_LAST + TESSERAQ_NROWS/2), v_spread32(aq + 4*(PTQ_UNITS - 1)), 0);

    // 8 times the first, 4, 2 and 1 of the others; all of it times 8
    s[1] = vaddq_s32(vshlq_n_s32(s[0], 1), s[1]);
    s[3] = vaddq_s32(vshlq_n_s32(s[2], 1), s[3]);
    *sum = vshlq_n_s32(vaddq_s32(vshlq_n_s32(s[1], 2), s[3]), 3);
}
#endif

template <int w> static TESSERAQ_INLINE void ptq_tile(const uint8_t * x, const uint8_t * a, vfloat * acc) {
    const uint8_t * aq = a + 16*w;

    {
        ptq_sums<w> sums;
        ptq_pairs_salient<ptq_sums<w>::UP_SALIENT>(x, [&](int p, vint even, vint odd) TESSERAQ_LAMBDA {
            TESSERAQ_FENCE();
            sums.add(even, odd, aq + 8*w*p);
        });
        ptq_add<w>(x, a, 0, sums, acc);
    }
    ptq_sums<w> sums;
#if defined(__ARM_FEATURE_DOTPROD)
    if (w == 1) {
        ptq_dot_single(x, aq, &sums.sum[0]);
        ptq_add<w>(x, a, 1, sums, acc);
        return;
    }
#endif
    ptq_pairs_binary<ptq_sums<w>::UP_BINARY>(x, [&](int p, vint even, vint odd) TESSERAQ_LAMBDA {
        TESSERAQ_FENCE();
        sums.add(even, odd, aq + 8*w*p);
    });
    ptq_add<w>(x, a, 1, sums, acc);
}

template <int w> static TESSERAQ_INLINE void ptq_store(float * const * s, const vfloat * acc) {
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        vst1q_f32(s[c], acc[c]);
    }
}

#endif // TESSERAQ_NROWS > 0
