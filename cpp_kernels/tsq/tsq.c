#include "tesseraq/tsq/tsq.h"
#include "tesseraq/common/quantize.h"

#include <math.h>

#define TSQ_SEARCH_SCALES 18    // E5M3 codes tried per block: 2.25 octaves
#define TSQ_SEARCH_FINE   6     // best of them that are tried again, from both sides
#define TSQ_SEARCH_SIDE   0.4f  // how far to the sides, in codes
#define TSQ_SEARCH_STEPS  16    // at most so many rounds of "best codes for z, best z for codes" per start

// smallest E5M3 code whose value is at least d
static int tsq_encode_d_up(float d) {
    int code = 0;
    while (code < 255 && e5m3_decode(code) < d) {
        code++;
    }
    return code;
}

// nearest zero-point code
static int tsq_encode_z(float z, int nbits) {
    const float code = z * (128.0f / (1 << nbits)) + 64.5f;
    return !(code > 0.0f) ? 0 : code >= 255.0f ? 255 : (int) code;
}

// a block of weights at a certain scale
struct tsq_block {
    const float * x;     // weights in units of d
    const float * w;     // importance, >= 0
    float         sw;    // sum of w
    int           nbits;
};

// Nearest codes for a zero-point, and the best zero-point for these codes. Returns the weighted squared error, in units of d^2.
static float tsq_assign(const struct tsq_block * b, int z_code, int * z_next, float * GGML_RESTRICT q) {
    const float * GGML_RESTRICT x = b->x;
    const float * GGML_RESTRICT w = b->w;

    const float z    = tsq_decode_z(z_code, b->nbits);
    const float qmax = (float) ((1 << b->nbits) - 1);

    float err[8]   = {0};
    float shift[8] = {0};
    for (int i = 0; i < QK_TSQ; i += 8) {
        for (int j = 0; j < 8; j++) {
            const float v = x[i + j] + z;
            const float c = v > 0.0f ? v : 0.0f; // also takes NaN to 0
            const float k = (float) (int) ((c < qmax ? c : qmax) + 0.5f);
            const float e = k - v;

            q[i + j]  = k;
            err[j]   += w[i + j]*e*e;
            shift[j] += w[i + j]*e;
        }
    }

    const float sum = ((shift[0] + shift[4]) + (shift[1] + shift[5])) + ((shift[2] + shift[6]) + (shift[3] + shift[7]));
    *z_next = b->sw > 0.0f ? tsq_encode_z(z + sum/b->sw, b->nbits) : z_code;

    return ((err[0] + err[4]) + (err[1] + err[5])) + ((err[2] + err[6]) + (err[3] + err[7]));
}

// Alternate "best codes for z, best z for codes" from a start. Returns the smallest error on the way, in units of d^2.
static float tsq_descend(const struct tsq_block * b, int z_start, uint8_t * z_code, float * GGML_RESTRICT q) {
    float qt[QK_TSQ];
    float best = -1.0f; // none yet
    int   next = z_start;

    for (int step = 0; step < TSQ_SEARCH_STEPS; step++) {
        const int   z   = next;
        const float err = tsq_assign(b, z, &next, qt);
        if (best < 0.0f || err < best) {
            best    = err;
            *z_code = z;
            memcpy(q, qt, sizeof(qt));
        }
        if (next == z) {
            break;
        }
    }

    return best;
}

// the i-th smallest of n values
static float tsq_nth(const float * values, int n, int i) {
    float sorted[TSQ_SEARCH_SCALES];
    for (int j = 0; j < n; j++) {
        int k = j;
        for (; k > 0 && sorted[k - 1] > values[j]; k--) {
            sorted[k] = sorted[k - 1];
        }
        sorted[k] = values[j];
    }
    return sorted[i < n ? i : n - 1];
}

