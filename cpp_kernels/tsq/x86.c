#include "tesseraq/tsq/tsq.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_AVX2)

#include "tesseraq/common/round.h"
#include "tesseraq/common/x86-heads.h"

#include <immintrin.h>

// A dot product goes by groups of activations: the scales of a group and its sums fill a vector each, the scales and zero-points
// of the weights are collected into vectors as well, and all that remains for a block is to multiply codes and add the products,
// times the product of both scales, to a sum that stays spread over the lanes until the row ends. Codes are multiplied where they
// stand, in some lanes times a power of two; tsq_unit() takes it out of the sum of the row.

#if defined(TESSERAQ_AVX512)

// codes of a block, 64 weights in their order, each times a power of two that is the same for 16 weights
static TESSERAQ_INLINE __m512i tsq_load_codes(const uint8_t * GGML_RESTRICT codes, int nbits) {
    if (nbits == 4) {
        const __m512i mask = _mm512_inserti64x4(_mm512_set1_epi8(0x0F), _mm256_set1_epi8((char) 0xF0), 1);

        return _mm512_and_si512(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *) codes)), mask);
    }

    const __m512i q = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) codes));
    if (nbits == 2) {
        return _mm512_and_si512(q, _mm512_set_epi64(0xC0C0C0C0C0C0C0C0, 0xC0C0C0C0C0C0C0C0, 0x3030303030303030, 0x3030303030303030,
                                                    0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303));
    }

    // plane 3 moves down to where plane 2 is, so that there is room above it for the high bits; these move up to their planes
    const __m512i shift = _mm512_set_epi64(2, 2, 0, 0, 0, 0, 0, 0);
    const __m512i turn  = _mm512_set_epi64(63, 0, 1, 2, 1, 2, 1, 2);
    const __m512i low   = _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x3030303030303030, 0x3030303030303030,
                                           0x0C0C0C0C0C0C0C0C, 0x0C0C0C0C0C0C0C0C, 0x0303030303030303, 0x0303030303030303);
    const __m512i all   = _mm512_set_epi64(0x7070707070707070, 0x7070707070707070, 0x7070707070707070, 0x7070707070707070,
                                           0x1C1C1C1C1C1C1C1C, 0x1C1C1C1C1C1C1C1C, 0x0707070707070707, 0x0707070707070707);
    int64_t high;
    memcpy(&high, codes + QK_TSQ/4, sizeof(high));
    const __m512i h = _mm512_rolv_epi64(_mm512_set1_epi64(high), turn);
    return _mm512_and_si512(_mm512_ternarylogic_epi64(low, _mm512_srlv_epi64(q, shift), h, 0xCA), all);
}

// what makes 1 of the powers of two of tsq_load_codes()
static TESSERAQ_INLINE __m512 tsq_unit(int nbits) {
    const __m128 u0 = _mm_set1_ps(1.0f);
    const __m128 u1 = _mm_set1_ps(nbits == 4 ? 1.0f : 1.0f/4);
    const __m128 u2 = _mm_set1_ps(1.0f/16);
    const __m128 u3 = _mm_set1_ps(nbits == 2 ? 1.0f/64 : 1.0f/16);
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_set_m128(u1, u0)), _mm256_set_m128(u3, u2), 1);
}

// one group of m blocks
static TESSERAQ_INLINE void tsq_dot_group(const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y, int m, __m512 * acc, __m512 * accz) {
    const __mmask16 blocks = (__mmask16) ((1u << m) - 1);

    __m512i dx, zx;
    x86_load_heads(x, nbits, m, &dx, &zx);

    const __m512  d     = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(dx, 20), _mm512_set1_epi32(103 << 23)));
    const __m512  scale = _mm512_mul_ps(d, _mm512_maskz_loadu_ps(blocks, y));

    // -(z - 64)*sum(a) as the sum of two 16-bit products
    const __m512i s = _mm512_maskz_loadu_epi32(blocks, y + 4*m);
    const __m512i z = _mm512_madd_epi16(_mm512_or_si512(zx, _mm512_set1_epi32(64 << 16)), s);
    *accz = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(z), *accz);

    float scales[16];
    _mm512_storeu_ps(scales, scale);
    TESSERAQ_IN_MEMORY(scales);

    const uint8_t * GGML_RESTRICT codes = x + TSQ_CODES;
    const uint8_t * GGML_RESTRICT a     = y + 8*m;

