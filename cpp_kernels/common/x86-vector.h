#pragma once

// Vectors of the kernels of repacked rows on x86: 4 bytes, an int or a float for every row of a group of TESSERAQ_NROWS.

#include "tesseraq/common/compiler.h"
#include "tesseraq/common/groups.h"

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // GCC's own AVX-512 intrinsics
#endif

#include <immintrin.h>

#if TESSERAQ_NROWS == 16

typedef __m512i vint;
typedef __m512  vfloat;

static TESSERAQ_INLINE vint   v_load (const void * p)            { return _mm512_loadu_si512(p); }
static TESSERAQ_INLINE vint   v_bytes(const uint8_t * p)         { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *) p)); }
static TESSERAQ_INLINE vint   v_set8 (int x)                     { return _mm512_set1_epi8((char) x); }
static TESSERAQ_INLINE vint   v_table(const void * p)            { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) p)); }
static TESSERAQ_INLINE vint   v_look (vint table, vint at)       { return _mm512_shuffle_epi8(table, at); }
static TESSERAQ_INLINE vint   v_set32(int x)                     { return _mm512_set1_epi32(x); }
static TESSERAQ_INLINE vint   v_and  (vint a, vint b)            { return _mm512_and_si512(a, b); }
static TESSERAQ_INLINE vint   v_or   (vint a, vint b)            { return _mm512_or_si512(a, b); }
static TESSERAQ_INLINE vint   v_mix  (vint m, vint a, vint b)    { return _mm512_ternarylogic_epi32(m, a, b, 0xCA); }
static TESSERAQ_INLINE vint   v_add  (vint a, vint b)            { return _mm512_add_epi32(a, b); }
static TESSERAQ_INLINE vint   v_shl32(vint a, int n)             { return _mm512_slli_epi32(a, n); }
static TESSERAQ_INLINE vint   v_sra32(vint a, int n)             { return _mm512_srai_epi32(a, n); }
static TESSERAQ_INLINE vfloat v_float(vint a)                    { return _mm512_cvtepi32_ps(a); }
static TESSERAQ_INLINE vfloat v_cast (vint a)                    { return _mm512_castsi512_ps(a); }
static TESSERAQ_INLINE vfloat v_setf (float x)                   { return _mm512_set1_ps(x); }
static TESSERAQ_INLINE vfloat v_mul  (vfloat a, vfloat b)        { return _mm512_mul_ps(a, b); }
static TESSERAQ_INLINE vfloat v_fma  (vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
static TESSERAQ_INLINE void   v_store(float * p, vfloat a)       { _mm512_storeu_ps(p, a); }
static TESSERAQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm512_dpbusd_epi32(s, q, a); }
static TESSERAQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm512_dpwssd_epi32(s, a, b); }

// bits move by n, left if n > 0, right if not; they may come in from the neighbouring byte
template <int n> static TESSERAQ_INLINE vint v_shift(vint a) {
    return n > 0 ? _mm512_slli_epi16(a, n > 0 ? n : 0) : n < 0 ? _mm512_srli_epi16(a, n < 0 ? -n : 0) : a;
}

#define TESSERAQ_VNNI 1

#else

typedef __m256i vint;
typedef __m256  vfloat;

static TESSERAQ_INLINE vint   v_load (const void * p)            { return _mm256_loadu_si256((const __m256i *) p); }
static TESSERAQ_INLINE vint   v_bytes(const uint8_t * p)         { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) p)); }
static TESSERAQ_INLINE vint   v_set8 (int x)                     { return _mm256_set1_epi8((char) x); }
static TESSERAQ_INLINE vint   v_table(const void * p)            { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) p)); }
static TESSERAQ_INLINE vint   v_look (vint table, vint at)       { return _mm256_shuffle_epi8(table, at); }
static TESSERAQ_INLINE vint   v_set32(int x)                     { return _mm256_set1_epi32(x); }
static TESSERAQ_INLINE vint   v_and  (vint a, vint b)            { return _mm256_and_si256(a, b); }
static TESSERAQ_INLINE vint   v_or   (vint a, vint b)            { return _mm256_or_si256(a, b); }
static TESSERAQ_INLINE vint   v_mix  (vint m, vint a, vint b)    { return _mm256_or_si256(_mm256_and_si256(m, a), _mm256_andnot_si256(m, b)); }
static TESSERAQ_INLINE vint   v_add  (vint a, vint b)            { return _mm256_add_epi32(a, b); }
static TESSERAQ_INLINE vint   v_shl32(vint a, int n)             { return _mm256_slli_epi32(a, n); }
static TESSERAQ_INLINE vint   v_sra32(vint a, int n)             { return _mm256_srai_epi32(a, n); }
static TESSERAQ_INLINE vfloat v_float(vint a)                    { return _mm256_cvtepi32_ps(a); }
static TESSERAQ_INLINE vfloat v_cast (vint a)                    { return _mm256_castsi256_ps(a); }
static TESSERAQ_INLINE vfloat v_setf (float x)                   { return _mm256_set1_ps(x); }
static TESSERAQ_INLINE vfloat v_mul  (vfloat a, vfloat b)        { return _mm256_mul_ps(a, b); }
static TESSERAQ_INLINE vfloat v_fma  (vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
static TESSERAQ_INLINE void   v_store(float * p, vfloat a)       { _mm256_storeu_ps(p, a); }

template <int n> static TESSERAQ_INLINE vint v_shift(vint a) {
    return n > 0 ? _mm256_slli_epi16(a, n > 0 ? n : 0) : n < 0 ? _mm256_srli_epi16(a, n < 0 ? -n : 0) : a;
}

#if defined(__AVXVNNI__)
static TESSERAQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm256_dpbusd_avx_epi32(s, q, a); }
static TESSERAQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm256_dpwssd_avx_epi32(s, a, b); }

#define TESSERAQ_VNNI 1
#else
// here s are 16-bit sums
static TESSERAQ_INLINE vint   v_dot8 (vint s, vint q, vint a)    { return _mm256_add_epi16(s, _mm256_maddubs_epi16(q, a)); }
static TESSERAQ_INLINE vint   v_dot16(vint s, vint a, vint b)    { return _mm256_add_epi32(s, _mm256_madd_epi16(a, b)); }

#define TESSERAQ_VNNI 0
#endif

#endif

static TESSERAQ_INLINE vint v_spread32(const void * p) {
    int32_t x;
    memcpy(&x, p, sizeof(x));
    return v_set32(x);
}

static TESSERAQ_INLINE vfloat v_zero()                      { return v_setf(0.0f); }
static TESSERAQ_INLINE void   v_prefetch(const uint8_t * p) { _mm_prefetch((const char *) p, _MM_HINT_T0); }
