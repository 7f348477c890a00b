#pragma once

// The functions of our types in libggml-base: those of each layout are in its family's folder.

#include "ggml.h"

#include <assert.h>

#ifdef __cplusplus
extern "C" {
#endif

// Quantization, of rows by themselves and utilizing an importance matrix, and dequantization
#define TESSERAQ_DECLARE_REFERENCE(TYPE, type, LAYOUT, layout, ...)                                                \
    GGML_API void   quantize_row_##layout##_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k); \
    GGML_API void   dequantize_row_##layout(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k);     \
    GGML_API size_t quantize_##layout(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix);

TESSERAQ_TYPES(TESSERAQ_DECLARE_REFERENCE)

// the structure of a block is as large as the list says
#define TESSERAQ_ASSERT_BLOCK(TYPE, type, LAYOUT, layout, id, weights, bytes, ...) \
    static_assert(sizeof(block_##layout) == bytes, "wrong " #layout " block size/padding");

// rows of ggml's table of type traits
#define TESSERAQ_TRAITS(TYPE, type, LAYOUT, layout, id, weights, bytes, ...) \
    [GGML_TYPE_##TYPE] = {                                                   \
        .type_name                = #type,                                   \
        .blck_size                = weights,                                 \
        .type_size                = bytes,                                   \
        .is_quantized             = true,                                    \
        .to_float                 = dequantize_row_##layout,                 \
        .from_float_ref           = quantize_row_##layout##_ref,             \
    },

#define TESSERAQ_TRAITS_ACTIVATIONS(TYPE, type, id, numbers, bytes) \
    [GGML_TYPE_##TYPE] = {                                          \
        .type_name                = #type,                          \
        .blck_size                = numbers,                        \
        .type_size                = bytes,                          \
        .is_quantized             = true,                           \
    },

// in ggml_quantize_chunk
#define TESSERAQ_CASE_QUANTIZE(TYPE, type, LAYOUT, layout, ...) \
    case GGML_TYPE_##TYPE: result = quantize_##layout(src + start, (char *) dst + start_row * row_size, nrows, n_per_row, imatrix); break;

#ifdef __cplusplus
}
#endif
