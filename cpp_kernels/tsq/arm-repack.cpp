#include "tesseraq/tsq/repack.h"

#include <cstring>

#if TESSERAQ_NROWS > 0

#include "tesseraq/common/round.h"

#include <arm_neon.h>

// Four rows, so that a register holds one sum for each, and every matrix has a multiple of them. What more rows would save,
// loads of activations, costs little here, since an instruction takes any of four words of a register and repeats it for all
// rows. The 32 registers are better spent on columns: 12 of them have 12 sums of the block and 12 of the row, which leaves 8
// for activations, codes and masks.
//
//   - i8mm: smmla multiplies two rows with two columns, 8 deep, twice the work of sdot. Codes and panels are interleaved by 8
//     columns (TESSERAQ_DEPTH) instead of 4: then nothing has to be zipped together, in either of them. With 4, that would take
//     an instruction for every group of 4 columns of the panel, and so half of what smmla gains. Codes are never above 120,
//     so usdot and usmmla have nothing that sdot and smmla have not.
//   - dotprod: sdot multiplies 4 rows with 4 columns of one column of the panel.
//   - neither: products of int8 add up in 16 bits, two registers to a column. A lane gets 16 of them in a block, which is
//     at most 16*15*128 = 30720, so that they are widened once, at the end of the block.
//
// With more than one column, sdot and smmla get codes as q << (7 - nbits), whose sums come in steps of the zero-point.

// registers of a vector of codes
static const int NREG = TESSERAQ_NROWS*TESSERAQ_DEPTH/16;

struct vint { uint8x16_t r[NREG]; };

typedef float32x4_t vfloat;

static TESSERAQ_INLINE vint v_load(const uint8_t * p) {
    vint a;
    TESSERAQ_UNROLL
    for (int i = 0; i < NREG; i++) {
        a.r[i] = vld1q_u8(p + 16*i);
    }
    return a;
}

static TESSERAQ_INLINE vint v_and(vint a, int mask) {
    TESSERAQ_UNROLL
    for (int i = 0; i < NREG; i++) {
        a.r[i] = vandq_u8(a.r[i], vdupq_n_u8((uint8_t) mask));
    }
    return a;
}

// bits move by n within their bytes, left if n > 0, right if not
template <int n> static TESSERAQ_INLINE vint v_shift(vint a) {
    TESSERAQ_UNROLL
    for (int i = 0; i < NREG && n != 0; i++) {
        a.r[i] = n > 0 ? vshlq_n_u8(a.r[i], n > 0 ? n : 0) : vshrq_n_u8(a.r[i], n < 0 ? -n : 1);
    }
    return a;
}

template <int nbits, int at, int up> static TESSERAQ_INLINE vint v_bits(vint a) {
    const vint moved = v_shift<up - at>(a);
    return up == 0 && at + nbits == 8 ? moved : v_and(moved, ((1 << nbits) - 1) << up);
}

template <int low, int up> static TESSERAQ_INLINE vint v_bits_high(vint a, vint b) {
    b = v_shift<7 - low>(b);
    TESSERAQ_UNROLL
    for (int i = 0; i < NREG; i++) {
        a.r[i] = vsriq_n_u8(a.r[i], b.r[i], 2);
    }
    return v_bits<3, 5, up>(a);
}

static TESSERAQ_INLINE vfloat v_zero()                   { return vdupq_n_f32(0.0f); }
static TESSERAQ_INLINE void   v_prefetch(const uint8_t *) {} // left to the processor: nobody has measured what it gains

#if TESSERAQ_DEPTH == 8
// for every two columns of a panel one register of two rows, [r0 c0] [r0 c1] [r1 c0] [r1 c1], and one of the other two
#define TSQ_NSUMS(w) ((w) == 1 ? 1 : ((w) + 1)/2*2)
#else
#define TSQ_NSUMS(w) (w)
#endif

#include "tesseraq/tsq/tile.h"

template <int i> using constant = std::integral_constant<int, i>;

// 4 or 8 bytes over and over
static TESSERAQ_INLINE int8x16_t v_spread32(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
}

