#pragma once

// Our tensor types in the CUDA backend: the list that upstream's switches are hooked to, and what a type is to its kernels.
// Included by common.cuh, after its own ggml_cuda_type_traits.

#include "tesseraq/bcq.h"
#include "tesseraq/ptq.h"
#include "tesseraq/tsq.h"

// X(NAME, name) for each layout that MMQ has: there is ggml_cuda_mmq_load_tiles_name
#define TESSERAQ_MMQ_LAYOUTS(X) \
    X(TSQ2, tsq2) \
    X(TSQ3, tsq3) \
    X(TSQ4, tsq4) \
    X(BCQ4, bcq4)

// X(TYPE, NAME, name) for each type that MMQ has: GGML_TYPE_TYPE has the bytes of GGML_TYPE_NAME, and its kernels
#define TESSERAQ_MMQ_TYPES(X) \
    X(TSQ2,    TSQ2, tsq2) \
    X(TSQ3,    TSQ3, tsq3) \
    X(TSQ4,    TSQ4, tsq4) \
    X(BCQ4,    BCQ4, bcq4) \
    X(BCQ4_A4, BCQ4, bcq4)

// X(TYPE, NAME, name) for each type: there are dequantize_name and vec_dot_name_q8_1. MMQ's tiles have a scale for every 16 weights or more,
// and 24 salient weights are no multiple of it: PTQ1_61 is dequantised for what is more than MMVQ's columns.
#define TESSERAQ_CUDA_TYPES(X) \
    TESSERAQ_MMQ_TYPES(X)      \
    X(PTQ1_61, PTQ1_61, ptq1_61)

// labels of a switch over types
#define TESSERAQ_CASE(TYPE, NAME, name) case GGML_TYPE_##TYPE:
#define TESSERAQ_CASES     TESSERAQ_CUDA_TYPES(TESSERAQ_CASE)
#define TESSERAQ_MMQ_CASES TESSERAQ_MMQ_TYPES(TESSERAQ_CASE)

static constexpr __host__ __device__ bool tesseraq_is_type(ggml_type type) {
    switch (type) {
        TESSERAQ_CASES
            return true;
        default:
            return false;
    }
}

// whether weights are looked up in the codebooks of a model
static constexpr __host__ __device__ bool tesseraq_has_codebooks(ggml_type type) {
    return type == GGML_TYPE_BCQ4 || type == GGML_TYPE_BCQ4_A4;
}

// qk: weights of a block, qr: codes of a byte of qs, qi: 32 bit integers of qs, bs: bytes of a block
template<>
struct ggml_cuda_type_traits<GGML_TYPE_TSQ2> {
    static constexpr int qk = QK_TSQ;
    static constexpr int qr = 4;
    static constexpr int qi = QK_TSQ / (4*qr);
    static constexpr int bs = sizeof(block_tsq2);
};

template<>
struct ggml_cuda_type_traits<GGML_TYPE_TSQ3> {
    static constexpr int qk = QK_TSQ;
    static constexpr int qr = 4;
    static constexpr int qi = QK_TSQ / (4*qr);
    static constexpr int bs = sizeof(block_tsq3);
};

template<>
struct ggml_cuda_type_traits<GGML_TYPE_TSQ4> {
    static constexpr int qk = QK_TSQ;
    static constexpr int qr = 2;
    static constexpr int qi = QK_TSQ / (4*qr);
    static constexpr int bs = sizeof(block_tsq4);
};

template<>
struct ggml_cuda_type_traits<GGML_TYPE_BCQ4> {
    static constexpr int qk = QK_BCQ;
    static constexpr int qr = 2;
    static constexpr int qi = QK_BCQ / (4*qr);
    static constexpr int bs = sizeof(block_bcq4);
};

// qi: blocks of activations, as many as threads share a block
template<>
struct ggml_cuda_type_traits<GGML_TYPE_PTQ1_61> {
    static constexpr int qk = QK_PTQ;
    static constexpr int qr = 2; // weights that dequantize_ptq1_61 takes
    static constexpr int qi = QK_PTQ / QK8_1;
    static constexpr int bs = sizeof(block_ptq1_61);
};
