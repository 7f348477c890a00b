#pragma once

// PTQ1_61 kernels of the CPU backend

#include "ggml.h"
#include "tesseraq/ptq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Quantization
void quantize_row_ptq1_61(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void quantize_row_q8_ptq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// Dequantization, bit for bit that of dequantize_row_ptq1_61
void ggml_cpu_ptq1_61_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// Dot product
void ggml_vec_dot_ptq1_61_q8_ptq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Generic implementation
void quantize_row_q8_ptq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_cpu_ptq1_61_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_ptq1_61_q8_ptq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Round a block of 128 numbers to int8, in their order; its two scales and sums are those of Q8_PTQ.
void ptq_round_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d, int32_t * GGML_RESTRICT s);

#ifdef __cplusplus
}
#endif
