#pragma once

// TSQ: affine blocks of 64 weights, w = d*(q - z), with an 8-bit float d and an 8-bit fixed-point z.
// The layout is described to the bit in docs/formats.md; convert/tensor_types.py holds the same numbers for Python.

#include "ggml.h"

#include <assert.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

// ids of the tensor types (ggml_type) and file types (llama_ftype, ggml_ftype); 501 and 502 are kept for TSQ3 and TSQ4
#define TSQ2_TYPE_ID 500

#define QK_TSQ 64 // weights per block, for all TSQ types

// 2.25 bits per weight
typedef struct {
    uint8_t d;              // scale, E5M3: 2^(e - 24) * (1 + m/8), e = d >> 3, m = d & 7
    uint8_t z;              // zero-point, fixed point: z/32 - 2
    uint8_t qs[QK_TSQ / 4]; // codes 0..3 in 4 planes of 16: weight i stands in qs[i % 16], bits 2*(i / 16) and up
} block_tsq2;
static_assert(sizeof(block_tsq2) == 2 + QK_TSQ / 4, "wrong tsq2 block size/padding");

// E5M3 code to float: the code is the head of the float's exponent and mantissa, so a shift and an add decode it
static inline float tsq_decode_d(uint8_t code) {
    const uint32_t bits = ((uint32_t) code << 20) + ((uint32_t) 103 << 23);
    float d;
    memcpy(&d, &bits, sizeof(d));
    return d;
}

// zero-point code of an n-bit type to float: steps of 2^n/128 from -2^(n - 1), so 64 is 0 for every n
static inline float tsq_decode_z(uint8_t code, int nbits) {
    return ((int) code - 64) * ((1 << nbits) / 128.0f);
}

// Quantization
GGML_API void quantize_row_tsq2_ref(const float * GGML_RESTRICT x, block_tsq2 * GGML_RESTRICT y, int64_t k);

// Dequantization
GGML_API void dequantize_row_tsq2(const block_tsq2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// Quantization utilizing an importance matrix
GGML_API size_t quantize_tsq2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

#ifdef __cplusplus
}
#endif