// Search d and z on their grids for the smallest weighted squared error; codes go to q.
// Every scale starts with the range of the weights in the middle of the codes, the best of them from both sides as well: more
// codes have more local minima, so they get more starts on the way.
static void tsq_search(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int nbits,
                       uint8_t * GGML_RESTRICT d_code, uint8_t * GGML_RESTRICT z_code, float * GGML_RESTRICT q) {
    const int   qmax  = (1 << nbits) - 1;
    const float reach = (float) (1 << (nbits - 1)); // z runs from -reach to almost 3*reach

    float lo = x[0];
    float hi = x[0];
    float sw = 0.0f;
    for (int i = 0; i < QK_TSQ; i++) {
        lo  = x[i] < lo ? x[i] : lo;
        hi  = x[i] > hi ? x[i] : hi;
        sw += w[i];
    }

    *d_code = 0;
    *z_code = 64;
    memset(q, 0, QK_TSQ*sizeof(float));

    if (!(lo < 0.0f) && !(hi > 0.0f)) { // all zero (or NaN)
        return;
    }

    // scales from 0.25 to 1.2 times range/qmax, none so small that a block far from zero is out of reach
    float d_min = 0.25f*(hi - lo)/qmax;
    d_min = fmaxf(d_min, lo/ (reach + qmax));
    d_min = fmaxf(d_min, hi/-(reach*2.98f));

    const int first = tsq_encode_d_up(d_min);
    const int count = first + TSQ_SEARCH_SCALES <= 256 ? TSQ_SEARCH_SCALES : 256 - first;

    float xs[QK_TSQ];
    float qt[QK_TSQ];
    float error[TSQ_SEARCH_SCALES];
    float best = -1.0f; // none yet

    for (int pass = 0; pass < 2; pass++) {
        const float limit = pass == 0 ? 0.0f : tsq_nth(error, count, TSQ_SEARCH_FINE - 1);

        for (int c = 0; c < count; c++) {
            if (pass == 1 && !(error[c] <= limit)) {
                continue;
            }

            const float d  = e5m3_decode(first + c);
            const float id = 1.0f/d;
            for (int i = 0; i < QK_TSQ; i++) {
                xs[i] = x[i]*id;
            }
            const struct tsq_block b = { xs, w, sw, nbits };

            const float z_mid = 0.5f*(qmax - (lo + hi)*id);
            const int   sides = pass == 0 ? 0 : 1 << (nbits - 2);

            for (int side = -sides; side <= sides; side++) {
                if (pass == 1 && side == 0) {
                    continue;
                }
                const float z_start = pass == 0 ? z_mid : z_mid + TSQ_SEARCH_SIDE*side/sides;

                uint8_t z = 64;
                const float err = d*d*tsq_descend(&b, tsq_encode_z(z_start, nbits), &z, qt);
                if (pass == 0) {
                    error[c] = err;
                }
                if (best < 0.0f || err < best) {
                    best    = err;
                    *d_code = first + c;
                    *z_code = z;
                    memcpy(q, qt, sizeof(qt));
                }
            }
        }
    }
}

// bits of codes, from bit `shift` up, to planes of `width` bits
static void tsq_pack_planes(const float * GGML_RESTRICT q, int width, int shift, uint8_t * GGML_RESTRICT planes) {
    const int n    = 8*width; // bytes: weights of one plane
    const int mask = (1 << width) - 1;

    memset(planes, 0, n);
    for (int i = 0; i < QK_TSQ/n; i++) {
        for (int j = 0; j < n; j++) {
            planes[j] |= (((uint8_t) q[i*n + j] >> shift) & mask) << i*width;
        }
    }
}

static void tsq_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int nbits, uint8_t * GGML_RESTRICT y) {
    float q[QK_TSQ];
    tsq_search(x, w, nbits, &y[0], &y[1], q);

    tsq_pack_planes(q, nbits == 4 ? 4 : 2, 0, y + TSQ_CODES);
    if (nbits == 3) {
        tsq_pack_planes(q, 1, 2, y + TSQ_CODES + QK_TSQ/4);
    }
}

static inline void tsq_dequantize_row(const uint8_t * GGML_RESTRICT x, int nbits, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    for (int64_t i = 0; i < nb; i++) {
        const uint8_t * b = x + i*TSQ_BLOCK_SIZE(nbits);
        const float     d = e5m3_decode(b[0]);
        const float     z = tsq_decode_z(b[1], nbits);

        uint8_t q[QK_TSQ];
        tsq_unpack(b + TSQ_CODES, nbits, q);

        for (int j = 0; j < QK_TSQ; j++) {
            y[i*QK_TSQ + j] = d*(q[j] - z);
        }
    }
}

#define TSQ_FUNCTIONS(nbits)                                                                                                                  \
    static void tsq_quantize_block_##nbits(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT y) {          \
        tsq_quantize_block(x, w, nbits, y);                                                                                                 \
    }                                                                                                                                       \
    TESSERAQ_QUANTIZE(tsq##nbits, QK_TSQ, TSQ_BLOCK_SIZE(nbits), tsq_quantize_block_##nbits)                                                \
    void dequantize_row_tsq##nbits(const void * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {                                      \
        tsq_dequantize_row(x, nbits, y, k);                                                                                                 \
    }

TSQ_FUNCTIONS(2)
TSQ_FUNCTIONS(3)
TSQ_FUNCTIONS(4)
