#pragma once

#include "tesseraq/ptq/cuda/ptq.cuh"

static __device__ __forceinline__ float dequantize_ptq1_61(const block_ptq1_61 * x, int i) {
    if (i < PTQ_SALIENT) {
        const int q = x->qs[i % (PTQ_SALIENT/2)] >> 4*(i / (PTQ_SALIENT/2)) & 15;
        return e5m3_scale(x->s, -1) * (2*q - 15);
    }
    const int   j = i - PTQ_SALIENT;
    const float d = e5m3_scale(x->d, 0);
    return x->signs[j / 8] >> j % 8 & 1 ? d : -d;
}

// Weights iqs and iqs + 64 of a block. Exact: s has four significant bits, what it is multiplied with as many.
static __device__ __forceinline__ void dequantize_ptq1_61(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_ptq1_61 * x = (const block_ptq1_61 *) vx + ib;

    v.x = dequantize_ptq1_61(x, iqs);
    v.y = dequantize_ptq1_61(x, iqs + QK_PTQ/2);
}
