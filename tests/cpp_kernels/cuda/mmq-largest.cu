// The kernels of MMQ that need the most registers: whole tiles of 128 columns. All others are in */cuda/mmq-*.cu.

#include "mmq.cuh"
#include "tesseraq/bcq/cuda/load-tiles.cuh"

#define TESSERAQ_LARGEST(NAME, ...)                                                                                         \
    template __global__ void mul_mat_q<GGML_TYPE_##NAME, 128, false>(                                                       \
        const char * __restrict__ x, const int * __restrict__ y, const int32_t * __restrict__ ids_dst,                      \
        const int32_t * __restrict__ expert_bounds, float * __restrict__ dst, float * __restrict__ tmp_fixup,               \
        const float * __restrict__ y_scale, const uint3 blocks_per_ne00, const int nrows_x, const int ncols_dst,            \
        const int stride_row_x, const int ncols_y, const int stride_col_dst, const uint3 channel_ratio,                     \
        const uint3 nchannels_y, const int stride_channel_x, const int stride_channel_y, const int stride_channel_dst,      \
        const uint3 sample_ratio, const uint3 nsamples_y, const int stride_sample_x, const int stride_sample_y,             \
        const int stride_sample_dst, const uint3 ntx);

// all layouts: BCQ4_A4 has that of BCQ4
TESSERAQ_LARGEST(TSQ2)
TESSERAQ_LARGEST(TSQ3)
TESSERAQ_LARGEST(TSQ4)
TESSERAQ_LARGEST(BCQ2)
TESSERAQ_LARGEST(BCQ4)
