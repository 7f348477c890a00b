#include "tesseraq/bcq/bcq.h"
#include "tesseraq/bcq/bcq2-codebooks.h"
#include "tesseraq/bcq/bcq4-codebooks.h"
#include "tesseraq/common/quantize.h"

#include "ggml-threading.h"

#include <math.h>

#define BCQ4_SEARCH_BELOW 5 // E5M3 codes tried below the one that brings the largest weight to the largest codeword
#define BCQ4_SEARCH_ABOVE 2 // and above it

#define BCQ2_SEARCH_BELOW 8
#define BCQ2_SEARCH_ABOVE 4

static const int8_t bcq4_universal[BCQ4_CODEBOOKS][BCQ4_LEVELS] = { BCQ4_UNIVERSAL_CODEBOOKS };
static const int8_t bcq2_universal[BCQ2_CODEBOOKS][BCQ2_LEVELS] = { BCQ2_UNIVERSAL_CODEBOOKS };

// what dequantizing needs is there from the start
struct bcq4_tables bcq4_tables = { .codeword = { BCQ4_UNIVERSAL_CODEBOOKS } };
struct bcq2_tables bcq2_tables = { .codeword = { BCQ2_UNIVERSAL_CODEBOOKS } };

static void bcq4_fill(const int8_t * codebooks) {
    for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
        const int8_t * c = codebooks + b*BCQ4_LEVELS;

        for (int i = 0; i < BCQ4_LEVELS; i++) {
            bcq4_tables.codeword [b][i] = c[i];
            bcq4_tables.codeword4[b][i] = 4*c[i];
            bcq4_tables.shifted  [b][i] = c[i] + BCQ_OFFSET;
            // u is nearest to the upper one from halfway on
            bcq4_tables.border4  [b][i] = i + 1 < BCQ4_LEVELS ? 2*(c[i] + c[i + 1]) - 1 : 127;
        }
        for (int h = -64; h < 64; h++) {
            int i = 0;
            while (i + 1 < BCQ4_LEVELS && h >= c[i] + c[i + 1]) {
                i++;
            }
            bcq4_tables.index   [b][h & 127] = i;
            bcq4_tables.nearest4[b][h & 127] = 4*c[i];
        }
    }
}

static void bcq2_fill(const int8_t * codebooks) {
    for (int b = 0; b < BCQ2_CODEBOOKS; b++) {
        for (int i = 0; i < BCQ2_LEVELS; i++) {
            bcq2_tables.codeword[b][i] = codebooks[b*BCQ2_LEVELS + i];
            bcq2_tables.shifted [b][i] = codebooks[b*BCQ2_LEVELS + i] + BCQ_OFFSET;
        }
    }
}

// the codebooks of a layout
struct bcq_set {
    int            count, levels;
    const int8_t * universal;
    const int8_t * in_use;
    void           (*fill)(const int8_t * codebooks); // the caller is in the critical section
    bool           ready;
    int            users;
};

