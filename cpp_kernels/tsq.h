#pragma once

// TSQ: affine blocks of 64 weights, w = d*(q - z), with an 8-bit float d and an 8-bit fixed-point z.
// The layout is described to the bit in docs/formats.md; convert/tensor_types.py holds the same numbers for Python.

#include "ggml.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// ids of the tensor types (ggml_type) and file types (llama_ftype, ggml_ftype)
#define TSQ2_TYPE_ID 500
#define TSQ3_TYPE_ID 501
#define TSQ4_TYPE_ID 502

// id of the activations that meet them row by row in the CPU backend; no file holds such a tensor
#define Q8_TSQ_TYPE_ID 510

#define QK_TSQ 64 // weights per block, for all TSQ types

// A block is d, z and codes. d is the scale, E5M3: 2^(e - 24) * (1 + m/8), e = d >> 3, m = d & 7. z is the zero-point, fixed
// point: (z - 64) * 2^n/128 for codes of n bits. Codes stand in planes: with planes of b bits, weight i has its bits in byte
// i % (8*b), from bit b*(i / (8*b)) up.

// 2.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/32 - 2
    uint8_t qs[QK_TSQ / 4]; // codes 0..3 in 4 planes of 16
} block_tsq2;
static_assert(sizeof(block_tsq2) == 2 + QK_TSQ / 4, "wrong tsq2 block size/padding");

// 3.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/16 - 4
    uint8_t qs[QK_TSQ / 4]; // codes 0..7, low 2 bits in 4 planes of 16
    uint8_t qh[QK_TSQ / 8]; //             high bit in 8 planes of 8
} block_tsq3;
static_assert(sizeof(block_tsq3) == 2 + QK_TSQ / 4 + QK_TSQ / 8, "wrong tsq3 block size/padding");

// 4.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/8 - 8
    uint8_t qs[QK_TSQ / 2]; // codes 0..15 in 2 planes of 32
} block_tsq4;
static_assert(sizeof(block_tsq4) == 2 + QK_TSQ / 2, "wrong tsq4 block size/padding");

// What the types share works on bytes: 0 is d, 1 is z, the codes begin at TSQ_CODES.
#define TSQ_CODES             2
#define TSQ_BLOCK_SIZE(nbits) (TSQ_CODES + (nbits)*QK_TSQ/8)

// E5M3 code to float: the code is the head of the float's exponent and mantissa, so a shift and an add decode it
static inline float tsq_decode_d(uint8_t code) {
    const uint32_t bits = ((uint32_t) code << 20) + ((uint32_t) 103 << 23);
    float d;
    memcpy(&d, &bits, sizeof(d));
    return d;
}

// E5M3 code nearest to a scale; what is smaller or larger than all codes gets the nearest end
static inline uint8_t tsq_encode_d(float d) {
    uint32_t bits;
    memcpy(&bits, &d, sizeof(bits));
    const int code = (int) ((bits + (1u << 19)) >> 20) - (103 << 3);
    return code < 0 ? 0 : code > 255 ? 255 : code;
}

// zero-point code of an n-bit type to float: steps of 2^n/128 from -2^(n - 1), so 64 is 0 for every n
static inline float tsq_decode_z(uint8_t code, int nbits) {
    return ((int) code - 64) * ((1 << nbits) / 128.0f);
}

// add bits to codes, from bit `shift` up, out of planes of `width` bits
static inline void tsq_unpack_planes(const uint8_t * GGML_RESTRICT planes, int width, int shift, uint8_t * GGML_RESTRICT q) {
    const int n    = 8*width; // bytes: weights of one plane
    const int mask = (1 << width) - 1;

    for (int i = 0; i < QK_TSQ/n; i++) {
        for (int j = 0; j < n; j++) {
            q[i*n + j] |= ((planes[j] >> i*width) & mask) << shift;
        }
    }
}

// the codes of a block
static inline void tsq_unpack(const uint8_t * GGML_RESTRICT codes, int nbits, uint8_t * GGML_RESTRICT q) {
    memset(q, 0, QK_TSQ);
    tsq_unpack_planes(codes, nbits == 4 ? 4 : 2, 0, q);
    if (nbits == 3) {
        tsq_unpack_planes(codes + QK_TSQ/4, 1, 2, q);
    }
}

// Q8_TSQ: activations of a row, 64 numbers of 8 bits with one scale and one sum. Blocks stand in groups of Q8_TSQ_GROUP, a last
// group has what is left, so that the scales of a group fill a vector and its sums another one. A group of m blocks is
//     float   d [m]      scale
//     int16_t s [m][2]   sum of qs times -1 and 1
//     int8_t  qs[m][64]
#define Q8_TSQ_GROUP      16
#define Q8_TSQ_BLOCK_SIZE (sizeof(float) + 2*sizeof(int16_t) + QK_TSQ)

// blocks of activations whose largest magnitude is less are zeros: its reciprocal may be infinite
#define TSQ_MIN_AMAX 1e-36f

// the larger of a magnitude and that of x; what is NaN once stays NaN, where fmaxf would drop it
static inline float tsq_max_magnitude(float amax, float x) {
    const float a = fabsf(x);
    return a <= amax || amax != amax ? amax : a;
}

// Scale of activations whose largest magnitude is amax, and what brings them to 8 bits. Activations that are not all finite have
// the scale NaN, and with it every product: a broken model must not look like one that multiplies zeros.
static inline float tsq_activation_scale(float amax, float * id) {
    *id = amax > TSQ_MIN_AMAX ? 127.0f/amax : 0.0f;
    return amax <= TSQ_MIN_AMAX ? 0.0f : amax <= FLT_MAX ? amax/127.0f : NAN;
}

// Quantization
GGML_API void quantize_row_tsq2_ref(const float * GGML_RESTRICT x, block_tsq2 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_tsq3_ref(const float * GGML_RESTRICT x, block_tsq3 * GGML_RESTRICT y, int64_t k);
GGML_API void quantize_row_tsq4_ref(const float * GGML_RESTRICT x, block_tsq4 * GGML_RESTRICT y, int64_t k);

// Dequantization
GGML_API void dequantize_row_tsq2(const block_tsq2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_tsq3(const block_tsq3 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
GGML_API void dequantize_row_tsq4(const block_tsq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// Quantization utilizing an importance matrix
GGML_API size_t quantize_tsq2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_tsq3(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
GGML_API size_t quantize_tsq4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
