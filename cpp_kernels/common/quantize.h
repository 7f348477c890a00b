#pragma once

// Quantization of rows, by what quantizes a block: how an importance matrix weights the weights of a row stands here alone.

#include "ggml.h"

#include <assert.h>
#include <math.h>
#include <stdint.h>

#define TESSERAQ_MAX_BLOCK 128 // weights

// the best block for weights x of importance w
typedef void (*tesseraq_quantize_block_t)(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT y);

// the importance of weights that matter alike
static const float tesseraq_equal[TESSERAQ_MAX_BLOCK] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

// blocks of `qk` weights and `size` bytes
static inline void tesseraq_quantize_row(
        const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k, int qk, size_t size, tesseraq_quantize_block_t block) {
    assert(k % qk == 0);
    const int64_t nb = k / qk;

    for (int64_t i = 0; i < nb; i++) {
        block(x + i*qk, tesseraq_equal, (uint8_t *) y + i*size);
    }
}

static inline size_t tesseraq_quantize(
        const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix,
        int qk, size_t size, tesseraq_quantize_block_t block) {
    assert(n_per_row % qk == 0 && qk <= TESSERAQ_MAX_BLOCK);
    const int64_t nb = n_per_row / qk;

    if (!imatrix) {
        tesseraq_quantize_row(src, dst, nrows*n_per_row, qk, size, block);
        return nrows*nb*size;
    }

    uint8_t * y = (uint8_t *) dst;

    for (int64_t row = 0; row < nrows; row++) {
        const float * x = src + row*n_per_row;

        float sum_x2 = 0.0f;
        for (int64_t i = 0; i < n_per_row; i++) {
            sum_x2 += x[i]*x[i];
        }
        const float sigma2 = sum_x2/n_per_row;

        for (int64_t i = 0; i < nb; i++, y += size) {
            const float * xb = x + i*qk;

            float w[TESSERAQ_MAX_BLOCK];
            for (int j = 0; j < qk; j++) {
                w[j] = imatrix[i*qk + j] * sqrtf(sigma2 + xb[j]*xb[j]);
            }
            block(xb, w, y);
        }
    }

    return nrows*nb*size;
}

// the functions of a layout by what quantizes its blocks
#define TESSERAQ_QUANTIZE(layout, qk, size, block)                                                                                                 \
    void quantize_row_##layout##_ref(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {                                           \
        tesseraq_quantize_row(x, y, k, qk, size, block);                                                                                           \
    }                                                                                                                                              \
    size_t quantize_##layout(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) { \
        return tesseraq_quantize(src, dst, nrows, n_per_row, imatrix, qk, size, block);                                                            \
    }
