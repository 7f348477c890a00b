#include "tesseraq/ptq/repack.h"
#include "tesseraq/ptq/cpu.h"

#include <cmath>
#include <cstring>

void ptq1_61_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y) {
    for (int r = 0; r < nrows; r++) {
        const block_ptq1_61 * in = (const block_ptq1_61 *) x + r*nb;

        for (int64_t i = 0; i < nb; i++) {
            uint8_t * out   = (uint8_t *) y + i*nrows*sizeof(block_ptq1_61);
            uint8_t * last  = out  + 2*nrows;
            uint8_t * qs    = last + nrows;
            uint8_t * signs = qs   + 3*4*nrows;

            out[r]         = in[i].d;
            out[nrows + r] = in[i].s;
            for (int v = 0; v < 3; v++) {
                memcpy(qs    + 4*(v*nrows + r), in[i].qs    + 4*v, 4);
                memcpy(signs + 4*(v*nrows + r), in[i].signs + 4*v, 4);
            }
            // two rows share a byte
            for (int u = 0; u < 2; u++) {
                const int at    = u*nrows + r;
                const int shift = at % 2*4;
                last[at/2] = (uint8_t) ((last[at/2] & 0xF0 >> shift) | (in[i].signs[12] >> 4*u & 15) << shift);
            }
        }
    }
}

// of 4 columns of a unit and row r of a repacked block: 8 times the code, or 64 times the bit
static int ptq_repacked(const uint8_t * block, int nrows, int r, int unit, int j) {
    const uint8_t * last  = block + 2*nrows;
    const uint8_t * qs    = last  + nrows;
    const uint8_t * signs = qs    + 3*4*nrows;

    const int u = unit - PTQ_SALIENT_UNITS;
    if (u < 0) {
        return 8*(qs[4*(unit % 3*nrows + r) + j] >> 4*(unit / 3) & 15);
    }
    if (u < 24) {
        return 64*(signs[4*(u / 8*nrows + r) + j] >> u % 8 & 1);
    }
    const int at = (u - 24)*nrows + r;
    return 64*(last[at/2] >> (at % 2*4 + j) & 1);
}

void ggml_gemm_ptq1_61_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows) {
    const int nb = n / QK_PTQ;

    for (int c = 0; c < w; c++) {
        for (int r = 0; r < nrows; r++) {
            float sumf = 0.0f;

            for (int i = 0; i < nb; i++) {
                const uint8_t * block = (const uint8_t *) vx + (size_t) i*nrows*sizeof(block_ptq1_61);
                const uint8_t * panel = (const uint8_t *) vy + (size_t) i*w*Q8_PTQ_BLOCK_SIZE;
                const int8_t  * a     = (const int8_t *) panel + 16*w + TESSERAQ_DEPTH*c;

                float   d[2];
                int32_t sum[2];
                for (int kind = 0; kind < 2; kind++) {
                    memcpy(&d[kind],   panel + 4*(kind*w + c),       sizeof(float));
                    memcpy(&sum[kind], panel + 4*((2 + kind)*w + c), sizeof(int32_t));
                }
                for (int unit = 0; unit < PTQ_UNITS; unit++) {
                    for (int j = 0; j < 4; j++) {
                        const int at = 4*unit + j;
                        sum[unit >= PTQ_SALIENT_UNITS] += ptq_repacked(block, nrows, r, unit, j)*a[at/TESSERAQ_DEPTH*TESSERAQ_DEPTH*w + at % TESSERAQ_DEPTH];
                    }
                }
                sumf = fmaf((float) sum[0]*(e5m3_decode(block[nrows + r])*PTQ_UNIT_SALIENT), d[0], sumf);
                sumf = fmaf((float) sum[1]*(e5m3_decode(block[r])        *PTQ_UNIT_BINARY),  d[1], sumf);
            }
            s[c][r] = sumf;
        }
    }
}

void quantize_panel_q8_ptq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    uint8_t * out = (uint8_t *) y;

    for (int64_t i = 0; i < nb; i++, x += QK_PTQ, out += w*Q8_PTQ_BLOCK_SIZE) {
        int8_t  q[QK_PTQ];
        float   d[2];
        int32_t s[2];
        ptq_round_generic(x, q, d, s);

        for (int kind = 0; kind < 2; kind++) {
            memcpy(out + 4*(kind*w + c),       &d[kind], sizeof(float));
            memcpy(out + 4*((2 + kind)*w + c), &s[kind], sizeof(int32_t));
        }
        for (int at = 0; at < QK_PTQ; at++) {
            out[16*w + TESSERAQ_DEPTH*(at/TESSERAQ_DEPTH*w + c) + at % TESSERAQ_DEPTH] = (uint8_t) q[ptq_column(at/4, at % 4)];
        }
    }
}
