#pragma once

// Fields and codes of TSQ blocks in registers. docs/formats.md has the layout. Included after common.cuh.
// Blocks begin at even addresses, and no more can be said of them: 16 bits are the widest load that is always aligned.

#include "tesseraq/common/cuda/arithmetic.cuh"
#include "tesseraq/tsq/tsq.h"

// d and z of a block, as they stand in it: d in the low byte
static __device__ __forceinline__ uint32_t tsq_load_dz(const void * block) {
    return *(const uint16_t *) block;
}

// 32 bits of codes from two loads, byte offset even
static __device__ __forceinline__ uint32_t tsq_load_codes(const void * block, int offset) {
    const uint16_t * x = (const uint16_t *) ((const char *) block + offset);
    return x[0] | (uint32_t) x[1] << 16;
}

// zero-point in its steps: 2^n/128
static __device__ __forceinline__ int tsq_zero(uint32_t dz) {
    return (int) (dz >> 8) - 64;
}

// Codes in registers. A byte of `even` has a code of the first 32 weights in its low nibble and one of the last 32 in its high
// nibble; so has a byte of `odd`, 16 weights further. Integer j of qs holds weights 4*j + {0, 16, 32, 48} and the 3 after each.

template <int nbits>
static __device__ __forceinline__ void tsq_nibbles(const void * block, int j, uint32_t & even, uint32_t & odd) {
    const uint32_t v = tsq_load_codes(block, TSQ_CODES + 4*j);

    even = v & 0x33333333;
    odd  = (v >> 2) & 0x33333333;
    if (nbits == 3) {
        const uint32_t h = tsq_load_codes(block, TSQ_CODES + QK_TSQ/4 + 4*(j % 2)) >> (j / 2);

        even |= (h << 2) & 0x44444444;
        odd  |=  h       & 0x44444444;
    }
}
