#include "tesseraq/tsq/repack.h"

#include <cmath>
#include <cstring>

static inline uint32_t load32(const uint8_t * p) {
    uint32_t x;
    memcpy(&x, p, sizeof(x));
    return x;
}

// the vectors of a row out of its 16 words of 4 codes
static void tsq_repack_codes3(const uint8_t * GGML_RESTRICT codes, uint8_t * GGML_RESTRICT y, int vector) {
    const int words = TESSERAQ_DEPTH/4; // of a group

    uint32_t q[16];
    for (int i = 0; i < 16; i++) {
        const uint32_t low  = load32(codes + 4*(i % 4)) >> 2*(i / 4);
        const uint32_t high = load32(codes + QK_TSQ/4 + 4*(i % 2)) >> (i / 2);
        q[i] = (low & 0x03030303) | (high & 0x01010101) << 2;
    }
    for (int t = 0; t < 2/words; t++) {
        for (int j = 0; j < words; j++) {
            uint32_t p[8];
            for (int i = 0; i < 8; i++) {
                p[i] = q[(8*t + i)*words + j];
            }
            const uint32_t out[3] = {
                p[0] | p[1] << 3 | (p[6] & 0x06060606) << 5,
                p[2] | p[3] << 3 | (p[7] & 0x06060606) << 5,
                p[4] | p[5] << 3 | (p[6] & 0x01010101) << 6 | (p[7] & 0x01010101) << 7,
            };
            for (int v = 0; v < 3; v++) {
                memcpy(y + (3*t + v)*vector + 4*j, &out[v], sizeof(uint32_t));
            }
        }
    }
}

static void tsq_repack(int nbits, int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y) {
    const int header = 2*nrows;
    const int vector = TESSERAQ_DEPTH*nrows;
    const int codes  = nrows*nbits*QK_TSQ/8;

    for (int r = 0; r < nrows; r++) {
        const uint8_t * in = (const uint8_t *) x + r*nb*TSQ_BLOCK_SIZE(nbits);

        for (int64_t i = 0; i < nb; i++, in += TSQ_BLOCK_SIZE(nbits)) {
            uint8_t * pair  = (uint8_t *) y + i/2*2*(header + codes);
            const int heads = i % 2 == 0 && i + 1 == nb ? 1 : 2;

            pair[i % 2*header + r]         = in[0];
            pair[i % 2*header + nrows + r] = in[1];

            uint8_t * out = pair + heads*header + i % 2*codes + TESSERAQ_DEPTH*r;
            if (nbits == 3) {
                tsq_repack_codes3(in + TSQ_CODES, out, vector);
            } else {
                // neighbouring bytes of a plane are already neighbouring columns of several groups
                for (int v = 0; v < nbits*QK_TSQ/8/TESSERAQ_DEPTH; v++) {
                    memcpy(out + v*vector, in + TSQ_CODES + TESSERAQ_DEPTH*v, TESSERAQ_DEPTH);
                }
            }
        }
    }
}

// groups of columns in a block
static const int NGROUP = QK_TSQ/TESSERAQ_DEPTH;

// code of row r and column TESSERAQ_DEPTH*g + j, out of the repacked codes of a block
static int tsq_repacked_code(const uint8_t * codes, int nbits, int nrows, int r, int g, int j) {
    const uint8_t * q = codes + TESSERAQ_DEPTH*r + j;
    const int vector = TESSERAQ_DEPTH*nrows;

    if (nbits == 2) {
        const int n = NGROUP/4;
        return q[g % n*vector] >> 2*(g / n) & 3;
    }
    if (nbits == 4) {
        const int n = NGROUP/2;
        return q[g % n*vector] >> 4*(g / n) & 15;
    }
    q += g / 8*3*vector;
    g %= 8;
    if (g < 6) {
        return q[g / 2*vector] >> 3*(g % 2) & 7;
    }
    return (q[(g - 6)*vector] >> 6) << 1 | (q[2*vector] >> g & 1);
}

static void tsq_gemm_generic(int nbits, int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows) {
    const int nb     = n / QK_TSQ;
    const int header = 2*nrows;
    const int codes  = nrows*nbits*QK_TSQ/8;

    for (int c = 0; c < w; c++) {
        for (int r = 0; r < nrows; r++) {
            float sumf = 0.0f;

            for (int i = 0; i < nb; i++) {
                const uint8_t * pair  = (const uint8_t *) vx + (size_t) (i/2)*2*(header + codes);
                const uint8_t * dz    = pair + i % 2*header;
                const uint8_t * q     = pair + (i % 2 == 0 && i + 1 == nb ? 1 : 2)*header + i % 2*codes;
                const uint8_t * panel = (const uint8_t *) vy + (size_t) i*w*Q8_TSQ_BLOCK_SIZE;
                const int8_t  * a     = (const int8_t *) panel + 8*w + TESSERAQ_DEPTH*c;

                float da;
                memcpy(&da, panel + 4*c, sizeof(da));

                // sum((q - z)*a) in steps of z
                int sumi = 0;
                for (int g = 0; g < NGROUP; g++) {
                    for (int j = 0; j < TESSERAQ_DEPTH; j++) {
                        sumi += ((tsq_repacked_code(q, nbits, nrows, r, g, j) << (7 - nbits)) - (dz[nrows + r] - 64))*a[g*TESSERAQ_DEPTH*w + j];
                    }
                }
                sumf = fmaf((float) sumi*(e5m3_decode(dz[r])/(1 << (7 - nbits))), da, sumf);
            }
            s[c][r] = sumf;
        }
    }
}

#define TSQ_FUNCTIONS(nbits)                                                                                                  \
    void tsq##nbits##_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y) {                     \
        tsq_repack(nbits, nrows, nb, x, y);                                                                                     \
    }                                                                                                                           \
    void ggml_gemm_tsq##nbits##_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows) { \
        tsq_gemm_generic(nbits, n, s, vx, vy, w, nrows);                                                                        \
    }

TSQ_FUNCTIONS(2)
TSQ_FUNCTIONS(3)
TSQ_FUNCTIONS(4)

void quantize_panel_q8_tsq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    q8_quantize_panel(x, y, nb, w, c, q8_block_generic);
}
