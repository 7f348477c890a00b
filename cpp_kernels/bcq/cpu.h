#pragma once

// A4_BCQ, the activations of BCQ4_A4. They have the layout of Q8_TSQ, and codewords as numbers: what a block of BCQ4_A4 would decode to. All
// arithmetic beyond the scaling is that of integers, so every kernel chooses the same codewords:
//     d   max|x|/31, rounded to three bits of mantissa
//     u   x in quarters of d, rounded to int8
//     e   4*c - u for the codeword c nearest to u, no further from 0 than 127
//     the codebook with the least sum of e*e over 8 numbers, the first of those that draw

#include "ggml.h"
#include "tesseraq/bcq/bcq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Encode 64 numbers: codewords go to q, the scale to d. Returns the sum of the codewords.
int bcq_encode_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d);

#ifdef __cplusplus
}
#endif
