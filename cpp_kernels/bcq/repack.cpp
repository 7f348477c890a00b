#include "tesseraq/bcq/repack.h"
#include "tesseraq/bcq/cpu.h"

#include <cmath>
#include <cstring>

// of BCQ4: column of a block that byte j of vector v has in its low bits (half 0) or in its high ones (half 1)
static int bcq4_column(int v, int half, int j) {
    return 2*BCQ_DEPTH*v + BCQ_DEPTH*half + j;
}

void bcq4_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y) {
    for (int r = 0; r < nrows; r++) {
        const block_bcq4 * in = (const block_bcq4 *) x + r*nb;

        for (int64_t i = 0; i < nb; i++) {
            uint8_t * out = (uint8_t *) y + i*nrows*sizeof(block_bcq4);

            memcpy(out + 4*r, &in[i], 4);
            for (int v = 0; v < 32/BCQ_DEPTH; v++) {
                for (int j = 0; j < BCQ_DEPTH; j++) {
                    out[4*nrows + (v*nrows + r)*BCQ_DEPTH + j] =
                        bcq4_index(&in[i], bcq4_column(v, 0, j)) | bcq4_index(&in[i], bcq4_column(v, 1, j)) << 4;
                }
            }
        }
    }
}

void ggml_gemm_bcq4_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows) {
    const int nb = n / QK_BCQ;

    for (int c = 0; c < w; c++) {
        for (int r = 0; r < nrows; r++) {
            float sumf = 0.0f;

            for (int i = 0; i < nb; i++) {
                const uint8_t * block = (const uint8_t *) vx + (size_t) i*nrows*sizeof(block_bcq4);
                const uint8_t * panel = (const uint8_t *) vy + (size_t) i*w*Q8_TSQ_BLOCK_SIZE;
                const int8_t  * a     = (const int8_t *) panel + 8*w + TESSERAQ_DEPTH*c;

                uint32_t head;
                float    da;
                memcpy(&head, block + 4*r, sizeof(head));
                memcpy(&da,   panel + 4*c, sizeof(da));

                int sumi = 0;
                for (int v = 0; v < 32/BCQ_DEPTH; v++) {
                    for (int j = 0; j < BCQ_DEPTH; j++) {
                        const uint8_t q = block[4*nrows + (v*nrows + r)*BCQ_DEPTH + j];
                        for (int half = 0; half < 2; half++) {
                            const int col = bcq4_column(v, half, j);
                            const int8_t code = bcq4_tables.codeword[head >> (8 + 3*(col/BCQ4_GROUP)) & 7][q >> 4*half & 15];
                            sumi += code*a[col/TESSERAQ_DEPTH*TESSERAQ_DEPTH*w + col % TESSERAQ_DEPTH];
                        }
                    }
                }
                sumf = fmaf((float) sumi*e5m3_decode((uint8_t) head), da, sumf);
            }
            s[c][r] = sumf;
        }
    }
}

void bcq2_repack(int nrows, int64_t nb, const void * GGML_RESTRICT x, void * GGML_RESTRICT y) {
    for (int r = 0; r < nrows; r++) {
        const block_bcq2 * in = (const block_bcq2 *) x + r*nb;

        for (int64_t i = 0; i < nb; i++) {
            uint8_t * out = (uint8_t *) y + i*nrows*sizeof(block_bcq2);

            out[r]         = in[i].d;
            out[nrows + r] = in[i].sel;
            for (int v = 0; v < 16/BCQ_DEPTH; v++) {
                memcpy(out + 2*nrows + (v*nrows + r)*BCQ_DEPTH, in[i].qs + v*BCQ_DEPTH, BCQ_DEPTH);
            }
        }
    }
}

void ggml_gemm_bcq2_generic(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w, int nrows) {
    const int nb = n / QK_BCQ;

    for (int c = 0; c < w; c++) {
        for (int r = 0; r < nrows; r++) {
            float sumf = 0.0f;

            for (int i = 0; i < nb; i++) {
                const uint8_t * block = (const uint8_t *) vx + (size_t) i*nrows*sizeof(block_bcq2);
                const uint8_t * panel = (const uint8_t *) vy + (size_t) i*w*Q8_TSQ_BLOCK_SIZE;
                const int8_t  * a     = (const int8_t *) panel + 8*w + TESSERAQ_DEPTH*c;

                float da;
                memcpy(&da, panel + 4*c, sizeof(da));

                int sumi = 0;
                for (int col = 0; col < QK_BCQ; col++) {
                    const int     k = col/16;
                    const uint8_t q = block[2*nrows + (col % 16/BCQ_DEPTH*nrows + r)*BCQ_DEPTH + col % BCQ_DEPTH] >> 2*k & 3;
                    sumi += bcq2_tables.codeword[block[nrows + r] >> 2*k & 3][q]*a[col/TESSERAQ_DEPTH*TESSERAQ_DEPTH*w + col % TESSERAQ_DEPTH];
                }
                sumf = fmaf((float) sumi*e5m3_decode(block[r]), da, sumf);
            }
            s[c][r] = sumf;
        }
    }
}

#if TESSERAQ_NROWS > 0 && BCQ4_NROWS == 0
// nobody asks for it, but the list of types names it
void ggml_gemm_bcq4(int n, float * const * s, const void * GGML_RESTRICT vx, const void * GGML_RESTRICT vy, int w) {
    ggml_gemm_bcq4_generic(n, s, vx, vy, w, TESSERAQ_NROWS);
}
#endif

void quantize_panel_a4_bcq_generic(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t nb, int w, int c) {
    q8_quantize_panel(x, y, nb, w, c, bcq_encode_generic);
}
