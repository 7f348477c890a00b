#include "tesseraq/tsq.h"

#include <math.h>

#define TSQ_SEARCH_SCALES 18 // E5M3 codes tried per block: 2.25 octaves
#define TSQ_SEARCH_STARTS  3 // zero-points to start from, per scale
#define TSQ_SEARCH_STEPS  16 // at most so many rounds of "best codes for z, best z for codes" per start

// smallest E5M3 code whose value is at least d
static int tsq_encode_d_up(float d) {
    int code = 0;
    while (code < 255 && tsq_decode_d(code) < d) {
        code++;
    }
    return code;
}

// nearest zero-point code
static int tsq_encode_z(float z, int nbits) {
    const float code = z * (128.0f / (1 << nbits)) + 64.5f;
    return !(code > 0.0f) ? 0 : code >= 255.0f ? 255 : (int) code;
}

// nearest codes for a given scale and zero-point
static void tsq_assign(const float * GGML_RESTRICT x, float id, float z, int qmax, int n, float * GGML_RESTRICT q) {
    for (int i = 0; i < n; i++) {
        float v = x[i]*id + z;
        v    = v > 0.0f ? v : 0.0f; // also takes NaN to 0
        v    = v < qmax ? v : qmax;
        q[i] = (float) (int) (v + 0.5f);
    }
}

// weighted squared error of the codes, in units of d^2
static float tsq_error(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, float id, float z, const float * GGML_RESTRICT q, int n) {
    float sum[8] = {0};
    for (int i = 0; i < n; i += 8) {
        for (int j = 0; j < 8; j++) {
            const float e = x[i + j]*id - (q[i + j] - z);
            sum[j] += w[i + j]*e*e;
        }
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// sum of w*(q - x/d), the numerator of the best zero-point for given codes
static float tsq_shift(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, float id, const float * GGML_RESTRICT q, int n) {
    float sum[8] = {0};
    for (int i = 0; i < n; i += 8) {
        for (int j = 0; j < 8; j++) {
            sum[j] += w[i + j]*(q[i + j] - x[i + j]*id);
        }
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// Search d and z on their grids for the smallest weighted squared error; w is >= 0, codes go to q.
// Every scale that could be meant is tried with a few zero-points, each improved by alternation.
static void tsq_search(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int nbits, int n,
                       uint8_t * GGML_RESTRICT d_code, uint8_t * GGML_RESTRICT z_code, float * GGML_RESTRICT q) {
    const int   qmax  = (1 << nbits) - 1;
    const float reach = (float) (1 << (nbits - 1)); // z runs from -reach to almost 3*reach

    float lo = x[0];
    float hi = x[0];
    float sw = 0.0f;
    for (int i = 0; i < n; i++) {
        lo  = x[i] < lo ? x[i] : lo;
        hi  = x[i] > hi ? x[i] : hi;
        sw += w[i];
    }

    *d_code = 0;
    *z_code = 64;
    memset(q, 0, n*sizeof(float));

    if (!(lo < 0.0f) && !(hi > 0.0f)) { // all zero (or NaN)
        return;
    }

    // scales from 0.25 to 1.2 times range/qmax, none so small that a block far from zero is out of reach
    float d_min = 0.25f*(hi - lo)/qmax;
    d_min = fmaxf(d_min, lo/ (reach + qmax));
    d_min = fmaxf(d_min, hi/-(reach*2.98f));

    const int first = tsq_encode_d_up(d_min);

    float best = -1.0f; // none yet
    float qt[QK_TSQ];

    for (int dc = first; dc < first + TSQ_SEARCH_SCALES && dc <= 255; dc++) {
        const float d  = tsq_decode_d(dc);
        const float id = 1.0f/d;

        // start with the middle of the range at the middle of the codes, and to both sides of it
        const float z_mid = 0.5f*(qmax - (lo + hi)*id);

        for (int start = 0; start < TSQ_SEARCH_STARTS; start++) {
            int zc = tsq_encode_z(z_mid + 0.4f*(start - 1), nbits);

            for (int step = 0; step < TSQ_SEARCH_STEPS; step++) {
                const float z = tsq_decode_z(zc, nbits);

                tsq_assign(x, id, z, qmax, n, qt);

                const float err = d*d*tsq_error(x, w, id, z, qt, n);
                if (best < 0.0f || err < best) {
                    best    = err;
                    *d_code = dc;
                    *z_code = zc;
                    memcpy(q, qt, n*sizeof(float));
                }

                const int next = sw > 0.0f ? tsq_encode_z(tsq_shift(x, w, id, qt, n)/sw, nbits) : zc;
                if (next == zc) {
                    break;
                }
                zc = next;
            }
        }
    }
}

static void quantize_block_tsq2(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, block_tsq2 * GGML_RESTRICT y) {
    float q[QK_TSQ];
    tsq_search(x, w, 2, QK_TSQ, &y->d, &y->z, q);

    for (int j = 0; j < QK_TSQ/4; j++) {
        y->qs[j] = (uint8_t) q[j] | (uint8_t) q[j + 16] << 2 | (uint8_t) q[j + 32] << 4 | (uint8_t) q[j + 48] << 6;
    }
}

void quantize_row_tsq2_ref(const float * GGML_RESTRICT x, block_tsq2 * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    float w[QK_TSQ];
    for (int j = 0; j < QK_TSQ; j++) {
        w[j] = 1.0f;
    }

    for (int64_t i = 0; i < nb; i++) {
        quantize_block_tsq2(x + i*QK_TSQ, w, y + i);
    }
}

void dequantize_row_tsq2(const block_tsq2 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_TSQ == 0);
    const int64_t nb = k / QK_TSQ;

    for (int64_t i = 0; i < nb; i++) {
        const float d = tsq_decode_d(x[i].d);
        const float z = tsq_decode_z(x[i].z, 2);

        for (int l = 0; l < 4; l++) {
            for (int j = 0; j < 16; j++) {
                const int q = (x[i].qs[j] >> 2*l) & 3;
                y[i*QK_TSQ + l*16 + j] = d*(q - z);
            }
        }
    }
}

size_t quantize_tsq2(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % QK_TSQ == 0);
    const int64_t nb = n_per_row / QK_TSQ;

    if (!imatrix) {
        quantize_row_tsq2_ref(src, (block_tsq2 *) dst, nrows*n_per_row);
        return nrows*nb*sizeof(block_tsq2);
    }

    block_tsq2 * y = (block_tsq2 *) dst;

    for (int64_t row = 0; row < nrows; row++) {
        const float * x = src + row*n_per_row;

        float sum_x2 = 0.0f;
        for (int64_t i = 0; i < n_per_row; i++) {
            sum_x2 += x[i]*x[i];
        }
        const float sigma2 = sum_x2/n_per_row;

        for (int64_t i = 0; i < nb; i++) {
            const float * xb = x + i*QK_TSQ;

            float w[QK_TSQ];
            for (int j = 0; j < QK_TSQ; j++) {
                w[j] = imatrix[i*QK_TSQ + j] * sqrtf(sigma2 + xb[j]*xb[j]);
            }
            quantize_block_tsq2(xb, w, y++);
        }
    }

    return nrows*nb*sizeof(block_tsq2);
}
