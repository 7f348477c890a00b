#pragma once

// PTQ1_61: blocks of 128 weights, the first 24 of 4 bits, the other 104 of one (PTQ1.61, arXiv 2502.13179). An order of the columns,
// which a file keeps beside the matrix, brings 24 salient input channels into every block.
// The layout is described to the bit in docs/formats.md.

#include "tesseraq/common/e5m3.h"
#include "tesseraq/common/q8.h"
#include "tesseraq/common/reference.h"

#include <assert.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_PTQ      128 // weights per block
#define PTQ_SALIENT 24  // of 4 bits, the first of a block
#define PTQ_BINARY  (QK_PTQ - PTQ_SALIENT)

// 1.6875 bits per weight
typedef struct {
    uint8_t d;                   // scale of the binary weights, E5M3
    uint8_t s;                   // scale of the salient weights, E5M3
    uint8_t qs[PTQ_SALIENT/2];   // codes 0..15 in 2 planes of 12: weight i has its bits in byte i % 12. Weights are s*(q - 7.5)
    uint8_t signs[PTQ_BINARY/8]; // bit i, little-endian, is weight 24 + i: 1 is d, 0 is -d
} block_ptq1_61;

TESSERAQ_PTQ_TYPES(TESSERAQ_ASSERT_BLOCK)

// on CUDA, weights that dequantize_ptq1_61 takes, and threads that share a block: each has a block of activations
#define QR_PTQ1_61 2
#define QI_PTQ1_61 (QK_PTQ / 32)

// code of salient weight i of a block
static inline int ptq_code(const block_ptq1_61 * x, int i) {
    return x->qs[i % (PTQ_SALIENT/2)] >> 4*(i / (PTQ_SALIENT/2)) & 15;
}

// bit of binary weight i of a block, 24 + i of all
static inline int ptq_sign(const block_ptq1_61 * x, int i) {
    return x->signs[i / 8] >> i % 8 & 1;
}

// Q8_PTQ: activations of a row, 128 numbers of 8 bits. Salient channels are those with the largest numbers, so the two kinds have
// scales of their own. Blocks stand in groups of Q8_GROUP, a last group has what is left. A group of m blocks is
//     float   d [2][m]    scales: of the salient numbers, of the others
//     int32_t s [2][m]    sums of qs, times PTQ_LACK_SALIENT and PTQ_LACK_BINARY
//     int8_t  qs[m][128]  the 104 others first, then the 24 salient numbers
// A product with codes q*8 lacks 8*7.5 times the sum of the numbers, one with bits*64 lacks half of it: 64*(2*bit - 1)/2.
#define Q8_PTQ_BLOCK_SIZE (2*sizeof(float) + 2*sizeof(int32_t) + QK_PTQ)

#define PTQ_LACK_SALIENT (-60)
#define PTQ_LACK_BINARY  (-32)
#define PTQ_UNIT_SALIENT (1.0f/8)  // what makes weights of products that lack nothing: s*(8*q - 60)/8,
#define PTQ_UNIT_BINARY  (1.0f/32) // and d*(64*bit - 32)/32

#ifdef __cplusplus
}
#endif
