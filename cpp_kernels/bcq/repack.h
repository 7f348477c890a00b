#pragma once

// BCQ tensors repacked at load for the CPU backend, in the groups of rows that TSQ has, and multiplied with the same panels of activations:
// those of Q8_TSQ (common/q8.h), in which A4_BCQ has codewords.

#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/buffer.h"
#include "tesseraq/common/q8.h"

// Rows of a group. BCQ4 has no kernels, and its tensors stay as they are, where looking codewords up in a table of 128 takes more than one
// instruction; on ARM it is worth it all the same.
#define BCQ2_NROWS TESSERAQ_NROWS
#if (TESSERAQ_NROWS == 16 && defined(__AVX512VBMI__)) || (defined(__ARM_NEON) && defined(__aarch64__))
#define BCQ4_NROWS TESSERAQ_NROWS
#else
#define BCQ4_NROWS 0
#endif

// Columns of a row that stand side by side: 8 on ARM, where a group of 8 is looked up at once, else as in a panel.
#if defined(__ARM_NEON) && defined(__aarch64__)
#define BCQ_DEPTH 8
#else
#define BCQ_DEPTH 4
#endif

// A group of rows of BCQ4 is a sequence of blocks. A block is
//     uint32_t head[rows]                    scale in the lowest byte, selectors above it
//     uint8_t  qs[32/BCQ_DEPTH][rows][BCQ_DEPTH]  indices of columns 2*BCQ_DEPTH*v + j in the low bits of byte j of vector v, those
//                                            of columns 2*BCQ_DEPTH*v + BCQ_DEPTH + j in the high ones
// and of BCQ2:
//     uint8_t  d[rows], sel[rows]
//     uint8_t  qs[16/BCQ_DEPTH][rows][BCQ_DEPTH]  bits 2*k and up of byte j of vector v: column 16*k + BCQ_DEPTH*v + j
// All of it together is as large as the rows were.
