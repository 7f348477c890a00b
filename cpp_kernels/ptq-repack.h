#pragma once

// PTQ1_61 tensors repacked at load for the CPU backend, as tsq-repack.h has it for TSQ: blocks of some neighbouring rows are
// interleaved, and multiplied with panels of activations.

#include "ggml.h"
#include "tesseraq/ptq.h"
#include "tesseraq/tsq-repack.h"

#ifdef __cplusplus
extern "C" {
#endif

// rows of a group; without kernels, tensors stay as they are
#define PTQ_NROWS TSQ_NROWS

// The 128 columns of a block are 32 units of 4. Salient ones are in their order; signs stay in the bytes they come in, 4 bytes of a row
// together, so that a unit of the first 24 binary ones is a column of each of 4 bytes.
#define PTQ_UNITS         (QK_PTQ/4)
#define PTQ_SALIENT_UNITS (PTQ_SALIENT/4)

static inline int ptq_column(int unit, int j) {
    const int u = unit - PTQ_SALIENT_UNITS;
    return u < 0 || u >= 24 ? 4*unit + j : PTQ_SALIENT + 8*(4*(u / 8) + j) + u % 8;
}

// A group of rows is a sequence of blocks. A block is
//     uint8_t d[rows], s[rows]
//     uint8_t last[rows]         bits 4*(rows*k + r) to 4*(rows*k + r) + 3, little-endian: unit 30 + k of row r
//     uint8_t qs[3][rows][4]     vector v: unit v in the low bits, unit v + 3 in the high ones
//     uint8_t signs[3][rows][4]  vector v, bit k: unit 6 + 8*v + k
// All of it together is as large as the rows were.
//
//   - nrows: rows of the group
//   - x    : the rows, nb blocks each, one after the other
void ptq_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y);

// A panel of activation columns in blocks of 128 numbers. A block of a panel of w columns is
//     float    d [2][w]     scales: of the salient numbers, of the others
//     int32_t  s [2][w]     sums of qs, times PTQ_LACK_SALIENT and PTQ_LACK_BINARY
//     int8_t   qs[128/TSQ_DEPTH][w][TSQ_DEPTH]  unit after unit
#define PTQ_PANEL_BLOCK_SIZE (2*sizeof(float) + 2*sizeof(int32_t) + QK_PTQ)

// quantize nb blocks of column c of a panel of w columns; y is the panel's first of these blocks
void ptq_quantize_panel        (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);
void ptq_quantize_panel_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);

// dot products of a group of rows with a panel of w columns: s[c][r] for column c and row r of the group
void ggml_gemm_ptq        (int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w);
void ggml_gemm_ptq_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows);

#ifdef __cplusplus
}
#endif
