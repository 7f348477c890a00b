#include "tesseraq/bcq.h"
#include "tesseraq/bcq-codebooks.h"

#include "ggml-threading.h"

#include <math.h>

#define BCQ_SEARCH_BELOW 5 // E5M3 codes tried below the one that brings the largest weight to the largest codeword
#define BCQ_SEARCH_ABOVE 2 // and above it

static const int8_t bcq_universal[BCQ_CODEBOOKS][BCQ_LEVELS] = { BCQ_UNIVERSAL_CODEBOOKS };

struct bcq_tables bcq_tables = { .codeword = { BCQ_UNIVERSAL_CODEBOOKS } }; // what dequantizing needs is there from the start

static bool bcq_ready = false;
static int  bcq_users = 0;

// the caller is in the critical section
static void bcq_fill(const int8_t * codebooks) {
    for (int b = 0; b < BCQ_CODEBOOKS; b++) {
        const int8_t * c = codebooks + b*BCQ_LEVELS;

        for (int i = 0; i < BCQ_LEVELS; i++) {
            bcq_tables.codeword [b][i] = c[i];
            bcq_tables.codeword4[b][i] = 4*c[i];
            bcq_tables.shifted  [b][i] = c[i] + BCQ_OFFSET;
            // u is nearest to the upper one from halfway on
            bcq_tables.border4  [b][i] = i + 1 < BCQ_LEVELS ? 2*(c[i] + c[i + 1]) - 1 : 127;
        }
        for (int h = -64; h < 64; h++) {
            int i = 0;
            while (i + 1 < BCQ_LEVELS && h >= c[i] + c[i + 1]) {
                i++;
            }
            bcq_tables.index   [b][h & 127] = i;
            bcq_tables.nearest4[b][h & 127] = 4*c[i];
        }
    }
    bcq_ready = true;
}

void bcq_init(void) {
    ggml_critical_section_start();
    if (!bcq_ready) {
        bcq_fill(bcq_universal[0]);
    }
    ggml_critical_section_end();
}

bool bcq_acquire(const int8_t * codebooks) {
    const int8_t * c = codebooks ? codebooks : bcq_universal[0];
    for (int i = 0; i < BCQ_CODEBOOKS*BCQ_LEVELS; i++) {
        if (c[i] < -BCQ_MAX_CODE || c[i] > BCQ_MAX_CODE || (i % BCQ_LEVELS != 0 && c[i] < c[i - 1])) {
            return false;
        }
    }

    ggml_critical_section_start();
    const bool same = bcq_ready && memcmp(bcq_tables.codeword, c, sizeof(bcq_tables.codeword)) == 0;
    const bool ok   = same || bcq_users == 0;
    if (ok) {
        if (!same) {
            bcq_fill(c);
        }
        bcq_users++;
    }
    ggml_critical_section_end();
    return ok;
}

void bcq_release(void) {
    ggml_critical_section_start();
    if (--bcq_users == 0) {
        bcq_fill(bcq_universal[0]);
    }
    ggml_critical_section_end();
}

const int8_t * bcq_codebooks(void) {
    return bcq_tables.codeword[0];
}

