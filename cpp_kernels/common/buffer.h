#pragma once

// Our tensors repacked at load for the CPU backend.

#include "ggml.h"
#include "ggml-backend.h"
#include "tesseraq/common/groups.h"

#ifdef __cplusplus
extern "C" {
#endif

// where the loader puts tensors that the kernels can work with; NULL without kernels
ggml_backend_buffer_type_t ggml_backend_cpu_tesseraq_buffer_type(void);

// What the buffer type and tests call, of every layout and every type of activations:
//
// Repacks a group of rows, nb blocks each, one after the other; all of it together is as large as the rows were.
//     void layout_repack(int nrows, int64_t nb, const void * x, void * y)
// Dot products of a group of rows with a panel of w columns: s[c][r] for column c and row r of the group.
//     void ggml_gemm_layout        (int n, float * const * s, const void * vx, const void * vy, int w)
//     void ggml_gemm_layout_generic(int n, float * const * s, const void * vx, const void * vy, int w, int nrows)
// Quantizes nb blocks of column c of a panel of w columns; y is the panel's first of these blocks.
//     void quantize_panel_acts        (const float * x, void * y, int64_t nb, int w, int c)
//     void quantize_panel_acts_generic(const float * x, void * y, int64_t nb, int w, int c)
//
// LAYOUT_NROWS are the rows of a group; 0 for a layout that has no kernels.
#define TESSERAQ_DECLARE_REPACK(TYPE, type, LAYOUT, layout, ...)                                                                      \
    void layout##_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y);                                \
    void ggml_gemm_##layout          (int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w); \
    void ggml_gemm_##layout##_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows);

#define TESSERAQ_DECLARE_PANEL(TYPE, type, ...)                                                                            \
    void quantize_panel_##type          (const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c); \
    void quantize_panel_##type##_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c);

TESSERAQ_TYPES(TESSERAQ_DECLARE_REPACK)
TESSERAQ_ACTIVATIONS(TESSERAQ_DECLARE_PANEL)

#ifdef __cplusplus
}
#endif
