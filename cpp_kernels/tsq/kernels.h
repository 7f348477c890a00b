// The functions of a kind of kernels, which has tsq_vec_dot(n, x, nbits, y), tsq_dequantize_row(x, nbits, y, k), and says its names as
// KERNEL(name) and what makes a block of activations as Q8_BLOCK. Included by each kind, so there is no guard.

#include "tesseraq/common/cpu.h"

void KERNEL(quantize_row_q8_tsq)(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {
    q8_quantize_row(x, y, k, Q8_BLOCK);
}

#define TSQ_KERNELS(nbits)                                                                                                      \
    void KERNEL(ggml_cpu_tsq##nbits##_to_fp32)(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {              \
        tsq_dequantize_row(x, nbits, y, k);                                                                                     \
    }                                                                                                                           \
    TESSERAQ_VEC_DOT(KERNEL(ggml_vec_dot_tsq##nbits##_q8_tsq), tsq_vec_dot(n, vx, nbits, vy))

TSQ_KERNELS(2)
TSQ_KERNELS(3)
TSQ_KERNELS(4)

#undef TSQ_KERNELS
#undef KERNEL
#undef Q8_BLOCK
