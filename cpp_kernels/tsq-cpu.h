#pragma once

// TSQ kernels of the CPU backend

#include "ggml.h"
#include "tesseraq/tsq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Quantization
void quantize_row_tsq2(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_tsq3(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);
void quantize_row_tsq4(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void quantize_row_q8_tsq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// Activations of Q8_TSQ, of A4_BCQ, which has its layout, and of Q8_PTQ go from float by rows, or by parts of rows that are whole groups:
// moves the ends of a part of a row of nb blocks, where the threads that share the row all find the same ends. Other types may be cut
// between any blocks.
static inline void ggml_cpu_tsq_whole_groups(enum ggml_type type, int64_t nb, int64_t * first, int64_t * last) {
    if (type == GGML_TYPE_Q8_TSQ || type == GGML_TYPE_A4_BCQ || type == GGML_TYPE_Q8_PTQ) {
        *first = *first == nb ? nb : *first - *first % Q8_TSQ_GROUP;
        *last  = *last  == nb ? nb : *last  - *last  % Q8_TSQ_GROUP;
    }
}

// Dequantization, bit for bit that of dequantize_row_tsq*
void ggml_cpu_tsq2_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
void ggml_cpu_tsq3_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
void ggml_cpu_tsq4_to_fp32(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

// to_float of a type: one of these, or what its traits have
ggml_to_float_t ggml_cpu_to_float(enum ggml_type type);

// Dot product
void ggml_vec_dot_tsq2_q8_tsq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_tsq3_q8_tsq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_tsq4_q8_tsq(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

// Generic implementation
void quantize_row_q8_tsq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

void ggml_cpu_tsq2_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
void ggml_cpu_tsq3_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);
void ggml_cpu_tsq4_to_fp32_generic(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);

void ggml_vec_dot_tsq2_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_tsq3_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);
void ggml_vec_dot_tsq4_q8_tsq_generic(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

#ifdef __cplusplus
}
#endif
