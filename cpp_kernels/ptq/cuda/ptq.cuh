#pragma once

// Fields of PTQ1_61 blocks in registers. docs/formats.md has the layout. Included after common.cuh.
// Blocks are 27 bytes, so they begin anywhere.

#include "tesseraq/common/cuda/arithmetic.cuh"
#include "tesseraq/ptq/ptq.h"

// 32 bits from anywhere, by the aligned words that its first byte and its last byte are in: nothing but these words is read
static __device__ __forceinline__ uint32_t ptq_load(const void * block, int offset) {
    const uintptr_t first = (uintptr_t) block + offset;
    const uint32_t  low   = *(const uint32_t *) (first       & ~(uintptr_t) 3);
    const uint32_t  high  = *(const uint32_t *) ((first + 3) & ~(uintptr_t) 3);

    return __funnelshift_r(low, high, 8*(first & 3));
}
