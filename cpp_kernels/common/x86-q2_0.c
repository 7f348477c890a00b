// Stock Q2_0, which upstream has no x86 SIMD for.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "quants.h"

#include <assert.h>

#define UNUSED GGML_UNUSED

#if defined(__AVX2__) && defined(__F16C__)
// 32 codes, one to a byte in the order of the weights, out of 8 bytes with 4 codes each
static inline __m256i q2_0_load_codes(const uint8_t * GGML_RESTRICT qs) {
    int64_t bytes;
    memcpy(&bytes, qs, sizeof(bytes));
    const __m256i all = _mm256_set1_epi64x(bytes);
    const __m256i m3  = _mm256_set1_epi8(3);

#if defined(__AVX512VBMI__) && defined(__AVX512VL__)
    const __m256i at = _mm256_setr_epi8( 0,  2,  4,  6,  8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                        32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
    return _mm256_and_si256(_mm256_multishift_epi64_epi8(at, all), m3);
#else
    // each byte into the upper halves of two 16-bit numbers, where one keeps the low two codes and the other the high two;
    // 65 = 1 + (1 << 6) copies a pair of codes 6 bits up: the second one lands at the start of the next byte
    const __m256i spread = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,
                                            -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    const __m256i halves = _mm256_set1_epi32((int) 0xF0000F00);
    const __m256i copy   = _mm256_set1_epi32((65 << 20) | (65 << 8));

    const __m256i q = _mm256_and_si256(_mm256_shuffle_epi8(all, spread), halves);
    return _mm256_and_si256(_mm256_mulhi_epu16(q, copy), m3);
#endif
}

static inline __m256 q2_0_fmadd(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// sums of 4 neighbouring (q - 1)*a
static inline __m256i q2_0_dot(__m256i q, __m256i a) {
    const __m256i one = _mm256_set1_epi8(1);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_sub_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q, a), _mm256_dpbusd_epi32(_mm256_setzero_si256(), one, a));
#elif defined(__AVXVNNI__)
    return _mm256_sub_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), q, a), _mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), one, a));
#else
    const __m256i p = _mm256_sub_epi16(_mm256_maddubs_epi16(q, a), _mm256_maddubs_epi16(one, a));
    return _mm256_madd_epi16(_mm256_set1_epi16(1), p);
#endif
}
#endif

void ggml_vec_dot_q2_0_q8_0(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
#if defined(__AVX2__) && defined(__F16C__)
    assert(n % QK2_0 == 0);
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    const block_q2_0 * GGML_RESTRICT x = vx;
    const block_q8_0 * GGML_RESTRICT y = vy;

    const int nb = n / QK2_0;

    __m256 acc0 = _mm256_setzero_ps();
    __m256 acc1 = _mm256_setzero_ps();

    // one block of 64 weights maps to two Q8_0 blocks
    for (int i = 0; i < nb; i++) {
        const float d  = GGML_CPU_FP16_TO_FP32(x[i].d);
        const float d0 = d*GGML_CPU_FP16_TO_FP32(y[2*i + 0].d);
        const float d1 = d*GGML_CPU_FP16_TO_FP32(y[2*i + 1].d);

        const __m256i a0 = _mm256_loadu_si256((const __m256i *) y[2*i + 0].qs);
        const __m256i a1 = _mm256_loadu_si256((const __m256i *) y[2*i + 1].qs);

        const __m256 p0 = _mm256_cvtepi32_ps(q2_0_dot(q2_0_load_codes(x[i].qs + 0), a0));
        const __m256 p1 = _mm256_cvtepi32_ps(q2_0_dot(q2_0_load_codes(x[i].qs + 8), a1));

        acc0 = q2_0_fmadd(_mm256_set1_ps(d0), p0, acc0);
        acc1 = q2_0_fmadd(_mm256_set1_ps(d1), p1, acc1);
    }

    acc0 = _mm256_add_ps(acc0, acc1);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(acc0), _mm256_extractf128_ps(acc0, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    sum = _mm_add_ss(sum, _mm_movehdup_ps(sum));
    *s = _mm_cvtss_f32(sum);
#else
    ggml_vec_dot_q2_0_q8_0_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