#if TESSERAQ_DEPTH == 8
static TESSERAQ_INLINE int8x16_t v_spread64(const void * p) {
    int64_t x;
    memcpy(&x, p, sizeof(x));
    return vreinterpretq_s8_s64(vdupq_n_s64(x));
}
#else
// a panel's activations are loaded for 4 columns at a time, the last 4 of which may begin among those before
static constexpr int tsq_first(int w, int c) {
    return c/4*4 + 4 <= w ? c/4*4 : w - 4;
}
#endif

// scales of 4 rows, times the step of the zero-point; zero-points less 64, in the upper half
static TESSERAQ_INLINE void tsq_load_header(const uint8_t * dz, int nbits, float32x4_t * d, int16x8_t * z) {
    const uint16x8_t h    = vmovl_u8(vld1_u8(dz));
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(vget_low_u16(h)), 20);
    *d = vreinterpretq_f32_u32(vaddq_u32(bits, vdupq_n_u32((uint32_t) (103 - (7 - nbits)) << 23)));
    *z = vsubq_s16(vreinterpretq_s16_u16(h), vdupq_n_s16(64));
}

#if defined(__ARM_FEATURE_DOTPROD)

// sum of q*a of the 4 rows for a panel of one column. Codes are multiplied where they stand, if that saves shifts: each place
// has its own sum, and they come together at the end.
template <int nbits> static TESSERAQ_INLINE int32x4_t tsq_dot_single(const uint8_t * codes, const uint8_t * aq) {
    int32x4_t s[3][NREG];
    tesseraq_unroll<3*NREG>([&](auto i) TESSERAQ_LAMBDA {
        s[i/NREG][i % NREG] = vdupq_n_s32(0);
    });

    int8x16_t b[4];
    tesseraq_unroll<4>([&](auto i) TESSERAQ_LAMBDA {
        b[i] = vld1q_s8((const int8_t *) aq + 16*i);
    });

    // adds the products of the group of columns g to the sum of a place
    auto dot = [&](auto place, auto g, vint q) TESSERAQ_LAMBDA {
        tesseraq_unroll<NREG>([&](auto i) TESSERAQ_LAMBDA {
            const int8x16_t qs = vreinterpretq_s8_u8(q.r[i]);
#if TESSERAQ_DEPTH == 8
            constexpr int lane = decltype(g)::value % 2;
            s[place][i] = vdotq_s32(s[place][i], qs, vreinterpretq_s8_s64(vdupq_laneq_s64(vreinterpretq_s64_s8(b[g/2]), lane)));
#else
            constexpr int lane = decltype(g)::value % 4;
            s[place][i] = vdotq_laneq_s32(s[place][i], qs, b[g/4], lane);
#endif
        });
    };

    if constexpr (nbits == 2) {
        constexpr int n = NGROUP/4;

        tesseraq_unroll<n>([&](auto v) TESSERAQ_LAMBDA {
            TESSERAQ_FENCE();
            const vint q = v_load(codes + v*VECTOR);
            dot(constant<0>(), constant<v + 0*n>(), v_and(q, 0x03));
            dot(constant<1>(), constant<v + 1*n>(), v_and(q, 0x0C));
            dot(constant<2>(), constant<v + 2*n>(), v_and(q, 0x30));
            dot(constant<0>(), constant<v + 3*n>(), v_shift<-6>(q));
        });
    } else if constexpr (nbits == 3) {
        tesseraq_unroll<NGROUP/8>([&](auto t) TESSERAQ_LAMBDA {
            TESSERAQ_FENCE();
            const vint q0 = v_load(codes + (3*t + 0)*VECTOR);
            const vint q1 = v_load(codes + (3*t + 1)*VECTOR);
            const vint q2 = v_load(codes + (3*t + 2)*VECTOR);
            dot(constant<0>(), constant<8*t + 0>(), v_and(q0, 0x07));
            dot(constant<1>(), constant<8*t + 1>(), v_and(q0, 0x38));
            dot(constant<0>(), constant<8*t + 2>(), v_and(q1, 0x07));
            dot(constant<1>(), constant<8*t + 3>(), v_and(q1, 0x38));
            dot(constant<0>(), constant<8*t + 4>(), v_and(q2, 0x07));
            dot(constant<1>(), constant<8*t + 5>(), v_and(q2, 0x38));
            dot(constant<2>(), constant<8*t + 6>(), v_bits_high<6, 0>(q0, q2));
            dot(constant<2>(), constant<8*t + 7>(), v_bits_high<7, 0>(q1, q2));
        });
    } else {
        constexpr int n = NGROUP/2;

        tesseraq_unroll<n>([&](auto v) TESSERAQ_LAMBDA {
            TESSERAQ_FENCE();
            const vint q = v_load(codes + v*VECTOR);
            dot(constant<0>(), constant<v + 0*n>(), v_bits<4, 0, 0>(q));
            dot(constant<1>(), constant<v + 1*n>(), v_bits<4, 4, 0>(q));
        });
    }

    tesseraq_unroll<NREG>([&](auto i) TESSERAQ_LAMBDA {
        if (nbits == 2) {
            s[0][i] = vsraq_n_s32(vsraq_n_s32(s[0][i], s[1][i], 2), s[2][i], 4);
        } else if (nbits == 3) {
            s[0][i] = vsraq_n_s32(vaddq_s32(s[0][i], s[2][i]), s[1][i], 3);
        } else {
            s[0][i] = vaddq_s32(s[0][i], s[1][i]);
        }
    });
#if TESSERAQ_DEPTH == 8
    return vpaddq_s32(s[0][0], s[0][1]);
#else
    return s[0][0];
#endif
}

