#pragma once

#include "tesseraq/bcq/cuda/bcq.cuh"
#include "tesseraq/bcq/cuda/unit.cuh"

// Weights iqs and iqs + 32 of a block, which share a byte. Exact: d has four significant bits, codewords five.
static __device__ __forceinline__ void dequantize_bcq4(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_bcq4 * x    = (const block_bcq4 *) vx + ib;
    const uint32_t     head = bcq4_load_head(x);
    const float        d    = bcq_scale(head);
    const int          q    = x->qs[iqs];

    v.x = d * __ldg(&bcq_device.codeword[bcq4_selector_of(head, iqs/BCQ4_GROUP)]    [q & 15]);
    v.y = d * __ldg(&bcq_device.codeword[bcq4_selector_of(head, iqs/BCQ4_GROUP + 4)][q >> 4]);
}

// weights iqs and iqs + 32 of a block, which share a byte
static __device__ __forceinline__ void dequantize_bcq2(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_bcq2 * x    = (const block_bcq2 *) vx + ib;
    const uint32_t     head = bcq2_load_head(x);
    const float        d    = bcq_scale(head);
    const int          k    = iqs/BCQ2_GROUP;
    const int          q    = x->qs[iqs%16] >> 2*k;

    v.x = d * __ldg(&bcq_device.codeword2[bcq2_selector_of(head, k)]    [q & 3]);
    v.y = d * __ldg(&bcq_device.codeword2[bcq2_selector_of(head, k + 2)][q >> 4 & 3]);
}