#define TSQ_STEP(b, i) do {                                                                                          \
        const __m512i q = tsq_load_codes(codes + (b)*TSQ_BLOCK_SIZE(nbits), nbits);                                  \
        const __m512i p = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, _mm512_loadu_si512(a + (b)*QK_TSQ));        \
        acc[i] = _mm512_fmadd_ps(_mm512_set1_ps(scales[b]), _mm512_cvtepi32_ps(p), acc[i]);                          \
    } while (0)

    TESSERAQ_UNROLL
    for (int b = 0; b + 3 < m; b += 4) {
        TSQ_STEP(b,     0);
        TSQ_STEP(b + 1, 1);
        TSQ_STEP(b + 2, 2);
        TSQ_STEP(b + 3, 3);
    }
    for (int b = m / 4 * 4; b < m; b++) {
        TSQ_STEP(b, 0);
    }
#undef TSQ_STEP
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    __m512 acc[4];
    acc[0] = acc[1] = acc[2] = acc[3] = _mm512_setzero_ps();
    __m512 accz = _mm512_setzero_ps();

    int i = 0;
    for (; i + Q8_GROUP <= nb; i += Q8_GROUP) {
        tsq_dot_group(x, nbits, y, Q8_GROUP, acc, &accz);
        x += Q8_GROUP*TSQ_BLOCK_SIZE(nbits);
        y += Q8_GROUP*Q8_TSQ_BLOCK_SIZE;
    }
    if (i < nb) {
        tsq_dot_group(x, nbits, y, nb - i, acc, &accz);
    }

    const __m512 sum = _mm512_add_ps(_mm512_add_ps(acc[0], acc[1]), _mm512_add_ps(acc[2], acc[3]));
    const __m512 z   = _mm512_mul_ps(accz, _mm512_set1_ps((1 << nbits)/128.0f));
    return _mm512_reduce_add_ps(_mm512_fmadd_ps(sum, tsq_unit(nbits), z));
}

#else

// sums of 4 neighbouring products, unsigned codes times signed activations, for both halves of a block
static TESSERAQ_INLINE __m256i tsq_mul_sum_us8(__m256i q0, __m256i a0, __m256i q1, __m256i a1) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), q0, a0), q1, a1);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), q0, a0), q1, a1);
#else
    // codes up to 7 << 2 or 15 leave room for 4 products in 16 bits
    const __m256i p = _mm256_add_epi16(_mm256_maddubs_epi16(q0, a0), _mm256_maddubs_epi16(q1, a1));
    return _mm256_madd_epi16(_mm256_set1_epi16(1), p);
#endif
}

static TESSERAQ_INLINE __m256 tsq_fmadd(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// codes of a block: the first 32 weights and the next 32; those of TSQ2 and TSQ3 times 4 in the upper lane
static TESSERAQ_INLINE void tsq_load_codes(const uint8_t * GGML_RESTRICT codes, int nbits, __m256i * q0, __m256i * q1) {
    if (nbits == 4) {
        const __m256i m15 = _mm256_set1_epi8(15);

        const __m256i q = _mm256_loadu_si256((const __m256i *) codes);
        *q0 = _mm256_and_si256(q, m15);
        *q1 = _mm256_and_si256(_mm256_srli_epi16(q, 4), m15);
        return;
    }

    const __m256i low = _mm256_setr_epi32(0x03030303, 0x03030303, 0x03030303, 0x03030303, 0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C, 0x0C0C0C0C);

    const __m256i q = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) codes));
    *q0 = _mm256_and_si256(q, low);
    *q1 = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);

    if (nbits == 3) {
        // planes of 8, the first four and the next: up and down to where they complete the low bits
        const __m256i high = _mm256_setr_epi32(0x04040404, 0x04040404, 0x04040404, 0x04040404, 0x10101010, 0x10101010, 0x10101010, 0x10101010);

        int64_t bits;
        memcpy(&bits, codes + QK_TSQ/4, sizeof(bits));
        const __m256i h = _mm256_set1_epi64x(bits);
        *q0 = _mm256_or_si256(*q0, _mm256_and_si256(_mm256_sllv_epi64(h, _mm256_setr_epi64x(2, 1, 2, 1)), high));
        *q1 = _mm256_or_si256(*q1, _mm256_and_si256(_mm256_srlv_epi64(h, _mm256_setr_epi64x(2, 3, 2, 3)), high));
    }
}

