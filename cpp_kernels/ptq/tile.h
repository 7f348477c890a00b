#pragma once

// What the kernels of repacked PTQ1_61 tensors have in common: how codes and signs are taken out of a tile, and the loops around tiles.
// A processor's file defines its vectors, includes this, and then defines the functions declared below. Its vectors are
//     vint    4*TESSERAQ_NROWS bytes: a unit, 4 columns of all rows
//     vfloat  sums that stay in registers from block to block, PTQ_NSUMS(w) of them for a panel of w columns
// with
//     v_load(p)                  a vint
//     v_bits<nbits, at, up>(a)   bits `at` to `at + nbits - 1` of every byte as a number, times 2^up
//     v_mask<up>(p)              2^up in the bytes that have a 1 in the TESSERAQ_NROWS/2 bytes at p, else 0
//     v_zero()                   a vfloat
//     v_prefetch(p)              asks for what stands at p, if the processor does not know by itself

#include "tesseraq/common/compiler.h"
#include "tesseraq/common/panels.h"
#include "tesseraq/ptq/repack.h"

#include <cstring>

// add the product of a block of the group with a block of the panel
template <int w> static void ptq_tile(const uint8_t * x, const uint8_t * a, vfloat * acc);

// write the sums: s[c][r]
template <int w> static void ptq_store(float * const * s, const vfloat * acc);

// 128 numbers rounded to int8, with their scales and sums, as ptq_round_generic does it
static void ptq_round(const float * x, int8_t * q, float * d, int32_t * s);

// 32 numbers, 8 for each of 4 bytes of signs, to the order of their units
static void ptq_to_units(const int8_t * q, uint8_t * y);

static const int PTQ_VECTOR = 4*TESSERAQ_NROWS;
static const int PTQ_TILE   = TESSERAQ_NROWS*(int) sizeof(block_ptq1_61);

// parts of a block
static const int PTQ_LAST  = 2*TESSERAQ_NROWS;
static const int PTQ_CODES = 3*TESSERAQ_NROWS;
static const int PTQ_SIGNS = PTQ_CODES + 3*PTQ_VECTOR;

// Calls f(unit, q) for the salient units of a block: codes times 2^up.
template <int up, typename F> static TESSERAQ_INLINE void ptq_unpack_salient(const uint8_t * x, F f) {
    TESSERAQ_UNROLL
    for (int v = 0; v < 3; v++) {
        const vint q = v_load(x + PTQ_CODES + v*PTQ_VECTOR);
        f(v,     v_bits<4, 0, up>(q));
        f(v + 3, v_bits<4, 4, up>(q));
    }
}

// Calls f(unit, q) for the binary units of a block: bits times 2^up.
template <int up, typename F> static TESSERAQ_INLINE void ptq_unpack_binary(const uint8_t * x, F f) {
    TESSERAQ_UNROLL
    for (int v = 0; v < 3; v++) {
        const vint q = v_load(x + PTQ_SIGNS + v*PTQ_VECTOR);
        const int first = PTQ_SALIENT_UNITS + 8*v;
        f(first + 0, v_bits<1, 0, up>(q));
        f(first + 1, v_bits<1, 1, up>(q));
        f(first + 2, v_bits<1, 2, up>(q));
        f(first + 3, v_bits<1, 3, up>(q));
        f(first + 4, v_bits<1, 4, up>(q));
        f(first + 5, v_bits<1, 5, up>(q));
        f(first + 6, v_bits<1, 6, up>(q));
        f(first + 7, v_bits<1, 7, up>(q));
    }
    f(PTQ_UNITS - 2, v_mask<up>(x + PTQ_LAST));
    f(PTQ_UNITS - 1, v_mask<up>(x + PTQ_LAST + TESSERAQ_NROWS/2));
}

template <int w> static void ptq_gemm_panel(int n, float * const * s, const uint8_t * x, const uint8_t * a) {
    const int nb = n / QK_PTQ;

    vfloat acc[PTQ_NSUMS(w)];
    TESSERAQ_UNROLL
    for (int i = 0; i < PTQ_NSUMS(w); i++) {
        acc[i] = v_zero();
    }

    for (int i = 0; i < nb; i++) {
        if (w == 1) {
            // decoding reads every weight once, from memory: ask for it well ahead
            for (int j = 0; j < PTQ_TILE; j += 64) {
                v_prefetch(x + TESSERAQ_AHEAD + j);
            }
        }
        ptq_tile<w>(x, a, acc);
        x += PTQ_TILE;
        a += w*Q8_PTQ_BLOCK_SIZE;
    }

    ptq_store<w>(s, acc);
}

void ggml_gemm_ptq1_61(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w) {
    tesseraq_with_width(w, [&](auto width) {
        ptq_gemm_panel<decltype(width)::value>(n, s, (const uint8_t *) vx, (const uint8_t *) vy);
    });
}

void quantize_panel_q8_ptq(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    uint8_t * out = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i++, x += QK_PTQ, out += w*Q8_PTQ_BLOCK_SIZE) {
        int8_t  q[QK_PTQ];
        float   d[2];
        int32_t s[2];
        ptq_round(x, q, d, s);

        for (int kind = 0; kind < 2; kind++) {
            memcpy(out + 4*(kind*w + c),       &d[kind], sizeof(float));
            memcpy(out + 4*((2 + kind)*w + c), &s[kind], sizeof(int32_t));
        }

        uint8_t units[QK_PTQ];
        uint8_t * u = w == 1 ? out + 16 : units;
        memcpy(u, q, PTQ_SALIENT);
        for (int v = 0; v < 3; v++) {
            ptq_to_units(q + PTQ_SALIENT + 32*v, u + PTQ_SALIENT + 32*v);
        }
        memcpy(u + QK_PTQ - 8, q + QK_PTQ - 8, 8);
        if (w > 1) {
            for (int g = 0; g < QK_PTQ/TESSERAQ_DEPTH; g++) {
                memcpy(out + 16*w + TESSERAQ_DEPTH*(g*w + c), u + TESSERAQ_DEPTH*g, TESSERAQ_DEPTH);
            }
        }
    }
}
