#include "tesseraq/bcq/repack.h"

#if TESSERAQ_NROWS > 0

#include "tesseraq/common/x86-vector.h"

#include "tesseraq/bcq/tile.h"

// The codewords of all four codebooks are a table of 16 bytes, and each plane of a block has a codebook of its own: selectors stand above the
// indices of all columns of a row. Without VNNI, products of two vectors of columns are as many as 16 bits hold.
template <int k> static TESSERAQ_INLINE void bcq2_plane(const vint * q, vint selectors, vint table, vint * entries) {
    // selector k to bits 2-3; what else stands in these bytes is masked with it
    const vint sel = v_shift<2 - 2*k>(selectors);
    TESSERAQ_UNROLL
    for (int v = 0; v < 4; v++) {
        entries[v] = v_look(table, v_and(v_mix(v_set8(3), v_shift<-2*k>(q[v]), sel), v_set8(15)));
    }
}

// adds products of 16 columns with those of column c of a panel of w columns
template <int w> static TESSERAQ_INLINE vint bcq2_dot(vint sum, const vint * entries, const uint8_t * aq, int first, int c) {
#if TESSERAQ_VNNI
    TESSERAQ_UNROLL
    for (int v = 0; v < 4; v++) {
        sum = v_dot8(sum, entries[v], v_spread32(aq + 4*((first + v)*w + c)));
    }
    return sum;
#else
    TESSERAQ_UNROLL
    for (int v = 0; v < 4; v += 2) {
        vint s = v_dot8(v_set32(0), entries[v], v_spread32(aq + 4*((first + v)*w + c)));
        s   = v_dot8(s, entries[v + 1], v_spread32(aq + 4*((first + v + 1)*w + c)));
        sum = v_dot16(sum, s, _mm256_set1_epi16(1));
    }
    return sum;
#endif
}

template <int w> static void bcq2_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb = n / QK_BCQ;

    const vint table = v_table(bcq2_tables.shifted[0]);

    vfloat acc[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        acc[c] = v_zero();
    }

    for (int i = 0; i < nb; i++) {
        if (w == 1) {
            // decoding reads every weight once, from memory: ask for it well ahead
            for (size_t j = 0; j < BCQ2_NROWS*sizeof(block_bcq2); j += 64) {
                v_prefetch(x + TESSERAQ_AHEAD + j);
            }
        }

        const uint8_t * as = a  + w*sizeof(float);
        const uint8_t * aq = as + w*2*sizeof(int16_t);

        // a row's selectors in all 4 bytes of its lane
        const vint first     = v_table("\0\0\0\0\4\4\4\4\10\10\10\10\14\14\14\14");
        const vint selectors = v_look(v_bytes(x + BCQ2_NROWS), first);

        vint q[4];
        TESSERAQ_UNROLL
        for (int v = 0; v < 4; v++) {
            q[v] = v_load(x + 2*BCQ2_NROWS + 4*BCQ2_NROWS*v);
        }

        // -BCQ_OFFSET*sum(a)
        vint sum[w];
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            int16_t minus;
            memcpy(&minus, as + 4*c, sizeof(minus));
            sum[c] = v_set32(BCQ_OFFSET*minus);
        }

        vint entries[4];
#define BCQ2_PLANE(k)                                                \
        bcq2_plane<k>(q, selectors, table, entries);                 \
        TESSERAQ_UNROLL                                              \
        for (int c = 0; c < w; c++) {                                \
            sum[c] = bcq2_dot<w>(sum[c], entries, aq, 4*(k), c);     \
        }
        BCQ2_PLANE(0)
        BCQ2_PLANE(1)
        BCQ2_PLANE(2)
        BCQ2_PLANE(3)
#undef BCQ2_PLANE

        const vfloat d = v_cast(v_add(v_shl32(v_bytes(x), 20), v_set32(103 << 23)));
        TESSERAQ_UNROLL
        for (int c = 0; c < w; c++) {
            float da;
            memcpy(&da, a + 4*c, sizeof(da));
            acc[c] = v_fma(v_mul(v_float(sum[c]), d), v_setf(da), acc[c]);
        }

        x += BCQ2_NROWS*sizeof(block_bcq2);
        a += w*Q8_TSQ_BLOCK_SIZE;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        v_store(s[c], acc[c]);
    }
}

BCQ_GEMM(bcq2)

#if BCQ4_NROWS > 0

// A vector has 4 bytes, an int or a float for each of 16 rows. Two vectors of indices are a group of 8 columns of all rows: their
// selectors come out of the heads with one instruction, and codewords out of all codebooks, a table of 128, with another.
template <int w> static void bcq4_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb = n / QK_BCQ;

    const __m512i table0 = _mm512_loadu_si512(bcq4_tables.shifted[0]);
    const __m512i table1 = _mm512_loadu_si512(bcq4_tables.shifted[4]);
    const __m512i low    = _mm512_set1_epi8(0x0F);

    __m512 acc[w];
    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        acc[c] = _mm512_setzero_ps();
    }

    for (int i = 0; i < nb; i++) {
        if (w == 1) {
            // decoding reads every weight once, from memory: ask for it well ahead
            for (size_t j = 0; j < BCQ4_NROWS*sizeof(block_bcq4); j += 64) {
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
        for (int v = 0; v < QK_BCQ/BCQ4_GROUP; v++) {
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

        x += BCQ4_NROWS*sizeof(block_bcq4);
        a += w*Q8_TSQ_BLOCK_SIZE;
    }

    TESSERAQ_UNROLL
    for (int c = 0; c < w; c++) {
        _mm512_storeu_ps(s[c], acc[c]);
    }
}

BCQ_GEMM(bcq4)

#endif // BCQ4_NROWS > 0

#endif // TESSERAQ_NROWS > 0
