#pragma once

// Activations of 8 bits with a scale for 64 of them: Q8_TSQ, which TSQ and BCQ types are multiplied with, in rows and in panels.

#include "ggml.h"
#include "tesseraq/common/compiler.h"
#include "tesseraq/common/groups.h"

#include <assert.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define QK8_TSQ 64

// In rows, blocks stand in groups of Q8_GROUP, a last group has what is left, so that the scales of a group fill a vector and its
// sums another one. A group of m blocks is
//     float   d [m]      scale
//     int16_t s [m][2]   sum of qs times -1 and 1
//     int8_t  qs[m][64]
// A block of a panel of w columns of activations is
//     float    d [w]
//     int16_t  s [w][2]
//     int8_t   qs[64/TESSERAQ_DEPTH][w][TESSERAQ_DEPTH]
#define Q8_GROUP          16
#define Q8_TSQ_BLOCK_SIZE (sizeof(float) + 2*sizeof(int16_t) + QK8_TSQ)

// blocks of activations whose largest magnitude is less are zeros: its reciprocal may be infinite
#define Q8_MIN_AMAX 1e-36f

// the larger of a magnitude and that of x; what is NaN once stays NaN, where fmaxf would drop it
static inline float q8_max_magnitude(float amax, float x) {
    const float a = fabsf(x);
    return a <= amax || amax != amax ? amax : a;
}

// Scale of activations whose largest magnitude is amax, and what brings them to 8 bits. Activations that are not all finite have
// the scale NaN, and with it every product: a broken model must not look like one that multiplies zeros.
static inline float q8_scale(float amax, float * id) {
    *id = amax > Q8_MIN_AMAX ? 127.0f/amax : 0.0f;
    return amax <= Q8_MIN_AMAX ? 0.0f : amax <= FLT_MAX ? amax/127.0f : NAN;
}

// brings 64 numbers to 8 bits and a scale d; returns their sum
typedef int (*q8_block_t)(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d);

static inline int q8_block_generic(const float * GGML_RESTRICT x, int8_t * GGML_RESTRICT q, float * GGML_RESTRICT d) {
    float amax = 0.0f;
    for (int j = 0; j < QK8_TSQ; j++) {
        amax = q8_max_magnitude(amax, x[j]);
    }
    float id;
    *d = q8_scale(amax, &id);

    int sum = 0;
    for (int j = 0; j < QK8_TSQ; j++) {
        const float v = rintf(x[j]*id);
        q[j] = (int8_t) (v >= -128.0f && v <= 127.0f ? (int) v : v > 0.0f ? 127 : -128);
        sum += q[j];
    }
    return sum;
}

// a row, by what makes a block: the groups of the layout stand here alone
static TESSERAQ_INLINE void q8_quantize_row(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k, q8_block_t block) {
    assert(k % QK8_TSQ == 0);
    const int64_t nb = k / QK8_TSQ;

    uint8_t * group = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i += Q8_GROUP) {
        const int m = nb - i < Q8_GROUP ? (int) (nb - i) : Q8_GROUP;

        for (int b = 0; b < m; b++, x += QK8_TSQ) {
            float d;
            const int     sum  = block(x, (int8_t *) group + 8*m + b*QK8_TSQ, &d);
            const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
            memcpy(group + 4*b,       &d, sizeof(d));
            memcpy(group + 4*m + 4*b, s,  sizeof(s));
        }
        group += m*Q8_TSQ_BLOCK_SIZE;
    }
}

// nb blocks of column c of a panel of w columns, by what makes a block; y is the panel's first of these blocks
static TESSERAQ_INLINE void q8_quantize_panel(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c, q8_block_t block) {
    uint8_t * out = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i++, x += QK8_TSQ, out += w*Q8_TSQ_BLOCK_SIZE) {
        int8_t q[QK8_TSQ];
        float  d;
        const int     sum  = block(x, q, &d);
        const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };

        memcpy(out + 4*c, &d, sizeof(d));
        memcpy(out + 4*w + 4*c, s, sizeof(s));
        for (int g = 0; g < QK8_TSQ/TESSERAQ_DEPTH; g++) {
            memcpy(out + 8*w + TESSERAQ_DEPTH*(g*w + c), q + TESSERAQ_DEPTH*g, TESSERAQ_DEPTH);
        }
    }
}