// sums of 4 neighbouring products of a block
static TESSERAQ_INLINE __m256 tsq_dot_block(const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT a) {
    __m256i q0, q1;
    tsq_load_codes(x + TSQ_CODES, nbits, &q0, &q1);
    const __m256i a0 = _mm256_loadu_si256((const __m256i *) (a +  0));
    const __m256i a1 = _mm256_loadu_si256((const __m256i *) (a + 32));
    return _mm256_cvtepi32_ps(tsq_mul_sum_us8(q0, a0, q1, a1));
}

// d and z of a block
static TESSERAQ_INLINE short tsq_load_head(const uint8_t * GGML_RESTRICT x) {
    short head;
    memcpy(&head, x, sizeof(head));
    return head;
}

// 8 blocks, their scales at y, sums at s, activations at a
static TESSERAQ_INLINE void tsq_dot_8(const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y, const uint8_t * GGML_RESTRICT s,
                                 const uint8_t * GGML_RESTRICT a, __m256 * acc, __m256 * accz) {
    const int size = TSQ_BLOCK_SIZE(nbits);

    const __m256i dz = _mm256_cvtepu16_epi32(_mm_setr_epi16(
        tsq_load_head(x + 0*size), tsq_load_head(x + 1*size), tsq_load_head(x + 2*size), tsq_load_head(x + 3*size),
        tsq_load_head(x + 4*size), tsq_load_head(x + 5*size), tsq_load_head(x + 6*size), tsq_load_head(x + 7*size)));

    const __m256i code  = _mm256_slli_epi32(_mm256_and_si256(dz, _mm256_set1_epi32(0xFF)), 20);
    const __m256  d     = _mm256_castsi256_ps(_mm256_add_epi32(code, _mm256_set1_epi32(103 << 23)));
    const __m256  scale = _mm256_mul_ps(d, _mm256_loadu_ps((const float *) y));

    // -(z - 64)*sum(a) as the sum of two 16-bit products
    const __m256i z = _mm256_or_si256(_mm256_srli_epi32(dz, 8), _mm256_set1_epi32(64 << 16));
    *accz = tsq_fmadd(scale, _mm256_cvtepi32_ps(_mm256_madd_epi16(z, _mm256_loadu_si256((const __m256i *) s))), *accz);

    float scales[8];
    _mm256_storeu_ps(scales, scale);
    TESSERAQ_IN_MEMORY(scales);

    TESSERAQ_UNROLL
    for (int b = 0; b < 8; b++) {
        acc[b % 2] = tsq_fmadd(_mm256_set1_ps(scales[b]), tsq_dot_block(x + b*size, nbits, a + b*QK_TSQ), acc[b % 2]);
    }
}

static inline float tsq_vec_dot(int n, const uint8_t * GGML_RESTRICT x, int nbits, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_TSQ == 0);
    const int nb = n / QK_TSQ;

    __m256 acc[2];
    acc[0] = acc[1] = _mm256_setzero_ps();
    __m256 accz = _mm256_setzero_ps();
    float  sumz = 0.0f;

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        const uint8_t * GGML_RESTRICT s = y + 4*m;
        const uint8_t * GGML_RESTRICT a = y + 8*m;

        int b = 0;
        for (; b + 8 <= m; b += 8, x += 8*TSQ_BLOCK_SIZE(nbits)) {
            tsq_dot_8(x, nbits, y + 4*b, s + 4*b, a + b*QK_TSQ, acc, &accz);
        }
        for (; b < m; b++, x += TSQ_BLOCK_SIZE(nbits)) {
            float   da;
            int16_t sa[2];
            memcpy(&da, y + 4*b, sizeof(da));
            memcpy(sa,  s + 4*b, sizeof(sa));

            const float scale = e5m3_decode(x[0])*da;
            acc[0]  = tsq_fmadd(_mm256_set1_ps(scale), tsq_dot_block(x, nbits, a + b*QK_TSQ), acc[0]);
            sumz   += scale*(x[1]*sa[0] + 64*sa[1]);
        }
        y += m*Q8_TSQ_BLOCK_SIZE;
    }

    const float  quarter = nbits == 4 ? 1.0f : 1.0f/4;
    const float  zstep   = (1 << nbits)/128.0f;
    const __m256 unit    = _mm256_setr_ps(1.0f, 1.0f, 1.0f, 1.0f, quarter, quarter, quarter, quarter);
    const __m256 sum     = tsq_fmadd(_mm256_add_ps(acc[0], acc[1]), unit, _mm256_mul_ps(accz, _mm256_set1_ps(zstep)));

    __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    h = _mm_add_ss(h, _mm_movehdup_ps(h));
    return _mm_cvtss_f32(h) + zstep*sumz;
}

