#pragma once

#include "tesseraq/bcq/cuda/bcq.cuh"
#include "tesseraq/bcq/cuda/unit.cuh"

// Weights iqs and iqs + 32 of a block, which share a byte. Exact: d has four significant bits, codewords five.
static __device__ __forceinline__ void dequantize_bcq4(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_bcq4 * x    = (const block_bcq4 *) vx + ib;
    const uint32_t     head = bcq_load_head(x);
    const float        d    = bcq_scale(head);
    const int          q    = x->qs[iqs];

    v.x = d * __ldg(&bcq_device.codeword[bcq_selector_of(head, iqs/BCQ_GROUP)]    [q & 15]);
    v.y = d * __ldg(&bcq_device.codeword[bcq_selector_of(head, iqs/BCQ_GROUP + 4)][q >> 4]);
}
