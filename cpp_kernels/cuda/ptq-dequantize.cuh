#pragma once

#include "tesseraq/cuda/ptq.cuh"

static __device__ __forceinline__ float dequantize_ptq1_61(const block_ptq1_61 * x, int i) {
    if (i < PTQ_SALIENT) {
        return tsq_scale(x->s, -1) * (2*ptq_code(x, i) - 15);
    }
    const float d = tsq_scale(x->d, 0);
    return ptq_sign(x, i - PTQ_SALIENT) ? d : -d;
}

// Weights iqs and iqs + 64 of a block. Exact: s has four significant bits, what it is multiplied with as many.
static __device__ __forceinline__ void dequantize_ptq1_61(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const block_ptq1_61 * x = (const block_ptq1_61 *) vx + ib;

    v.x = dequantize_ptq1_61(x, iqs);
    v.y = dequantize_ptq1_61(x, iqs + QK_PTQ/2);
}
