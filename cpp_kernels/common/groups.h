#pragma once

// Repacked tensors of the CPU backend: blocks of some neighbouring rows are interleaved, so that one vector holds the same few columns of
// all these rows, another one their scales, and nothing is summed across the lanes of a vector. Kernels multiply such a group of rows with
// a panel of activation columns, unpacking each tile once for all columns.
//
// Rows of a group and most columns of a panel for the kernels that are compiled in; without kernels, tensors stay as they are.
// TESSERAQ_DEPTH columns of a row stand side by side, as many as one instruction sums up: 8 for products of matrices (i8mm), else 4.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define TESSERAQ_NROWS 16
#define TESSERAQ_NCOLS 12
#define TESSERAQ_DEPTH 4
#elif defined(__AVX2__) && defined(__FMA__)
#define TESSERAQ_NROWS 8
#define TESSERAQ_NCOLS 4
#define TESSERAQ_DEPTH 4
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#define TESSERAQ_NROWS 4
#define TESSERAQ_NCOLS 12
#define TESSERAQ_DEPTH 8
#elif defined(__ARM_NEON) && defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TESSERAQ_NROWS 4
#define TESSERAQ_NCOLS 12
#define TESSERAQ_DEPTH 4
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define TESSERAQ_NROWS 4
#define TESSERAQ_NCOLS 8
#define TESSERAQ_DEPTH 4
#else
#define TESSERAQ_NROWS 0
#define TESSERAQ_NCOLS 4
#define TESSERAQ_DEPTH 4
#endif
