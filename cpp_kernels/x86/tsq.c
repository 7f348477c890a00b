#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TSQ_VEC_DOT_AVX512

// Codes of a block for vpdpbusd, 64 weights in their order, each times a power of two that is the same for 16 weights: masking
// planes where they stand saves the shifts, and tsq_unit() takes the powers out of the sum of a whole row.
static inline __m512i tsq_load_codes_512(const uint8_t * GGML_RESTRICT codes, int nbits) {
    if (nbits == 4) {
        const __m512i mask = _mm512_inserti64x4(_mm512_set1_epi8(0x0F), _mm256_set1_epi8((char) 0xF0), 1);

        return _mm512_and_si512(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) codes)), mask);
    }

    const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) codes));
    if (nbits == 2) {
        return _mm512_and_si512(q, _mm512_set_epi64(0xC0C0C0C0C0C0C0C0, 0xC0C0C0C0C0C0C0C0, 0x3030303030303030, 0x3030303030303030,
                                                    0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303));
    }

    // plane 3 moves down to where plane 2 is, so that there is room above it for the high bits; these move up to their planes
    const __m512i shift = _mm512_set_epi64(2, 2, 0, 0, 0, 0, 0, 0);
    const __m512i turn  = _mm512_set_epi64(63, 0, 1, 2, 1, 2, 1, 2);
    const __m512i low   = _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x3030303030303030, 0x3030303030303030,
                                           0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303);
    const __m512i all   = _mm512_set_epi64(0x7070707070707070, 0x7070707070707070, 0x7070707070707070, 0x7070707070707070,
                                           0x1C1C1C1C1C1C1C1C, 0x1C1C1C1C1C1C1C1C, 0x0707070707070707, 0x0707070707070707);
    int64_t high;
    memcpy(&high, codes + QK_TSQ/4, sizeof(high));
    const __m512i h = _mm512_rolv_epi64(_mm512_set1_epi64(high), turn);
    return _mm512_and_si512(_mm512_ternarylogic_epi64(low, _mm512_srlv_epi64(q, shift), h, 0xCA), all);
}

// what makes 1 of the powers of two of tsq_load_codes_512()
static inline __m512 tsq_unit(int nbits) {
    const __m128 u0 = _mm_set1_ps(1.0f);
    const __m128 u1 = _mm_set1_ps(nbits == 4 ? 1.0f : 1.0f/4);
    const __m128 u2 = _mm_set1_ps(1.0f/16);
    const __m128 u3 = _mm_set1_ps(nbits == 2 ? 1.0f/64 : 1.0f/16);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set_m128(u1, u0)), _mm256_set_m128(u3, u2), 1);
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const block_q8_1 * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    const __m512i lane  = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i pair  = _mm512_srli_epi32(lane, 1);
    const __m512i x_at  = _mm512_mullo_epi32(lane, _mm512_set1_epi32(TSQ_BLOCK_SIZE(nbits)));
    const __m512i y_at  = _mm512_mullo_epi32(lane, _mm512_set1_epi32(sizeof(block_q8_1)));
    const __m512  zstep = _mm512_set1_ps((1 << nbits)/128.0f);

    __m512 acc[4];
    acc[0] = acc[1] = acc[2] = acc[3] = _mm512_setzero_ps();
    __m512 accz = _mm512_setzero_ps();

    // 8 blocks at a time: their scales fill one vector, two lanes to a block because a block meets two of Q8_1
    for (int i = 0; i < nb; i += 8) {
        const uint8_t    * GGML_RESTRICT b = x + (int64_t) i*TSQ_BLOCK_SIZE(nbits);
        const block_q8_1 * GGML_RESTRICT a = y + (int64_t) i*2;
        const int m = nb - i < 8 ? nb - i : 8;

        const __mmask16 ma  = (__mmask16) ((1u << 2*m) - 1);
        const __m256i   dz  = _mm256_mmask_i32gather_epi32(_mm256_setzero_si256(), (__mmask8) ((1u << m) - 1), _mm512_castsi512_si256(x_at), b, 1);
        const __m512i   dz2 = _mm512_permutexvar_epi32(pair, _mm512_castsi256_si512(dz));
        const __m512i   ds  = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), ma, y_at, a, 1);

        const __m512i dcode = _mm512_and_si512(dz2, _mm512_set1_epi32(0xFF));
        const __m512i zcode = _mm512_and_si512(_mm512_srli_epi32(dz2, 8), _mm512_set1_epi32(0xFF));

        const __m512 d  = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(dcode, 20), _mm512_set1_epi32(103 << 23)));
        const __m512 z  = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(zcode, _mm512_set1_epi32(64))), zstep);
        const __m512 da = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(ds));
        const __m512 s  = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(ds, 16)));

        accz = _mm512_fmadd_ps(_mm512_mul_ps(d, z), s, accz);

        const __m512  scale = _mm512_mul_ps(d, da);
        __m512i at = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);

#define TSQ_STEP(k) do {                                                                                                       \
            const __m512i q  = tsq_load_codes_512(b + (k)*TSQ_BLOCK_SIZE(nbits) + TSQ_CODES, nbits);                           \
            const __m512i qa = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *) a[2*(k)].qs)),   \
                                                  _mm256_loadu_si256((const __m256i *) a[2*(k) + 1].qs), 1);                   \
            const __m512  p  = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, qa));                         \
            acc[(k) % 4] = _mm512_fmadd_ps(_mm512_permutexvar_ps(at, scale), p, acc[(k) % 4]);                                 \
            at = _mm512_add_epi32(at, _mm512_set1_epi32(2));                                                                   \
        } while (0)

        if (m == 8) {
            TSQ_STEP(0); TSQ_STEP(1); TSQ_STEP(2); TSQ_STEP(3); TSQ_STEP(4); TSQ_STEP(5); TSQ_STEP(6); TSQ_STEP(7);
        } else {
            for (int k = 0; k < m; k++) {
                TSQ_STEP(k);
            }
        }
