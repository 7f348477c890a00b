#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_AVX2)

#include "tesseraq/bcq/encode.h"
#include "tesseraq/common/x86-heads.h"

#include <immintrin.h>

#if defined(TESSERAQ_AVX512) && defined(__AVX512VBMI__)
#define BCQ4_AVX512
#endif

// Codewords enter products as unsigned numbers, c + BCQ_OFFSET; the sums of the activations take the offset out again. Products
// of a block stay spread over the lanes until the row ends.

// ---- what both layouts have with AVX2 --------------------------------------------------------------------------------------------

static TESSERAQ_INLINE __m256 bcq_fmadd(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// sums of 4 neighbouring products of the entries of a block, the first 32 weights and the next 32
static TESSERAQ_INLINE __m256 bcq_products(__m256i q0, __m256i q1, const uint8_t * GGML_RESTRICT a) {
    const __m256i a0 = _mm256_loadu_si256((const __m256i *) (a +  0));
    const __m256i a1 = _mm256_loadu_si256((const __m256i *) (a + 32));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    const __m256i p = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q0, a0), q1, a1);
#elif defined(__AVXVNNI__)
    const __m256i p = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), q0, a0), q1, a1);
#else
    // entries up to 63 leave room for 4 products in 16 bits
    const __m256i p = _mm256_madd_epi16(_mm256_set1_epi16(1), _mm256_add_epi16(_mm256_maddubs_epi16(q0, a0), _mm256_maddubs_epi16(q1, a1)));
#endif
    return _mm256_cvtepi32_ps(p);
}

// a row by what multiplies a block
#define BCQ_VEC_DOT(layout)                                                                                                 \
    static inline float layout##_vec_dot(int n, const block_##layout * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {  \
        assert(n % QK_BCQ == 0);                                                                                            \
        const int nb = n / QK_BCQ;                                                                                          \
                                                                                                                            \
        __m256 acc[2];                                                                                                      \
        acc[0] = acc[1] = _mm256_setzero_ps();                                                                              \
        float acco = 0.0f; /* -d*sum(a) */                                                                                  \
                                                                                                                            \
        for (int i = 0; i < nb; i += Q8_GROUP) {                                                                            \
            const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;                                                            \
                                                                                                                            \
            for (int b = 0; b < m; b++, x++) {                                                                              \
                float   da;                                                                                                 \
                int16_t s;                                                                                                  \
                memcpy(&da, y + 4*b,       sizeof(da));                                                                     \
                memcpy(&s,  y + 4*m + 4*b, sizeof(s));                                                                      \
                                                                                                                            \
                const float d = e5m3_decode(x->d)*da;                                                                       \
                acc[b % 2]  = bcq_fmadd(_mm256_set1_ps(d), layout##_dot_block(x, y + 8*m + b*QK_BCQ), acc[b % 2]);          \
                acco       += d*s;                                                                                          \
            }                                                                                                               \
            y += m*Q8_TSQ_BLOCK_SIZE;                                                                                       \
        }                                                                                                                   \
                                                                                                                            \
        const __m256 sum = _mm256_add_ps(acc[0], acc[1]);                                                                   \
        __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));                                  \
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));                                                                             \
        h = _mm_add_ss(h, _mm_movehdup_ps(h));                                                                              \
        return _mm_cvtss_f32(h) + BCQ_OFFSET*acco;                                                                          \
    }

static TESSERAQ_INLINE void bcq_store_weights(float * GGML_RESTRICT y, __m128i c, __m256 d) {
    _mm256_storeu_ps(y + 0, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(c))));
    _mm256_storeu_ps(y + 8, _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(c, 8)))));
}

// ---- BCQ4 ------------------------------------------------------------------------------------------------------------------------

#if defined(BCQ4_AVX512)

// All 8 codebooks are one table of 128 bytes, and the index of a weight with its selector above it is 7 bits: one instruction
// looks up a block.
static TESSERAQ_INLINE __m512i bcq4_load_codes(const block_bcq4 * GGML_RESTRICT x, __m512i table0, __m512i table1) {
    // selector k to bits 4-6 of the 8 bytes of group k; the selectors begin at bit 8 of the block
    const __m512i at = _mm512_set_epi64(0x1919191919191919, 0x1616161616161616, 0x1313131313131313, 0x1010101010101010,
                                        0x0D0D0D0D0D0D0D0D, 0x0A0A0A0A0A0A0A0A, 0x0707070707070707, 0x0404040404040404);
    const __m512i up = _mm512_set_epi64(4, 4, 4, 4, 0, 0, 0, 0);

    int64_t head;
    memcpy(&head, x, sizeof(head));
    const __m512i sel = _mm512_multishift_epi64_epi8(at, _mm512_set1_epi64(head));
    const __m512i q   = _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) x->qs)), up);
    // the lookup ignores the highest bit
    return _mm512_permutex2var_epi8(table0, _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x0F), q, sel, 0xCA), table1);
}

