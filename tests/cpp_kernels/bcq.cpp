// The BCQ sources on their own, for whatever instructions this is compiled with, under sanitizers: every buffer is exactly as
// large as it must be, inputs are random, extreme and not finite, codebooks are the universal ones and others. Integers are
// compared with the generic reference bit for bit, dot products with a sum in double.

#include "tesseraq/bcq/cpu.h"
#include "tesseraq/bcq/repack.h"
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
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
}

#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, "%s: ", #condition); fprintf(stderr, __VA_ARGS__); fprintf(stderr, "\n"); return false; } } while (0)

static const int ROWS = BCQ_NROWS > 0 ? BCQ_NROWS : 4;

static std::mt19937 rng(0);

typedef std::vector<uint8_t> bytes;

// kinds of numbers; ties: the scale is 1, and most numbers are halfway between two quarters
enum { NORMAL, LARGE, SMALL, ZEROS, TIES, ONE_SIGN, NANS, INFINITE, VALUES };

static std::vector<float> make_floats(size_t n, int kind) {
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
        switch (kind) {
            case LARGE:    v *= 1e30f;                                                     break;
            case SMALL:    v *= 1e-30f;                                                    break;
            case ZEROS:    v  = 0.0f;                                                      break;
            case TIES:     v  = rng() % 4 ? ((int) (rng() % 497) - 248)/8.0f : 31.0f;      break;
            case ONE_SIGN: v  = -std::fabs(v);                                             break;
            case NANS:     v  = rng() % 8 ? v : NAN;                                       break;
            case INFINITE: v  = rng() % 8 ? v : rng() % 2 ? INFINITY : -INFINITY;          break;
        }
    }
    return x;
}

static std::vector<block_bcq4> make_blocks(int nb, bool extreme) {
    std::vector<block_bcq4> x(nb);
    for (size_t i = 0; i < nb*sizeof(block_bcq4); i++) {
        ((uint8_t *) x.data())[i] = extreme ? 0xFF : rng();
    }
    return x;
}

// blocks of activations, any numbers of 8 bits
struct activations {
    std::vector<float>  d;
    std::vector<int8_t> q;

    activations(int nb, bool extreme) : d(nb), q(nb*QK_BCQ) {
        for (float & v : d) {
            v = (rng() % 1000 + 1)/1000.0f;
        }
        const int8_t all = rng() % 2 ? 127 : -128;
        for (int8_t & v : q) {
            v = extreme ? all : (int8_t) rng();
        }
    }

    int sum(int i) const {
        int s = 0;
        for (int j = 0; j < QK_BCQ; j++) {
            s += q[i*QK_BCQ + j];
        }
        return s;
    }

    // as rows have them
    bytes row() const {
        const int nb = (int) d.size();
        bytes y(nb*Q8_TSQ_BLOCK_SIZE);
        for (int i = 0; i < nb; i++) {
            const int m = std::min(Q8_GROUP, nb - i/Q8_GROUP*Q8_GROUP), b = i % Q8_GROUP;
            uint8_t * group = y.data() + i/Q8_GROUP*Q8_GROUP*Q8_TSQ_BLOCK_SIZE;
            const int16_t s[2] = { (int16_t) -sum(i), (int16_t) sum(i) };
            memcpy(group + 4*b,              &d[i],         4);
            memcpy(group + 4*m + 4*b,        s,             4);
            memcpy(group + 8*m + b*QK_BCQ,   &q[i*QK_BCQ],  QK_BCQ);
        }
        return y;
    }

    // as column c of a panel of w columns
    void column(bytes & y, int w, int c) const {
        for (size_t i = 0; i < d.size(); i++) {
            uint8_t * block = y.data() + i*w*Q8_TSQ_BLOCK_SIZE;
            const int16_t s[2] = { (int16_t) -sum(i), (int16_t) sum(i) };
            memcpy(block + 4*c,       &d[i], 4);
            memcpy(block + 4*w + 4*c, s,     4);
            for (int j = 0; j < QK_BCQ; j++) {
                block[8*w + TESSERAQ_DEPTH*(j/TESSERAQ_DEPTH*w + c) + j % TESSERAQ_DEPTH] = (uint8_t) q[i*QK_BCQ + j];
            }
        }
    }
};

