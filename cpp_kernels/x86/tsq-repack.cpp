#include "tesseraq/tsq-repack.h"

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC's own AVX-512 intrinsics
#endif

#include <immintrin.h>

#if TSQ_NROWS > 0

#include "tesseraq/x86/tsq-round.h"

#if defined(_MSC_VER)
#define TSQ_INLINE __forceinline
#define TSQ_LAMBDA
#define TSQ_UNROLL
#else
#define TSQ_INLINE inline __attribute__((always_inline))
#define TSQ_LAMBDA __attribute__((always_inline))
#define TSQ_UNROLL _Pragma("GCC unroll 16")
#endif

// A vector has 4 bytes, an int or a float for every row of the group.
//
// With VNNI, codes enter the products as q << (7 - nbits), so that sums come in steps of the zero-point: then the zero-point's
// part is an integer product like the others, and one conversion to float serves both. maddubs has no room for that; it gets q
// as it is, and the factor comes in when its 16-bit sums are widened.

#if TSQ_NROWS == 16

typedef __m512i vint;
typedef __m512  vfloat;

static TSQ_INLINE vint   v_load (const void * p)            { return _mm512_loadu_si512(p); }
static TSQ_INLINE vint   v_bytes(const uint8_t * p)         { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }
static TSQ_INLINE vint   v_set8 (int x)                     { return _mm512_set1_epi8((char) x); }
static TSQ_INLINE vint   v_set32(int x)                     { return _mm512_set1_epi32(x); }
static TSQ_INLINE vint   v_and  (vint a, vint b)            { return _mm512_and_si512(a, b); }
static TSQ_INLINE vint   v_or   (vint a, vint b)            { return _mm512_or_si512(a, b); }
static TSQ_INLINE vint   v_mix  (vint m, vint a, vint b)    { return _mm512_ternarylogic_epi32(m, a, b, 0xCA); }
static TSQ_INLINE vint   v_add  (vint a, vint b)            { return _mm512_add_epi32(a, b); }
static TSQ_INLINE vint   v_shl32(vint a, int n)             { return _mm512_slli_epi32(a, n); }
static TSQ_INLINE vint   v_sra32(vint a, int n)             { return _mm512_srai_epi32(a, n); }
static TSQ_INLINE vfloat v_float(vint a)                    { return _mm512_cvtepi32_ps(a); }
static TSQ_INLINE vfloat v_cast (vint a)                    { return _mm512_castsi512_ps(a); }
static TSQ_INLINE vfloat v_setf (float x)                   { return _mm512_set1_ps(x); }
static TSQ_INLINE vfloat v_mul  (vfloat a, vfloat b)        { return _mm512_mul_ps(a, b); }
static TSQ_INLINE vfloat v_fma  (vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
static TSQ_INLINE void   v_store(float * p, vfloat a)       { _mm512_storeu_ps(p, a); }
static TSQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm512_dpbusd_epi32(s, q, a); }
static TSQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm512_dpwssd_epi32(s, a, b); }

// bits move by n, left if n > 0, right if not; they may come in from the neighbouring byte
template <int n> static TSQ_INLINE vint v_shift(vint a) {
    return n > 0 ? _mm512_slli_epi16(a, n > 0 ? n : 0) : n < 0 ? _mm512_srli_epi16(a, n < 0 ? -n : 0) : a;
}

#define TSQ_VNNI 1

#else

typedef __m256i vint;
typedef __m256  vfloat;

static TSQ_INLINE vint   v_load (const void * p)            { return _mm256_loadu_si256((const __m256i *) p); }
static TSQ_INLINE vint   v_bytes(const uint8_t * p)         { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }
static TSQ_INLINE vint   v_set8 (int x)                     { return _mm256_set1_epi8((char) x); }
static TSQ_INLINE vint   v_set32(int x)                     { return _mm256_set1_epi32(x); }
static TSQ_INLINE vint   v_and  (vint a, vint b)            { return _mm256_and_si256(a, b); }
static TSQ_INLINE vint   v_or   (vint a, vint b)            { return _mm256_or_si256(a, b); }
static TSQ_INLINE vint   v_mix  (vint m, vint a, vint b)    { return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b)); }
static TSQ_INLINE vint   v_add  (vint a, vint b)            { return _mm256_add_epi32(a, b); }
static TSQ_INLINE vint   v_shl32(vint a, int n)             { return _mm256_slli_epi32(a, n); }
static TSQ_INLINE vint   v_sra32(vint a, int n)             { return _mm256_srai_epi32(a, n); }
static TSQ_INLINE vfloat v_float(vint a)                    { return _mm256_cvtepi32_ps(a); }
static TSQ_INLINE vfloat v_cast (vint a)                    { return _mm256_castsi256_ps(a); }
static TSQ_INLINE vfloat v_setf (float x)                   { return _mm256_set1_ps(x); }
static TSQ_INLINE vfloat v_mul  (vfloat a, vfloat b)        { return _mm256_mul_ps(a, b); }
static TSQ_INLINE vfloat v_fma  (vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
static TSQ_INLINE void   v_store(float * p, vfloat a)       { _mm256_storeu_ps(p, a); }

template <int n> static TSQ_INLINE vint v_shift(vint a) {
    return n > 0 ? _mm256_slli_epi16(a, n > 0 ? n : 0) : n < 0 ? _mm256_srli_epi16(a, n < 0 ? -n : 0) : a;
}

#if defined(__AVXVNNI__)
static TSQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm256_dpbusd_avx_epi32(s, q, a); }
static TSQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm256_dpwssd_avx_epi32(s, a, b); }