// scales of the m blocks of a group in 16 lanes, out of the first words of the blocks, every second of which are in one vector
static TESSERAQ_INLINE __m512 bcq4_load_scales(const block_bcq4 * GGML_RESTRICT x, int m) {
    const __m512i word = _mm512_set_epi32(9, 0, 9, 0, 9, 0, 9, 0, 9, 0, 9, 0, 9, 0, 9, 0);

    __m512i heads = _mm512_setzero_si512();
    TESSERAQ_UNROLL
    for (int i = 0; i < Q8_GROUP; i += 2) {
        if (m < Q8_GROUP && i >= m) {
            break;
        }
        const __m512i v = m == Q8_GROUP || i + 1 < m ? _mm512_loadu_si512(x + i)
                                                         : _mm512_maskz_loadu_epi32(0x1FF, x + i); // the last block ends here
        heads = _mm512_mask_permutexvar_epi32(heads, (__mmask16) (3u << i), word, v);
    }

    const __m512i d = _mm512_and_si512(heads, _mm512_set1_epi32(0xFF));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(d, 20), _mm512_set1_epi32(103 << 23)));
}

// one group of m blocks
static TESSERAQ_INLINE void bcq4_dot_group(const block_bcq4 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y, int m,
                                     __m512i table0, __m512i table1, __m512 * acc, __m512 * acco) {
    const __mmask16 blocks = (__mmask16) ((1u << m) - 1);

    const __m512 scale = _mm512_mul_ps(bcq4_load_scales(x, m), _mm512_maskz_loadu_ps(blocks, y));

    // -BCQ_OFFSET*sum(a)
    const __m512i s = _mm512_maskz_loadu_epi32(blocks, y + 4*m);
    const __m512i o = _mm512_madd_epi16(_mm512_set1_epi32(BCQ_OFFSET), s);
    *acco = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(o), *acco);

    float scales[16];
    _mm512_storeu_ps(scales, scale);
    TESSERAQ_IN_MEMORY(scales);

    const uint8_t * GGML_RESTRICT a = y + 8*m;

    TESSERAQ_UNROLL
    for (int b = 0; b < m; b++) {
        const __m512i q = bcq4_load_codes(x + b, table0, table1);
        const __m512i p = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(a + b*QK_BCQ));
        acc[b % 4] = _mm512_fmadd_ps(_mm512_set1_ps(scales[b]), _mm512_cvtepi32_ps(p), acc[b % 4]);
    }
}

static inline float bcq4_vec_dot(int n, const block_bcq4 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_BCQ == 0);
    const int nb = n / QK_BCQ;

    const __m512i table0 = _mm512_loadu_si512(bcq4_tables.shifted[0]);
    const __m512i table1 = _mm512_loadu_si512(bcq4_tables.shifted[4]);

    __m512 acc[4];
    acc[0] = acc[1] = acc[2] = acc[3] = _mm512_setzero_ps();
    __m512 acco = _mm512_setzero_ps();

    int i = 0;
    for (; i + Q8_GROUP <= nb; i += Q8_GROUP) {
        bcq4_dot_group(x, y, Q8_GROUP, table0, table1, acc, &acco);
        x += Q8_GROUP;
        y += Q8_GROUP*Q8_TSQ_BLOCK_SIZE;
    }
    if (i < nb) {
        bcq4_dot_group(x, y, nb - i, table0, table1, acc, &acco);
    }

    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])), acco));
}

static TESSERAQ_INLINE void bcq4_dequantize_row(const block_bcq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    const __m512i table0 = _mm512_loadu_si512(bcq4_tables.codeword[0]);
    const __m512i table1 = _mm512_loadu_si512(bcq4_tables.codeword[4]);

    for (int64_t i = 0; i < nb; i++, y += QK_BCQ) {
        const __m512  d = _mm512_set1_ps(e5m3_decode(x[i].d));
        const __m512i c = bcq4_load_codes(x + i, table0, table1);
        _mm512_storeu_ps(y +  0, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(c)))));
        _mm512_storeu_ps(y + 16, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 1)))));
        _mm512_storeu_ps(y + 32, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 2)))));
        _mm512_storeu_ps(y + 48, _mm512_mul_ps(d, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 3)))));
    }
}

