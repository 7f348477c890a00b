#pragma once

// BCQ: blocks of 64 weights, w = d*c, with an 8-bit float d and codewords c of 6 bits. BCQ4: every 8 weights choose among 8 codebooks of 16
// (LO-BCQ, arXiv 2502.05376). BCQ2: every 16 weights choose among 4 codebooks of 4, which are a table of 16 bytes.
// The layout is described to the bit in docs/formats.md.

#include "tesseraq/bcq/lease.h"
#include "tesseraq/common/e5m3.h"
#include "tesseraq/common/q8.h"
#include "tesseraq/common/reference.h"

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_BCQ         64 // weights per block
#define BCQ_MAX_CODE   31 // largest magnitude of a codeword
#define BCQ_OFFSET     32 // added to codewords where products take unsigned numbers

#define BCQ4_GROUP     8  // weights that share a codebook
#define BCQ4_CODEBOOKS 8
#define BCQ4_LEVELS    16

#define BCQ2_GROUP     16
#define BCQ2_CODEBOOKS 4
#define BCQ2_LEVELS    4

// 4.5 bits per weight. Both types have these bytes: BCQ4 multiplies activations of 8 bits, BCQ4_A4 such that are encoded as a
// block is.
typedef struct {
    uint8_t d;                            // scale, E5M3
    uint8_t sel[3*QK_BCQ/BCQ4_GROUP/8];   // codebooks: 8 times 3 bits, that of weights 8*k to 8*k + 7 from bit 3*k up
    uint8_t qs[QK_BCQ/2];                 // indices of codewords 0..15 in 2 planes of 32: weight i has its bits in byte i % 32
} block_bcq4;

// 2.25 bits per weight
typedef struct {
    uint8_t d;            // scale, E5M3
    uint8_t sel;          // codebooks: 4 times 2 bits, that of weights 16*k to 16*k + 15 from bit 2*k up
    uint8_t qs[QK_BCQ/4]; // indices of codewords 0..3 in 4 planes of 16: weight i has its bits in byte i % 16, from bit 2*(i / 16) up
} block_bcq2;

TESSERAQ_BCQ_TYPES(TESSERAQ_ASSERT_BLOCK)

// on CUDA, indices of a byte of qs, and 32-bit integers of qs
#define QR_BCQ4 2
#define QI_BCQ4 (QK_BCQ / (4*QR_BCQ4))
#define QR_BCQ2 4
#define QI_BCQ2 (QK_BCQ / (4*QR_BCQ2))

// Codebooks, and what is looked up instead of computed. With u a scaled number in quarters, the nearest codeword is a function
// of floor(u/2), because halfway between two codewords is a multiple of one half.
struct bcq4_tables {
    int8_t  codeword[BCQ4_CODEBOOKS][BCQ4_LEVELS]; // ascending
    uint8_t shifted [BCQ4_CODEBOOKS][BCQ4_LEVELS]; // + BCQ_OFFSET
    uint8_t index   [BCQ4_CODEBOOKS][128];         // of the codeword nearest to u, by (u >> 1) & 127
    int8_t  nearest4[BCQ4_CODEBOOKS][128];         // 4 times that codeword
    int8_t  codeword4[BCQ4_CODEBOOKS][BCQ4_LEVELS]; // 4 times the codewords
    int8_t  border4 [BCQ4_CODEBOOKS][BCQ4_LEVELS]; // largest u that is nearer to codeword i than to codeword i + 1
};
GGML_API struct bcq4_tables bcq4_tables;

struct bcq2_tables {
    int8_t  codeword[BCQ2_CODEBOOKS][BCQ2_LEVELS]; // ascending
    uint8_t shifted [BCQ2_CODEBOOKS][BCQ2_LEVELS]; // + BCQ_OFFSET
};
GGML_API struct bcq2_tables bcq2_tables;

// fills in what is looked up of the codebooks in use, if that was not done yet; ggml_cpu_init and the quantization functions do it
GGML_API void bcq_init(void);

// codebook of the group-th 8 weights of a block
static inline int bcq4_selector(const block_bcq4 * x, int group) {
    const uint32_t sel = x->sel[0] | (uint32_t) x->sel[1] << 8 | (uint32_t) x->sel[2] << 16;
    return sel >> 3*group & 7;
}

// index of weight i of a block
static inline int bcq4_index(const block_bcq4 * x, int i) {
    return x->qs[i % (QK_BCQ/2)] >> 4*(i / (QK_BCQ/2)) & 15;
}

// the codewords of a block
static inline void bcq4_decode(const block_bcq4 * GGML_RESTRICT x, int8_t * GGML_RESTRICT c) {
    for (int i = 0; i < QK_BCQ; i++) {
        c[i] = bcq4_tables.codeword[bcq4_selector(x, i/BCQ4_GROUP)][bcq4_index(x, i)];
    }
}

// codebook of the group-th 16 weights of a block
static inline int bcq2_selector(const block_bcq2 * x, int group) {
    return x->sel >> 2*group & 3;
}

// index of weight i of a block
static inline int bcq2_index(const block_bcq2 * x, int i) {
    return x->qs[i % (QK_BCQ/4)] >> 2*(i / (QK_BCQ/4)) & 3;
}

// the codewords of a block
static inline void bcq2_decode(const block_bcq2 * GGML_RESTRICT x, int8_t * GGML_RESTRICT c) {
    for (int i = 0; i < QK_BCQ; i++) {
        c[i] = bcq2_tables.codeword[bcq2_selector(x, i/BCQ2_GROUP)][bcq2_index(x, i)];
    }
}

// Scale of 64 activations whose largest magnitude is amax, and what brings them to quarters of it. It has three bits of mantissa as
// that of weights, and all exponents of a float, since no file has to hold it. NaN as q8_scale has it.
static inline float bcq_activation_scale(float amax, float * id4) {
    if (!(amax > Q8_MIN_AMAX && amax <= FLT_MAX)) {
        *id4 = 0.0f;
        return amax <= Q8_MIN_AMAX ? 0.0f : NAN;
    }
    float d = amax/BCQ_MAX_CODE;
    uint32_t bits;
    memcpy(&bits, &d, sizeof(bits));
    bits = (bits + (1u << 19)) & 0xFFF00000u;
    memcpy(&d, &bits, sizeof(d));
    *id4 = 4.0f/d;
    return d;
}

#ifdef __cplusplus
}
#endif
