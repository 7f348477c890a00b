#pragma once

// Activations: what makes those of all types NaN where one is not finite, and those that are not rounded to 8 bits. Included by upstream's
// quantize.cu.

// the larger of two magnitudes: as floats are ordered by their bits, NaN above infinity, where fmaxf would drop it
static __device__ __forceinline__ float tesseraq_larger(float a, float b) {
    return __uint_as_float(max(__float_as_uint(a), __float_as_uint(b)));
}

// the scale of activations with this sum, which is not finite if one of them is not
static __device__ __forceinline__ float tesseraq_finite_scale(float d, float sum) {
    return (__float_as_uint(sum) & 0x7F800000u) == 0x7F800000u ? __uint_as_float(0x7FC00000u) : d;
}

#include "tesseraq/bcq/cuda/quantize.cuh"

// In upstream's functions of these names: whether the activations are of this kind, and done.

static bool tesseraq_quantize_row_q8_1(
        ggml_type type, const float * x, void * vy, int64_t ne00, int64_t s01, int64_t s02, int64_t s03,
        int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, cudaStream_t stream) {
    if (type != GGML_TYPE_BCQ4_A4) {
        return false;
    }
    constexpr int per_block = BCQ_ENCODE_WARPS*QK_BCQ;
    const ggml_cuda_kernel_launch_params launch_params = ggml_cuda_kernel_launch_params(
        dim3((ne0 + per_block - 1)/per_block, ne1, ne2*ne3), dim3(WARP_SIZE, BCQ_ENCODE_WARPS), 0, stream);
    ggml_cuda_kernel_launch(bcq_quantize_q8_1, launch_params, x, vy, ne00, s01, s02, s03, ne0, ne1, init_fastdiv_values(ne2));
    return true;
}

static bool tesseraq_quantize_mmq_q8_1(
        ggml_type type, const float * x, const int32_t * ids, void * vy, int64_t ne00, int64_t s01, int64_t s02, int64_t s03,
        int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3, cudaStream_t stream) {
    if (type != GGML_TYPE_BCQ4_A4) {
        return false;
    }
    constexpr int per_block = BCQ_ENCODE_WARPS*QK_BCQ;
    const dim3 num_blocks(ne1, (ne0 + per_block - 1)/per_block, ne2*ne3);
    const dim3 block_size(WARP_SIZE, BCQ_ENCODE_WARPS);
    bcq_quantize_mmq_q8_1<false><<<num_blocks, block_size, 0, stream>>>(x, ids, vy, ne00, s01, s02, s03, ne0, ne1, ne2, 0);
    return true;
}

static bool tesseraq_quantize_scatter_mmq_q8_1(
        ggml_type type, const float * x, const int32_t * ids, void * vy, int64_t ne00, int64_t stride_token,
        int64_t ne0, int64_t n_tokens, int64_t nrows_dst, int n_expert_used, cudaStream_t stream) {
    if (type != GGML_TYPE_BCQ4_A4) {
        return false;
    }
    constexpr int per_block = BCQ_ENCODE_WARPS*QK_BCQ;
    const dim3 num_blocks(n_tokens, (ne0 + per_block - 1)/per_block, 1);
    const dim3 block_size(WARP_SIZE, BCQ_ENCODE_WARPS);
    bcq_quantize_mmq_q8_1<true><<<num_blocks, block_size, 0, stream>>>(
        x, ids, vy, ne00, 0, stride_token, 0, ne0, nrows_dst, 1, n_expert_used);
    return true;
}