#else

// codebooks s0 and s1 in the halves of a vector
static TESSERAQ_INLINE __m256i bcq4_load_tables(const uint8_t * GGML_RESTRICT codebooks, uint32_t s0, uint32_t s1) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (codebooks + s0))),
                                   _mm_loadu_si128((const __m128i *) (codebooks + s1)), 1);
}

// Entries of the codebooks, the first 32 weights of a block and the next 32. A lane of 16 bytes has two groups: their codebooks
// are looked up in all of it, and each gives its half.
static TESSERAQ_INLINE void bcq4_load_codes(const block_bcq4 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT codebooks, __m256i * q0, __m256i * q1) {
    const __m256i m15 = _mm256_set1_epi8(15);

    uint32_t head;
    memcpy(&head, x, sizeof(head));

    // 16 times the selectors, which are bytes from the beginning of the codebooks
    const uint32_t s = head >> 4;
    const __m256i t0 = bcq4_load_tables(codebooks, s       & 0x70, s >>  6 & 0x70);
    const __m256i t1 = bcq4_load_tables(codebooks, s >>  3 & 0x70, s >>  9 & 0x70);
    const __m256i t2 = bcq4_load_tables(codebooks, s >> 12 & 0x70, s >> 18 & 0x70);
    const __m256i t3 = bcq4_load_tables(codebooks, s >> 15 & 0x70, s >> 21 & 0x70);

    const __m256i q  = _mm256_loadu_si256((const __m256i *) x->qs);
    const __m256i i0 = _mm256_and_si256(q, m15);
    const __m256i i1 = _mm256_and_si256(_mm256_srli_epi16(q, 4), m15);

    *q0 = _mm256_blend_epi32(_mm256_shuffle_epi8(t0, i0), _mm256_shuffle_epi8(t1, i0), 0xCC);
    *q1 = _mm256_blend_epi32(_mm256_shuffle_epi8(t2, i1), _mm256_shuffle_epi8(t3, i1), 0xCC);
}

// sums of 4 neighbouring products of a block
static TESSERAQ_INLINE __m256 bcq4_dot_block(const block_bcq4 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT a) {
    __m256i q0, q1;
    bcq4_load_codes(x, bcq4_tables.shifted[0], &q0, &q1);
    return bcq_products(q0, q1, a);
}

BCQ_VEC_DOT(bcq4)

static TESSERAQ_INLINE void bcq4_dequantize_row(const block_bcq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    for (int64_t i = 0; i < nb; i++, y += QK_BCQ) {
        const __m256 d = _mm256_set1_ps(e5m3_decode(x[i].d));

        __m256i c0, c1;
        bcq4_load_codes(x + i, (const uint8_t *) bcq4_tables.codeword[0], &c0, &c1);
        bcq_store_weights(y +  0, _mm256_castsi256_si128(c0), d);
        bcq_store_weights(y + 16, _mm256_extracti128_si256(c0, 1), d);
        bcq_store_weights(y + 32, _mm256_castsi256_si128(c1), d);
        bcq_store_weights(y + 48, _mm256_extracti128_si256(c1, 1), d);
    }
}

#endif

// ---- BCQ2 ------------------------------------------------------------------------------------------------------------------------

// All codebooks are one table of 16 bytes. A group of 16 weights is a plane, so its selector stands above all indices of a lane of 16 bytes.

#if defined(TESSERAQ_AVX512)

// entries of a table for the 64 weights of a block
static TESSERAQ_INLINE __m512i bcq2_load_codes(const block_bcq2 * GGML_RESTRICT x, __m512i table) {
    const __m512i down = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);     // plane k to bits 0-1
    const __m512i turn = _mm512_set_epi64(60, 60, 62, 62, 0, 0, 2, 2); // selector k to bits 2-3; all bytes are the same

    const __m512i q   = _mm512_srlv_epi64(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) x->qs)), down);
    const __m512i sel = _mm512_rolv_epi64(_mm512_set1_epi8((char) x->sel), turn);
    const __m512i at  = _mm512_ternarylogic_epi64(_mm512_set1_epi8(3), q, sel, 0xCA);
    return _mm512_shuffle_epi8(table, _mm512_and_si512(at, _mm512_set1_epi8(15)));
}

