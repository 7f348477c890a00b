#pragma once

// TSQ in MMQ: a tile of I rows and 256 weights, unpacked to 8 bits in shared memory. It has the layout of Q5_1's tiles, a scale and
// an offset for every 32 weights, so upstream's products of Q8_1 with Q8_1 take it from there.
//
// The whole part of the zero-point goes into the integers. Only a fraction of a code is left for the offset: both halves of x_dm are
// then exact (but for scales below 2^-21), and what MMQ loses by sums of activations from before their rounding is small.

#include "tesseraq/tsq/cuda/tsq.cuh"

// nearest whole number to a zero-point
template <int nbits>
static __device__ __forceinline__ int tsq_whole_zero(int z) {
    return (z + (1 << (6 - nbits))) >> (7 - nbits);
}

// scale, and what is to be added for each activation: d*(whole - z)
template <int nbits>
static __device__ __forceinline__ half2 tsq_scale_and_offset(uint32_t dz, int z, int whole) {
    return make_half2(e5m3_scale(dz, 0), e5m3_scale(dz, nbits - 7) * (whole*(1 << (7 - nbits)) - z));
}

template <ggml_type type, int J, bool fallback, int nbits> static __device__ __forceinline__ void tsq_mmq_load_tiles(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps    = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    int   * x_qs = (int   *)  x_tile;
    half2 * x_dm = (half2 *) (x_qs + 2*MMQ_TILE_NE_K);
#else
    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(GGML_TYPE_Q5_1, I);
    int   * x_qs = (int   *)  x_tile;
    half2 * x_dm = (half2 *) (x_qs + txs.qs);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

    // a thread has 32 bits of codes: 16 weights of TSQ2 and TSQ3, 8 of TSQ4
    constexpr int qi              = ggml_cuda_type_traits<type>::qi;
    constexpr int threads_per_row = MMQ_ITER_K / QK_TSQ * qi;
    constexpr int nrows           = warp_size / threads_per_row;
    const int txi  = threadIdx.x % threads_per_row;
    const int kbx  = txi / qi;
    const int kqsx = txi % qi;

    // not all at once: the sums of the product stay in registers meanwhile
#pragma unroll 4
    for (int i0 = 0; i0 < I; i0 += nrows*nwarps) {
        int i = i0 + threadIdx.y*nrows + threadIdx.x/threads_per_row;

        if (fallback) {
            i = min(i, i_max);
        }

        const char   * block = x + (int64_t) (kbx0 + i*stride + kbx)*TSQ_BLOCK_SIZE(nbits);
        const uint32_t dz    = tsq_load_dz(block);
        const int      z     = tsq_zero(dz);
        const int      whole = tsq_whole_zero<nbits>(z);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        int   * qs = x_qs + i*sram_stride + kbx*(QK_TSQ/4) + kqsx;
        half2 * dm = x_dm + i*sram_stride + kbx*(QK_TSQ/QK8_1);
#else
        int   * qs = x_qs + i*(2*MMQ_TILE_NE_K + 1)           + kbx*(QK_TSQ/4) + kqsx;
        half2 * dm = x_dm + i*(MMQ_TILE_NE_K/QI5_1) + i/QI5_1 + kbx*(QK_TSQ/QK8_1);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

        if (nbits == 4) {
            const uint32_t v = tsq_load_codes(block, TSQ_CODES + 4*kqsx);
            qs[0] = subtract_bytes( v       & 0x0F0F0F0F, whole);
            qs[8] = subtract_bytes((v >> 4) & 0x0F0F0F0F, whole);
        } else {
            uint32_t even;
            uint32_t odd;
            tsq_nibbles<nbits>(block, kqsx, even, odd);
            qs[ 0] = subtract_bytes( even       & 0x0F0F0F0F, whole);
            qs[ 4] = subtract_bytes( odd        & 0x0F0F0F0F, whole);
            qs[ 8] = subtract_bytes((even >> 4) & 0x0F0F0F0F, whole);
            qs[12] = subtract_bytes((odd  >> 4) & 0x0F0F0F0F, whole);
        }

        if (kqsx < QK_TSQ/QK8_1) {
            dm[kqsx] = tsq_scale_and_offset<nbits>(dz, z, whole);
        }
    }
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tsq2(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    tsq_mmq_load_tiles<type, J, fallback, 2>(x, x_tile, kbx0, i_max, stride);
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tsq3(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    tsq_mmq_load_tiles<type, J, fallback, 3>(x, x_tile, kbx0, i_max, stride);
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_tsq4(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    tsq_mmq_load_tiles<type, J, fallback, 4>(x, x_tile, kbx0, i_max, stride);
}
