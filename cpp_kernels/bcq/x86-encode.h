#pragma once

// Blocks of 64 activations to codewords, for activations in rows (A4_BCQ) and in panels.

#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/compiler.h"
#include "tesseraq/common/round.h"

#include <immintrin.h>

#if defined(TESSERAQ_AVX512) && defined(__AVX512VBMI__)

// Encode 64 numbers: codewords go to q, the scale to d. Returns the sum of the codewords. Looking up the nearest codewords of a codebook in a table of 128 is one instruction
static inline int bcq_encode(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float id4;
    *d = bcq_activation_scale(q8_amax(x), &id4);
    q8_round(x, id4, q);

    const __m512i u    = _mm512_loadu_si512(q);
    const __m512i half = _mm512_srli_epi16(u, 1); // the lookup ignores the highest bit, where the neighbour's lowest comes in

    __m512i best  = _mm512_set1_epi32(INT32_MAX);
    __m512i found = _mm512_setzero_si512();
    for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
        const int8_t * table = bcq4_tables.nearest4[b];

        const __m512i c4 = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), half, _mm512_loadu_si512(table + 64));
        const __m512i e  = _mm512_min_epu8(_mm512_abs_epi8(_mm512_subs_epi8(c4, u)), _mm512_set1_epi8(127));
        const __m512i e2 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), e, e);
        // both halves of a group of 8 get its sum
        const __m512i   sum  = _mm512_add_epi32(e2, _mm512_shuffle_epi32(e2, (_MM_PERM_ENUM) 0xB1));
        const __mmask16 less = _mm512_cmplt_epi32_mask(sum, best);
        best  = _mm512_min_epi32(best, sum);
        found = _mm512_mask_mov_epi32(found, less, c4);
    }

    // codewords are a quarter of what was found: as unsigned bytes, so that the shift needs no sign
    const __m512i c = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(_mm512_xor_si512(found, _mm512_set1_epi8((char) 0x80)), 2),
                                                       _mm512_set1_epi8(0x3F)), _mm512_set1_epi8(32));
    _mm512_storeu_si512(q, c);

    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), c);
    return _mm512_reduce_add_epi32(sums);
}

#else

// Encode 64 numbers: codewords go to q, the scale to d. Returns the sum of the codewords. How many borders between codewords they are above is the index of the nearest one
static inline int bcq_encode(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float id4;
    *d = bcq_activation_scale(q8_amax(x), &id4);
    q8_round(x, id4, q);

    const __m256i m127 = _mm256_set1_epi8(127);
    const __m256i ones = _mm256_set1_epi16(1);

    const __m256i u0 = _mm256_loadu_si256((const __m256i *) (q +  0));
    const __m256i u1 = _mm256_loadu_si256((const __m256i *) (q + 32));

    __m256i best0  = _mm256_set1_epi32(INT32_MAX);
    __m256i best1  = best0;
    __m256i found0 = _mm256_setzero_si256();
    __m256i found1 = found0;
    for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
        __m256i i0 = _mm256_setzero_si256();
        __m256i i1 = i0;
        for (int i = 0; i < BCQ4_LEVELS - 1; i++) {
            const __m256i border = _mm256_set1_epi8(bcq4_tables.border4[b][i]);
            i0 = _mm256_sub_epi8(i0, _mm256_cmpgt_epi8(u0, border));
            i1 = _mm256_sub_epi8(i1, _mm256_cmpgt_epi8(u1, border));
        }
        const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) bcq4_tables.codeword4[b]));
        const __m256i c0 = _mm256_shuffle_epi8(table, i0);
        const __m256i c1 = _mm256_shuffle_epi8(table, i1);

        const __m256i e0 = _mm256_min_epu8(_mm256_abs_epi8(_mm256_subs_epi8(c0, u0)), m127);
        const __m256i e1 = _mm256_min_epu8(_mm256_abs_epi8(_mm256_subs_epi8(c1, u1)), m127);
        const __m256i p0 = _mm256_madd_epi16(_mm256_maddubs_epi16(e0, e0), ones);
        const __m256i p1 = _mm256_madd_epi16(_mm256_maddubs_epi16(e1, e1), ones);
        // both halves of a group of 8 get its sum
        const __m256i s0 = _mm256_add_epi32(p0, _mm256_shuffle_epi32(p0, 0xB1));
        const __m256i s1 = _mm256_add_epi32(p1, _mm256_shuffle_epi32(p1, 0xB1));

        found0 = _mm256_blendv_epi8(found0, c0, _mm256_cmpgt_epi32(best0, s0));
        found1 = _mm256_blendv_epi8(found1, c1, _mm256_cmpgt_epi32(best1, s1));
        best0  = _mm256_min_epi32(best0, s0);
        best1  = _mm256_min_epi32(best1, s1);
    }

    // codewords are a quarter of what was found: as unsigned bytes, so that the shift needs no sign
    const __m256i flip = _mm256_set1_epi8((char) 0x80);
    const __m256i six  = _mm256_set1_epi8(0x3F);
    const __m256i half = _mm256_set1_epi8(32);
    const __m256i q0 = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(found0, flip), 2), six), half);
    const __m256i q1 = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(_mm256_xor_si256(found1, flip), 2), six), half);
    _mm256_storeu_si256((__m256i *) (q +  0), q0);
    _mm256_storeu_si256((__m256i *) (q + 32), q1);

    const __m256i one = _mm256_set1_epi8(1);
    const __m256i sum = _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(one, q0), _mm256_maddubs_epi16(one, q1)), ones);
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtsi128_si32(h);
}

#endif
