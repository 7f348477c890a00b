#pragma once

// Dot product of PTQ1_61 with Q8_1, for MMVQ. Included by vecdotq.cuh, after get_int_b4.

#include "tesseraq/ptq/cuda/ptq.cuh"

// Four threads share a block, and each has a block of activations: its signs, and a third of the salient codes, which are three integers
// and belong to the first block of activations. The last thread has zeros for them, and so has the first one for the activations whose
// signs it would take out of codes: all threads do the same.
#define VDR_PTQ1_61_Q8_1_MMVQ 1

// 8 integers, 4 activations each, to the order in which signs come out of a word: number k + 8*i in byte i of integer k. Rows share
// activations, so this is done once for them all.
static __device__ __forceinline__ void ptq_transpose(const int (&u)[8], int (&a)[8]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) { // integers h, h + 2, h + 4, h + 6 have numbers 4*h to 4*h + 3, and those 8, 16, 24 further
        const uint32_t low0  = __byte_perm(u[h],     u[h + 2], 0x5140);
        const uint32_t high0 = __byte_perm(u[h],     u[h + 2], 0x7362);
        const uint32_t low1  = __byte_perm(u[h + 4], u[h + 6], 0x5140);
        const uint32_t high1 = __byte_perm(u[h + 4], u[h + 6], 0x7362);

        a[4*h + 0] = __byte_perm(low0,  low1,  0x5410);
        a[4*h + 1] = __byte_perm(low0,  low1,  0x7632);
        a[4*h + 2] = __byte_perm(high0, high1, 0x5410);
        a[4*h + 3] = __byte_perm(high0, high1, 0x7632);
    }
}

static __device__ __forceinline__ float vec_dot_ptq1_61_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block_ptq1_61 * block = (const block_ptq1_61 *) vbq + kbx;

    // masks, and not branches: what rows share stays in sight of the compiler
    const int binary = iqs == 0 ? 0 : -1;
    int u[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        u[i] = get_int_b4(bq8_1[iqs].qs, i) & (i < PTQ_SALIENT/4 ? binary : -1);
    }
    int a[8];
    ptq_transpose(u, a);

    // sums of activations, and of those whose sign is +
    const uint32_t signs = ptq_load(block, (int) offsetof(block_ptq1_61, signs) - PTQ_SALIENT/8 + 4*iqs);
    int all  = 0;
    int plus = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        all  = ggml_cuda_dp4a(0x01010101, a[k], all);
        plus = ggml_cuda_dp4a((signs >> k) & 0x01010101, a[k], plus);
    }

    const int      v     = min(iqs, 2);
    const uint32_t codes = ptq_load(block, (int) offsetof(block_ptq1_61, qs) + 4*v);
    const int      third = iqs < 3 ? -1 : 0;
    const int      low   = get_int_b4(bq8_1[0].qs, v)     & third;
    const int      high  = get_int_b4(bq8_1[0].qs, v + 3) & third;

    const int salient = ggml_cuda_dp4a(0x01010101, low, ggml_cuda_dp4a(0x01010101, high, 0));
    const int product = ggml_cuda_dp4a(codes & 0x0F0F0F0F, low, ggml_cuda_dp4a((codes >> 4) & 0x0F0F0F0F, high, 0));

    return e5m3_scale(block->d,  0) * __low2float(bq8_1[iqs].ds) * (2*plus - all)
        +  e5m3_scale(block->s, -1) * __low2float(bq8_1[0].ds)   * (2*product - 15*salient);
}