#define BCQ_SET(LAYOUT, layout, count, levels, key) \
    { count, levels, layout##_universal[0], layout##_tables.codeword[0], layout##_fill, false, 0 },

static struct bcq_set bcq_sets[BCQ_LAYOUTS] = { TESSERAQ_CODEBOOKS(BCQ_SET) };

static void bcq_use(struct bcq_set * set, const int8_t * codebooks) {
    set->fill(codebooks);
    set->ready = true;
}

void bcq_init(void) {
    ggml_critical_section_start();
    for (int i = 0; i < BCQ_LAYOUTS; i++) {
        if (!bcq_sets[i].ready) {
            bcq_use(&bcq_sets[i], bcq_sets[i].universal);
        }
    }
    ggml_critical_section_end();
}

bool bcq_acquire(enum bcq_layout layout, const int8_t * codebooks) {
    struct bcq_set * set = &bcq_sets[layout];

    const int8_t * c = codebooks ? codebooks : set->universal;
    const int      n = set->count*set->levels;
    for (int i = 0; i < n; i++) {
        if (c[i] < -BCQ_MAX_CODE || c[i] > BCQ_MAX_CODE || (i % set->levels != 0 && c[i] < c[i - 1])) {
            return false;
        }
    }

    ggml_critical_section_start();
    const bool same = set->ready && memcmp(set->in_use, c, n) == 0;
    const bool ok   = same || set->users == 0;
    if (ok) {
        if (!same) {
            bcq_use(set, c);
        }
        set->users++;
    }
    ggml_critical_section_end();
    return ok;
}

void bcq_release(enum bcq_layout layout) {
    struct bcq_set * set = &bcq_sets[layout];

    ggml_critical_section_start();
    if (--set->users == 0) {
        bcq_use(set, set->universal);
    }
    ggml_critical_section_end();
}

const int8_t * bcq_codebooks(enum bcq_layout layout) {
    return bcq_sets[layout].in_use;
}

// ---- BCQ4 ------------------------------------------------------------------------------------------------------------------------

// The best codebooks and codewords of a block for a scale. Returns the weighted squared error.
static float bcq4_assign(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, uint8_t d_code, block_bcq4 * GGML_RESTRICT y) {
    const float d  = e5m3_decode(d_code);
    const float id = 1.0f/d;

    memset(y, 0, sizeof(*y));
    y->d = d_code;

    uint32_t sel   = 0;
    float    total = 0.0f;
    for (int g = 0; g < QK_BCQ/BCQ4_GROUP; g++) {
        float scaled[BCQ4_GROUP];
        int   half  [BCQ4_GROUP];
        for (int j = 0; j < BCQ4_GROUP; j++) {
            scaled[j] = x[g*BCQ4_GROUP + j]*id;
            const float h = floorf(2.0f*scaled[j]);
            half[j] = (h >= -64.0f && h <= 63.0f ? (int) h : h > 0.0f ? 63 : -64) & 127; // also takes NaN to an end
        }

        int   best_b = 0;
        float best   = -1.0f; // none yet
        for (int b = 0; b < BCQ4_CODEBOOKS; b++) {
            float err = 0.0f;
            for (int j = 0; j < BCQ4_GROUP; j++) {
                const float e = bcq4_tables.codeword[b][bcq4_tables.index[b][half[j]]] - scaled[j];
                err += w[g*BCQ4_GROUP + j]*e*e;
            }
            if (best < 0.0f || err < best) {
                best   = err;
                best_b = b;
            }
        }

        sel   |= (uint32_t) best_b << 3*g;
        total += best;
        for (int j = 0; j < BCQ4_GROUP; j++) {
            const int i = g*BCQ4_GROUP + j;
            y->qs[i % (QK_BCQ/2)] |= bcq4_tables.index[best_b][half[j]] << 4*(i / (QK_BCQ/2));
        }
    }
    y->sel[0] = sel & 0xFF;
    y->sel[1] = sel >> 8 & 0xFF;
    y->sel[2] = sel >> 16;

    return total*d*d;
}

// the weights' importance, and the code of the scale that brings the largest weight to the largest codeword
static const float * bcq_prepare(const float * GGML_RESTRICT x, const float * w, int * middle) {
    bcq_init();

    float amax = 0.0f;
    float sumw = 0.0f;
    for (int j = 0; j < QK_BCQ; j++) {
        amax  = fmaxf(amax, fabsf(x[j]));
        sumw += w[j];
    }
    *middle = e5m3_encode(amax/BCQ_MAX_CODE);
    return sumw > 0.0f ? w : tesseraq_equal; // where nothing matters, everything does alike: zeros stay zeros
}

// Try some scales around that of the paper, which brings the largest weight to the largest codeword.
static void bcq4_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT vy) {
    block_bcq4 * y = vy;

    int middle;
    w = bcq_prepare(x, w, &middle);

    float best = bcq4_assign(x, w, middle, y);
    for (int code = middle - BCQ4_SEARCH_BELOW; code <= middle + BCQ4_SEARCH_ABOVE; code++) {
        if (code == middle || code < 0 || code > 255) {
            continue;
        }
        block_bcq4 other;
        const float err = bcq4_assign(x, w, code, &other);
        if (err < best) {
            best = err;
            *y   = other;
        }
    }
}

