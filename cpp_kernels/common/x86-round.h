#pragma once

// Blocks of 64 activations to int8 on x86.

#include "tesseraq/common/q8.h"

#include <immintrin.h>

// Largest magnitude of 64 numbers, NaN if one of them is. Without their signs floats are in the order of their bits, NaN above
// infinity; the maximum of floats would drop NaN.
static inline float q8_amax(const float * GGML_RESTRICT x) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512i mm = _mm512_setzero_si512();
    for (int j = 0; j < QK8_TSQ; j += 16) {
        mm = _mm512_max_epi32(_mm512_andnot_si512(_mm512_set1_epi32(INT32_MIN), _mm512_loadu_si512(x + j)), mm);
    }
    const __m256i m = _mm256_max_epi32(_mm512_castsi512_si256(mm), _mm512_extracti64x4_epi64(mm, 1));
#else
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    __m256i m = _mm256_setzero_si256();
    for (int j = 0; j < QK8_TSQ; j += 8) {
        m = _mm256_max_epi32(_mm256_andnot_si256(sign, _mm256_loadu_si256((const __m256i *) (x + j))), m);
    }
#endif
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtss_f32(_mm_castsi128_ps(h));
}

// 64 numbers times id, rounded to int8; returns their sum
static inline int q8_round(const float * GGML_RESTRICT x, float id, int8_t * GGML_RESTRICT q) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m512 mul = _mm512_set1_ps(id);
    __m512i sum = _mm512_setzero_si512();
    for (int j = 0; j < QK8_TSQ; j += 16) {
        const __m128i b = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + j), mul)));
        _mm_storeu_si128((__m128i *) (q + j), b);
        sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(b));
    }
    const __m256i s = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
#else
    const __m256 mul = _mm256_set1_ps(id);
    __m256i s = _mm256_setzero_si256();
    for (int j = 0; j < QK8_TSQ; j += 16) {
        const __m256i i0 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + j + 0), mul));
        const __m256i i1 = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + j + 8), mul));
        const __m256i w  = _mm256_permute4x64_epi64(_mm256_packs_epi32(i0, i1), 0xD8);
        const __m128i b  = _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
        _mm_storeu_si128((__m128i *) (q + j), b);
        s = _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_cvtepi8_epi16(b), _mm256_set1_epi16(1)));
    }
#endif
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtsi128_si32(h);
}
