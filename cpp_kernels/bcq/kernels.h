// The functions of a kind of kernels, which has bcq_vec_dot(n, x, y), bcq_dequantize_row(x, y, k), and says its names as KERNEL(name) and
// what encodes a block of activations as BCQ_ENCODE. Included by each kind, so there is no guard.

#include "tesseraq/common/cpu.h"

void KERNEL(quantize_row_a4_bcq)(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    q8_quantize_row(x, y, k, BCQ_ENCODE);
}

void KERNEL(ggml_cpu_bcq4_to_fp32)(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    bcq_dequantize_row(x, y, k);
}

TESSERAQ_VEC_DOT(KERNEL(ggml_vec_dot_bcq4_q8_tsq), bcq_vec_dot(n, vx, vy))

#undef KERNEL
#undef BCQ_ENCODE
