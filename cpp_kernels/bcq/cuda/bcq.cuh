#pragma once

// Fields and codewords of BCQ blocks in registers. docs/formats.md has the layout. Included after common.cuh.
// Blocks of BCQ4 are 36 bytes, so they begin at multiples of 4; those of BCQ2 are 18, and begin at even addresses.

#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/cuda/arithmetic.cuh"

// scale and selectors: d | sel << 8
static __device__ __forceinline__ uint32_t bcq4_load_head(const void * block) {
    return *(const uint32_t *) block;
}

// the indices of a block in integers
static __device__ __forceinline__ const uint32_t * bcq4_indices(const void * block) {
    return (const uint32_t *) block + 1;
}

static __device__ __forceinline__ float bcq_scale(uint32_t head) {
    return e5m3_scale(head, 0);
}

// selector of the group-th 8 weights
static __device__ __forceinline__ int bcq4_selector_of(uint32_t head, int group) {
    return head >> (8 + 3*group) & 7;
}

// Bytes a (0 to 3) and b (4 to 7) by the low four nibbles of the selectors. One with its high bit set gives the sign of the byte, eight
// times: zero, where all bytes are positive. __byte_perm has no such bit.
static __device__ __forceinline__ uint32_t bcq_prmt(uint32_t a, uint32_t b, uint32_t selectors) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selectors));
    return result;
}

// low nibbles of a, high nibbles of b, in one instruction; compilers take two
static __device__ __forceinline__ uint32_t bcq4_low_and_high_nibbles(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(result) : "r"(a), "r"(b), "r"(0x0F0F0F0F));
    return result;
}

// Integers 2*k and 2*k + 1 of the indices, v and w, have those of two groups of 8 weights: k in the low nibbles, k + 4 in the high ones.
// Each group comes into an integer of its own, in the order in which bcq4_lookup wants it: weights 0, 4, 1, 5, 2, 6, 3, 7.
static __device__ __forceinline__ uint32_t bcq4_low_group(uint32_t v, uint32_t w) {
    return bcq4_low_and_high_nibbles(v, w << 4);
}

static __device__ __forceinline__ uint32_t bcq4_high_group(uint32_t v, uint32_t w) {
    return bcq4_low_and_high_nibbles(v >> 4, w);
}

// Codewords of a group, + BCQ_OFFSET, in bytes: x those of weights 0, 4, 1, 5, y those of 2, 6, 3, 7. A half of a codebook is what an
// instruction looks up. Each index finds its codeword in one half, and zero in the other: codewords with their offset are positive.
static __device__ __forceinline__ uint2 bcq4_lookup(const uint4 & codebook, uint32_t indices) {
    const uint32_t other = indices ^ 0x88888888;

    return make_uint2(
        bcq_prmt(codebook.x, codebook.y, indices)       + bcq_prmt(codebook.z, codebook.w, other),
        bcq_prmt(codebook.x, codebook.y, indices >> 16) + bcq_prmt(codebook.z, codebook.w, other >> 16));
}

// ---- BCQ2

// scale and selectors of a block: d | sel << 8
static __device__ __forceinline__ uint32_t bcq2_load_head(const void * block) {
    return *(const uint16_t *) block;
}

// integer j of the indices: those of weights 4*j + {0, 16, 32, 48} and the 3 after each
static __device__ __forceinline__ uint32_t bcq2_load_indices(const void * block, int j) {
    const uint16_t * x = (const uint16_t *) block + 1 + 2*j;
    return x[0] | (uint32_t) x[1] << 16;
}

static __device__ __forceinline__ int bcq2_selector_of(uint32_t head, int group) {
    return head >> (8 + 2*group) & 3;
}

// Codewords of 8 weights, 4*j + 32*half and the 3 after it, and 16 further: an instruction looks up in two codebooks, a and b, of these groups.
// In bytes, x those of weights 0, 16, 1, 17, y those of 2, 18, 3, 19.
static __device__ __forceinline__ uint2 bcq2_lookup(uint32_t a, uint32_t b, uint32_t indices, int half) {
    const uint32_t v  = indices >> 4*half;
    const uint32_t at = (v & 0x03030303) | (v << 2 & 0x30303030) | 0x40404040;

    return make_uint2(bcq_prmt(a, b, at), bcq_prmt(a, b, at >> 16));
}
