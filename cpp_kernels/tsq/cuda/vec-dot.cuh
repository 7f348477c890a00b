#pragma once

// Dot products of TSQ with Q8_1, for MMVQ. Included by vecdotq.cuh, after get_int_b4.

#include "tesseraq/tsq/cuda/tsq.cuh"

// Integers of qs per thread: half a block. A whole block would be fewer instructions per weight, but the lanes of a warp would then
// lie twice as far apart in the activations, and each of its loads would touch twice as many cache lines.
#define VDR_TSQ2_Q8_1_MMVQ 2
#define VDR_TSQ3_Q8_1_MMVQ 2
#define VDR_TSQ4_Q8_1_MMVQ 4

// A block faces two blocks of activations: sums qs0 and qs1 of codes times activations, qs1 in units of 2^-shift1, and sums a0 and
// a1 of the same activations. z joins the integers, with codes in its steps. `s` of Q8_1 would do as well, but it is a sum from
// before rounding to 8 bits, and z times what rounding changed would stay in the result.
template <int nbits, int shift1>
static __device__ __forceinline__ float tsq_dot(
        uint32_t dz, const block_q8_1 * __restrict__ bq8_1, int qs0, int qs1, int a0, int a1) {
    const int z  = tsq_zero(dz);
    const int s0 = qs0*(1 << (7 - nbits))          - z*a0;
    const int s1 = qs1*(1 << (7 - nbits - shift1)) - z*a1;

    return e5m3_scale(dz, nbits - 7) * (__low2float(bq8_1[0].ds)*s0 + __low2float(bq8_1[1].ds)*s1);
}

// TSQ2 and TSQ3: codes of the last 32 weights stay in the high nibbles, sixteenfold
template <int nbits, int vdr>
static __device__ __forceinline__ float tsq_vec_dot_nibbles(
        const void * __restrict__ block, const block_q8_1 * __restrict__ bq8_1, const int iqs) {
    int qs0 = 0;
    int qs1 = 0;
    int a0  = 0;
    int a1  = 0;

#pragma unroll
    for (int i = 0; i < vdr; ++i) {
        const int j = iqs + i;

        uint32_t even;
        uint32_t odd;
        tsq_nibbles<nbits>(block, j, even, odd);

        const int u0 = get_int_b4(bq8_1[0].qs, j);
        const int u1 = get_int_b4(bq8_1[0].qs, j + 4);
        const int u2 = get_int_b4(bq8_1[1].qs, j);
        const int u3 = get_int_b4(bq8_1[1].qs, j + 4);

        qs0 = ggml_cuda_dp4a(even & 0x07070707, u0, qs0);
        qs0 = ggml_cuda_dp4a(odd  & 0x07070707, u1, qs0);
        qs1 = ggml_cuda_dp4a(even & 0x70707070, u2, qs1);
        qs1 = ggml_cuda_dp4a(odd  & 0x70707070, u3, qs1);

        a0 = ggml_cuda_dp4a(0x01010101, u0, a0);
        a0 = ggml_cuda_dp4a(0x01010101, u1, a0);
        a1 = ggml_cuda_dp4a(0x01010101, u2, a1);
        a1 = ggml_cuda_dp4a(0x01010101, u3, a1);
    }

    return tsq_dot<nbits, 4>(tsq_load_dz(block), bq8_1, qs0, qs1, a0, a1);
}

static __device__ __forceinline__ float vec_dot_tsq2_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    return tsq_vec_dot_nibbles<2, VDR_TSQ2_Q8_1_MMVQ>((const block_tsq2 *) vbq + kbx, bq8_1, iqs);
}

static __device__ __forceinline__ float vec_dot_tsq3_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    return tsq_vec_dot_nibbles<3, VDR_TSQ3_Q8_1_MMVQ>((const block_tsq3 *) vbq + kbx, bq8_1, iqs);
}

static __device__ __forceinline__ float vec_dot_tsq4_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block_tsq4 * block = (const block_tsq4 *) vbq + kbx;

    int qs0 = 0;
    int qs1 = 0;
    int a0  = 0;
    int a1  = 0;

#pragma unroll
    for (int i = 0; i < VDR_TSQ4_Q8_1_MMVQ; ++i) {
        const uint32_t v  = tsq_load_codes(block, TSQ_CODES + 4*(iqs + i));
        const int      u0 = get_int_b4(bq8_1[0].qs, iqs + i);
        const int      u1 = get_int_b4(bq8_1[1].qs, iqs + i);

        qs0 = ggml_cuda_dp4a( v       & 0x0F0F0F0F, u0, qs0);
        qs1 = ggml_cuda_dp4a((v >> 4) & 0x0F0F0F0F, u1, qs1);

        a0 = ggml_cuda_dp4a(0x01010101, u0, a0);
        a1 = ggml_cuda_dp4a(0x01010101, u1, a1);
    }

    return tsq_dot<4, 0>(tsq_load_dz(block), bq8_1, qs0, qs1, a0, a1);
}
