#pragma once

// PTQ1_61 tensors repacked at load for the CPU backend, and their panels of activations.

#include "tesseraq/common/buffer.h"
#include "tesseraq/ptq/ptq.h"

#define PTQ1_61_NROWS TESSERAQ_NROWS // rows of a group

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

// A panel of activation columns in blocks of 128 numbers. A block of a panel of w columns is
//     float    d [2][w]     scales: of the salient numbers, of the others
//     int32_t  s [2][w]     sums of qs, times PTQ_LACK_SALIENT and PTQ_LACK_BINARY
//     int8_t   qs[128/TESSERAQ_DEPTH][w][TESSERAQ_DEPTH]  unit after unit
