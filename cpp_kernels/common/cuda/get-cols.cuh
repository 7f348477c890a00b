#pragma once

// GGML_OP_GET_COLS in the CUDA backend: activations in the order of the columns of a PTQ1_61 matrix

#include "ggml-cuda/common.cuh"

void ggml_cuda_op_get_cols(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
