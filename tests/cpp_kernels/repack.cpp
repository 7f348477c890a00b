// The kernels of repacked TSQ tensors on their own, for whatever instructions this is compiled with: against the generic
// reference, and against the dequantised rows. Every buffer is exactly as large as it must be, for AddressSanitizer.

#include "tesseraq/tsq/repack.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

// what the sources need of ggml
extern "C" void ggml_abort(const char * file, int line, const char *, ...) {
    fprintf(stderr, "%s:%d: assertion failed\n", file, line);
    abort();
}

typedef void (*repack_t)(int nrows, int64_t nb, const void * x, void * y);
typedef void (*gemm_generic_t)(int n, float * const * s, const void * vx, const void * vy, int w, int nrows);
typedef void (*gemm_t)(int n, float * const * s, const void * vx, const void * vy, int w);

// by the bits of a code, from 2 on
static const repack_t       repack[]       = { tsq2_repack, tsq3_repack, tsq4_repack };
static const gemm_generic_t gemm_generic[] = { ggml_gemm_tsq2_generic, ggml_gemm_tsq3_generic, ggml_gemm_tsq4_generic };
#if TESSERAQ_NROWS > 0
static const gemm_t         gemm[]         = { ggml_gemm_tsq2, ggml_gemm_tsq3, ggml_gemm_tsq4 };
#endif

static const int ROWS = TESSERAQ_NROWS > 0 ? TESSERAQ_NROWS : 4;

static std::mt19937 rng(0);

// kinds of blocks and activations
enum { RANDOM, LARGEST, SMALLEST, ZEROS, TIES, NOT_FINITE, KINDS };

static std::vector<uint8_t> make_rows(int nbits, int nb, int kind) {
    std::vector<uint8_t> x(ROWS*nb*TSQ_BLOCK_SIZE(nbits));
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = kind == LARGEST ? 255 : kind == SMALLEST ? 0 : rng();
    }
    return x;
}

static std::vector<float> make_activations(int n, int w, int kind) {
    std::vector<float> a((size_t) n*w);
    std::normal_distribution<float> normal;
    for (float & v : a) {
        v = normal(rng);
        switch (kind) {
            case LARGEST:    v = v > 0.0f ? 1e4f : -1e4f; break;
            case SMALLEST:   v *= 1e-37f;                 break;
            case ZEROS:      v  = 0.0f;                   break;
            case TIES:       v  = rng() % 4 ? ((int) (rng() % 507) - 253)/2.0f : 127.0f; break; // halfway, where the scale is 1
            case NOT_FINITE: v  = rng() % 64 == 0 ? (rng() % 2 ? INFINITY : NAN) : v; break;
        }
    }
    return a;
}

static bool check(int nbits, int nb, int w, int kind) {
    const int n = nb*QK_TSQ;

    const std::vector<uint8_t> rows = make_rows(nbits, nb, kind);
    const std::vector<float>   a    = make_activations(n, w, kind);

    std::vector<uint8_t> x(rows.size());
    repack[nbits - 2](ROWS, nb, rows.data(), x.data());

    std::vector<uint8_t> panel(nb*w*Q8_TSQ_BLOCK_SIZE, 0xAA);
    for (int c = 0; c < w; c++) {
        quantize_panel_q8_tsq_generic(a.data() + (size_t) c*n, panel.data(), nb, w, c);
    }

    std::vector<float> out(w*ROWS), ref(w*ROWS);
    float * r[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        r[c] = ref.data() + c*ROWS;
    }
    gemm_generic[nbits - 2](n, r, x.data(), panel.data(), w, ROWS);

#if TESSERAQ_NROWS > 0
    // quantised in two pieces, as two threads do it
    std::vector<uint8_t> pieces(panel.size(), 0x55);
    for (int c = 0; c < w; c++) {
        const int half = nb/2;
        quantize_panel_q8_tsq(a.data() + (size_t) c*n, pieces.data(), half, w, c);
        quantize_panel_q8_tsq(a.data() + (size_t) c*n + half*QK_TSQ, pieces.data() + half*w*Q8_TSQ_BLOCK_SIZE, nb - half, w, c);
    }
    if (memcmp(pieces.data(), panel.data(), panel.size()) != 0) {
        return false;
    }
    float * s[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        s[c] = out.data() + c*ROWS;
    }
    gemm[nbits - 2](n, s, x.data(), pieces.data(), w);
    if (kind == NOT_FINITE) {
        return true; // nothing was read or written that should not be
    }
#else
    if (kind == NOT_FINITE) {
        return true;
    }
    out = ref;
#endif

    for (int c = 0; c < w; c++) {
        for (int i = 0; i < ROWS; i++) {
            double sum = 0.0, magnitude = 0.0;
            for (int b = 0; b < nb; b++) {
                const uint8_t * block = rows.data() + (i*nb + b)*TSQ_BLOCK_SIZE(nbits);
                const uint8_t * p     = panel.data() + b*w*Q8_TSQ_BLOCK_SIZE;
                uint8_t q[QK_TSQ];
                float   da;
                tsq_unpack(block + TSQ_CODES, nbits, q);
                memcpy(&da, p + 4*c, sizeof(da));
                for (int j = 0; j < QK_TSQ; j++) {
                    const int8_t qa = (int8_t) p[8*w + TESSERAQ_DEPTH*(j/TESSERAQ_DEPTH*w + c) + j % TESSERAQ_DEPTH];
                    const double v  = (double) e5m3_decode(block[0])*(q[j] - tsq_decode_z(block[1], nbits))*da*qa;
                    sum       += v;
                    magnitude += fabs(v);
                }
            }
            // tiny products are denormal floats
            const double tolerance = 4e-7*magnitude + 1e-42;
            if (!(fabs(out[c*ROWS + i] - sum) <= tolerance) || !(fabs(ref[c*ROWS + i] - sum) <= tolerance)) {
                fprintf(stderr, "column %d, row %d: %g, generic %g, should be %g\n", c, i, out[c*ROWS + i], ref[c*ROWS + i], sum);
                return false;
            }
        }
    }
    return true;
}

int main() {
    for (int nbits = 2; nbits <= 4; nbits++) {
        for (int nb : { 1, 2, 3, 10 }) {
            for (int w = 1; w <= TESSERAQ_NCOLS; w++) {
                for (int kind = 0; kind < KINDS; kind++) {
                    if (!check(nbits, nb, w, kind)) {
                        fprintf(stderr, "tsq%d, %d blocks, %d columns, kind %d: FAILED\n", nbits, nb, w, kind);
                        return 1;
                    }
                }
            }
        }
    }
    printf("%d rows: all ok\n", ROWS);
    return 0;
}