#endif

// d*(q - z) for all codes is exact, so a table and q*d - z*d have the bits of the reference, whatever the order
static TESSERAQ_INLINE void tsq_dequantize_row(const uint8_t * GGML_RESTRICT x, int nbits, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    for (int64_t i = 0; i < nb; i++, x += TSQ_BLOCK_SIZE(nbits), y += QK_TSQ) {
        const float     d     = e5m3_decode(x[0]);
        const float     z     = tsq_decode_z(x[1], nbits);
        const uint8_t * codes = x + TSQ_CODES;
        const int       width = nbits == 4 ? 4 : 2; // bits of the planes

        // high bits of TSQ3, 16 weights at a time in step with the low ones, and moved up to their place
        __m128i high = _mm_setzero_si128();
        if (nbits == 3) {
            const __m128i h = _mm_loadl_epi64((const __m128i *) (codes + QK_TSQ/4));
            high = _mm_unpacklo_epi64(h, _mm_srli_epi64(h, 1));
        }

        TESSERAQ_UNROLL
        for (int j = 0; j < 8*width; j += 16) { // bytes of a plane
            const __m128i low = _mm_loadu_si128((const __m128i *) (codes + j));
#if defined(TESSERAQ_AVX512)
            // values of the codes, over and over: the higher bits of a lane do not matter
            const __m512i lane  = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i code  = _mm512_and_si512(lane, _mm512_set1_epi32((1 << nbits) - 1));
            const __m512  value = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(z)), _mm512_set1_ps(d));

            __m512i q = _mm512_cvtepu8_epi32(low);
            __m512i h = _mm512_slli_epi32(_mm512_cvtepu8_epi32(high), 2);
            for (int p = 0; p < 8/width; p++) {
                const __m512i at = nbits == 3 ? _mm512_ternarylogic_epi32(_mm512_set1_epi32(3), q, h, 0xCA) : q;
                _mm512_storeu_ps(y + p*8*width + j, _mm512_permutexvar_ps(at, value));
                q = _mm512_srli_epi32(q, width);
                h = _mm512_srli_epi32(h, width);
            }
#else
            const __m256 scale = _mm256_set1_ps(d);
            const __m256 shift = _mm256_set1_ps(-(z*d));

            TESSERAQ_UNROLL
            for (int l = 0; l < 16; l += 8) {
                __m256i q = _mm256_cvtepu8_epi32(l == 0 ? low  : _mm_srli_si128(low,  8));
                __m256i h = _mm256_slli_epi32(_mm256_cvtepu8_epi32(l == 0 ? high : _mm_srli_si128(high, 8)), 2);
                for (int p = 0; p < 8/width; p++) {
                    __m256i code = _mm256_and_si256(q, _mm256_set1_epi32((1 << width) - 1));
                    if (nbits == 3) {
                        code = _mm256_or_si256(code, _mm256_and_si256(h, _mm256_set1_epi32(4)));
                    }
                    _mm256_storeu_ps(y + p*8*width + j + l, tsq_fmadd(_mm256_cvtepi32_ps(code), scale, shift));
                    q = _mm256_srli_epi32(q, width);
                    h = _mm256_srli_epi32(h, width);
                }
            }
#endif
        }
    }
}

#define KERNEL(name) name
#define Q8_BLOCK     q8_block
#include "tesseraq/tsq/kernels.h"

#endif // defined(TESSERAQ_AVX2)
