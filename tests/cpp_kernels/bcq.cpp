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

// a layout and its functions
struct no_kernels {
    static void gemm(int, float * const *, const void *, const void *, int) {}
};

#define LAYOUT(layout, LAYOUT, kernels)                                                                             \
    struct layout {                                                                                                 \
        typedef block_##layout block;                                                                               \
        static const bcq_layout id = BCQ_LAYOUT_##LAYOUT;                                                           \
        static const int codebooks = LAYOUT##_CODEBOOKS, levels = LAYOUT##_LEVELS;                                  \
        static const int nrows     = LAYOUT##_NROWS;                                                                \
        static const int rows      = nrows > 0 ? nrows : 4;                                                         \
                                                                                                                    \
        static constexpr auto decode          = layout##_decode;                                                    \
        static constexpr auto vec_dot         = ggml_vec_dot_##layout##_q8_tsq;                                     \
        static constexpr auto vec_dot_generic = ggml_vec_dot_##layout##_q8_tsq_generic;                             \
        static constexpr auto to_fp32         = ggml_cpu_##layout##_to_fp32;                                        \
        static constexpr auto dequantize      = dequantize_row_##layout;                                            \
        static constexpr auto quantize        = quantize_##layout;                                                  \
        static constexpr auto repack          = layout##_repack;                                                    \
        static constexpr auto gemm            = kernels;                                                            \
        static constexpr auto gemm_generic    = ggml_gemm_##layout##_generic;                                       \
    };

#if TESSERAQ_NROWS > 0
LAYOUT(bcq2, BCQ2, ggml_gemm_bcq2)
LAYOUT(bcq4, BCQ4, ggml_gemm_bcq4)
#else
LAYOUT(bcq2, BCQ2, no_kernels::gemm)
LAYOUT(bcq4, BCQ4, no_kernels::gemm)
#endif

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