#endif

template <int nbits, int w> static TESSERAQ_INLINE void tsq_tile(const uint8_t * dz, const uint8_t * codes, const uint8_t * a, vfloat * acc) {
    const uint8_t * as = a  + w*sizeof(float);
    const uint8_t * aq = as + w*2*sizeof(int16_t);

    float32x4_t d;
    int16x8_t   z;

#if defined(__ARM_FEATURE_DOTPROD)
    if constexpr (w == 1) {
        int32x4_t sum = vshlq_n_s32(tsq_dot_single<nbits>(codes, aq), 7 - nbits);

        TESSERAQ_FENCE();
        tsq_load_header(dz, nbits, &d, &z);
        const int8x8_t ds = vld1_s8((const int8_t *) a);
        sum    = vmlal_high_lane_s16(sum, z, vreinterpret_s16_s8(ds), 2);
        acc[0] = vfmaq_lane_f32(acc[0], vmulq_f32(vcvtq_f32_s32(sum), d), vreinterpret_f32_s8(ds), 0);
        return;
    }
#endif

    tsq_load_header(dz, nbits, &d, &z);

#if TESSERAQ_DEPTH == 8
    constexpr int pairs = (w + 1)/2;

    // of the last column of an odd number there are two
    const auto spread = [&](const uint8_t * p, auto i, auto size) TESSERAQ_LAMBDA {
        constexpr int bytes = decltype(size)::value;
        if constexpr (2*decltype(i)::value + 1 < w) {
            return bytes == 8 ? vld1q_s8((const int8_t *) p + 16*i) : v_spread64(p + 8*i);
        } else {
            return bytes == 8 ? v_spread64(p + 16*i) : v_spread32(p + 8*i);
        }
    };

    // -(z - 64)*sum(a) for two rows and two columns; z as [z0 z0 z1 z1 z2 z2 z3 z3]
    const int16x8_t z2 = vzip2q_s16(z, z);

    int32x4_t sum[2*pairs];
    tesseraq_unroll<pairs>([&](auto p) TESSERAQ_LAMBDA {
        const int16x8_t s  = vreinterpretq_s16_s8(spread(as, p, constant<4>()));
        const int16x8_t s2 = vuzp1q_s16(s, s);
        sum[2*p + 0] = vmull_s16(vget_low_s16(z2), vget_low_s16(s2));
        sum[2*p + 1] = vmull_high_s16(z2, s2);
    });

    tsq_unpack_block<nbits, 7 - nbits>(codes, [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_FENCE();
        tesseraq_unroll<pairs>([&](auto p) TESSERAQ_LAMBDA {
            const int8x16_t b = spread(aq + 8*w*g, p, constant<8>());
            sum[2*p + 0] = vmmlaq_s32(sum[2*p + 0], vreinterpretq_s8_u8(q.r[0]), b);
            sum[2*p + 1] = vmmlaq_s32(sum[2*p + 1], vreinterpretq_s8_u8(q.r[1]), b);
        });
    });

    const float32x4_t d01 = vzip1q_f32(d, d);
    const float32x4_t d23 = vzip2q_f32(d, d);
    tesseraq_unroll<pairs>([&](auto p) TESSERAQ_LAMBDA {
        const float32x4_t da = vreinterpretq_f32_s8(spread(a, p, constant<4>()));
        acc[2*p + 0] = vfmaq_f32(acc[2*p + 0], vmulq_f32(vcvtq_f32_s32(sum[2*p + 0]), d01), da);
        acc[2*p + 1] = vfmaq_f32(acc[2*p + 1], vmulq_f32(vcvtq_f32_s32(sum[2*p + 1]), d23), da);
    });
#else
    // four columns of the panel's scales and sums at a time; what a narrower panel has behind them is not used
    const auto scales = [&](int c) TESSERAQ_LAMBDA { return vld1q_f32((const float *) (a + c/4*16)); };
    const auto sums   = [&](int c) TESSERAQ_LAMBDA { return vreinterpretq_s16_u8(vld1q_u8(as + c/4*16)); };

    int32x4_t sum[w];

#if defined(__ARM_FEATURE_DOTPROD)
    const auto dot = [&](auto c, int8x16_t q, const uint8_t * b) TESSERAQ_LAMBDA {
        if constexpr (w < 4) {
            sum[c] = vdotq_s32(sum[c], q, v_spread32(b + 4*c));
        } else {
            constexpr int first = tsq_first(w, decltype(c)::value);
            constexpr int lane  = decltype(c)::value - first;
            sum[c] = vdotq_laneq_s32(sum[c], q, vld1q_s8((const int8_t *) b + 4*first), lane);
        }
    };

    // -(z - 64)*sum(a)
    tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
        constexpr int lane = decltype(c)::value % 4*2;
        sum[c] = vmull_high_laneq_s16(z, sums(c), lane);
    });
    tsq_unpack_block<nbits, 7 - nbits>(codes, [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_FENCE();
        tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
            dot(c, vreinterpretq_s8_u8(q.r[0]), aq + 4*w*g);
        });
    });
