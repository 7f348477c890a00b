#pragma once

// What the kernels of repacked TSQ tensors have in common: how codes are taken out of a tile, and the loops around tiles.
// A processor's file defines its vectors, includes this, and then defines the functions declared below. Its vectors are
//     vint    TESSERAQ_NROWS*TESSERAQ_DEPTH bytes: one vector of a block's codes
//     vfloat  sums that stay in registers from block to block, TSQ_NSUMS(w) of them for a panel of w columns
// with
//     v_load(p)                     a vint
//     v_bits<nbits, at, up>(a)      bits `at` to `at + nbits - 1` of every byte as a number, times 2^up
//     v_bits_high<low, up>(a, b)    codes of 3 bits: the high ones are bits 6-7 of a, the low one is bit `low` of b; times 2^up
//     v_zero()                      a vfloat
//     v_prefetch(p)                 asks for what stands at p, if the processor does not know by itself

#include "tesseraq/common/compiler.h"
#include "tesseraq/common/panels.h"
#include "tesseraq/common/round.h"
#include "tesseraq/tsq/repack.h"

#include <cstring>
#include <type_traits>
#include <utility>

// add the product of a block of the group with a block of the panel
//   - dz   : scales and zero-points of the block
//   - codes: and its codes
//   - a    : the block of the panel
template <int nbits, int w> static void tsq_tile(const uint8_t * dz, const uint8_t * codes, const uint8_t * a, vfloat * acc);

// write the sums: s[c][r]
template <int w> static void tsq_store(float * const * s, const vfloat * acc);

static const int VECTOR = TESSERAQ_DEPTH*TESSERAQ_NROWS; // bytes of a vector of codes
static const int NGROUP = QK_TSQ/TESSERAQ_DEPTH;    // groups of columns in a block

// Calls f(0), ..., f(n - 1), in which the numbers are types, so that they can be arguments of templates and instructions.
template <int... i, typename F> static TESSERAQ_INLINE void tesseraq_unroll(F & f, std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>()), ...);
}

template <int n, typename F> static TESSERAQ_INLINE void tesseraq_unroll(F f) {
    tesseraq_unroll(f, std::make_integer_sequence<int, n>());
}

// Calls f(g, q) for the groups of columns of a block. In a code that is q*2^up, no step is wasted on bringing it down.
template <int up, typename F> static TESSERAQ_INLINE void tsq_unpack2(const uint8_t * x, F f) {
    const int n = NGROUP/4;

    TESSERAQ_UNROLL
    for (int v = 0; v < n; v++) {
        const vint q = v_load(x + v*VECTOR);
        f(v + 0*n, v_bits<2, 0, up>(q));
        f(v + 1*n, v_bits<2, 2, up>(q));
        f(v + 2*n, v_bits<2, 4, up>(q));
        f(v + 3*n, v_bits<2, 6, up>(q));
    }
}

template <int up, typename F> static TESSERAQ_INLINE void tsq_unpack3(const uint8_t * x, F f) {
    TESSERAQ_UNROLL
    for (int t = 0; t < NGROUP/8; t++) {
        const vint q0 = v_load(x + (3*t + 0)*VECTOR);
        const vint q1 = v_load(x + (3*t + 1)*VECTOR);
        const vint q2 = v_load(x + (3*t + 2)*VECTOR);
        f(8*t + 0, v_bits<3, 0, up>(q0));
        f(8*t + 1, v_bits<3, 3, up>(q0));
        f(8*t + 2, v_bits<3, 0, up>(q1));
        f(8*t + 3, v_bits<3, 3, up>(q1));
        f(8*t + 4, v_bits<3, 0, up>(q2));
        f(8*t + 5, v_bits<3, 3, up>(q2));
        f(8*t + 6, v_bits_high<6, up>(q0, q2));
        f(8*t + 7, v_bits_high<7, up>(q1, q2));
    }
}

template <int up, typename F> static TESSERAQ_INLINE void tsq_unpack4(const uint8_t * x, F f) {
    const int n = NGROUP/2;

    TESSERAQ_UNROLL
    for (int v = 0; v < n; v++) {
        const vint q = v_load(x + v*VECTOR);
        f(v + 0*n, v_bits<4, 0, up>(q));
        f(v + 1*n, v_bits<4, 4, up>(q));
    }
}

template <int nbits, int up, typename F> static TESSERAQ_INLINE void tsq_unpack_block(const uint8_t * x, F f) {
    if (nbits == 2) {
        tsq_unpack2<up>(x, f);
    } else if (nbits == 3) {
        tsq_unpack3<up>(x, f);
    } else {
        tsq_unpack4<up>(x, f);
    }
}

template <int nbits, int w> static void tsq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb     = n / QK_TSQ;
    const int header = 2*TESSERAQ_NROWS;
    const int codes  = TESSERAQ_NROWS*nbits*QK_TSQ/8;
    const int column = w*(int) Q8_TSQ_BLOCK_SIZE;

    vfloat acc[TSQ_NSUMS(w)];
    tesseraq_unroll<TSQ_NSUMS(w)>([&](auto i) TESSERAQ_LAMBDA {
        acc[i] = v_zero();
    });

    for (int i = 0; i < nb/2; i++) {
        if (w == 1) {
            // decoding reads every weight once, from memory: ask for it well ahead
            for (int j = 0; j < 2*(header + codes); j += 64) {
                v_prefetch(x + TESSERAQ_AHEAD + j);
            }
        }
        tsq_tile<nbits, w>(x,          x + 2*header,         a,          acc);
        tsq_tile<nbits, w>(x + header, x + 2*header + codes, a + column, acc);
        x += 2*(header + codes);
        a += 2*column;
    }
    if (nb % 2 != 0) {
        tsq_tile<nbits, w>(x, x + header, a, acc);
    }

    tsq_store<w>(s, acc);
}

#define TSQ_FUNCTIONS(nbits)                                                                                                  \
    void ggml_gemm_tsq##nbits(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w) {  \
        tesseraq_with_width(w, [&](auto width) {                                                                                \
            tsq_gemm_panel<nbits, decltype(width)::value>(n, s, (const uint8_t *) vx, (const uint8_t *) vy);                    \
        });                                                                                                                     \
    }

TSQ_FUNCTIONS(2)
TSQ_FUNCTIONS(3)
TSQ_FUNCTIONS(4)

void quantize_panel_q8_tsq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    q8_quantize_panel(x, y, nb, w, c, q8_block);
}