static bool is_near(float s, const block_bcq4 * x, const activations & a) {
    double sum = 0.0, magnitude = 0.0;
    for (size_t i = 0; i < a.d.size(); i++) {
        int8_t c[QK_BCQ];
        bcq_decode(&x[i], c);
        for (int j = 0; j < QK_BCQ; j++) {
            const double v = (double) e5m3_decode(x[i].d)*a.d[i]*c[j]*a.q[i*QK_BCQ + j];
            sum       += v;
            // kernels add codewords with an offset, and take it out again
            magnitude += (double) e5m3_decode(x[i].d)*a.d[i]*(std::abs(c[j]) + BCQ_OFFSET)*std::abs(a.q[i*QK_BCQ + j]);
        }
    }
    return std::fabs(s - sum) <= 1e-6*magnitude + 1e-37;
}

static bool check_vec_dot(int nb, bool extreme) {
    const std::vector<block_bcq4> x = make_blocks(nb, extreme);
    const activations a(nb, extreme);
    const bytes y = a.row();

    float simd, generic;
    ggml_vec_dot_bcq4_q8_tsq         (nb*QK_BCQ, &simd,    0, x.data(), 0, y.data(), 0, 1);
    ggml_vec_dot_bcq4_q8_tsq_generic(nb*QK_BCQ, &generic, 0, x.data(), 0, y.data(), 0, 1);
    CHECK(is_near(simd, x.data(), a) && is_near(generic, x.data(), a), "%d blocks: %g, generic %g", nb, simd, generic);
    return true;
}

// every scale
static bool check_to_fp32() {
    const int nb = 256;
    std::vector<block_bcq4> x = make_blocks(nb, false);
    for (int i = 0; i < nb; i++) {
        x[i].d = i;
    }
    std::vector<float> a(nb*QK_BCQ), b(nb*QK_BCQ);
    ggml_cpu_bcq4_to_fp32(x.data(), a.data(), nb*QK_BCQ);
    dequantize_row_bcq4  (x.data(), b.data(), nb*QK_BCQ);
    CHECK(memcmp(a.data(), b.data(), a.size()*sizeof(float)) == 0, "dequantised weights differ");
    return true;
}

static bool check_activations(int nb, int kind) {
    const std::vector<float> x = make_floats(nb*QK_BCQ, kind);
    bytes a(nb*Q8_TSQ_BLOCK_SIZE, 0xAA), b(a.size(), 0x55);
    quantize_row_a4_bcq         (x.data(), a.data(), nb*QK_BCQ);
    quantize_row_a4_bcq_generic(x.data(), b.data(), nb*QK_BCQ);
    CHECK(a == b, "activations of kind %d, %d blocks", kind, nb);

    for (int w : { 1, 3 }) {
        bytes p(nb*w*Q8_TSQ_BLOCK_SIZE, 0), r(p.size(), 0);
        for (int c = 0; c < w; c++) {
            quantize_panel_a4_bcq_generic(x.data(), r.data(), nb, w, c);
#if BCQ_NROWS > 0
            // in two pieces, as two threads do it
            const int half = nb/2;
            quantize_panel_a4_bcq(x.data(), p.data(), half, w, c);
            quantize_panel_a4_bcq(x.data() + half*QK_BCQ, p.data() + half*w*Q8_TSQ_BLOCK_SIZE, nb - half, w, c);
#else
            p = r;
#endif
        }
        CHECK(p == r, "panel of kind %d, %d blocks", kind, nb);
    }
    return true;
}

