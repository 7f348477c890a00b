// The PTQ1_61 sources on their own, for whatever instructions this is compiled with, under sanitizers: every buffer is exactly as
// large as it must be, inputs are random, extreme and not finite. Integers are compared with the generic reference bit for bit, dot
// products with a sum in double.

#include "tesseraq/ptq/cpu.h"
#include "tesseraq/ptq/repack.h"
#include "tesseraq/common/cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

// what the sources need of ggml
extern "C" {
void ggml_abort(const char * file, int line, const char *, ...) {
    fprintf(stderr, "%s:%d: assertion failed\n", file, line);
    abort();
}
float ggml_table_f32_f16[1 << 16];
}

#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, "%s: ", #condition); fprintf(stderr, __VA_ARGS__); fprintf(stderr, "\n"); return false; } } while (0)

static const int ROWS = TESSERAQ_NROWS > 0 ? TESSERAQ_NROWS : 4;

static std::mt19937 rng(0);

typedef std::vector<uint8_t> bytes;
typedef std::vector<block_ptq1_61> blocks;

// kinds of numbers; ties: the scale is 1, and most numbers are halfway between two integers
enum { NORMAL, LARGE, SMALL, DENORMAL, ZEROS, TIES, ONE_SIGN, OUTLIERS, NANS, INFINITE, VALUES };

static std::vector<float> make_floats(size_t n, int kind) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (size_t i = 0; i < n; i++) {
        float & v = x[i];
        v = normal(rng);
        switch (kind) {
            case LARGE:    v *= 1e30f;                                                     break;
            case SMALL:    v *= 1e-30f;                                                    break;
            case DENORMAL: v *= 1e-38f;                                                    break;
            case ZEROS:    v  = 0.0f;                                                      break;
            case TIES:     v  = rng() % 4 ? ((int) (rng() % 507) - 253)/2.0f : 127.0f;     break;
            case ONE_SIGN: v  = -std::fabs(v);                                             break;
            case OUTLIERS: v *= i % QK_PTQ < PTQ_SALIENT ? 100.0f : 1.0f;                  break;
            case NANS:     v  = rng() % 8 ? v : NAN;                                       break;
            case INFINITE: v  = rng() % 8 ? v : rng() % 2 ? INFINITY : -INFINITY;          break;
        }
    }
    return x;
}

// kinds of blocks: any bytes, and all bits 0 or 1
enum { RANDOM, SMALLEST, LARGEST, BLOCKS };

static blocks make_blocks(int nb, int kind) {
    blocks x(nb);
    for (size_t i = 0; i < nb*sizeof(block_ptq1_61); i++) {
        ((uint8_t *) x.data())[i] = kind == RANDOM ? rng() : kind == LARGEST ? 0xFF : 0;
    }
    return x;
}

// blocks of activations in their own order, any numbers of 8 bits
struct activations {
    std::vector<float>  d; // two for every block
    std::vector<int8_t> q;

    activations(int nb, bool extreme) : d(2*nb), q(nb*QK_PTQ) {
        for (float & v : d) {
            v = (rng() % 1000 + 1)/1000.0f;
        }
        const int8_t all = rng() % 2 ? 127 : -128;
        for (int8_t & v : q) {
            v = extreme ? all : (int8_t) rng();
        }
    }

    int32_t lack(int i, int kind) const {
        int s = 0;
        for (int j = kind ? PTQ_SALIENT : 0; j < (kind ? QK_PTQ : PTQ_SALIENT); j++) {
            s += q[i*QK_PTQ + j];
        }
        return s*(kind ? PTQ_LACK_BINARY : PTQ_LACK_SALIENT);
    }

    // as rows have them
    bytes row() const {
        const int nb = (int) d.size()/2;
        bytes y(nb*Q8_PTQ_BLOCK_SIZE);
        for (int i = 0; i < nb; i++) {
            const int m = std::min(Q8_GROUP, nb - i/Q8_GROUP*Q8_GROUP), b = i % Q8_GROUP;
            uint8_t * group = y.data() + i/Q8_GROUP*Q8_GROUP*Q8_PTQ_BLOCK_SIZE;
            for (int kind = 0; kind < 2; kind++) {
                const int32_t s = lack(i, kind);
                memcpy(group + 4*(kind*m + b),       &d[2*i + kind], 4);
                memcpy(group + 4*((2 + kind)*m + b), &s,             4);
            }
            memcpy(group + 16*m + b*QK_PTQ,              &q[i*QK_PTQ + PTQ_SALIENT], PTQ_BINARY);
            memcpy(group + 16*m + b*QK_PTQ + PTQ_BINARY, &q[i*QK_PTQ],               PTQ_SALIENT);
        }
        return y;
    }

