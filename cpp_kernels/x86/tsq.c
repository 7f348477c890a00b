#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"

#include "tesseraq/tsq.h"
#include "tesseraq/tsq-cpu.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__AVX2__) && defined(__F16C__)
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
#if defined(__AVX2__) && defined(__F16C__)
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
#if defined(__AVX2__) && defined(__F16C__)
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
#if defined(__AVX2__) && defined(__F16C__)
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
