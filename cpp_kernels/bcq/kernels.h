// The functions of a kind of kernels, which has bcq2_vec_dot(n, x, y), bcq2_dequantize_row(x, y, k), the same for bcq4, and says its names as
// KERNEL(name) and what encodes a block of activations as BCQ_ENCODE. Included by each kind, so there is no guard.

#include "tesseraq/common/cpu.h"

void KERNEL(quantize_row_a4_bcq)(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    q8_quantize_row(x, y, k, BCQ_ENCODE);
}

#define BCQ_KERNELS(layout)                                                                                         \
    void KERNEL(ggml_cpu_##layout##_to_fp32)(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {    \
        layout##_dequantize_row(x, y, k);                                                                           \
    }                                                                                                               \
    TESSERAQ_VEC_DOT(KERNEL(ggml_vec_dot_##layout##_q8_tsq), layout##_vec_dot(n, vx, vy))

BCQ_KERNELS(bcq2)
BCQ_KERNELS(bcq4)

#undef BCQ_KERNELS
#undef KERNEL
#undef BCQ_ENCODE
