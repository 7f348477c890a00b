#pragma once

// Dot products of BCQ with Q8_1, for MMVQ. Included by vecdotq.cuh, after get_int_b4.

#include "tesseraq/bcq/cuda/bcq.cuh"

#define VDR_BCQ4_Q8_1_MMVQ 4 // half a block to a thread, as for TSQ

// Codebooks in shared memory, + BCQ_OFFSET: 128 bytes, so every bank has one word of them, and lanes that load different codebooks are
// not in each other's way. bcq_share_codebooks (mmvq.cuh) fills them in.
static __device__ __forceinline__ uint4 * bcq4_shared_codebooks() {
    __shared__ uint4 codebooks[BCQ4_CODEBOOKS];
    return codebooks;
}

// 8 weights times activations u and v, added to sum. Activations, which rows share, take the order of codewords.
static __device__ __forceinline__ int bcq4_dot_group(uint32_t indices, int codebook_offset, int u, int v, int sum) {
    const uint4 codebook = *(const uint4 *) ((const char *) bcq4_shared_codebooks() + codebook_offset);
    const uint2 c        = bcq4_lookup(codebook, indices);

    sum = ggml_cuda_dp4a(c.x, __byte_perm(u, v, 0x5140), sum);
    sum = ggml_cuda_dp4a(c.y, __byte_perm(u, v, 0x7362), sum);
    return sum;
}

static __device__ __forceinline__ float vec_dot_bcq4_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block_bcq4 * block = (const block_bcq4 *) vbq + kbx;
    const uint32_t   * qs    = bcq4_indices(block) + iqs;
    const uint32_t     head  = bcq4_load_head(block);

    // selectors of this half, times 16, the bytes of a codebook: the first group's from bit 4 up
    const uint32_t offsets = head >> (4 + 3*(iqs/2));

    // what the offset of the codewords will be too much
    const int minus_offsets = (int) (0x01010101u*(256 - BCQ_OFFSET));
    int s0 = 0;
    int s1 = 0;
#pragma unroll
    for (int i = 0; i < VDR_BCQ4_Q8_1_MMVQ; ++i) {
        s0 = ggml_cuda_dp4a(minus_offsets, get_int_b4(bq8_1[0].qs, iqs + i), s0);
        s1 = ggml_cuda_dp4a(minus_offsets, get_int_b4(bq8_1[1].qs, iqs + i), s1);
    }

#pragma unroll
    for (int i = 0; i < VDR_BCQ4_Q8_1_MMVQ; i += 2) {
        s0 = bcq4_dot_group(bcq4_low_group(qs[i], qs[i + 1]),  offsets >> (3*i/2)      & 0x70,
            get_int_b4(bq8_1[0].qs, iqs + i), get_int_b4(bq8_1[0].qs, iqs + i + 1), s0);
        s1 = bcq4_dot_group(bcq4_high_group(qs[i], qs[i + 1]), offsets >> (3*i/2 + 12) & 0x70,
            get_int_b4(bq8_1[1].qs, iqs + i), get_int_b4(bq8_1[1].qs, iqs + i + 1), s1);
    }

    return bcq_scale(head) * (__low2float(bq8_1[0].ds)*s0 + __low2float(bq8_1[1].ds)*s1);
}

#define VDR_BCQ2_Q8_1_MMVQ 2 // half a block to a thread, as for TSQ

// codebooks in shared memory: 16 bytes
static __device__ __forceinline__ uint32_t * bcq2_shared_codebooks() {
    __shared__ uint32_t codebooks[BCQ2_CODEBOOKS];
    return codebooks;
}

static __device__ __forceinline__ float vec_dot_bcq2_q8_1(
        const void * __restrict__ vbq, const block_q8_1 * __restrict__ bq8_1, const int & kbx, const int & iqs) {
    const block_bcq2 * block = (const block_bcq2 *) vbq + kbx;
    const uint32_t     head  = bcq2_load_head(block);

    uint32_t codebooks[BCQ2_CODEBOOKS]; // of the four groups
#pragma unroll
    for (int k = 0; k < BCQ2_CODEBOOKS; ++k) {
        codebooks[k] = bcq2_shared_codebooks()[bcq2_selector_of(head, k)];
    }

    // activations, which rows share, take the order of codewords
    int sums[2] = { 0, 0 };
#pragma unroll
    for (int i = 0; i < VDR_BCQ2_Q8_1_MMVQ; ++i) {
        const uint32_t indices = bcq2_load_indices(block, iqs + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint2 c = bcq2_lookup(codebooks[2*half], codebooks[2*half + 1], indices, half);
            const int   u = get_int_b4(bq8_1[half].qs, iqs + i);
            const int   v = get_int_b4(bq8_1[half].qs, iqs + i + 4);

            sums[half] = ggml_cuda_dp4a(c.x, __byte_perm(u, v, 0x5140), sums[half]);
            sums[half] = ggml_cuda_dp4a(c.y, __byte_perm(u, v, 0x7362), sums[half]);
        }
    }

    return bcq_scale(head) * (__low2float(bq8_1[0].ds)*sums[0] + __low2float(bq8_1[1].ds)*sums[1]);
}