    // as column c of a panel of w columns
    void column(bytes & y, int w, int c) const {
        for (size_t i = 0; i < d.size()/2; i++) {
            uint8_t * block = y.data() + i*w*Q8_PTQ_BLOCK_SIZE;
            for (int kind = 0; kind < 2; kind++) {
                const int32_t s = lack((int) i, kind);
                memcpy(block + 4*(kind*w + c),       &d[2*i + kind], 4);
                memcpy(block + 4*((2 + kind)*w + c), &s,             4);
            }
            for (int at = 0; at < QK_PTQ; at++) {
                block[16*w + TESSERAQ_DEPTH*(at/TESSERAQ_DEPTH*w + c) + at % TESSERAQ_DEPTH] = (uint8_t) q[i*QK_PTQ + ptq_column(at/4, at % 4)];
            }
        }
    }
};

static bool is_near(float s, const block_ptq1_61 * x, const activations & a) {
    double sum = 0.0, magnitude = 0.0;
    for (size_t i = 0; i < a.d.size()/2; i++) {
        float w[QK_PTQ];
        dequantize_row_ptq1_61(&x[i], w, QK_PTQ);
        for (int j = 0; j < QK_PTQ; j++) {
            const bool   binary = j >= PTQ_SALIENT;
            const double scale  = binary ? e5m3_decode(x[i].d) : 7.5*e5m3_decode(x[i].s);
            const double act    = (double) a.d[2*i + binary]*a.q[i*QK_PTQ + j];
            sum       += w[j]*act;
            // kernels take less than nothing out of the products again
            magnitude += 2*scale*std::fabs(act);
        }
    }
    return std::fabs(s - sum) <= 1e-6*magnitude + 1e-37;
}

static bool check_vec_dot(int nb, int kind) {
    const blocks x = make_blocks(nb, kind);
    const activations a(nb, kind != RANDOM);
    const bytes y = a.row();

    float simd, generic;
    ggml_vec_dot_ptq1_61_q8_ptq         (nb*QK_PTQ, &simd,    0, x.data(), 0, y.data(), 0, 1);
    ggml_vec_dot_ptq1_61_q8_ptq_generic(nb*QK_PTQ, &generic, 0, x.data(), 0, y.data(), 0, 1);
    CHECK(is_near(simd, x.data(), a) && is_near(generic, x.data(), a), "%d blocks of kind %d: %g, generic %g", nb, kind, simd, generic);
    return true;
}

// all scales
static bool check_to_fp32() {
    const int nb = 256;
    blocks x = make_blocks(nb, RANDOM);
    for (int i = 0; i < nb; i++) {
        x[i].d = i;
        x[i].s = 255 - i;
    }
    std::vector<float> a(nb*QK_PTQ), b(nb*QK_PTQ);
    ggml_cpu_ptq1_61_to_fp32(x.data(), a.data(), nb*QK_PTQ);
    dequantize_row_ptq1_61  (x.data(), b.data(), nb*QK_PTQ);
    CHECK(memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0, "dequantised weights differ");
    return true;
}

