#pragma once

// Blocks of 128 activations to int8, for activations in rows (Q8_PTQ) and in panels.

#include "tesseraq/ptq/ptq.h"

#include <immintrin.h>

// largest magnitude of n numbers, a multiple of 16 and 8 more, NaN if one of them is: see q8_amax
static inline float ptq_amax(const float * GGML_RESTRICT x, int n) {
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    __m256i m = _mm256_andnot_si256(sign, _mm256_loadu_si256((const __m256i *) (x + n - 8)));
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512i mm = _mm512_setzero_si512();
    for (int j = 0; j + 16 <= n; j += 16) {
        mm = _mm512_max_epi32(_mm512_andnot_si512(_mm512_set1_epi32(INT32_MIN), _mm512_loadu_si512(x + j)), mm);
    }
    m = _mm256_max_epi32(_mm256_max_epi32(_mm512_castsi512_si256(mm), _mm512_extracti64x4_epi64(mm, 1)), m);
#else
    for (int j = 0; j + 8 < n; j += 8) {
        m = _mm256_max_epi32(_mm256_andnot_si256(sign, _mm256_loadu_si256((const __m256i *) (x + j))), m);
    }
#endif
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(h));
}

// n numbers times id, rounded to int8; returns their sum
static inline int ptq_round_to(const float * GGML_RESTRICT x, int n, float id, int8_t * GGML_RESTRICT q) {
    __m128i h = _mm_setzero_si128();
    int j = 0;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512i sum = _mm512_setzero_si512();
    for (; j + 16 <= n; j += 16) {
        const __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), _mm512_set1_ps(id))));
        _mm_storeu_si128((__m128i *) (q + j), b);
        sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(b));
    }
    const __m256i s = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    h = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
#endif
    for (; j < n; j += 8) {
        const __m256i i = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + j), _mm256_set1_ps(id)));
        const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
        const __m128i b = _mm_packs_epi16(w, w);
        _mm_storel_epi64((__m128i *) (q + j), b);
        h = _mm_add_epi32(h, _mm_madd_epi16(_mm_cvtepi8_epi16(b), _mm_set1_epi16(1)));
    }
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtsi128_si32(h);
}

// a part of a block gets one scale and one sum
static inline void ptq_round_part(const float * GGML_RESTRICT x, int n, int lack, int8_t * GGML_RESTRICT q, float * d, int32_t * s) {
    float id;
    *d = q8_scale(ptq_amax(x, n), &id);
    *s = lack*ptq_round_to(x, n, id, q);
}

static inline void ptq_round(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d, int32_t * GGML_RESTRICT s) {
    ptq_round_part(x,               PTQ_SALIENT, PTQ_LACK_SALIENT, q,               &d[0], &s[0]);
    ptq_round_part(x + PTQ_SALIENT, PTQ_BINARY,  PTQ_LACK_BINARY,  q + PTQ_SALIENT, &d[1], &s[1]);
}
