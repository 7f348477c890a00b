#pragma once

// BCQ tensors repacked at load for the CPU backend, as tsq-repack.h has it for TSQ: blocks of some neighbouring rows are
// interleaved, and multiplied with the same panels of activations.

#include "ggml.h"
#include "tesseraq/bcq.h"
#include "tesseraq/tsq-repack.h"

#ifdef __cplusplus
extern "C" {
#endif

// Rows of a group; without kernels, tensors stay as they are. On x86 the lookup of codewords in a table of 128 is worth it.
#if TSQ_NROWS == 16 && defined(__AVX512VBMI__)
#define BCQ_NROWS 16
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define BCQ_NROWS TSQ_NROWS
#else
#define BCQ_NROWS 0
#endif

// Columns of a row that stand side by side: 8 on ARM, where a group of 8 is looked up at once, else as in a panel.
#if defined(__ARM_NEON) && defined(__aarch64__)
#define BCQ_DEPTH 8
#else
#define BCQ_DEPTH 4
#endif

// A group of rows is a sequence of blocks. A block is
//     uint32_t head[rows]                    scale in the lowest byte, selectors above it
//     uint8_t  qs[32/BCQ_DEPTH][rows][BCQ_DEPTH]  indices of columns 2*BCQ_DEPTH*v + j in the low bits of byte j of vector v, those
//                                            of columns 2*BCQ_DEPTH*v + BCQ_DEPTH + j in the high ones
// All of it together is as large as the rows were.
//
//   - nrows: rows of the group
//   - x    : the rows, nb blocks each, one after the other
void bcq_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y);

// encode nb blocks of column c of a panel of w columns, as quantize_row_a4_bcq does; y is the panel's first of these blocks
void bcq_quantize_panel        (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);
void bcq_quantize_panel_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);

// dot products of a group of rows with a panel of w columns: s[c][r] for column c and row r of the group
void ggml_gemm_bcq        (int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w);
void ggml_gemm_bcq_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows);

#ifdef __cplusplus
}
#endif