static bool check_activations(int nb, int kind) {
    const std::vector<float> x = make_floats(nb*QK_PTQ, kind);
    bytes a(nb*Q8_PTQ_BLOCK_SIZE, 0xAA), b(a.size(), 0x55);
    quantize_row_q8_ptq         (x.data(), a.data(), nb*QK_PTQ);
    quantize_row_q8_ptq_generic(x.data(), b.data(), nb*QK_PTQ);
    CHECK(a == b, "activations of kind %d, %d blocks", kind, nb);

    for (int w : { 1, 3 }) {
        bytes p(nb*w*Q8_PTQ_BLOCK_SIZE, 0), r(p.size(), 0);
        for (int c = 0; c < w; c++) {
            quantize_panel_q8_ptq_generic(x.data(), r.data(), nb, w, c);
#if TESSERAQ_NROWS > 0
            // in two pieces, as two threads do it
            const int half = nb/2;
            quantize_panel_q8_ptq(x.data(), p.data(), half, w, c);
            quantize_panel_q8_ptq(x.data() + half*QK_PTQ, p.data() + half*w*Q8_PTQ_BLOCK_SIZE, nb - half, w, c);
#else
            p = r;
#endif
        }
        CHECK(p == r, "panel of kind %d, %d blocks", kind, nb);
    }
    return true;
}

static bool check_gemm(int nb, int w, int kind) {
    const blocks rows = make_blocks(ROWS*nb, kind);
    bytes x(rows.size()*sizeof(block_ptq1_61), 0x77);
    ptq1_61_repack(ROWS, nb, rows.data(), x.data());

    bytes panel(nb*w*Q8_PTQ_BLOCK_SIZE);
    std::vector<activations> columns;
    std::vector<float> out(w*ROWS), ref(w*ROWS);
    float * s[TESSERAQ_NCOLS], * r[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        columns.emplace_back(nb, kind != RANDOM);
        columns.back().column(panel, w, c);
        s[c] = out.data() + c*ROWS;
        r[c] = ref.data() + c*ROWS;
    }
    ggml_gemm_ptq1_61_generic(nb*QK_PTQ, r, x.data(), panel.data(), w, ROWS);
#if TESSERAQ_NROWS > 0
    ggml_gemm_ptq1_61(nb*QK_PTQ, s, x.data(), panel.data(), w);
#else
    out = ref;
#endif
    for (int c = 0; c < w; c++) {
        for (int i = 0; i < ROWS; i++) {
            CHECK(is_near(s[c][i], &rows[i*nb], columns[c]) && is_near(r[c][i], &rows[i*nb], columns[c]),
                  "%d blocks, column %d of %d, row %d: %g, generic %g", nb, c, w, i, s[c][i], r[c][i]);
        }
    }
    return true;
}

// whatever the weights and their importance are, there is a block of finite weights for them
static bool check_quantize(int nb, int kind) {
    const std::vector<float> x = make_floats(nb*QK_PTQ, kind);
    std::vector<float> w = make_floats(nb*QK_PTQ, NORMAL), y(nb*QK_PTQ);
    for (size_t i = 0; i < w.size(); i++) {
        w[i] = i < QK_PTQ && rng() % 2 ? 0.0f : std::fabs(w[i]);
    }
    for (const float * imatrix : { (const float *) nullptr, (const float *) w.data() }) {
        blocks q(nb);
        CHECK(quantize_ptq1_61(x.data(), q.data(), 1, nb*QK_PTQ, imatrix) == nb*sizeof(block_ptq1_61), "size");
        dequantize_row_ptq1_61(q.data(), y.data(), nb*QK_PTQ);
        for (float v : y) {
            CHECK(std::isfinite(v) && (kind != ZEROS || (v > 0.0f && v < 1e-7f)), "weights of kind %d, %d blocks: %g", kind, nb, v);
        }
    }
    return true;
}

int main() {
    bool ok = check_to_fp32();
    for (int nb = 1; ok && nb <= 2*Q8_GROUP + 3; nb++) {
        for (int kind = 0; ok && kind < BLOCKS; kind++) {
            ok = check_vec_dot(nb, kind);
        }
    }
    for (int nb : { 1, 2, 5, 16, 35 }) {
        for (int kind = 0; ok && kind < VALUES; kind++) {
            ok = check_activations(nb, kind) && (nb > 5 || check_quantize(nb, kind));
        }
    }
    for (int nb : { 1, 2, 3, 10 }) {
        for (int w = 1; ok && w <= TESSERAQ_NCOLS; w++) {
            for (int kind = 0; ok && kind < BLOCKS; kind++) {
                ok = check_gemm(nb, w, kind);
            }
        }
    }
    if (!ok) {
        return 1;
    }
    printf("%d rows: all ok\n", ROWS);
    return 0;
}
