#pragma once

// The functions of our types in the CPU backend: those of each layout are in its family's folder, by processor, and generic.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Dequantization, bit for bit that of dequantize_row_*, and dot products with activations
#define TESSERAQ_DECLARE_KERNELS(name, dot)                                      \
    void name(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k); \
    void dot(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc);

#define TESSERAQ_DECLARE_TYPE(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, ...) \
    TESSERAQ_DECLARE_KERNELS(ggml_cpu_##layout##_to_fp32,           ggml_vec_dot_##layout##_##rows)  \
    TESSERAQ_DECLARE_KERNELS(ggml_cpu_##layout##_to_fp32_generic,   ggml_vec_dot_##layout##_##rows##_generic)

// Quantization of weights, as the reference does it
#define TESSERAQ_DECLARE_FROM_FLOAT(TYPE, type, ...) void quantize_row_##type(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

// and of activations
#define TESSERAQ_DECLARE_ACTIVATIONS(TYPE, type, ...)                                                     \
    void quantize_row_##type          (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k); \
    void quantize_row_##type##_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);

TESSERAQ_TYPES(TESSERAQ_DECLARE_TYPE)
TESSERAQ_TYPES(TESSERAQ_DECLARE_FROM_FLOAT)
TESSERAQ_ACTIVATIONS(TESSERAQ_DECLARE_ACTIVATIONS)

// to_float of a type: one of these, or what its traits have
ggml_to_float_t ggml_cpu_to_float(enum ggml_type type);

// Activations go from float by rows, or by parts of rows that are whole groups: moves the ends of a part of a row of nb blocks, where the
// threads that share the row all find the same ends. Other types may be cut between any blocks.
void ggml_cpu_whole_groups(enum ggml_type type, int64_t nb, int64_t * first, int64_t * last);

// rows of the CPU backend's table of type traits
#define TESSERAQ_TRAITS_CPU(TYPE, type, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, ...) \
    [GGML_TYPE_##TYPE] = {                                                                         \
        .from_float               = quantize_row_##type,                                           \
        .vec_dot                  = ggml_vec_dot_##layout##_##rows,                                \
        .vec_dot_type             = GGML_TYPE_##ACTS,                                              \
        .nrows                    = 1,                                                             \
    },

#define TESSERAQ_TRAITS_CPU_ACTIVATIONS(TYPE, type, ...) \
    [GGML_TYPE_##TYPE] = {                               \
        .from_float               = quantize_row_##type, \
    },

// The definition of a dot product: `product` is made of n, vx and vy.
#define TESSERAQ_VEC_DOT(name, product)                                                                                                                 \
    void name(int n, float * GGML_RESTRICT s, size_t bs, const void * GGML_RESTRICT vx, size_t bx, const void * GGML_RESTRICT vy, size_t by, int nrc) { \
        assert(nrc == 1);                                                                                                                               \
        GGML_UNUSED(nrc);                                                                                                                               \
        GGML_UNUSED(bx);                                                                                                                                \
        GGML_UNUSED(by);                                                                                                                                \
        GGML_UNUSED(bs);                                                                                                                                \
                                                                                                                                                        \
        *s = product;                                                                                                                                   \
    }

#ifdef __cplusplus
}
#endif
