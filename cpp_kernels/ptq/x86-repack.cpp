#include "tesseraq/ptq/repack.h"

#if TESSERAQ_NROWS > 0

#include "tesseraq/common/x86-vector.h"

#include "tesseraq/ptq/x86-round.h"

// With VNNI, codes enter the products as q << 3 and bits as 1 << 6, so that the sums of the activations, which stand in the panel, complete
// them. maddubs has no room for that; it gets both as they are, and the factors come in when its 16-bit sums are widened.

template <int nbits, int at, int up> static TESSERAQ_INLINE vint v_bits(vint a) {
    return v_and(v_shift<up - at>(a), v_set8(((1 << nbits) - 1) << up));
}

template <int up> static TESSERAQ_INLINE vint v_mask(const uint8_t * p) {
#if TESSERAQ_NROWS == 16
    uint64_t bits;
    memcpy(&bits, p, sizeof(bits));
    return _mm512_maskz_mov_epi8(_cvtu64_mask64(bits), v_set8(1 << up));
#else
    const vint byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const vint bit  = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    const vint bits = v_and(_mm256_shuffle_epi8(v_spread32(p), byte), bit);
    return v_and(_mm256_cmpeq_epi8(bits, bit), v_set8(1 << up));
#endif
}

#define PTQ_NSUMS(w) (w)

#include "tesseraq/ptq/tile.h"

static TESSERAQ_INLINE void ptq_to_units(const int8_t * q, uint8_t * y) {
    // bytes of rows 0 and 1, and of rows 2 and 3, in turns
    const __m128i r01 = _mm_loadu_si128((const __m128i *) q);
    const __m128i r23 = _mm_loadu_si128((const __m128i *) (q + 16));
    const __m128i t01 = _mm_unpacklo_epi8(r01, _mm_srli_si128(r01, 8));
    const __m128i t23 = _mm_unpacklo_epi8(r23, _mm_srli_si128(r23, 8));
    _mm_storeu_si128((__m128i *) y,        _mm_unpacklo_epi16(t01, t23));
    _mm_storeu_si128((__m128i *) (y + 16), _mm_unpackhi_epi16(t01, t23));
}

// adds products of both kinds to the sums of the row
template <int w> static TESSERAQ_INLINE void ptq_add(const uint8_t * x, const uint8_t * a, int kind, const vint * sum, vfloat * acc) {
    // scales: d stands before s, and the panel has the salient one first
    const int exponent = kind == 0 ? 103 - 3 : 103 - 5;
    const vfloat d = v_cast(v_add(v_shl32(v_bytes(x + (kind == 0 ? TESSERAQ_NROWS : 0)), 20), v_set32(exponent << 23)));
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        float da;
        memcpy(&da, a + 4*(kind*w + c), sizeof(da));
        acc[c] = v_fma(v_mul(v_float(sum[c]), d), v_setf(da), acc[c]);
    }
}

template <int w> static TESSERAQ_INLINE void ptq_tile(const uint8_t * x, const uint8_t * a, vfloat * acc) {
    const uint8_t * as = a  + w*2*sizeof(float);
    const uint8_t * aq = as + w*2*sizeof(int32_t);

    vint sum[w];

#if TESSERAQ_VNNI
    if (w == 1) {
        // A single column is not worth shifts: codes are multiplied where they stand, each place has its own sum.
        vint s0 = v_set32(0), s1 = v_set32(0), s2 = v_set32(0), s3 = v_set32(0);
        TESSERAQ_UNROLL
        for (int v = 0; v < 3; v++) {
            const vint q = v_load(x + PTQ_CODES + v*PTQ_VECTOR);
            s0 = v_dot8(s0, v_and(q, v_set8(0x0F)), v_spread32(aq + 4*v));
            s1 = v_dot8(s1, v_and(q, v_set8(0xF0)), v_spread32(aq + 4*(v + 3)));
        }
        sum[0] = v_add(v_add(v_spread32(as), v_shl32(s0, 3)), v_sra32(s1, 1));
        ptq_add<w>(x, a, 0, sum, acc);

        // four of the eight places of a byte, then the other four in their place
        s0 = v_dot8(v_set32(0), v_mask<4>(x + PTQ_LAST),               v_spread32(aq + 4*(PTQ_UNITS - 2)));
        s1 = v_dot8(v_set32(0), v_mask<5>(x + PTQ_LAST + TESSERAQ_NROWS/2), v_spread32(aq + 4*(PTQ_UNITS - 1)));
        s2 = s3 = v_set32(0);
        TESSERAQ_UNROLL
        for (int v = 0; v < 3; v++) {
            const uint8_t * b = aq + 4*(PTQ_SALIENT_UNITS + 8*v);
            const vint high = v_load(x + PTQ_SIGNS + v*PTQ_VECTOR);
            const vint low  = v_shift<4>(high);
            s0 = v_dot8(s0, v_and(low,  v_set8(0x10)), v_spread32(b +  0));
            s1 = v_dot8(s1, v_and(low,  v_set8(0x20)), v_spread32(b +  4));
            s2 = v_dot8(s2, v_and(low,  v_set8(0x40)), v_spread32(b +  8));
            s3 = v_dot8(s3, v_and(low,  v_set8(0x80)), v_spread32(b + 12));
            s0 = v_dot8(s0, v_and(high, v_set8(0x10)), v_spread32(b + 16));
            s1 = v_dot8(s1, v_and(high, v_set8(0x20)), v_spread32(b + 20));
            s2 = v_dot8(s2, v_and(high, v_set8(0x40)), v_spread32(b + 24));
            s3 = v_dot8(s3, v_and(high, v_set8(0x80)), v_spread32(b + 28));
        }
        s1 = v_add(v_add(s0, s0), s1);                // in 32nds
        s2 = v_add(v_add(v_add(s1, s1), s2), v_sra32(s3, 1)); // in 64ths
        sum[0] = v_add(s2, v_spread32(as + 4));
        ptq_add<w>(x, a, 1, sum, acc);
        return;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum[c] = v_spread32(as + 4*c);
    }
    ptq_unpack_salient<3>(x, [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = v_dot8(sum[c], q, v_spread32(aq + 4*(g*w + c)));
        }
    });
    ptq_add<w>(x, a, 0, sum, acc);

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum[c] = v_spread32(as + 4*(w + c));
    }
    ptq_unpack_binary<6>(x, [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = v_dot8(sum[c], q, v_spread32(aq + 4*(g*w + c)));
        }
    });
    ptq_add<w>(x, a, 1, sum, acc);
