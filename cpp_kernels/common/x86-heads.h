#pragma once

// Scales of the blocks of a group with AVX-512.

#include "tesseraq/common/compiler.h"
#include "tesseraq/common/q8.h"

#if defined(TESSERAQ_AVX512)

#include <immintrin.h>

// The first two bytes, d and z, of the m blocks of a group, in the lowest bytes of 16 lanes. Blocks have 2 + 8*nbits bytes. Vectors are loaded
// from every second (4 bits), third or fourth block on, as many as have their first bytes in one, and a permutation fetches these.
static TESSERAQ_INLINE void x86_load_heads(const uint8_t * GGML_RESTRICT x, int nbits, int m, __m512i * d, __m512i * z) {
    const int size = 2 + 8*nbits;
    const int each = nbits == 2 ? 4 : nbits == 3 ? 3 : 2;
    const int end  = m*size;

    // 32-bit word of block i of the group in its vector, and the byte in that word; with 3 bits, the last vector begins earlier so that it
    // ends with the group
    const __m512i word = nbits == 2 ? _mm512_set_epi32(13, 9, 4, 0, 13, 9, 4, 0, 13, 9, 4, 0, 13, 9, 4, 0)
                       : nbits == 3 ? _mm512_set_epi32(9, 13, 6, 0, 13, 6, 0, 13, 6, 0, 13, 6, 0, 13, 6, 0)
                                    : _mm512_set_epi32(8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0, 8, 0);
    const __m512i byte = nbits == 3 ? _mm512_set_epi32(2, 0, 2, 0, 0, 2, 0, 0, 2, 0, 0, 2, 0, 0, 2, 0)
                                    : _mm512_set_epi32(2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0);

    __m512i heads = _mm512_setzero_si512();
    TESSERAQ_UNROLL
    for (int i = 0; i < Q8_GROUP; i += each) {
        const int at = nbits == 3 && i == 15 ? 16*size - 64 : i*size;
        if (m < Q8_GROUP && at >= end) {
            break;
        }
        const __mmask16 lanes = (__mmask16) (((1u << each) - 1) << i);
        const __m512i   v     = m == Q8_GROUP || end - at >= 64 ? _mm512_loadu_si512(x + at)
                                                                    : _mm512_maskz_loadu_epi8(~0ULL >> (64 - (end - at)), x + at);
        heads = _mm512_mask_permutexvar_epi32(heads, lanes, word, v);
    }

    // the byte of d, then that of z, of each lane to its lowest place
    const __m512i lane  = _mm512_set_epi32(12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0, 12, 8, 4, 0);
    const __m512i low   = _mm512_or_si512(_mm512_add_epi32(lane, byte), _mm512_set1_epi32((int) 0x80808000));
    *d = _mm512_shuffle_epi8(heads, low);
    *z = _mm512_shuffle_epi8(heads, _mm512_add_epi32(low, _mm512_set1_epi32(1)));
}

// floats of E5M3 codes in 16 lanes
static TESSERAQ_INLINE __m512 x86_decode_e5m3(__m512i codes) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(codes, 20), _mm512_set1_epi32(103 << 23)));
}

#endif // defined(TESSERAQ_AVX512)
