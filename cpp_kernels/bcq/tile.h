#pragma once

// What the kernels of repacked BCQ tensors have in common on all processors. Whoever includes this defines, for each layout that it has
// kernels for, and then BCQ_GEMM(layout),
//     template <int w> void layout_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a)

#include "tesseraq/bcq/encode.h"
#include "tesseraq/bcq/repack.h"
#include "tesseraq/common/compiler.h"
#include "tesseraq/common/panels.h"

#include <cstring>

#define BCQ_GEMM(layout)                                                                                                            \
    void ggml_gemm_##layout(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w) {        \
        tesseraq_with_width(w, [&](auto width) {                                                                                    \
            layout##_gemm_panel<decltype(width)::value>(n, s, (const uint8_t *) vx, (const uint8_t *) vy);                          \
        });                                                                                                                         \
    }

void quantize_panel_a4_bcq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    q8_quantize_panel(x, y, nb, w, c, bcq_encode);
}
