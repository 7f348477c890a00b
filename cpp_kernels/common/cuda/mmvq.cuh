#pragma once

// Our types in mmvq.cu: the cases of its switches, and launch parameters.

#include "tesseraq/bcq/cuda/mmvq.cuh"

#define TESSERAQ_CASE_VEC_DOT(TYPE, type, LAYOUT, layout, ...) case GGML_TYPE_##TYPE: return vec_dot_##layout##_q8_1;
#define TESSERAQ_CASE_VDR(TYPE, type, LAYOUT, layout, ...)     case GGML_TYPE_##TYPE: return VDR_##LAYOUT##_Q8_1_MMVQ;

#define TESSERAQ_CASE_MMVQ(TYPE, type, LAYOUT, layout, ...)                                                      \
    case GGML_TYPE_##TYPE:                                                                                       \
        mul_mat_vec_q_switch_ncols_dst<GGML_TYPE_##LAYOUT>                                                       \
            (vx, vy, ids, fusion, dst, ncols_x, nrows_x, ncols_dst, stride_row_x, stride_col_y, stride_col_dst,  \
             nchannels_x, nchannels_y, nchannels_dst, stride_channel_x, stride_channel_y, stride_channel_dst,    \
             nsamples_x, nsamples_dst, stride_sample_x, stride_sample_y, stride_sample_dst, ids_stride, stream); \
        break;

// With one column, four rows to a thread block share the activations: loading them and adding them up would else be half of what a
// thread does. With two warps rather than four, each thread has two steps to go in a row of 4096 weights, and less is left to
// what it begins and ends with. `scripts/cuda_budget` counts. For more columns, and on devices that are not NVIDIA's, upstream's
// choice stands.
#define TESSERAQ_MMVQ_ONE_COLUMN(type, ncols_dst, table_id) \
    (tesseraq_is_type(type) && (ncols_dst) == 1 &&          \
     ((table_id) == MMVQ_PARAMETERS_GENERIC || (table_id) == MMVQ_PARAMETERS_TURING || (table_id) == MMVQ_PARAMETERS_GB10))

#define TESSERAQ_MMVQ_ONE_COLUMN_NWARPS 2
#define TESSERAQ_MMVQ_ONE_COLUMN_ROWS   4

// in upstream's calc_nwarps
#define TESSERAQ_MMVQ_NWARPS(type, ncols_dst, table_id)        \
    if (TESSERAQ_MMVQ_ONE_COLUMN(type, ncols_dst, table_id)) { \
        return TESSERAQ_MMVQ_ONE_COLUMN_NWARPS;                \
    }

// around upstream's calc_rows_per_block
#define TESSERAQ_MMVQ_ROWS(type, ncols_dst, table_id, upstream) \
    (TESSERAQ_MMVQ_ONE_COLUMN(type, ncols_dst, table_id) ? TESSERAQ_MMVQ_ONE_COLUMN_ROWS : (upstream))

// in the kernel, rows of the matrix: with ids, upstream's bound is that of all experts of a token, beyond the end of one
#define TESSERAQ_MMVQ_NROWS(type) (tesseraq_is_type(type) && ncols_dst == 1 && ids ? stride_channel_dst : stride_col_dst)

// row i of a thread block: a last block that is not full takes its last row again, where upstream reads on
#define TESSERAQ_MMVQ_ROW(type, i) \
    (rows_per_cuda_block > 1 && tesseraq_is_type(type) ? min(i, (int) (TESSERAQ_MMVQ_NROWS(type) - row0) - 1) : (i))

// at the beginning of a kernel
#define TESSERAQ_MMVQ_BEGIN(type)                 \
    if constexpr (tesseraq_has_codebooks(type)) { \
        bcq_share_codebooks<type>();              \
    }
