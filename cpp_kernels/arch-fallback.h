#pragma once

// The `_generic` kernels of TSQ and its kin take the plain name where no SIMD version is compiled in.
// Included at the end of ggml-cpu/arch-fallback.h.

#if defined(GGML_CPU_GENERIC) || !(defined(__x86_64__) || defined(__i386__) || defined(_M_IX86) || defined(_M_X64) || \
                                   defined(__aarch64__) || defined(__arm__) || defined(_M_ARM) || defined(_M_ARM64) || defined(_M_ARM64EC))
#define quantize_row_q8_tsq_generic quantize_row_q8_tsq
#define ggml_cpu_tsq2_to_fp32_generic ggml_cpu_tsq2_to_fp32
#define ggml_cpu_tsq3_to_fp32_generic ggml_cpu_tsq3_to_fp32
#define ggml_cpu_tsq4_to_fp32_generic ggml_cpu_tsq4_to_fp32
#define ggml_vec_dot_tsq2_q8_tsq_generic ggml_vec_dot_tsq2_q8_tsq
#define ggml_vec_dot_tsq3_q8_tsq_generic ggml_vec_dot_tsq3_q8_tsq
#define ggml_vec_dot_tsq4_q8_tsq_generic ggml_vec_dot_tsq4_q8_tsq
#define quantize_row_a4_bcq_generic quantize_row_a4_bcq
#define ggml_cpu_bcq4_to_fp32_generic ggml_cpu_bcq4_to_fp32
#define ggml_vec_dot_bcq4_q8_tsq_generic ggml_vec_dot_bcq4_q8_tsq
#define quantize_row_q8_ptq_generic quantize_row_q8_ptq
#define ggml_cpu_ptq1_61_to_fp32_generic ggml_cpu_ptq1_61_to_fp32
#define ggml_vec_dot_ptq1_61_q8_ptq_generic ggml_vec_dot_ptq1_61_q8_ptq
#endif

#if defined(GGML_CPU_GENERIC) || !(defined(__x86_64__) || defined(__i386__) || defined(_M_IX86) || defined(_M_X64))
#define ggml_vec_get_cols_generic ggml_vec_get_cols
#endif