template <typename L> static std::vector<typename L::block> make_blocks(int nb, bool extreme) {
    std::vector<typename L::block> x(nb);
    for (size_t i = 0; i < nb*sizeof(typename L::block); i++) {
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

template <typename L> static bool is_near(float s, const typename L::block * x, const activations & a) {
    double sum = 0.0, magnitude = 0.0;
    for (size_t i = 0; i < a.d.size(); i++) {
        int8_t c[QK_BCQ];
        L::decode(&x[i], c);
        for (int j = 0; j < QK_BCQ; j++) {
            const double v = (double) e5m3_decode(x[i].d)*a.d[i]*c[j]*a.q[i*QK_BCQ + j];
            sum       += v;
            // kernels add codewords with an offset, and take it out again
            magnitude += (double) e5m3_decode(x[i].d)*a.d[i]*(std::abs(c[j]) + BCQ_OFFSET)*std::abs(a.q[i*QK_BCQ + j]);
        }
    }
    return std::fabs(s - sum) <= 1e-6*magnitude + 1e-37;
}

template <typename L> static bool check_vec_dot(int nb, bool extreme) {
    const std::vector<typename L::block> x = make_blocks<L>(nb, extreme);
    const activations a(nb, extreme);
    const bytes y = a.row();

    float simd, generic;
    L::vec_dot        (nb*QK_BCQ, &simd,    0, x.data(), 0, y.data(), 0, 1);
    L::vec_dot_generic(nb*QK_BCQ, &generic, 0, x.data(), 0, y.data(), 0, 1);
    CHECK(is_near<L>(simd, x.data(), a) && is_near<L>(generic, x.data(), a), "%d blocks: %g, generic %g", nb, simd, generic);
    return true;
}

// every scale
template <typename L> static bool check_to_fp32() {
    const int nb = 256;
    std::vector<typename L::block> x = make_blocks<L>(nb, false);
    for (int i = 0; i < nb; i++) {
        x[i].d = i;
    }
    std::vector<float> a(nb*QK_BCQ), b(nb*QK_BCQ);
    L::to_fp32   (x.data(), a.data(), nb*QK_BCQ);
    L::dequantize(x.data(), b.data(), nb*QK_BCQ);
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
#if TESSERAQ_NROWS > 0
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

template <typename L> static bool check_gemm(int nb, int w, bool extreme) {
    const std::vector<typename L::block> rows = make_blocks<L>(L::rows*nb, extreme);
    bytes x(rows.size()*sizeof(typename L::block));
    L::repack(L::rows, nb, rows.data(), x.data());

    bytes panel(nb*w*Q8_TSQ_BLOCK_SIZE);
    std::vector<activations> columns;
    std::vector<float> out(w*L::rows), ref(w*L::rows);
    float * s[TESSERAQ_NCOLS], * r[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        columns.emplace_back(nb, extreme);
        columns.back().column(panel, w, c);
        s[c] = out.data() + c*L::rows;
        r[c] = ref.data() + c*L::rows;
    }
    L::gemm_generic(nb*QK_BCQ, r, x.data(), panel.data(), w, L::rows);
    if (L::nrows > 0) {
        L::gemm(nb*QK_BCQ, s, x.data(), panel.data(), w);
    } else {
        out = ref;
    }
    for (int c = 0; c < w; c++) {
        for (int i = 0; i < L::rows; i++) {
            CHECK(is_near<L>(s[c][i], &rows[i*nb], columns[c]) && is_near<L>(r[c][i], &rows[i*nb], columns[c]),
                  "%d blocks, column %d of %d, row %d: %g, generic %g", nb, c, w, i, s[c][i], r[c][i]);
        }
    }
    return true;
}

// whatever the weights and their importance are, there is a block of finite weights for them
template <typename L> static bool check_quantize(int nb, int kind) {
    const std::vector<float> x = make_floats(nb*QK_BCQ, kind);
    std::vector<float> w = make_floats(nb*QK_BCQ, NORMAL), y(nb*QK_BCQ);
    for (float & v : w) {
        v = std::fabs(v);
    }
    for (const float * imatrix : { (const float *) nullptr, (const float *) w.data() }) {
        std::vector<typename L::block> q(nb);
        CHECK(L::quantize(x.data(), q.data(), 1, nb*QK_BCQ, imatrix) == nb*sizeof(typename L::block), "size");
        L::dequantize(q.data(), y.data(), nb*QK_BCQ);
        for (float v : y) {
            // codebooks need not have a 0: then it is a codeword times the smallest scale
            CHECK(std::isfinite(v) && (kind != ZEROS || std::fabs(v) < (L::levels < 16 ? 2e-6f : 1e-30f)), "weights of kind %d, %d blocks: %g", kind, nb, v);
        }
    }
    return true;
}

template <typename L> static bool check_all() {
    bool ok = check_to_fp32<L>();
    for (int nb = 1; ok && nb <= 2*Q8_GROUP + 3; nb++) {
        ok = check_vec_dot<L>(nb, false) && check_vec_dot<L>(nb, true);
    }
    for (int nb : { 1, 2, 5, 16, 35 }) {
        for (int kind = 0; ok && kind < VALUES; kind++) {
            ok = check_activations(nb, kind) && (nb > 5 || check_quantize<L>(nb, kind));
        }
    }
    for (int nb : { 1, 2, 3, 10 }) {
        for (int w = 1; ok && w <= TESSERAQ_NCOLS; w++) {
            ok = check_gemm<L>(nb, w, false) && check_gemm<L>(nb, w, true);
        }
    }
    return ok;
}

template <typename L> static bool check_layout() {
    if (!check_all<L>()) {
        return false;
    }

    // codebooks of a model: any that ascend, also such as have no small codeword
    static const int size = L::codebooks*L::levels;
    int8_t own[size], worse[size];
    for (int b = 0; b < L::codebooks; b++) {
        for (int i = 0; i < L::levels; i++) {
            own[b*L::levels + i] = b == 3 ? 31 : b == L::codebooks - 3 ? -31 : b == 0 ? 0 : (int8_t) (rng() % 63) - 31;
        }
        std::sort(own + b*L::levels, own + (b + 1)*L::levels);
    }
    memcpy(worse, own, sizeof(own));
    worse[0] = 32;
    CHECK(!bcq_acquire(L::id, worse) && bcq_acquire(L::id, own) && !bcq_acquire(L::id, nullptr) && bcq_acquire(L::id, own),
        "codebooks are taken that should not be, or the other way round");
    if (!check_all<L>()) {
        return false;
    }
    bcq_release(L::id);
    CHECK(!bcq_acquire(L::id, nullptr), "codebooks change under a model");
    bcq_release(L::id);
    CHECK(bcq_acquire(L::id, nullptr) && memcmp(bcq_codebooks(L::id), own, size) != 0, "the universal codebooks do not come back");
    bcq_release(L::id);
    return true;
}

int main() {
    bcq_init();
    if (!check_layout<bcq2>() || !check_layout<bcq4>()) {
        return 1;
    }
    // those of one layout are nothing to those of the other
    const int8_t zeros[BCQ2_CODEBOOKS*BCQ2_LEVELS] = {};
    if (!bcq_acquire(BCQ_LAYOUT_BCQ4, nullptr) || !bcq_acquire(BCQ_LAYOUT_BCQ2, zeros)) {
        fprintf(stderr, "codebooks of two layouts are taken for those of one\n");
        return 1;
    }
    printf("%d and %d rows: all ok\n", bcq2::rows, bcq4::rows);
    return 0;
}
