#include "tesseraq/ptq/ptq.h"
#include "tesseraq/ptq/cpu.h"
#include "tesseraq/common/compiler.h"

#include <assert.h>

#if defined(TESSERAQ_AVX2)

#include "tesseraq/ptq/x86-round.h"

#include <immintrin.h>

// A dot product goes by groups of activations. The products of both scales of 16 or 8 blocks are made at once, and with them what the
// products of codes and bits lack. Codes are multiplied as they are, bits as bytes of 0 and 1: these products count twice.

// d and s of a block, d in the lower byte
static TESSERAQ_INLINE short ptq_load_head(const block_ptq1_61 * x) {
    short head;
    memcpy(&head, x, sizeof(head));
    return head;
}

// heads of 8 blocks in 16-bit lanes; of the last block for those from m on
static TESSERAQ_INLINE __m128i ptq_load_heads(const block_ptq1_61 * GGML_RESTRICT x, int m) {
#define PTQ_HEAD(i) ptq_load_head(x + ((i) < m ? (i) : m - 1))
    return _mm_setr_epi16(PTQ_HEAD(0), PTQ_HEAD(1), PTQ_HEAD(2), PTQ_HEAD(3), PTQ_HEAD(4), PTQ_HEAD(5), PTQ_HEAD(6), PTQ_HEAD(7));
#undef PTQ_HEAD
}

static TESSERAQ_INLINE int64_t ptq_load64(const uint8_t * x) {
    int64_t bits;
    memcpy(&bits, x, sizeof(bits));
    return bits;
}
#if defined(TESSERAQ_AVX512)

// E5M3 codes in the bytes from bit `shift` up
static TESSERAQ_INLINE __m512 ptq_decode(__m512i heads, int shift) {
    const __m512i code = _mm512_and_si512(_mm512_srli_epi32(heads, shift), _mm512_set1_epi32(0xFF));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(103 << 23)));
}

// One group of m blocks. Sums stay spread over the lanes until the row ends: acc[0] and acc[1] of salient and binary products, accl[0] and
// accl[1] of what they lack.
static TESSERAQ_INLINE void ptq_dot_group(const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y, int m, __m512 * acc, __m512 * accl) {
    const __mmask16 blocks = (__mmask16) ((1u << m) - 1);

    const __m128i h0 = ptq_load_heads(x, m);
    const __m128i h1 = m > 8 ? ptq_load_heads(x + 8, m - 8) : h0;
    const __m512i heads = _mm512_cvtepu16_epi32(_mm256_set_m128i(h1, h0));

    const __m512 salient = _mm512_mul_ps(ptq_decode(heads, 8), _mm512_maskz_loadu_ps(blocks, y));
    const __m512 binary  = _mm512_mul_ps(ptq_decode(heads, 0), _mm512_maskz_loadu_ps(blocks, y + 4*m));
    accl[0] = _mm512_fmadd_ps(salient, _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(blocks, y +  8*m)), accl[0]);
    accl[1] = _mm512_fmadd_ps(binary,  _mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32(blocks, y + 12*m)), accl[1]);

    float scales[2][16];
    _mm512_storeu_ps(scales[0], salient);
    _mm512_storeu_ps(scales[1], binary);
    TESSERAQ_IN_MEMORY(scales);

    const uint8_t * GGML_RESTRICT a = y + 16*m;

    // The second half of the activations has 40 binary ones and the 24 salient ones. Codes come to the bytes of these: the low ones of
    // all 12 bytes, then the high ones, which count 16 times as much.
    const __m512i place = _mm512_inserti64x4(_mm512_set1_epi8((char) 0x80), _mm256_setr_epi8(
        -128, -128, -128, -128, -128, -128, -128, -128, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), 1);
    const __m512i nibble = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_setr_epi32(
        0, 0, 0x0F0F0F0F, 0x0F0F0F0F, 0x0F0F0F0F, (int) 0xF0F0F0F0, (int) 0xF0F0F0F0, (int) 0xF0F0F0F0), 1);
    const __m512i one = _mm512_set1_epi8(1);

#define PTQ_STEP(b, i) do {                                                                                                       \
        const uint8_t * p = (const uint8_t *) (x + (b));                                                                          \
        const __m512i a0 = _mm512_loadu_si512(a + (b)*QK_PTQ);                                                                    \
        const __m512i a1 = _mm512_loadu_si512(a + (b)*QK_PTQ + 64);                                                               \
        const __mmask64 k0 = _cvtu64_mask64((uint64_t) ptq_load64(p + 14));                                                       \
        const __mmask64 k1 = _cvtu64_mask64((uint64_t) ptq_load64(p + 19) >> 24);                                                 \
        const __m512i q  = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)), place);              \
        const __m512i s0 = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(q, nibble), a1);                          \
        const __m512i s1 = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_maskz_mov_epi8(k0, one), a0),   \
                                               _mm512_maskz_mov_epi8(k1, one), a1);                                               \
        acc[i]     = _mm512_fmadd_ps(_mm512_set1_ps(scales[0][b]), _mm512_cvtepi32_ps(s0), acc[i]);                               \
        acc[i + 1] = _mm512_fmadd_ps(_mm512_set1_ps(scales[1][b]), _mm512_cvtepi32_ps(s1), acc[i + 1]);                           \
    } while (0)

    TESSERAQ_UNROLL
    for (int b = 0; b + 1 < m; b += 2) {
        PTQ_STEP(b,     0);
        PTQ_STEP(b + 1, 2);
    }
    if (m % 2 != 0) {
        PTQ_STEP(m - 1, 0);
    }
