#pragma once

// Codebooks in the shared memory of MMVQ.

#include "tesseraq/bcq/cuda/unit.cuh"

// all threads of a block; codebooks are no result of the kernel before, so this need not wait for it
template <ggml_type type> static __device__ __forceinline__ void bcq_share_codebooks() {
    const int thread = blockDim.x*threadIdx.y + threadIdx.x;
    if constexpr (type == GGML_TYPE_BCQ2) {
        if (thread < BCQ2_CODEBOOKS) {
            bcq2_shared_codebooks()[thread] = bcq2_load_codebook(thread);
        }
    } else {
        if (thread < BCQ4_CODEBOOKS) {
            bcq4_shared_codebooks()[thread] = bcq4_load_codebook(thread);
        }
    }
    __syncthreads();
}
