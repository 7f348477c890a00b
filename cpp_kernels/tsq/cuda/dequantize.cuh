#pragma once

#include "tesseraq/tsq/cuda/tsq.cuh"

// Weights iqs and iqs + 32 of a block, which share a byte of every plane. Exact: d has four significant bits, the integers eight.
template <int nbits>
static __device__ __forceinline__ void dequantize_tsq(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    const uint8_t * x  = (const uint8_t *) vx + ib*TSQ_BLOCK_SIZE(nbits);
    const uint32_t  dz = tsq_load_dz(x);

    int q;
    if (nbits == 4) {
        q = x[TSQ_CODES + iqs];
    } else {
        q = (x[TSQ_CODES + iqs%16] >> 2*(iqs/16)) & 0x33; // planes 0 and 2, or 1 and 3
        if (nbits == 3) {
            q |= ((x[TSQ_CODES + QK_TSQ/4 + iqs%8] >> iqs/8) & 0x11) << 2;
        }
    }

    const float d = e5m3_scale(dz, nbits - 7);
    const int   z = tsq_zero(dz);
    v.x = d * (((q & 0x0F) << (7 - nbits)) - z);
    v.y = d * (((q >>   4) << (7 - nbits)) - z);
}

static __device__ __forceinline__ void dequantize_tsq2(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    dequantize_tsq<2>(vx, ib, iqs, v);
}

static __device__ __forceinline__ void dequantize_tsq3(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    dequantize_tsq<3>(vx, ib, iqs, v);
}

static __device__ __forceinline__ void dequantize_tsq4(const void * vx, const int64_t ib, const int iqs, float2 & v) {
    dequantize_tsq<4>(vx, ib, iqs, v);
}
