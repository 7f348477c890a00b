#pragma once

// Activations of BCQ4_A4: in codewords, where those of other types are rounded to 8 bits. They come out in the layouts of Q8_1, so kernels
// multiply them as they do 8 bits.

#include "tesseraq/bcq/cuda/bcq.cuh"
#include "tesseraq/bcq/cuda/unit.cuh"

#define BCQ_ENCODE_WARPS 4 // to a thread block

// a number in quarters of the scale, in a byte
static __device__ __forceinline__ uint32_t bcq_quarters(float x) {
    return (uint8_t) min(max(__float2int_rn(x), -128), 127);
}

// A warp encodes 64 numbers, zeros if x is none; docs/formats.md says to what. Lane 8*g + b tries codebook b for groups g and g + 4, and
// gets the codewords of their numbers b.
static __device__ __forceinline__ void bcq_encode(const float * __restrict__ x, float & d, int (&c)[2]) {
    const int lane = threadIdx.x;
    const int g    = lane / BCQ4_CODEBOOKS;
    const int b    = lane % BCQ4_CODEBOOKS;

    const float v    = x ? x[2*lane]     : 0.0f;
    const float w    = x ? x[2*lane + 1] : 0.0f;
    float amax = tesseraq_larger(fabsf(v), fabsf(w));
#pragma unroll
    for (int offset = WARP_SIZE/2; offset > 0; offset >>= 1) {
        amax = tesseraq_larger(amax, __shfl_xor_sync(0xFFFFFFFF, amax, offset, WARP_SIZE));
    }

    // bcq_activation_scale, with divisions that round as those of the CPU do
    float id4 = 0.0f;
    d = 0.0f;
    if (__float_as_uint(amax) >= 0x7F800000u) {
        d   = __uint_as_float(0x7FC00000u);
    } else if (amax > Q8_MIN_AMAX) {
        d   = __uint_as_float((__float_as_uint(__fdiv_rn(amax, BCQ_MAX_CODE)) + (1u << 19)) & 0xFFF00000u);
        id4 = __fdiv_rn(4.0f, d);
    }

    // four numbers to an integer: lanes 2*i and 2*i + 1 have 4*i and the next three
    const uint32_t pair  = bcq_quarters(v*id4) | bcq_quarters(w*id4) << 8;
    const uint32_t other = __shfl_xor_sync(0xFFFFFFFF, pair, 1, WARP_SIZE);
    const uint32_t four  = lane % 2 ? other | pair << 16 : pair | other << 16;

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int      first = 4*(g + 4*i); // a lane with the first four of the group
        const uint32_t u     = __shfl_sync(0xFFFFFFFF, four, first,     WARP_SIZE);
        const uint32_t u4    = __shfl_sync(0xFFFFFFFF, four, first + 2, WARP_SIZE);

        int error = 0;
#pragma unroll
        for (int j = 0; j < BCQ4_GROUP; ++j) {
            error += __ldg(&bcq_device.error[(j < 4 ? u : u4) >> 8*(j % 4) & 0xFF][b]);
        }

        // the least error, and of those that draw the first codebook
        int key = error*BCQ4_CODEBOOKS + b;
#pragma unroll
        for (int offset = BCQ4_CODEBOOKS/2; offset > 0; offset >>= 1) {
            key = min(key, __shfl_xor_sync(0xFFFFFFFF, key, offset, WARP_SIZE));
        }

        const uint32_t mine = (b < 4 ? u : u4) >> 8*(b % 4) & 0xFF;
        c[i] = __ldg(&bcq_device.nearest[mine][key % BCQ4_CODEBOOKS]);
    }
}

// for MMVQ; grid and strides are those of quantize_q8_1, but that a warp takes 64 numbers
__launch_bounds__(BCQ_ENCODE_WARPS*WARP_SIZE, 1)
static __global__ void bcq_quantize_q8_1(
        const float * x, void * vy, const int64_t ne00, const int64_t s01, const int64_t s02, const int64_t s03,
        const int64_t ne0, const uint32_t ne1, const uint3 ne2) {
    ggml_cuda_pdl_lc();
    const int64_t i0 = ((int64_t) blockIdx.x*BCQ_ENCODE_WARPS + threadIdx.y)*QK_BCQ;
    if (i0 >= ne0) {
        return;
    }

    const int64_t i3 = fastdiv(blockIdx.z, ne2);
    const int64_t i2 = blockIdx.z - i3*ne2.z;
    const int64_t i1 = blockIdx.y;

    ggml_cuda_pdl_sync();
    float d;
    int   c[2];
    bcq_encode(i0 < ne00 ? x + i3*s03 + i2*s02 + i1*s01 + i0 : nullptr, d, c);

    block_q8_1 * y = (block_q8_1 *) vy + (((i3*ne2.z + i2)*ne1 + i1)*ne0 + i0)/QK8_1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        y[i].qs[threadIdx.x] = c[i];
        if (threadIdx.x == 0) {
            y[i].ds = make_half2(d, 0.0f); // no kernel asks for the sum
        }
    }
}

// for MMQ; grid and strides are those of quantize_mmq_q8_1, but that a warp takes 64 numbers
template <bool scatter>
__launch_bounds__(BCQ_ENCODE_WARPS*WARP_SIZE, 1)
static __global__ void bcq_quantize_mmq_q8_1(
        const float * x, const int32_t * ids, void * vy, const int64_t ne00, const int64_t s01, const int64_t s02, const int64_t s03,
        const int64_t ne0, const int ne1, const int ne2, const int n_expert_used) {
    const int64_t i0 = ((int64_t) blockIdx.y*BCQ_ENCODE_WARPS + threadIdx.y)*QK_BCQ;
    if (i0 >= ne0) {
        return;
    }

    ggml_cuda_pdl_sync();
    int64_t base;
    if constexpr (scatter) {
        base = (int64_t) blockIdx.x*s02; // one row per token
    } else {
        base = blockIdx.z/ne2*s03 + blockIdx.z%ne2*s02 + (int64_t) (ids ? ids[blockIdx.x] : blockIdx.x)*s01;
    }

    float d;
    int   c[2];
    bcq_encode(i0 < ne00 ? x + base + i0 : nullptr, d, c);

    const int64_t k_block = i0 / QK8_1_MMQ; // column block in the channel
    const int     k       = i0 % QK8_1_MMQ;
    const int64_t ib0     = (int64_t) blockIdx.z*ne1*(ne0/QK8_1_MMQ) + k_block*ne1;
    for (int slot = 0; slot < (scatter ? n_expert_used : 1); ++slot) {
        block_q8_1_mmq & y = ((block_q8_1_mmq *) vy)[ib0 + (scatter ? ids[(int64_t) blockIdx.x*n_expert_used + slot] : blockIdx.x)];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            y.qs[k + i*QK8_1 + threadIdx.x] = c[i];
            if (threadIdx.x == 0) {
                y.d4[k/QK8_1 + i] = d;
            }
        }
    }
}