// one group of m blocks
static TESSERAQ_INLINE void bcq2_dot_group(const block_bcq2 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y, int m,
                                           __m512i table, __m512 * acc, __m512 * acco) {
    const __mmask16 blocks = (__mmask16) ((1u << m) - 1);

    __m512i d, sel;
    x86_load_heads((const uint8_t *) x, 2, m, &d, &sel);
    const __m512 scale = _mm512_mul_ps(x86_decode_e5m3(d), _mm512_maskz_loadu_ps(blocks, y));

    // -BCQ_OFFSET*sum(a)
    const __m512i s = _mm512_maskz_loadu_epi32(blocks, y + 4*m);
    *acco = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(_mm512_madd_epi16(_mm512_set1_epi32(BCQ_OFFSET), s)), *acco);

    float scales[16];
    _mm512_storeu_ps(scales, scale);
    TESSERAQ_IN_MEMORY(scales);

    const uint8_t * GGML_RESTRICT a = y + 8*m;

    TESSERAQ_UNROLL
    for (int b = 0; b < m; b++) {
        const __m512i q = bcq2_load_codes(x + b, table);
        const __m512i p = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(a + b*QK_BCQ));
        acc[b % 4] = _mm512_fmadd_ps(_mm512_set1_ps(scales[b]), _mm512_cvtepi32_ps(p), acc[b % 4]);
    }
}

static inline float bcq2_vec_dot(int n, const block_bcq2 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_BCQ == 0);
    const int nb = n / QK_BCQ;

    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) bcq2_tables.shifted[0]));

    __m512 acc[4];
    acc[0] = acc[1] = acc[2] = acc[3] = _mm512_setzero_ps();
    __m512 acco = _mm512_setzero_ps();

    int i = 0;
    for (; i + Q8_GROUP <= nb; i += Q8_GROUP) {
        bcq2_dot_group(x, y, Q8_GROUP, table, acc, &acco);
        x += Q8_GROUP;
        y += Q8_GROUP*Q8_TSQ_BLOCK_SIZE;
    }
    if (i < nb) {
        bcq2_dot_group(x, y, nb - i, table, acc, &acco);
    }

    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3])), acco));
}

#endif

// entries of a table, the first 32 weights of a block and the next 32
static TESSERAQ_INLINE void bcq2_load_halves(const block_bcq2 * GGML_RESTRICT x, __m256i table, __m256i * q0, __m256i * q1) {
    const __m256i m3  = _mm256_set1_epi8(3);
    const __m256i m12 = _mm256_set1_epi8(12);

    // planes 0 and 1, then 2 and 3, to bits 0-1; their selectors to bits 2-3
    const __m256i q   = _mm256_srlv_epi64(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x->qs)), _mm256_setr_epi64x(0, 0, 2, 2));
    const __m256i sel = _mm256_set1_epi8((char) x->sel);
    const __m256i s0  = _mm256_and_si256(_mm256_sllv_epi64(sel, _mm256_setr_epi64x(2, 2, 0, 0)), m12);
    const __m256i s1  = _mm256_and_si256(_mm256_srlv_epi64(sel, _mm256_setr_epi64x(2, 2, 4, 4)), m12);

    *q0 = _mm256_shuffle_epi8(table, _mm256_or_si256(_mm256_and_si256(q, m3), s0));
    *q1 = _mm256_shuffle_epi8(table, _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(q, 4), m3), s1));
}

#if !defined(TESSERAQ_AVX512)

// sums of 4 neighbouring products of a block
static TESSERAQ_INLINE __m256 bcq2_dot_block(const block_bcq2 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT a) {
    __m256i q0, q1;
    bcq2_load_halves(x, _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) bcq2_tables.shifted[0])), &q0, &q1);
    return bcq_products(q0, q1, a);
}

BCQ_VEC_DOT(bcq2)

#endif

static TESSERAQ_INLINE void bcq2_dequantize_row(const block_bcq2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) bcq2_tables.codeword[0]));

    for (int64_t i = 0; i < nb; i++, y += QK_BCQ) {
        const __m256 d = _mm256_set1_ps(e5m3_decode(x[i].d));

        __m256i c0, c1;
        bcq2_load_halves(x + i, table, &c0, &c1);
        bcq_store_weights(y +  0, _mm256_castsi256_si128(c0), d);
        bcq_store_weights(y + 16, _mm256_extracti128_si256(c0, 1), d);
        bcq_store_weights(y + 32, _mm256_castsi256_si128(c1), d);
        bcq_store_weights(y + 48, _mm256_extracti128_si256(c1, 1), d);
    }
}

#define KERNEL(name) name
#define BCQ_ENCODE   bcq_encode
#include "tesseraq/bcq/kernels.h"

#endif // defined(TESSERAQ_AVX2)