static bool check_gemm(int nb, int w, bool extreme) {
    const std::vector<block_bcq4> rows = make_blocks(ROWS*nb, extreme);
    bytes x(rows.size()*sizeof(block_bcq4));
    bcq4_repack(ROWS, nb, rows.data(), x.data());

    bytes panel(nb*w*Q8_TSQ_BLOCK_SIZE);
    std::vector<activations> columns;
    std::vector<float> out(w*ROWS), ref(w*ROWS);
    float * s[TESSERAQ_NCOLS], * r[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        columns.emplace_back(nb, extreme);
        columns.back().column(panel, w, c);
        s[c] = out.data() + c*ROWS;
        r[c] = ref.data() + c*ROWS;
    }
    ggml_gemm_bcq4_generic(nb*QK_BCQ, r, x.data(), panel.data(), w, ROWS);
#if BCQ_NROWS > 0
    ggml_gemm_bcq4(nb*QK_BCQ, s, x.data(), panel.data(), w);
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
    const std::vector<float> x = make_floats(nb*QK_BCQ, kind);
    std::vector<float> w = make_floats(nb*QK_BCQ, NORMAL), y(nb*QK_BCQ);
    for (float & v : w) {
        v = std::fabs(v);
    }
    for (const float * imatrix : { (const float *) nullptr, (const float *) w.data() }) {
        std::vector<block_bcq4> q(nb);
        CHECK(quantize_bcq4(x.data(), q.data(), 1, nb*QK_BCQ, imatrix) == nb*sizeof(block_bcq4), "size");
        dequantize_row_bcq4(q.data(), y.data(), nb*QK_BCQ);
        for (float v : y) {
            CHECK(std::isfinite(v) && (kind != ZEROS || v == 0.0f), "weights of kind %d, %d blocks: %g", kind, nb, v);
        }
    }
    return true;
}

static bool check_all() {
    bool ok = check_to_fp32();
    for (int nb = 1; ok && nb <= 2*Q8_GROUP + 3; nb++) {
        ok = check_vec_dot(nb, false) && check_vec_dot(nb, true);
    }
    for (int nb : { 1, 2, 5, 16, 35 }) {
        for (int kind = 0; ok && kind < VALUES; kind++) {
            ok = check_activations(nb, kind) && (nb > 5 || check_quantize(nb, kind));
        }
    }
    for (int nb : { 1, 2, 3, 10 }) {
        for (int w = 1; ok && w <= TESSERAQ_NCOLS; w++) {
            ok = check_gemm(nb, w, false) && check_gemm(nb, w, true);
        }
    }
    return ok;
}

int main() {
    bcq_init();
    if (!check_all()) {
        return 1;
    }

    // codebooks of a model: any that ascend, also such as have no small codeword
    int8_t own[BCQ_CODEBOOKS*BCQ_LEVELS], worse[BCQ_CODEBOOKS*BCQ_LEVELS];
    for (int b = 0; b < BCQ_CODEBOOKS; b++) {
        for (int i = 0; i < BCQ_LEVELS; i++) {
            own[b*BCQ_LEVELS + i] = b == 3 ? 31 : b == 5 ? -31 : b == 0 ? 0 : (int8_t) (rng() % 63) - 31;
        }
        std::sort(own + b*BCQ_LEVELS, own + (b + 1)*BCQ_LEVELS);
    }
    memcpy(worse, own, sizeof(own));
    worse[0] = 32;
    if (bcq_acquire(worse) || !bcq_acquire(own) || bcq_acquire(nullptr) || !bcq_acquire(own)) {
        fprintf(stderr, "codebooks are taken that should not be, or the other way round\n");
        return 1;
    }
    if (!check_all()) {
        return 1;
    }
    bcq_release();
    if (bcq_acquire(nullptr)) {
        fprintf(stderr, "codebooks change under a model\n");
        return 1;
    }
    bcq_release();
    if (!bcq_acquire(nullptr) || bcq_tables.codeword[0][0] == own[0]) {
        fprintf(stderr, "the universal codebooks do not come back\n");
        return 1;
    }
    printf("%d rows: all ok\n", ROWS);
    return 0;
}
