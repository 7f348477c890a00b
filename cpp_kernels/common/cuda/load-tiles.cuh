#pragma once

// Our types' load_tiles, in the place of those of the types with the same tiles.

#include "tesseraq/tsq/cuda/load-tiles.cuh"

// defined in bcq/cuda/load-tiles.cuh: the unit that makes their kernels needs codebooks, and no other one does
#define TESSERAQ_DECLARE_LOAD_TILES(TYPE, type_, LAYOUT, layout, ...)                                                         \
    template <ggml_type type, int J, bool fallback> static __device__ __forceinline__ void ggml_cuda_mmq_load_tiles_##layout( \
        const char * __restrict__ x, int * __restrict__ x_tile, const int kbx0, const int i_max, const int stride);

TESSERAQ_BCQ_TYPES(TESSERAQ_DECLARE_LOAD_TILES)

template <ggml_type type, int J, bool fallback, typename util_funcs_t>
static constexpr __device__ util_funcs_t tesseraq_mmq_util_funcs(util_funcs_t funcs) {
#define TESSERAQ_LOAD_TILES(TYPE, type_, LAYOUT, layout, ...)                    \
    if constexpr (type == GGML_TYPE_##LAYOUT) {                                  \
        funcs.load_tiles = ggml_cuda_mmq_load_tiles_##layout<type, J, fallback>; \
    }
    TESSERAQ_MMQ_TYPES(TESSERAQ_LOAD_TILES)
#undef TESSERAQ_LOAD_TILES
    return funcs;
}