#else
    // 16-bit sums hold all products of a kind
    vint sum16[w];
    const auto widen = [&](int kind, int unit) TESSERAQ_LAMBDA {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum[c] = v_add(v_spread32(as + 4*(kind*w + c)), _mm256_madd_epi16(sum16[c], _mm256_set1_epi16((short) unit)));
        }
    };
    const auto dot = [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum16[c] = v_dot8(sum16[c], q, v_spread32(aq + 4*(g*w + c)));
        }
    };

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum16[c] = v_set32(0);
    }
    ptq_unpack_salient<0>(x, dot);
    widen(0, 8);
    ptq_add<w>(x, a, 0, sum, acc);

    if (w == 1) {
        // as above, but for the shift: each place has its own sum
        vint s0 = v_dot8(v_set32(0), v_mask<0>(x + PTQ_LAST),               v_spread32(aq + 4*(PTQ_UNITS - 2)));
        vint s1 = v_dot8(v_set32(0), v_mask<1>(x + PTQ_LAST + TESSERAQ_NROWS/2), v_spread32(aq + 4*(PTQ_UNITS - 1)));
        vint s2 = v_set32(0), s3 = v_set32(0);
        TESSERAQ_UNROLL
        for (int v = 0; v < 3; v++) {
            const uint8_t * b = aq + 4*(PTQ_SALIENT_UNITS + 8*v);
            const vint low  = v_load(x + PTQ_SIGNS + v*PTQ_VECTOR);
            const vint high = v_shift<-4>(low);
            s0 = v_dot8(s0, v_and(low,  v_set8(1)), v_spread32(b +  0));
            s1 = v_dot8(s1, v_and(low,  v_set8(2)), v_spread32(b +  4));
            s2 = v_dot8(s2, v_and(low,  v_set8(4)), v_spread32(b +  8));
            s3 = v_dot8(s3, v_and(low,  v_set8(8)), v_spread32(b + 12));
            s0 = v_dot8(s0, v_and(high, v_set8(1)), v_spread32(b + 16));
            s1 = v_dot8(s1, v_and(high, v_set8(2)), v_spread32(b + 20));
            s2 = v_dot8(s2, v_and(high, v_set8(4)), v_spread32(b + 24));
            s3 = v_dot8(s3, v_and(high, v_set8(8)), v_spread32(b + 28));
        }
        sum[0] = v_dot16(v_spread32(as + 4), s0, _mm256_set1_epi16(64));
        sum[0] = v_dot16(sum[0], s1, _mm256_set1_epi16(32));
        sum[0] = v_dot16(sum[0], s2, _mm256_set1_epi16(16));
        sum[0] = v_dot16(sum[0], s3, _mm256_set1_epi16(8));
        ptq_add<w>(x, a, 1, sum, acc);
        return;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum16[c] = v_set32(0);
    }
    ptq_unpack_binary<0>(x, dot);
    widen(1, 64);
    ptq_add<w>(x, a, 1, sum, acc);
#endif
}

template <int w> static TESSERAQ_INLINE void ptq_store(float * const * s, const vfloat * acc) {
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        v_store(s[c], acc[c]);
    }
}

#endif // TESSERAQ_NROWS > 0
