#pragma once

// BCQ kernels of the CPU backend

#include "ggml.h"
#include "tesseraq/bcq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Quantization
void quantize_row_bcq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// Activations of BCQ4_A4. They have the layout of Q8_TSQ, and codewords as numbers: what a block of BCQ4_A4 would decode to. All
// arithmetic beyond the scaling is that of integers, so every kernel chooses the same codewords:
//     d   max|x|/31, rounded to three bits of mantissa
//     u   x in quarters of d, rounded to int8
//     e   4*c - u for the codeword c nearest to u, no further from 0 than 127
//     the codebook with the least sum of e*e over 8 numbers, the first of those that draw
void quantize_row_a4_bcq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// Dequantization, bit for bit that of dequantize_row_bcq4
void ggml_cpu_bcq4_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// Dot product with Q8_TSQ or A4_BCQ
void ggml_vec_dot_bcq4_q8_tsq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Generic implementation
void quantize_row_a4_bcq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_cpu_bcq4_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_bcq4_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Encode 64 numbers: codewords go to q, the scale to d. Returns the sum of the codewords.
int bcq_encode_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d);

#ifdef __cplusplus
}
#endif
