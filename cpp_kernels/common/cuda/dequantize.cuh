#pragma once

// Our types in convert.cu and getrows.cu: their kernels take two weights per call, half a block apart.

#include "tesseraq/bcq/cuda/dequantize.cuh"
#include "tesseraq/ptq/cuda/dequantize.cuh"
#include "tesseraq/tsq/cuda/dequantize.cuh"

#define TESSERAQ_CASE_DEQUANTIZE_CONT(TYPE, type, LAYOUT, layout, ...) \
    case GGML_TYPE_##TYPE:                                             \
        return dequantize_block_cont_cuda<ggml_cuda_type_traits<GGML_TYPE_##LAYOUT>::qk, 2, dequantize_##layout>;

#define TESSERAQ_CASE_DEQUANTIZE_NC(TYPE, type, LAYOUT, layout, ...) \
    case GGML_TYPE_##TYPE:                                           \
        return dequantize_block_cuda<ggml_cuda_type_traits<GGML_TYPE_##LAYOUT>::qk, 2, dequantize_##layout>;

#define TESSERAQ_CASE_GET_ROWS(TYPE, type, LAYOUT, layout, ...)                                                       \
    case GGML_TYPE_##TYPE:                                                                                            \
        get_rows_cuda_q<ggml_cuda_type_traits<GGML_TYPE_##LAYOUT>::qk, 2, dequantize_##layout>(src0_d, src1_d, dst_d, \
            ne00, nb01, nb02, nb03, ne10, ne11, ne12, nb10, nb11, nb12, nb1, nb2, nb3, stream);                       \
        break;
