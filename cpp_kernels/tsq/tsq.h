#pragma once

// TSQ: affine blocks of 64 weights, w = d*(q - z), with an 8-bit float d and an 8-bit fixed-point z.
// The layout is described to the bit in docs/formats.md.

#include "tesseraq/common/e5m3.h"
#include "tesseraq/common/reference.h"

#include <assert.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QK_TSQ 64 // weights per block, for all TSQ types

// A block is d, z and codes. d is the scale, E5M3: 2^(e - 24) * (1 + m/8), e = d >> 3, m = d & 7. z is the zero-point, fixed
// point: (z - 64) * 2^n/128 for codes of n bits. Codes stand in planes: with planes of b bits, weight i has its bits in byte
// i % (8*b), from bit b*(i / (8*b)) up.

// 2.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/32 - 2
    uint8_t qs[QK_TSQ / 4]; // codes 0..3 in 4 planes of 16
} block_tsq2;

// 3.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/16 - 4
    uint8_t qs[QK_TSQ / 4]; // codes 0..7, low 2 bits in 4 planes of 16
    uint8_t qh[QK_TSQ / 8]; //             high bit in 8 planes of 8
} block_tsq3;

// 4.25 bits per weight
typedef struct {
    uint8_t d;              // scale
    uint8_t z;              // zero-point: z/8 - 8
    uint8_t qs[QK_TSQ / 2]; // codes 0..15 in 2 planes of 32
} block_tsq4;

TESSERAQ_TSQ_TYPES(TESSERAQ_ASSERT_BLOCK)

// What the types share works on bytes: 0 is d, 1 is z, the codes begin at TSQ_CODES.
#define TSQ_CODES             2
#define TSQ_BLOCK_SIZE(nbits) (TSQ_CODES + (nbits)*QK_TSQ/8)

// zero-point code of an n-bit type to float: steps of 2^n/128 from -2^(n - 1), so 64 is 0 for every n
static inline float tsq_decode_z(uint8_t code, int nbits) {
    return ((int) code - 64) * ((1 << nbits) / 128.0f);
}

// add bits to codes, from bit `shift` up, out of planes of `width` bits
static inline void tsq_unpack_planes(const uint8_t * GGML_RESTRICT planes, int width, int shift, uint8_t * GGML_RESTRICT q) {
    const int n    = 8*width; // bytes: weights of one plane
    const int mask = (1 << width) - 1;

    for (int i = 0; i < QK_TSQ/n; i++) {
        for (int j = 0; j < n; j++) {
            q[i*n + j] |= ((planes[j] >> i*width) & mask) << shift;
        }
    }
}

// the codes of a block
static inline void tsq_unpack(const uint8_t * GGML_RESTRICT codes, int nbits, uint8_t * GGML_RESTRICT q) {
    memset(q, 0, QK_TSQ);
    tsq_unpack_planes(codes, nbits == 4 ? 4 : 2, 0, q);
    if (nbits == 3) {
        tsq_unpack_planes(codes + QK_TSQ/4, 1, 2, q);
    }
}

// on CUDA, codes of a byte of qs, and 32-bit integers of qs
#define QR_TSQ2 4
#define QI_TSQ2 (QK_TSQ / (4*QR_TSQ2))
#define QR_TSQ3 4
#define QI_TSQ3 (QK_TSQ / (4*QR_TSQ3))
#define QR_TSQ4 2
#define QI_TSQ4 (QK_TSQ / (4*QR_TSQ4))

#ifdef __cplusplus
}
#endif
