#pragma once

// Blocks of 64 activations to int8 with the instructions of this processor, as q8_block_generic does it.

#include "tesseraq/common/q8.h"

#if defined(__aarch64__)
#include "tesseraq/common/arm-round.h"
#else
#include "tesseraq/common/x86-round.h"
#endif

static inline int q8_block(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float id;
    *d = q8_scale(q8_amax(x), &id);
    return q8_round(x, id, q);
}
