#pragma once

// TSQ tensors repacked at load for the CPU backend: the blocks of some neighbouring rows are interleaved, so that one vector
// holds the same few columns of all these rows, another one their scales, and nothing is summed across the lanes of a vector.
// Kernels multiply such a group of rows with a panel of activation columns, unpacking each tile once for all columns.

#include "ggml.h"
#include "ggml-backend.h"
#include "tesseraq/tsq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows of a group and most columns of a panel for the kernels that are compiled in; without kernels, tensors stay as they are.
// TSQ_DEPTH columns of a row stand side by side, as many as one instruction sums up: 8 for products of matrices (i8mm), else 4.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TSQ_NROWS 16
#define TSQ_NCOLS 12
#define TSQ_DEPTH 4
#elif defined(__AVX2__) && defined(__FMA__)
#define TSQ_NROWS 8
#define TSQ_NCOLS 4
#define TSQ_DEPTH 4
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#define TSQ_NROWS 4
#define TSQ_NCOLS 12
#define TSQ_DEPTH 8
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TSQ_NROWS 4
#define TSQ_NCOLS 12
#define TSQ_DEPTH 4
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define TSQ_NROWS 4
#define TSQ_NCOLS 8
#define TSQ_DEPTH 4
#else
#define TSQ_NROWS 0
#define TSQ_NCOLS 4
#define TSQ_DEPTH 4
#endif

// A group of rows is a sequence of pairs of blocks; a last block without a partner stands alone. A pair is
//     uint8_t d[rows], z[rows] of the first block, d[rows], z[rows] of the second, codes of the first, codes of the second
// and the codes of a block are vectors of TSQ_DEPTH*rows bytes. Byte TSQ_DEPTH*r + j of a vector belongs to row r and to columns
// TSQ_DEPTH*g + j, for the groups of columns g that the vector holds, out of n = 64/TSQ_DEPTH:
//     TSQ2: vector v, bits 2*k and up: group n/4*k + v
//     TSQ4: vector v, bits 4*k and up: group n/2*k + v
//     TSQ3: vectors 3*t to 3*t + 2, bits 0-2 and 3-5: groups 8*t to 8*t + 5
//           group 8*t + 6: high two bits in bits 6-7 of vector 3*t,     low bit in bit 6 of vector 3*t + 2
//           group 8*t + 7: high two bits in bits 6-7 of vector 3*t + 1, low bit in bit 7 of vector 3*t + 2
// All of it together is as large as the rows were.
//
//   - nrows: rows of the group
//   - x    : the rows, nb blocks each, one after the other
void tsq_repack(int nbits, int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y);

// A panel of activation columns in blocks of 64 numbers. A block of a panel of w columns is
//     float    d [w]        scale
//     int16_t  s [w][2]     sum of qs times -1 and 1
//     int8_t   qs[64/TSQ_DEPTH][w][TSQ_DEPTH]
#define TSQ_PANEL_BLOCK_SIZE (sizeof(float) + 2*sizeof(int16_t) + QK_TSQ)

// quantize nb blocks of column c of a panel of w columns; y is the panel's first of these blocks
void tsq_quantize_panel        (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);
void tsq_quantize_panel_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);

// dot products of a group of rows with a panel of w columns: s[c][r] for column c and row r of the group
void ggml_gemm_tsq        (int nbits, int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w);
void ggml_gemm_tsq_generic(int nbits, int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows);

// where the loader puts tensors that the kernels can work with; NULL without kernels
ggml_backend_buffer_type_t ggml_backend_cpu_tsq_buffer_type(void);

#ifdef __cplusplus
}
#endif
