#pragma once

// GGML_OP_GET_COLS in the CPU backend: activations in the order of the columns of a PTQ1_61 matrix

#include "ggml.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_get_cols(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// y[i] = x[cols[i]]
void ggml_vec_get_cols        (int n, float * GGML_RESTRICT y, const float * GGML_RESTRICT x, const int32_t * GGML_RESTRICT cols);
void ggml_vec_get_cols_generic(int n, float * GGML_RESTRICT y, const float * GGML_RESTRICT x, const int32_t * GGML_RESTRICT cols);

#ifdef __cplusplus
}
#endif
