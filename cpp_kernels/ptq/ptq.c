#include "tesseraq/ptq/ptq.h"
#include "tesseraq/common/quantize.h"

#include <math.h>

#define PTQ_SEARCH_BELOW 8 // E5M3 codes of s tried below the one that brings the largest weight to the largest code
#define PTQ_SEARCH_ABOVE 2 // and above it

// Sums are in double, of products that are exact in double: they are the same with and without fused multiply-add, and the same as
// numpy's.

// The best codes of the salient weights for a scale. Returns the weighted squared error.
static double ptq_assign(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, int s_code, uint8_t * GGML_RESTRICT q) {
    const double s = (double) e5m3_decode(s_code);

    double total = 0.0;
    for (int i = 0; i < PTQ_SALIENT; i++) {
        const double v = floor((double) x[i]/s + 8.0);
        q[i] = v > 0.0 ? v < 15.0 ? (uint8_t) v : 15 : 0; // also takes NaN to 0

        const double e  = s*(q[i] - 7.5) - (double) x[i];
        const float  e2 = (float) (e*e);
        total += (double) w[i]*(double) e2;
    }
    return total;
}

// the weights' importance, or none: where nothing matters, everything does alike
static const float * ptq_importance(const float * w, int n, double * sum) {
    *sum = 0.0;
    for (int i = 0; i < n; i++) {
        *sum += (double) w[i];
    }
    if (*sum > 0.0) {
        return w;
    }
    *sum = n;
    return tesseraq_equal;
}

// scale and codes of the salient weights: try some scales around the one that brings the largest weight to the largest code
static void ptq_quantize_salient(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, block_ptq1_61 * GGML_RESTRICT y) {
    double sum;
    w = ptq_importance(w, PTQ_SALIENT, &sum);

    float amax = 0.0f;
    for (int i = 0; i < PTQ_SALIENT; i++) {
        amax = fmaxf(amax, fabsf(x[i]));
    }
    const int middle = e5m3_encode(amax/7.5f);

    uint8_t q[PTQ_SALIENT], other[PTQ_SALIENT];
    double best = ptq_assign(x, w, middle, q);
    y->s = middle;
    for (int code = middle - PTQ_SEARCH_BELOW; code <= middle + PTQ_SEARCH_ABOVE; code++) {
        if (code == middle || code < 0 || code > 255) {
            continue;
        }
        const double err = ptq_assign(x, w, code, other);
        if (err < best) {
            best = err;
            y->s = code;
            memcpy(q, other, sizeof(q));
        }
    }

    for (int j = 0; j < PTQ_SALIENT/2; j++) {
        y->qs[j] = q[j] | q[j + PTQ_SALIENT/2] << 4;
    }
}

// scale and signs of the binary weights: the mean of their magnitudes has the least squared error
static void ptq_quantize_binary(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, block_ptq1_61 * GGML_RESTRICT y) {
    double sum;
    w = ptq_importance(w, PTQ_BINARY, &sum);

    double total = 0.0;
    memset(y->signs, 0, sizeof(y->signs));
    for (int i = 0; i < PTQ_BINARY; i++) {
        total += (double) w[i]*(double) fabsf(x[i]);
        y->signs[i / 8] |= (x[i] >= 0.0f) << i % 8;
    }
    const float mean = (float) (total/sum);
    y->d = e5m3_encode(mean >= 0.0f ? mean : 0.0f); // NaN may have the sign of negative numbers
}

// the order of the columns is as it is
static void ptq_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT y) {
    ptq_quantize_salient(x, w, y);
    ptq_quantize_binary(x + PTQ_SALIENT, w + PTQ_SALIENT, y);
}

TESSERAQ_QUANTIZE(ptq1_61, QK_PTQ, sizeof(block_ptq1_61), ptq_quantize_block)

void dequantize_row_ptq1_61(const void * GGML_RESTRICT vx, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_PTQ == 0);
    const int64_t nb = k / QK_PTQ;

    const block_ptq1_61 * GGML_RESTRICT x = vx;

    for (int64_t i = 0; i < nb; i++, y += QK_PTQ) {
        const float d = e5m3_decode(x[i].d);
        const float s = e5m3_decode(x[i].s)/2;

        for (int j = 0; j < PTQ_SALIENT; j++) {
            y[j] = s*(2*ptq_code(&x[i], j) - 15);
        }
        for (int j = 0; j < PTQ_BINARY; j++) {
            y[PTQ_SALIENT + j] = ptq_sign(&x[i], j) ? d : -d;
        }
    }
}