#undef TSQ_STEP
    }

    acc[0] = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
    return _mm512_reduce_add_ps(_mm512_fmsub_ps(acc[0], tsq_unit(nbits), accz));
}

#elif defined(__AVX2__) && defined(__F16C__)
#define TSQ_VEC_DOT_AVX2

// sums of 4 neighbouring products, unsigned codes up to 15 times signed activations
static inline __m256i tsq_mul_sum_us8(__m256i q, __m256i a) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), q, a);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), q, a);
#else
    return _mm256_madd_epi16(_mm256_set1_epi16(1), _mm256_maddubs_epi16(q, a));
#endif
}

static inline __m256 tsq_fmadd(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

static inline float tsq_hsum(__m256 x, __m128 y) {
    y = _mm_add_ps(y, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    y = _mm_add_ss(y, _mm_movehdup_ps(y));
    return _mm_cvtss_f32(y);
}

// codes of a block, one to a byte: the first 32 weights and the next 32
static inline void tsq_load_codes(const uint8_t * GGML_RESTRICT codes, int nbits, __m256i * q0, __m256i * q1) {
    if (nbits == 4) {
        const __m256i m15 = _mm256_set1_epi8(15);

        const __m256i q = _mm256_loadu_si256((const __m256i *) codes);
        *q0 = _mm256_and_si256(q, m15);
        *q1 = _mm256_and_si256(_mm256_srli_epi16(q, 4), m15);
        return;
    }

    const __m256i m3     = _mm256_set1_epi8(3);
    const __m256i shift0 = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2); // planes 0 and 1
    const __m256i shift1 = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6); // planes 2 and 3

    const __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) codes));
    *q0 = _mm256_and_si256(_mm256_srlv_epi32(q, shift0), m3);
    *q1 = _mm256_and_si256(_mm256_srlv_epi32(q, shift1), m3);

    if (nbits == 3) {
        const __m256i m4      = _mm256_set1_epi8(4);
        const __m256i shifth0 = _mm256_setr_epi64x(0, 1, 2, 3); // planes 0 to 3 of 8, moved up by 2, down to bit 2
        const __m256i shifth1 = _mm256_setr_epi64x(2, 3, 4, 5); // planes 4 to 7 of 8, down to bit 2

        int64_t high;
        memcpy(&high, codes + QK_TSQ/4, sizeof(high));
        const __m256i h  = _mm256_set1_epi64x(high);
        const __m256i h0 = _mm256_srlv_epi64(_mm256_slli_epi64(h, 2), shifth0);
        const __m256i h1 = _mm256_srlv_epi64(h, shifth1);
        *q0 = _mm256_or_si256(*q0, _mm256_and_si256(h0, m4));
        *q1 = _mm256_or_si256(*q1, _mm256_and_si256(h1, m4));
    }
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const block_q8_1 * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    __m256 acc0 = _mm256_setzero_ps();
    __m256 acc1 = _mm256_setzero_ps();
    __m128 accz = _mm_setzero_ps(); // lanes 1 and 3: -d*z*s, lanes 0 and 2: not used

    for (int i = 0; i < nb; i++) {
        const uint8_t * b = x + i*TSQ_BLOCK_SIZE(nbits);
        const float     d = tsq_decode_d(b[0]);
        const float     z = tsq_decode_z(b[1], nbits);

        // d and s of both Q8_1 blocks at once: {d0, s0, d1, s1} * {d, -d*z, d, -d*z}
        int32_t ds0, ds1;
        memcpy(&ds0, &y[2*i + 0], sizeof(ds0));
        memcpy(&ds1, &y[2*i + 1], sizeof(ds1));
        const __m128 dz = _mm_setr_ps(d, -d*z, d, -d*z);
        const __m128 ds = _mm_mul_ps(dz, _mm_cvtph_ps(_mm_setr_epi32(ds0, ds1, 0, 0)));

        __m256i q0, q1;
        tsq_load_codes(b + TSQ_CODES, nbits, &q0, &q1);

        const __m256i a0 = _mm256_loadu_si256((const __m256i *) y[2*i + 0].qs);
        const __m256i a1 = _mm256_loadu_si256((const __m256i *) y[2*i + 1].qs);

        const __m256 p0 = _mm256_cvtepi32_ps(tsq_mul_sum_us8(q0, a0));
        const __m256 p1 = _mm256_cvtepi32_ps(tsq_mul_sum_us8(q1, a1));

        acc0 = tsq_fmadd(_mm256_broadcastss_ps(ds), p0, acc0);
        acc1 = tsq_fmadd(_mm256_broadcastss_ps(_mm_movehl_ps(ds, ds)), p1, acc1);
        accz = _mm_add_ps(accz, ds);
    }

    return tsq_hsum(_mm256_add_ps(acc0, acc1), _mm_blend_ps(accz, _mm_setzero_ps(), 0x5));
}
#endif

void ggml_vec_dot_tsq2_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_AVX512) || defined(TSQ_VEC_DOT_AVX2)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 2, vy);
#else
    ggml_vec_dot_tsq2_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}

void ggml_vec_dot_tsq3_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_AVX512) || defined(TSQ_VEC_DOT_AVX2)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 3, vy);
#else
    ggml_vec_dot_tsq3_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}

void ggml_vec_dot_tsq4_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(TSQ_VEC_DOT_AVX512) || defined(TSQ_VEC_DOT_AVX2)
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    *s = tsq_vec_dot(n, vx, 4, vy);
#else
    ggml_vec_dot_tsq4_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
