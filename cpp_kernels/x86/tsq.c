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
#endif

void ggml_vec_dot_tsq2_q8_1(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) {
    const int nb = n / QK_TSQ;

    assert(n % QK_TSQ == 0);
    assert(nrc == 1);
    UNUSED(nrc);
    UNUSED(bx);
    UNUSED(by);
    UNUSED(bs);

    const block_tsq2 * GGML_RESTRICT x = vx;
    const block_q8_1 * GGML_RESTRICT y = vy;

#if defined(__AVX2__) && defined(__F16C__)
    const __m256i m3     = _mm256_set1_epi8(3);
    const __m256i shift0 = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2); // planes 0 and 1: the first Q8_1 block
    const __m256i shift1 = _mm256_setr_epi32(4, 4, 4, 4, 6, 6, 6, 6); // planes 2 and 3: the second

    __m256 acc0 = _mm256_setzero_ps();
    __m256 acc1 = _mm256_setzero_ps();
    __m128 accz = _mm_setzero_ps(); // lanes 1 and 3: -d*z*s, lanes 0 and 2: not used

    for (int i = 0; i < nb; i++) {
        const float d = tsq_decode_d(x[i].d);
        const float z = tsq_decode_z(x[i].z, 2);

        // d and s of both Q8_1 blocks at once: {d0, s0, d1, s1} * {d, -d*z, d, -d*z}
        int32_t ds0, ds1;
        memcpy(&ds0, &y[2*i + 0], sizeof(ds0));
        memcpy(&ds1, &y[2*i + 1], sizeof(ds1));
        const __m128 dz = _mm_setr_ps(d, -d*z, d, -d*z);
        const __m128 ds = _mm_mul_ps(dz, _mm_cvtph_ps(_mm_setr_epi32(ds0, ds1, 0, 0)));

        const __m256i q  = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x[i].qs));
        const __m256i q0 = _mm256_and_si256(_mm256_srlv_epi32(q, shift0), m3);
        const __m256i q1 = _mm256_and_si256(_mm256_srlv_epi32(q, shift1), m3);

        const __m256i a0 = _mm256_loadu_si256((const __m256i *) y[2*i + 0].qs);
        const __m256i a1 = _mm256_loadu_si256((const __m256i *) y[2*i + 1].qs);

        const __m256 p0 = _mm256_cvtepi32_ps(tsq_mul_sum_us8(q0, a0));
        const __m256 p1 = _mm256_cvtepi32_ps(tsq_mul_sum_us8(q1, a1));

        acc0 = tsq_fmadd(_mm256_broadcastss_ps(ds), p0, acc0);
        acc1 = tsq_fmadd(_mm256_broadcastss_ps(_mm_movehl_ps(ds, ds)), p1, acc1);
        accz = _mm_add_ps(accz, ds);
    }

    *s = tsq_hsum(_mm256_add_ps(acc0, acc1), _mm_blend_ps(accz, _mm_setzero_ps(), 0x5));
#else
    UNUSED(x);
    UNUSED(y);
    UNUSED(nb);
    ggml_vec_dot_tsq2_q8_1_generic(n, s, bs, vx, bx, vy, by, nrc);
#endif
}
