#include "tesseraq/bcq/bcq.h"
#include "tesseraq/bcq/codebooks.h"
#include "tesseraq/common/quantize.h"

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
    const float d  = e5m3_decode(d_code);
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

// Try some scales around that of the paper, which brings the largest weight to the largest codeword.
static void bcq_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT vy) {
    block_bcq4 * y = vy;

    bcq_init();

    float amax = 0.0f;
    float sumw = 0.0f;
    for (int j = 0; j < QK_BCQ; j++) {
        amax  = fmaxf(amax, fabsf(x[j]));
        sumw += w[j];
    }
    if (!(sumw > 0.0f)) {
        w = tesseraq_equal; // where nothing matters, everything does alike: zeros stay zeros
    }
    const int middle = e5m3_encode(amax/BCQ_MAX_CODE);

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

TESSERAQ_QUANTIZE(bcq4, QK_BCQ, sizeof(block_bcq4), bcq_quantize_block)

void dequantize_row_bcq4(const void * GGML_RESTRICT vx, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    const block_bcq4 * GGML_RESTRICT x = vx;

    for (int64_t i = 0; i < nb; i++) {
        const float d = e5m3_decode(x[i].d);

        int8_t c[QK_BCQ];
        bcq_decode(&x[i], c);

        for (int j = 0; j < QK_BCQ; j++) {
            y[i*QK_BCQ + j] = d*c[j];
        }
    }
}