// The best codebooks and codewords of a block for a scale. Returns the weighted squared error.
static float bcq_assign(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, uint8_t d_code, block_bcq4 * GGML_RESTRICT y) {
    const float d  = tsq_decode_d(d_code);
    const float id = 1.0f/d;

    memset(y, 0, sizeof(*y));
    y->d = d_code;

    uint32_t sel   = 0;
    float    total = 0.0f;
    for (int g = 0; g < QK_BCQ/BCQ_GROUP; g++) {
        float scaled[BCQ_GROUP];
        int   half  [BCQ_GROUP];
        for (int j = 0; j < BCQ_GROUP; j++) {
            scaled[j] = x[g*BCQ_GROUP + j]*id;
            const float h = floorf(2.0f*scaled[j]);
            half[j] = (h >= -64.0f && h <= 63.0f ? (int) h : h > 0.0f ? 63 : -64) & 127; // also takes NaN to an end
        }

        int   best_b = 0;
        float best   = -1.0f; // none yet
        for (int b = 0; b < BCQ_CODEBOOKS; b++) {
            float err = 0.0f;
            for (int j = 0; j < BCQ_GROUP; j++) {
                const float e = bcq_tables.codeword[b][bcq_tables.index[b][half[j]]] - scaled[j];
                err += w[g*BCQ_GROUP + j]*e*e;
            }
            if (best < 0.0f || err < best) {
                best   = err;
                best_b = b;
            }
        }

        sel   |= (uint32_t) best_b << 3*g;
        total += best;
        for (int j = 0; j < BCQ_GROUP; j++) {
            const int i = g*BCQ_GROUP + j;
            y->qs[i % (QK_BCQ/2)] |= bcq_tables.index[best_b][half[j]] << 4*(i / (QK_BCQ/2));
        }
    }
    y->sel[0] = sel & 0xFF;
    y->sel[1] = sel >> 8 & 0xFF;
    y->sel[2] = sel >> 16;

    return total*d*d;
}

static const float bcq_equal[QK_BCQ] = {
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
    1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
};

// Try some scales around that of the paper, which brings the largest weight to the largest codeword.
static void bcq_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, block_bcq4 * GGML_RESTRICT y) {
    float amax = 0.0f;
    float sumw = 0.0f;
    for (int j = 0; j < QK_BCQ; j++) {
        amax  = fmaxf(amax, fabsf(x[j]));
        sumw += w[j];
    }
    if (!(sumw > 0.0f)) {
        w = bcq_equal; // where nothing matters, everything does alike: zeros stay zeros
    }
    const int middle = tsq_encode_d(amax/BCQ_MAX_CODE);

    float best = bcq_assign(x, w, middle, y);
    for (int code = middle - BCQ_SEARCH_BELOW; code <= middle + BCQ_SEARCH_ABOVE; code++) {
        if (code == middle || code < 0 || code > 255) {
            continue;
        }
        block_bcq4 other;
        const float err = bcq_assign(x, w, code, &other);
        if (err < best) {
            best = err;
            *y   = other;
        }
    }
}

void quantize_row_bcq4_ref(const float * GGML_RESTRICT x, block_bcq4 * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    bcq_init();

    for (int64_t i = 0; i < nb; i++) {
        bcq_quantize_block(x + i*QK_BCQ, bcq_equal, y + i);
    }
}

void dequantize_row_bcq4(const block_bcq4 * GGML_RESTRICT x, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    for (int64_t i = 0; i < nb; i++) {
        const float d = tsq_decode_d(x[i].d);

        int8_t c[QK_BCQ];
        bcq_decode(&x[i], c);

        for (int j = 0; j < QK_BCQ; j++) {
            y[i*QK_BCQ + j] = d*c[j];
        }
    }
}

size_t quantize_bcq4(const float * GGML_RESTRICT src, void * GGML_RESTRICT dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    assert(n_per_row % QK_BCQ == 0);
    const int64_t nb = n_per_row / QK_BCQ;

    if (!imatrix) {
        quantize_row_bcq4_ref(src, dst, nrows*n_per_row);
        return nrows*nb*sizeof(block_bcq4);
    }

    bcq_init();

    block_bcq4 * y = dst;

    for (int64_t row = 0; row < nrows; row++) {
        const float * x = src + row*n_per_row;

        float sum_x2 = 0.0f;
        for (int64_t i = 0; i < n_per_row; i++) {
            sum_x2 += x[i]*x[i];
        }
        const float sigma2 = sum_x2/n_per_row;

        for (int64_t i = 0; i < nb; i++) {
            const float * xb = x + i*QK_BCQ;

            float w[QK_BCQ];
            for (int j = 0; j < QK_BCQ; j++) {
                w[j] = imatrix[i*QK_BCQ + j] * sqrtf(sigma2 + xb[j]*xb[j]);
            }
            bcq_quantize_block(xb, w, y++);
        }
    }

    return nrows*nb*sizeof(block_bcq4);
}
