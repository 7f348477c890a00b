// The functions of a kind of kernels, which has ptq_vec_dot(n, x, y), ptq_dequantize_row(x, y, k), and says its names as KERNEL(name) and
// what rounds a part of a block of activations as PTQ_ROUND_PART. Included by each kind, so there is no guard.

#include "tesseraq/common/cpu.h"

void KERNEL(quantize_row_q8_ptq)(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    ptq_quantize_row(x, y, k, PTQ_ROUND_PART);
}

void KERNEL(ggml_cpu_ptq1_61_to_fp32)(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    ptq_dequantize_row(x, y, k);
}

TESSERAQ_VEC_DOT(KERNEL(ggml_vec_dot_ptq1_61_q8_ptq), ptq_vec_dot(n, vx, vy))

#undef KERNEL
#undef PTQ_ROUND_PART
