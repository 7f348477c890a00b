#pragma once

// Our types' load_tiles, in the place of those of the types with the same tiles.

#include "tesseraq/cuda/tsq-load-tiles.cuh"

// defined in bcq-load-tiles.cuh: the unit that makes its kernels needs codebooks, and no other one does
template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_bcq4(
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride);

template <ggml_type type, int J, bool fallback, typename util_funcs_t>
static constexpr __device__ util_funcs_t tesseraq_mmq_util_funcs(util_funcs_t funcs) {
#define TESSERAQ_LOAD_TILES(NAME, name)                                             \
    if constexpr (type == GGML_TYPE_##NAME) {                                       \
        funcs.load_tiles = ggml_cuda_mmq_load_tiles_##name<type, J, fallback>;      \
    }
    TESSERAQ_MMQ_LAYOUTS(TESSERAQ_LOAD_TILES)
#undef TESSERAQ_LOAD_TILES
    return funcs;
}
