#pragma once

// Our tensor types in the CUDA backend: what a type is to its kernels. Upstream's switches are hooked to the lists of types.h. Included by
// common.cuh, after its own ggml_cuda_type_traits.

#include "tesseraq/bcq/bcq.h"
#include "tesseraq/common/is-type.h"
#include "tesseraq/ptq/ptq.h"
#include "tesseraq/tsq/tsq.h"

// The types that MMQ has. Its tiles have a scale for every 16 weights or more, and 24 salient weights are no multiple of it: PTQ types are
// dequantised for what is more than MMVQ's columns.
#define TESSERAQ_MMQ_TYPES(X) TESSERAQ_TSQ_TYPES(X) TESSERAQ_BCQ_TYPES(X)

// qk: weights of a block, qr: codes of a byte of qs, qi: 32 bit integers of qs, bs: bytes of a block
#define TESSERAQ_CUDA_TYPE_TRAITS(TYPE, type, LAYOUT, layout, id, weights, bytes, ...) \
    template<>                                                                         \
    struct ggml_cuda_type_traits<GGML_TYPE_##TYPE> {                                   \
        static constexpr int qk = weights;                                             \
        static constexpr int qr = QR_##LAYOUT;                                         \
        static constexpr int qi = QI_##LAYOUT;                                         \
        static constexpr int bs = bytes;                                               \
    };

TESSERAQ_TYPES(TESSERAQ_CUDA_TYPE_TRAITS)
