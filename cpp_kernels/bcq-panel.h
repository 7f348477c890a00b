#pragma once

// Encoding of panels and the choice among kernels by the width of a panel, for all processors. Whoever includes this has
// bcq_encode(x, q, d), and defines
//     template <int w> void bcq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a)

#include "tesseraq/bcq-repack.h"

#include <cstring>

template <int w> static void bcq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a);

void ggml_gemm_bcq(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w) {
    const uint8_t * x = (const uint8_t *) vx;
    const uint8_t * a = (const uint8_t *) vy;

    switch (w) {
        case  1: bcq_gemm_panel< 1>(n, s, x, a); break;
        case  2: bcq_gemm_panel< 2>(n, s, x, a); break;
        case  3: bcq_gemm_panel< 3>(n, s, x, a); break;
        case  4: bcq_gemm_panel< 4>(n, s, x, a); break;
#if TSQ_NCOLS > 4
        case  5: bcq_gemm_panel< 5>(n, s, x, a); break;
        case  6: bcq_gemm_panel< 6>(n, s, x, a); break;
        case  7: bcq_gemm_panel< 7>(n, s, x, a); break;
        case  8: bcq_gemm_panel< 8>(n, s, x, a); break;
#endif
#if TSQ_NCOLS > 8
        case  9: bcq_gemm_panel< 9>(n, s, x, a); break;
        case 10: bcq_gemm_panel<10>(n, s, x, a); break;
        case 11: bcq_gemm_panel<11>(n, s, x, a); break;
        case 12: bcq_gemm_panel<12>(n, s, x, a); break;
#endif
        default: GGML_ABORT("a panel has no %d columns", w);
    }
}

void bcq_quantize_panel(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    uint8_t * out = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i++, x += QK_BCQ, out += w*TSQ_PANEL_BLOCK_SIZE) {
        int8_t q[QK_BCQ];
        float  d;
        const int     sum  = bcq_encode(x, q, &d);
        const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };

        memcpy(out + 4*c, &d, sizeof(d));
        memcpy(out + 4*w + 4*c, s, sizeof(s));
        for (int g = 0; g < QK_BCQ/TSQ_DEPTH; g++) {
            memcpy(out + 8*w + TSQ_DEPTH*(g*w + c), q + TSQ_DEPTH*g, TSQ_DEPTH);
        }
    }
}