#undef PTQ_STEP
}

static inline float ptq_vec_dot(int n, const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_PTQ == 0);
    const int nb = n / QK_PTQ;

    __m512 acc [4] = { _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps() };
    __m512 accl[2] = { _mm512_setzero_ps(), _mm512_setzero_ps() };

    int i = 0;
    for (; i + Q8_GROUP <= nb; i += Q8_GROUP) {
        ptq_dot_group(x + i, y, Q8_GROUP, acc, accl);
        y += Q8_GROUP*Q8_PTQ_BLOCK_SIZE;
    }
    if (i < nb) {
        ptq_dot_group(x + i, y, nb - i, acc, accl);
    }

    // salient products are in the lanes from 10 on, half of them 16 times as large
    const __m512 unit = _mm512_set_ps(1.0f/16, 1.0f/16, 1.0f/16, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512 sum = _mm512_mul_ps(_mm512_add_ps(acc[0], acc[2]), unit);
    sum = _mm512_fmadd_ps(_mm512_add_ps(acc[1], acc[3]), _mm512_set1_ps(2.0f), sum);
    sum = _mm512_fmadd_ps(accl[0], _mm512_set1_ps(PTQ_UNIT_SALIENT), sum);
    sum = _mm512_fmadd_ps(accl[1], _mm512_set1_ps(PTQ_UNIT_BINARY),  sum);
    return _mm512_reduce_add_ps(sum);
}

#else

static TESSERAQ_INLINE __m256 ptq_fmadd(__m256 a, __m256 b, __m256 c) {
#if defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
#endif
}

// adds the sums of 4 neighbouring products, unsigned codes up to 15 times signed activations; without VNNI, two products in 16 bits
static TESSERAQ_INLINE __m256i ptq_mul_sum_us8(__m256i sum, __m256i q, __m256i a) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, q, a);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, q, a);
#else
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(q, a));
#endif
}

static TESSERAQ_INLINE __m256 ptq_float(__m256i sum) {
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
    return _mm256_cvtepi32_ps(sum);
#else
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
#endif
}

// 32 bits to bytes of 0 and 1
static TESSERAQ_INLINE __m256i ptq_spread(int bits) {
    const __m256i byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit  = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
    const __m256i all  = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(all, bit), _mm256_set1_epi8(1));
}

static TESSERAQ_INLINE int ptq_load32(const uint8_t * x) {
    int bits;
    memcpy(&bits, x, sizeof(bits));
    return bits;
}

// the products of a block times its scales
static TESSERAQ_INLINE void ptq_dot_block(const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT a, float salient, float binary, __m256 * acc) {
    const __m256i a0 = _mm256_loadu_si256((const __m256i *) (a +  0));
    const __m256i a1 = _mm256_loadu_si256((const __m256i *) (a + 32));
    const __m256i a2 = _mm256_loadu_si256((const __m256i *) (a + 64));
    const __m256i a3 = _mm256_loadu_si256((const __m256i *) (a + 96)); // 8 binary ones and the salient ones

    __m256i s1 = ptq_mul_sum_us8(_mm256_setzero_si256(), ptq_spread(ptq_load32(x->signs + 0)), a0);
    s1 = ptq_mul_sum_us8(s1, ptq_spread(ptq_load32(x->signs + 4)), a1);
    s1 = ptq_mul_sum_us8(s1, ptq_spread(ptq_load32(x->signs + 8)), a2);
    s1 = ptq_mul_sum_us8(s1, _mm256_and_si256(ptq_spread(x->signs[12]), _mm256_setr_epi64x(-1, 0, 0, 0)), a3);

    // low codes from byte 8 on, then the high ones
    const __m256i place = _mm256_setr_epi8(-128, -128, -128, -128, -128, -128, -128, -128, 2, 3, 4, 5, 6, 7, 8, 9,
                                           10, 11, 12, 13, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128);
    const __m256i upper = _mm256_setr_epi8(-128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128, -128,
                                           -128, -128, -128, -128, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13);
    const __m256i q    = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) x));
    const __m256i both = _mm256_or_si256(_mm256_shuffle_epi8(q, place), _mm256_shuffle_epi8(_mm256_srli_epi16(q, 4), upper));
    const __m256i s0   = ptq_mul_sum_us8(_mm256_setzero_si256(), _mm256_and_si256(both, _mm256_set1_epi8(15)), a3);

    acc[0] = ptq_fmadd(_mm256_set1_ps(salient), ptq_float(s0), acc[0]);
    acc[1] = ptq_fmadd(_mm256_set1_ps(binary),  ptq_float(s1), acc[1]);
}

