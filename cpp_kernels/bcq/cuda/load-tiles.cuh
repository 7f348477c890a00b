#pragma once

// BCQ in MMQ: a tile of I rows and 256 weights, decoded to 8 bits in shared memory. It has the layout of Q8_0's tiles, a scale for every
// 32 weights, so upstream's products of Q8_0 with Q8_1 take it from there. To be included after mmq.cuh, where its kernels are made.

#include "tesseraq/bcq/cuda/bcq.cuh"
#include "tesseraq/bcq/cuda/unit.cuh"

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_bcq4(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps    = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    int   * x_qs = (int   *)  x_tile;
    float * x_df = (float *) (x_qs + 2*MMQ_TILE_NE_K);
#else
    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(GGML_TYPE_Q8_0, I);
    int   * x_qs = (int   *)  x_tile;
    float * x_df = (float *) (x_qs + txs.qs);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

    // a thread has two groups of 8 weights, k and k + 4
    constexpr int threads_per_block = QK_BCQ / (2*BCQ4_GROUP);
    constexpr int threads_per_row   = MMQ_ITER_K / QK_BCQ * threads_per_block;
    constexpr int nrows             = warp_size / threads_per_row;
    const int txi = threadIdx.x % threads_per_row;
    const int kbx = txi / threads_per_block;
    const int k   = txi % threads_per_block;

#pragma unroll
    for (int i0 = 0; i0 < I; i0 += nrows*nwarps) {
        int i = i0 + threadIdx.y*nrows + threadIdx.x/threads_per_row;

        if (fallback) {
            i = min(i, i_max);
        }

        const block_bcq4 * block = (const block_bcq4 *) x + (int64_t) (kbx0 + i*stride + kbx);
        const uint32_t     head  = bcq4_load_head(block);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        int   * qs = x_qs + i*sram_stride + kbx*(QK_BCQ/4) + 2*k;
        float * df = x_df + i*sram_stride + kbx*(QK_BCQ/QK8_0);
#else
        int   * qs = x_qs + i*(2*MMQ_TILE_NE_K + 1)                 + kbx*(QK_BCQ/4) + 2*k;
        float * df = x_df + i*(2*MMQ_TILE_NE_K/QI8_0) + i/(QI8_0/2) + kbx*(QK_BCQ/QK8_0);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

        const uint32_t v = bcq4_indices(block)[2*k];
        const uint32_t w = bcq4_indices(block)[2*k + 1];
        const uint2 low  = bcq4_lookup(bcq4_load_codebook(bcq4_selector_of(head, k)),     bcq4_low_group(v, w));
        const uint2 high = bcq4_lookup(bcq4_load_codebook(bcq4_selector_of(head, k + 4)), bcq4_high_group(v, w));

        qs[0] = subtract_bytes(__byte_perm(low.x,  low.y,  0x6420), BCQ_OFFSET);
        qs[1] = subtract_bytes(__byte_perm(low.x,  low.y,  0x7531), BCQ_OFFSET);
        qs[8] = subtract_bytes(__byte_perm(high.x, high.y, 0x6420), BCQ_OFFSET);
        qs[9] = subtract_bytes(__byte_perm(high.x, high.y, 0x7531), BCQ_OFFSET);

        if (k < QK_BCQ/QK8_0) {
            df[k] = bcq_scale(head);
        }
    }
}

template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_bcq2(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride) {
    constexpr int warp_size = ggml_cuda_get_physical_warp_size();
    constexpr int nwarps    = ggml_cuda_mmq_get_nthreads(type, J, fallback) / warp_size;
    constexpr int I         = ggml_cuda_mmq_get_I(type, J, fallback);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
    constexpr int sram_stride = ggml_cuda_mmq_get_sram_stride(type, J, fallback);
    int   * x_qs = (int   *)  x_tile;
    float * x_df = (float *) (x_qs + 2*MMQ_TILE_NE_K);
#else
    constexpr tile_x_sizes txs = mmq_get_dp4a_tile_x_sizes(GGML_TYPE_Q8_0, I);
    int   * x_qs = (int   *)  x_tile;
    float * x_df = (float *) (x_qs + txs.qs);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

    // a thread has an integer of indices: 4 weights of each group
    constexpr int threads_per_row = MMQ_ITER_K / QK_BCQ * QI_BCQ2;
    constexpr int nrows           = warp_size / threads_per_row;
    const int txi = threadIdx.x % threads_per_row;
    const int kbx = txi / QI_BCQ2;
    const int j   = txi % QI_BCQ2;

    // not all at once: the sums of the product stay in registers meanwhile
#pragma unroll 4
    for (int i0 = 0; i0 < I; i0 += nrows*nwarps) {
        int i = i0 + threadIdx.y*nrows + threadIdx.x/threads_per_row;

        if (fallback) {
            i = min(i, i_max);
        }

        const block_bcq2 * block   = (const block_bcq2 *) x + (int64_t) (kbx0 + i*stride + kbx);
        const uint32_t     head    = bcq2_load_head(block);
        const uint32_t     indices = bcq2_load_indices(block, j);

#if defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)
        int   * qs = x_qs + i*sram_stride + kbx*(QK_BCQ/4) + j;
        float * df = x_df + i*sram_stride + kbx*(QK_BCQ/QK8_0);
#else
        int   * qs = x_qs + i*(2*MMQ_TILE_NE_K + 1)                 + kbx*(QK_BCQ/4) + j;
        float * df = x_df + i*(2*MMQ_TILE_NE_K/QI8_0) + i/(QI8_0/2) + kbx*(QK_BCQ/QK8_0);
#endif // defined(AMD_MFMA_AVAILABLE) || defined(TURING_MMA_AVAILABLE) || defined(AMD_WMMA_AVAILABLE)

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint2 c = bcq2_lookup(bcq2_load_codebook(bcq2_selector_of(head, 2*half)),
                                        bcq2_load_codebook(bcq2_selector_of(head, 2*half + 1)), indices, half);

            qs[8*half]     = __byte_perm(c.x, c.y, 0x6420);
            qs[8*half + 4] = __byte_perm(c.x, c.y, 0x7531);
        }

        if (j < QK_BCQ/QK8_0) {
            df[j] = bcq_scale(head);
        }
    }
}
