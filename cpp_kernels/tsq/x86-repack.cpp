#include "tesseraq/tsq/repack.h"

#if TESSERAQ_NROWS > 0

#include "tesseraq/common/x86-vector.h"

#include "tesseraq/common/round.h"

// With VNNI, codes enter the products as q << (7 - nbits), so that sums come in steps of the zero-point: then the zero-point's
// part is an integer product like the others, and one conversion to float serves both. maddubs has no room for that; it gets q
// as it is, and the factor comes in when its 16-bit sums are widened.

template <int nbits, int at, int up> static TESSERAQ_INLINE vint v_bits(vint a) {
    return v_and(v_shift<up - at>(a), v_set8(((1 << nbits) - 1) << up));
}

template <int low, int up> static TESSERAQ_INLINE vint v_bits_high(vint a, vint b) {
    return v_and(v_mix(v_set8(6 << up), v_shift<up - 5>(a), v_shift<up - low>(b)), v_set8(7 << up));
}

#define TSQ_NSUMS(w) (w)

#include "tesseraq/tsq/tile.h"

template <int nbits, int w> static TESSERAQ_INLINE void tsq_tile(const uint8_t * dz, const uint8_t * codes, const uint8_t * a, vfloat * acc) {
    const uint8_t * as = a  + w*sizeof(float);
    const uint8_t * aq = as + w*2*sizeof(int16_t);

    // -(z - 64)*sum(a) as a product of two pairs of 16-bit numbers
    const vint z = v_or(v_bytes(dz + TESSERAQ_NROWS), v_set32(64 << 16));

    vint sum[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum[c] = v_dot16(v_set32(0), z, v_spread32(as + 4*c));
    }

#if TESSERAQ_VNNI
    if (w == 1) {
        // A single column is not worth shifts: codes are multiplied where they stand, each place has its own sum.
        vint s0 = v_set32(0), s1 = v_set32(0), s2 = v_set32(0), s3 = v_set32(0);
        if (nbits == 2) {
            TESSERAQ_UNROLL
            for (int v = 0; v < 4; v++) {
                const vint q = v_load(codes + v*VECTOR);
                s0 = v_dot8(s0, v_and(q, v_set8(0x03)), v_spread32(aq + 4*(v +  0)));
                s1 = v_dot8(s1, v_and(q, v_set8(0x0C)), v_spread32(aq + 4*(v +  4)));
                s2 = v_dot8(s2, v_and(q, v_set8(0x30)), v_spread32(aq + 4*(v +  8)));
                s3 = v_dot8(s3, v_and(q, v_set8(0xC0)), v_spread32(aq + 4*(v + 12)));
            }
            sum[0] = v_add(v_add(sum[0], v_shl32(s0, 5)), v_add(v_add(v_shl32(s1, 3), v_shl32(s2, 1)), v_sra32(s3, 1)));
        } else if (nbits == 3) {
            TESSERAQ_UNROLL
            for (int t = 0; t < 2; t++) {
                const vint q0 = v_load(codes + (3*t + 0)*VECTOR);
                const vint q1 = v_load(codes + (3*t + 1)*VECTOR);
                const vint q2 = v_load(codes + (3*t + 2)*VECTOR);
                s0 = v_dot8(s0, v_and(q0, v_set8(0x07)), v_spread32(aq + 4*(8*t + 0)));
                s1 = v_dot8(s1, v_and(q0, v_set8(0x38)), v_spread32(aq + 4*(8*t + 1)));
                s0 = v_dot8(s0, v_and(q1, v_set8(0x07)), v_spread32(aq + 4*(8*t + 2)));
                s1 = v_dot8(s1, v_and(q1, v_set8(0x38)), v_spread32(aq + 4*(8*t + 3)));
                s0 = v_dot8(s0, v_and(q2, v_set8(0x07)), v_spread32(aq + 4*(8*t + 4)));
                s1 = v_dot8(s1, v_and(q2, v_set8(0x38)), v_spread32(aq + 4*(8*t + 5)));
                s2 = v_dot8(s2, v_bits_high<6, 5>(q0, q2), v_spread32(aq + 4*(8*t + 6)));
                s2 = v_dot8(s2, v_bits_high<7, 5>(q1, q2), v_spread32(aq + 4*(8*t + 7)));
            }
            sum[0] = v_add(v_add(sum[0], v_shl32(s0, 4)), v_add(v_shl32(s1, 1), v_sra32(s2, 1)));
        } else {
            TESSERAQ_UNROLL
            for (int v = 0; v < 8; v += 2) {
                const vint q0 = v_load(codes + (v + 0)*VECTOR);
                const vint q1 = v_load(codes + (v + 1)*VECTOR);
                s0 = v_dot8(s0, v_and(q0, v_set8(0x0F)), v_spread32(aq + 4*(v + 0)));
                s1 = v_dot8(s1, v_and(q0, v_set8(0xF0)), v_spread32(aq + 4*(v + 8)));
                s2 = v_dot8(s2, v_and(q1, v_set8(0x0F)), v_spread32(aq + 4*(v + 1)));
                s3 = v_dot8(s3, v_and(q1, v_set8(0xF0)), v_spread32(aq + 4*(v + 9)));
            }
            sum[0] = v_add(v_add(sum[0], v_shl32(v_add(s0, s2), 3)), v_sra32(v_add(s1, s3), 1));
        }
    } else {
        tsq_unpack_block<nbits, 7 - nbits>(codes, [&](int g, vint q) TESSERAQ_LAMBDA {
            TESSERAQ_UNROLL
            for (int c = 0; c < w; c++) {
                sum[c] = v_dot8(sum[c], q, v_spread32(aq + 4*(g*w + c)));
            }
        });
    }
#else
    // 16-bit sums hold all products of a block, for TSQ4 those of half a block
    const vint unit = _mm256_set1_epi16(1 << (7 - nbits));
    vint sum16[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum16[c] = v_set32(0);
    }
    int count = 0;
    tsq_unpack_block<nbits, 0>(codes, [&](int g, vint q) TESSERAQ_LAMBDA {
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum16[c] = v_dot8(sum16[c], q, v_spread32(aq + 4*(g*w + c)));
        }
        count++;
        if (count == 16 || (nbits == 4 && count == 8)) {
            TESSERAQ_UNROLL
            for (int c = 0; c < w; c++) {
                sum[c]   = v_add(sum[c], _mm256_madd_epi16(sum16[c], unit));
                sum16[c] = v_set32(0);
            }
        }
    });
#endif

    // the scale, times the step of the zero-point
    const vfloat d = v_cast(v_add(v_shl32(v_bytes(dz), 20), v_set32((103 - (7 - nbits)) << 23)));
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        float da;
        memcpy(&da, a + 4*c, sizeof(da));
        acc[c] = v_fma(v_mul(v_float(sum[c]), d), v_setf(da), acc[c]);
    }
}

template <int w> static TESSERAQ_INLINE void tsq_store(float * const * s, const vfloat * acc) {
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        v_store(s[c], acc[c]);
    }
}

#endif // TESSERAQ_NROWS > 0
