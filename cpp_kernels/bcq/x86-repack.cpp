#include "tesseraq/bcq/repack.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC's own AVX-512 intrinsics
#endif

#if BCQ_NROWS > 0

#include <immintrin.h>

#include "tesseraq/bcq/tile.h"

// A vector has 4 bytes, an int or a float for each of 16 rows. Two vectors of indices are a group of 8 columns of all rows: their
// selectors come out of the heads with one instruction, and codewords out of all codebooks, a table of 128, with another.
template <int w> static void bcq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb = n / QK_BCQ;

    const __m512i table0 = _mm512_loadu_si512(bcq_tables.shifted[0]);
    const __m512i table1 = _mm512_loadu_si512(bcq_tables.shifted[4]);
    const __m512i low    = _mm512_set1_epi8(0x0F);

    __m512 acc[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        acc[c] = _mm512_setzero_ps();
    }

    for (int i = 0; i < nb; i++) {
        if (w == 1) {
            // decoding reads every weight once, from memory: ask for it well ahead
            for (size_t j = 0; j < BCQ_NROWS*sizeof(block_bcq4); j += 64) {
                _mm_prefetch((const char *) x + TESSERAQ_AHEAD + j, _MM_HINT_T0);
            }
        }

        const uint8_t * as = a  + w*sizeof(float);
        const uint8_t * aq = as + w*2*sizeof(int16_t);

        const __m512i head = _mm512_loadu_si512(x);

        // -BCQ_OFFSET*sum(a)
        __m512i sum[w];
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            int16_t minus;
            memcpy(&minus, as + 4*c, sizeof(minus));
            sum[c] = _mm512_set1_epi32(BCQ_OFFSET*minus);
        }

        // the selector of group v to bits 4-6 of the 4 bytes of a row; of two rows in 64 bits, the second is 32 bits further up
        __m512i at = _mm512_set1_epi64(0x2424242404040404);
        TESSERAQ_UNROLL
        for (int v = 0; v < QK_BCQ/BCQ_GROUP; v++) {
            const __m512i sel = _mm512_multishift_epi64_epi8(at, head);
            at = _mm512_add_epi8(at, _mm512_set1_epi8(3));

            const __m512i q  = _mm512_loadu_si512(x + 64*(v + 1));
            const __m512i q0 = _mm512_permutex2var_epi8(table0, _mm512_ternarylogic_epi64(low, q, sel, 0xCA), table1);
            const __m512i q1 = _mm512_permutex2var_epi8(table0, _mm512_ternarylogic_epi64(low, _mm512_srli_epi16(q, 4), sel, 0xCA), table1);

            TESSERAQ_UNROLL
            for (int c = 0; c < w; c++) {
                int32_t a0, a1;
                memcpy(&a0, aq + 4*((2*v + 0)*w + c), sizeof(a0));
                memcpy(&a1, aq + 4*((2*v + 1)*w + c), sizeof(a1));
                sum[c] = _mm512_dpbusd_epi32(sum[c], q0, _mm512_set1_epi32(a0));
                sum[c] = _mm512_dpbusd_epi32(sum[c], q1, _mm512_set1_epi32(a1));
            }
        }

        const __m512i code = _mm512_and_si512(head, _mm512_set1_epi32(0xFF));
        const __m512  d    = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(103 << 23)));
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            float da;
            memcpy(&da, a + 4*c, sizeof(da));
            acc[c] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[c]), d), _mm512_set1_ps(da), acc[c]);
        }

        x += BCQ_NROWS*sizeof(block_bcq4);
        a += w*Q8_TSQ_BLOCK_SIZE;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        _mm512_storeu_ps(s[c], acc[c]);
    }
}

#endif // BCQ_NROWS > 0