#else
    const auto spread = [&](auto c, const uint8_t * b) TESSERAQ_LAMBDA {
        if constexpr (w < 4) {
            return v_spread32(b + 4*c);
        } else {
            constexpr int first = tsq_first(w, decltype(c)::value);
            constexpr int lane  = decltype(c)::value - first;
            return vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(vld1q_s8((const int8_t *) b + 4*first)), lane));
        }
    };

    int16x8_t sum01[w], sum23[w];
    tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
        sum01[c] = sum23[c] = vdupq_n_s16(0);
    });
    tsq_unpack_block<nbits, 0>(codes, [&](int g, vint q) TESSERAQ_LAMBDA {
        if (w > 1) {
            TESSERAQ_FENCE();
        }
        const int8x16_t qs = vreinterpretq_s8_u8(q.r[0]);
        tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
            const int8x16_t b = spread(c, aq + 4*w*g);
            sum01[c] = vmlal_s8     (sum01[c], vget_low_s8(qs), vget_low_s8(b));
            sum23[c] = vmlal_high_s8(sum23[c], qs, b);
        });
    });
    tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
        constexpr int lane = decltype(c)::value % 4*2;
        const int32x4_t qa = vpaddq_s32(vpaddlq_s16(sum01[c]), vpaddlq_s16(sum23[c]));
        sum[c] = vmlal_high_laneq_s16(vshlq_n_s32(qa, 7 - nbits), z, sums(c), lane);
    });
#endif

    tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
        constexpr int lane = decltype(c)::value % 4;
        acc[c] = vfmaq_laneq_f32(acc[c], vmulq_f32(vcvtq_f32_s32(sum[c]), d), scales(c), lane);
    });
#endif
}

template <int w> static TESSERAQ_INLINE void tsq_store(float * const * s, const vfloat * acc) {
    tesseraq_unroll<w>([&](auto c) TESSERAQ_LAMBDA {
#if TESSERAQ_DEPTH == 8
        if constexpr (w > 1) {
            const vfloat r01 = acc[c/2*2], r23 = acc[c/2*2 + 1];
            vst1q_f32(s[c], c % 2 == 0 ? vuzp1q_f32(r01, r23) : vuzp2q_f32(r01, r23));
            return;
        }
#endif
        vst1q_f32(s[c], acc[c]);
    });
}

#endif // TESSERAQ_NROWS > 0
