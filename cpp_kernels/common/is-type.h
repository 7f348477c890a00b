#pragma once

// What a type is: one of ours, and which.

#include "ggml.h"

#include <stdbool.h>

#if defined(__CUDACC__) || defined(__HIPCC__) || defined(__MUSACC__)
#define TESSERAQ_CONSTEXPR static constexpr __host__ __device__
#elif defined(__cplusplus)
#define TESSERAQ_CONSTEXPR static constexpr
#else
#define TESSERAQ_CONSTEXPR static inline
#endif

#define TESSERAQ_IS(function, TYPES)                        \
    TESSERAQ_CONSTEXPR bool function(enum ggml_type type) { \
        switch (type) {                                     \
            TYPES(TESSERAQ_CASE)                            \
                return true;                                \
            default:                                        \
                return false;                               \
        }                                                   \
    }

TESSERAQ_IS(tesseraq_is_type,        TESSERAQ_TYPES)
TESSERAQ_IS(tesseraq_is_activations, TESSERAQ_ACTIVATIONS) // which no file holds
TESSERAQ_IS(tesseraq_has_codebooks,  TESSERAQ_BCQ_TYPES)    // in which weights are looked up
TESSERAQ_IS(tesseraq_has_order,      TESSERAQ_PTQ_TYPES)    // of its columns