static TESSERAQ_INLINE __m256 ptq_decode(__m256i heads, int shift) {
    const __m256i code = _mm256_and_si256(_mm256_srli_epi32(heads, shift), _mm256_set1_epi32(0xFF));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(code, 20), _mm256_set1_epi32(103 << 23)));
}

static inline float ptq_vec_dot(int n, const block_ptq1_61 * GGML_RESTRICT x, const uint8_t * GGML_RESTRICT y) {
    assert(n % QK_PTQ == 0);
    const int nb = n / QK_PTQ;

    __m256 acc [2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    __m256 accl[2] = { _mm256_setzero_ps(), _mm256_setzero_ps() };
    float  sumf = 0.0f;

    for (int i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? nb - i : Q8_GROUP;

        const uint8_t * GGML_RESTRICT a = y + 16*m;

        int b = 0;
        for (; b + 8 <= m; b += 8, x += 8) {
            const __m256i heads   = _mm256_cvtepu16_epi32(ptq_load_heads(x, 8));
            const __m256  salient = _mm256_mul_ps(ptq_decode(heads, 8), _mm256_loadu_ps((const float *) (y + 4*b)));
            const __m256  binary  = _mm256_mul_ps(ptq_decode(heads, 0), _mm256_loadu_ps((const float *) (y + 4*(m + b))));
            accl[0] = ptq_fmadd(salient, _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *) (y + 4*(2*m + b)))), accl[0]);
            accl[1] = ptq_fmadd(binary,  _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *) (y + 4*(3*m + b)))), accl[1]);

            float scales[2][8];
            _mm256_storeu_ps(scales[0], salient);
            _mm256_storeu_ps(scales[1], binary);
            TESSERAQ_IN_MEMORY(scales);
            TESSERAQ_UNROLL
            for (int k = 0; k < 8; k++) {
                ptq_dot_block(x + k, a + (b + k)*QK_PTQ, scales[0][k], scales[1][k], acc);
            }
        }
        for (; b < m; b++, x++) {
            float   da[2];
            int32_t sa[2];
            for (int kind = 0; kind < 2; kind++) {
                memcpy(&da[kind], y + 4*(kind*m + b),       sizeof(float));
                memcpy(&sa[kind], y + 4*((2 + kind)*m + b), sizeof(int32_t));
            }
            const float salient = e5m3_decode(x->s)*da[0];
            const float binary  = e5m3_decode(x->d)*da[1];
            ptq_dot_block(x, a + b*QK_PTQ, salient, binary, acc);
            sumf += PTQ_UNIT_SALIENT*salient*sa[0] + PTQ_UNIT_BINARY*binary*sa[1];
        }
        y += m*Q8_PTQ_BLOCK_SIZE;
    }

    __m256 sum = ptq_fmadd(acc[1], _mm256_set1_ps(2.0f), acc[0]);
    sum = ptq_fmadd(accl[0], _mm256_set1_ps(PTQ_UNIT_SALIENT), sum);
    sum = ptq_fmadd(accl[1], _mm256_set1_ps(PTQ_UNIT_BINARY),  sum);

    __m128 h = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    h = _mm_add_ss(h, _mm_movehdup_ps(h));
    return _mm_cvtss_f32(h) + sumf;
}

#endif

static inline void ptq_dequantize_row(const block_ptq1_61 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_PTQ == 0);
    const int64_t nb = k / QK_PTQ;

    for (int64_t i = 0; i < nb; i++, y += QK_PTQ) {
        // all products are exact, so 2*q - 15 comes to the same as q - 7.5
        const __m256  s    = _mm256_set1_ps(e5m3_decode(x[i].s));
        const __m256  half = _mm256_set1_ps(7.5f);
        const __m128i b    = _mm_loadu_si128((const __m128i *) &x[i]);
        const __m128i low  = _mm_and_si128(b, _mm_set1_epi8(15));
        const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15));

        // the 24 codes in their order: 8 bytes at a time
        const __m128i q[3] = {
            _mm_srli_si128(low, 2),
            _mm_unpacklo_epi32(_mm_srli_si128(low, 10), _mm_srli_si128(high, 2)),
            _mm_srli_si128(high, 6),
        };
        for (int j = 0; j < 3; j++) {
            _mm256_storeu_ps(y + 8*j, _mm256_mul_ps(s, _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q[j])), half)));
        }

        // where the bit is 1, the sign of -d changes
        const __m256  minus = _mm256_set1_ps(-e5m3_decode(x[i].d));
        const __m256i up    = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        for (int j = 0; j < PTQ_BINARY/8; j++) {
            const __m256 bits = _mm256_castsi256_ps(_mm256_sllv_epi32(_mm256_set1_epi32(x[i].signs[j]), up));
            _mm256_storeu_ps(y + PTQ_SALIENT + 8*j, _mm256_xor_ps(minus, _mm256_and_ps(bits, _mm256_set1_ps(-0.0f))));
        }
    }
}

#define KERNEL(name)   name
#define PTQ_ROUND_PART ptq_round_part
#include "tesseraq/ptq/kernels.h"

#endif // defined(TESSERAQ_AVX2)