TESSERAQ_QUANTIZE(bcq4, QK_BCQ, sizeof(block_bcq4), bcq4_quantize_block)

void dequantize_row_bcq4(const void * GGML_RESTRICT vx, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    const block_bcq4 * GGML_RESTRICT x = vx;

    for (int64_t i = 0; i < nb; i++) {
        const float d = e5m3_decode(x[i].d);

        int8_t c[QK_BCQ];
        bcq4_decode(&x[i], c);

        for (int j = 0; j < QK_BCQ; j++) {
            y[i*QK_BCQ + j] = d*c[j];
        }
    }
}

// ---- BCQ2 ------------------------------------------------------------------------------------------------------------------------

// The best codebooks and codewords of a block for a scale. Returns the weighted squared error.
static float bcq2_assign(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, uint8_t d_code, block_bcq2 * GGML_RESTRICT y) {
    const float d  = e5m3_decode(d_code);
    const float id = 1.0f/d;

    memset(y, 0, sizeof(*y));
    y->d = d_code;

    float total = 0.0f;
    for (int g = 0; g < QK_BCQ/BCQ2_GROUP; g++) {
        float   best = -1.0f; // none yet
        uint8_t best_q[BCQ2_GROUP] = { 0 };
        int     best_b = 0;
        for (int b = 0; b < BCQ2_CODEBOOKS; b++) {
            const int8_t * c = bcq2_tables.codeword[b];

            float   err = 0.0f;
            uint8_t q[BCQ2_GROUP];
            for (int j = 0; j < BCQ2_GROUP; j++) {
                const float v = x[g*BCQ2_GROUP + j]*id;

                int i = 0;
                while (i + 1 < BCQ2_LEVELS && 2.0f*v >= (float) (c[i] + c[i + 1])) { // nearest from halfway on; NaN stays at 0
                    i++;
                }
                const float e = c[i] - v;
                err += w[g*BCQ2_GROUP + j]*e*e;
                q[j] = i;
            }
            if (best < 0.0f || err < best) {
                best   = err;
                best_b = b;
                memcpy(best_q, q, sizeof(q));
            }
        }

        y->sel |= best_b << 2*g;
        total  += best;
        for (int j = 0; j < BCQ2_GROUP; j++) {
            y->qs[j] |= best_q[j] << 2*g;
        }
    }
    return total*d*d;
}

static void bcq2_quantize_block(const float * GGML_RESTRICT x, const float * GGML_RESTRICT w, void * GGML_RESTRICT vy) {
    block_bcq2 * y = vy;

    int middle;
    w = bcq_prepare(x, w, &middle);

    float best = bcq2_assign(x, w, middle, y);
    for (int code = middle - BCQ2_SEARCH_BELOW; code <= middle + BCQ2_SEARCH_ABOVE; code++) {
        if (code == middle || code < 0 || code > 255) {
            continue;
        }
        block_bcq2 other;
        const float err = bcq2_assign(x, w, code, &other);
        if (err < best) {
            best = err;
            *y   = other;
        }
    }
}

TESSERAQ_QUANTIZE(bcq2, QK_BCQ, sizeof(block_bcq2), bcq2_quantize_block)

void dequantize_row_bcq2(const void * GGML_RESTRICT vx, float * GGML_RESTRICT y, int64_t k) {
    assert(k % QK_BCQ == 0);
    const int64_t nb = k / QK_BCQ;

    const block_bcq2 * GGML_RESTRICT x = vx;

    for (int64_t i = 0; i < nb; i++) {
        const float d = e5m3_decode(x[i].d);

        int8_t c[QK_BCQ];
        bcq2_decode(&x[i], c);

        for (int j = 0; j < QK_BCQ; j++) {
            y[i*QK_BCQ + j] = d*c[j];
        }
    }
}