#define TSQ_VNNI 1
#else
// here s are 16-bit sums
static TSQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm256_add_epi16(s, _mm256_maddubs_epi16(q, a)); }
static TSQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm256_add_epi32(s, _mm256_madd_epi16(a, b)); }

#define TSQ_VNNI 0
#endif

#endif

template <int nbits, int at, int up> static TSQ_INLINE vint v_bits(vint a) {
    return v_and(v_shift<up - at>(a), v_set8(((1 << nbits) - 1) << up));
}

template <int low, int up> static TSQ_INLINE vint v_bits_high(vint a, vint b) {
    return v_and(v_mix(v_set8(6 << up), v_shift<up - 5>(a), v_shift<up - low>(b)), v_set8(7 << up));
}

static TSQ_INLINE vfloat v_zero()                      { return v_setf(0.0f); }
static TSQ_INLINE void   v_prefetch(const uint8_t * p) { _mm_prefetch((const char *) p, _MM_HINT_T0); }

#define TSQ_NSUMS(w) (w)

#include "tesseraq/tsq-tile.h"

static TSQ_INLINE vint v_spread32(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return v_set32(x);
}

template <int nbits, int w> static TSQ_INLINE void tsq_tile(const uint8_t * dz, const uint8_t * codes, const uint8_t * a, vfloat * acc) {
    const uint8_t * as = a  + w*sizeof(float);
    const uint8_t * aq = as + w*2*sizeof(int16_t);

    // -(z - 64)*sum(a) as a product of two pairs of 16-bit numbers
    const vint z = v_or(v_bytes(dz + TSQ_NROWS), v_set32(64 << 16));

    vint sum[w];
    TSQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum[c] = v_dot16(v_set32(0), z, v_spread32(as + 4*c));
    }

#if TSQ_VNNI
    if (w == 1) {
        // A single column is not worth shifts: codes are multiplied where they stand, each place has its own sum.
        vint s0 = v_set32(0), s1 = v_set32(0), s2 = v_set32(0), s3 = v_set32(0);
        if (nbits == 2) {
            TSQ_UNROLL
            for (int v = 0; v < 4; v++) {
                const vint q = v_load(codes + v*VECTOR);
                s0 = v_dot8(s0, v_and(q, v_set8(0x03)), v_spread32(aq + 4*(v +  0)));
                s1 = v_dot8(s1, v_and(q, v_set8(0x0C)), v_spread32(aq + 4*(v +  4)));
                s2 = v_dot8(s2, v_and(q, v_set8(0x30)), v_spread32(aq + 4*(v +  8)));
                s3 = v_dot8(s3, v_and(q, v_set8(0xC0)), v_spread32(aq + 4*(v + 12)));
            }
            sum[0] = v_add(v_add(sum[0], v_shl32(s0, 5)), v_add(v_add(v_shl32(s1, 3), v_shl32(s2, 1)), v_sra32(s3, 1)));
        } else if (nbits == 3) {
            TSQ_UNROLL
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
            TSQ_UNROLL
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
        tsq_unpack_block<nbits, 7 - nbits>(codes, [&](int g, vint q) TSQ_LAMBDA {
            TSQ_UNROLL
            for (int c = 0; c < w; c++) {
                sum[c] = v_dot8(sum[c], q, v_spread32(aq + 4*(g*w + c)));
            }
        });
    }
#else
    // 16-bit sums hold all products of a block, for TSQ4 those of half a block
    const vint unit = _mm256_set1_epi16(1 << (7 - nbits));
    vint sum16[w];
    TSQ_UNROLL
    for (int c = 0; c < w; c++) {
        sum16[c] = v_set32(0);
    }
    int count = 0;
    tsq_unpack_block<nbits, 0>(codes, [&](int g, vint q) TSQ_LAMBDA {
        TSQ_UNROLL
        for (int c = 0; c < w; c++) {
            sum16[c] = v_dot8(sum16[c], q, v_spread32(aq + 4*(g*w + c)));
        }
        count++;
        if (count == 16 || (nbits == 4 && count == 8)) {
            TSQ_UNROLL
            for (int c = 0; c < w; c++) {
                sum[c]   = v_add(sum[c], _mm256_madd_epi16(sum16[c], unit));
                sum16[c] = v_set32(0);
            }
        }
    });
#endif

    // the scale, times the step of the zero-point
    const vfloat d = v_cast(v_add(v_shl32(v_bytes(dz), 20), v_set32((103 - (7 - nbits)) << 23)));
    TSQ_UNROLL
    for (int c = 0; c < w; c++) {
        float da;
        memcpy(&da, a + 4*c, sizeof(da));
        acc[c] = v_fma(v_mul(v_float(sum[c]), d), v_setf(da), acc[c]);
    }
}

template <int w> static TSQ_INLINE void tsq_store(float * const * s, const vfloat * acc) {
    TSQ_UNROLL
    for (int c = 0; c < w; c++) {
        v_store(s[c], acc[c]);
    }
}

#endif // TSQ_NROWS > 0
