// Fuzz target: any bytes are rows of TSQ, BCQ and PTQ1_61 blocks. Dequantization, dot products, repacking and the products of repacked rows must
// neither read nor write outside of what they are given, must give finite numbers where those exist, and NaN where an activation is not
// finite, and SIMD must agree with plain arithmetic. For libFuzzer (scripts/run check fuzz), or with fuzz_main.cpp as a program of its own.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-impl.h"
#include "tesseraq/bcq/cpu.h"
#include "tesseraq/bcq/repack.h"
#include "tesseraq/ptq/cpu.h"
#include "tesseraq/ptq/repack.h"
#include "tesseraq/common/cpu.h"
#include "tesseraq/tsq/repack.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define FUZZ_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUZZ_ASAN
#endif
#endif
#if defined(FUZZ_ASAN)
#include <sanitizer/asan_interface.h>
#endif

extern "C" {
// what the sources need of ggml
float ggml_table_f32_f16[1 << 16];

void ggml_abort(const char * file, int line, const char *, ...) {
    fprintf(stderr, "%s:%d: assertion failed\n", file, line);
    abort();
}

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type) {
    return nullptr;
}

int LLVMFuzzerInitialize(int * argc, char *** argv);
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
}

#define CHECK(condition, ...) do { if (!(condition)) { fprintf(stderr, "%s: ", #condition); fprintf(stderr, __VA_ARGS__); abort(); } } while (0)

// Memory that ends, or begins, at a page that nobody may touch: gathers and masked loads are checked by nothing else. The
// bytes between the other end and its page are poisoned for AddressSanitizer.
class memory {
  public:
    memory(size_t size, bool at_end) : size_(size) {
        const size_t page = sysconf(_SC_PAGESIZE);
        total_ = (size + page - 1)/page*page + 2*page;
        base_  = (uint8_t *) mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(base_ != MAP_FAILED, "no memory\n");
        uint8_t * first = base_ + page;
        const size_t inside = total_ - 2*page;
        CHECK(inside == 0 || mprotect(first, inside, PROT_READ | PROT_WRITE) == 0, "no memory\n");
        data_ = at_end ? first + inside - size : first;
#if defined(FUZZ_ASAN)
        ASAN_POISON_MEMORY_REGION(first, inside);
        ASAN_UNPOISON_MEMORY_REGION(data_, size);
#endif
    }

    ~memory() {
#if defined(FUZZ_ASAN)
        ASAN_UNPOISON_MEMORY_REGION(base_, total_);
#endif
        munmap(base_, total_);
    }

    memory(const memory &) = delete;
    memory & operator=(const memory &) = delete;

    template <typename T = uint8_t> T * as() const { return (T *) data_; }
    size_t size() const { return size_; }

  private:
    uint8_t * base_;
    uint8_t * data_;
    size_t    size_, total_;
};

// the bytes of an input, over and over
class input {
  public:
    input(const uint8_t * data, size_t size) : data_(data), size_(size), at_(0) {}

    uint8_t byte() { return size_ ? data_[at_++ % size_] : 0; }

    void bytes(void * y, size_t n) {
        for (size_t i = 0; i < n; i++) {
            ((uint8_t *) y)[i] = byte();
        }
    }

  private:
    const uint8_t * data_;
    size_t          size_, at_;
};

// a sum, exactly, and the sum of the magnitudes of what was added up: floats cannot be nearer to it than a share of these
struct exact {
    double sum = 0.0, magnitude = 0.0;

    // w*a, on the way to which kernels add and take out again what is no larger than offset*a
    void add(double w, double offset, double a) {
        sum       += w*a;
        magnitude += (std::fabs(w) + offset)*std::fabs(a);
    }

    bool is_near(float s, int n) const { return std::fabs(s - sum) <= 4e-7*std::sqrt((double) n)*magnitude + 1e-30; }
};

typedef void (*quantize_panel_t)(const float * x, void * y, int64_t nb, int w, int c);
typedef void (*vec_dot_t)(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);
typedef void (*from_float_t)(const float * x, void * y, int64_t k);

// A type, and the two ways to everything that has two: generic first, then what is compiled in, if that is something else.
struct type {
    const char * name;
    int          block, bytes; // of weights
    int          words;        // of a block of activations beside its numbers, in rows (by groups) and in panels
    int          max;          // largest magnitude of an activation

    void   (*dequantize)(const void * x, float * y, int64_t k);
    size_t (*quantize)(const float * x, void * y, int64_t nrows, int64_t n, const float * imatrix);

    // largest magnitude that is added to weight j of a block, and taken out of the sum
    double (*offset)(const uint8_t * x, int j);

    // The words of a block, out of its numbers in the order of the weights and one float for each scale; scale and place of a number.
    void (*fill)(const int8_t * q, const float * d, uint32_t * words);
    int  (*scale_of)(int j);
    int  (*row_place)(int j);
    int  (*panel_place)(int j);

    from_float_t     from_float[2];
    vec_dot_t        vec_dot[2];
    int              nrows; // of a group of repacked rows; 0 without kernels
    void           (*repack)(int nrows, int64_t nb, const void * x, void * y);
    quantize_panel_t quantize_panel[2];
    void           (*gemm_generic)(int n, float * const * s, const void * x, const void * y, int w, int nrows);
    void           (*gemm)(int n, float * const * s, const void * x, const void * y, int w);

    int activations() const { return 4*words + block; } // bytes of a block of them
};

#define BOTH(name) { name##_generic, name }

#if TESSERAQ_NROWS > 0
#define PANEL(name) { name##_generic, name }
#define GEMM(f)     f
#else
#define PANEL(name) { name##_generic, nullptr }
#define GEMM(f)     nullptr
#endif

template <int nbits> static double tsq_offset(const uint8_t * x, int) { return e5m3_decode(x[0])*(1 << nbits)*1.5; }
static double bcq_offset(const uint8_t * x, int)   { return e5m3_decode(x[0])*BCQ_OFFSET; }
static double ptq_offset(const uint8_t * x, int j) { return j < PTQ_SALIENT ? 8.0*e5m3_decode(x[1]) : e5m3_decode(x[0]); }

static void tsq_fill(const int8_t * q, const float * d, uint32_t * words) {
    int sum = 0;
    for (int j = 0; j < QK_TSQ; j++) {
        sum += q[j];
    }
    const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
    memcpy(&words[0], d, 4);
    memcpy(&words[1], s, 4);
}

static void ptq_fill(const int8_t * q, const float * d, uint32_t * words) {
    int32_t s[2] = { 0, 0 };
    for (int j = 0; j < QK_PTQ; j++) {
        s[j >= PTQ_SALIENT] += (j < PTQ_SALIENT ? PTQ_LACK_SALIENT : PTQ_LACK_BINARY)*q[j];
    }
    memcpy(words,     d, 8);
    memcpy(words + 2, s, 8);
}

static int first_scale(int)     { return 0; }
static int ptq_scale(int j)     { return j >= PTQ_SALIENT; }
static int same_place(int j)    { return j; }
static int ptq_row_place(int j) { return (j + PTQ_BINARY) % QK_PTQ; }

static int ptq_panel_place(int j) {
    for (int at = 0; at < QK_PTQ; at++) {
        if (ptq_column(at/4, at % 4) == j) {
            return at;
        }
    }
    abort();
}

// what the activations of a type are like
#define MAX_q8_tsq 127
#define MAX_a4_bcq BCQ_MAX_CODE
#define MAX_q8_ptq 127

#define Q8_TSQ_LAYOUT tsq_fill, first_scale, same_place, same_place
#define Q8_PTQ_LAYOUT ptq_fill, ptq_scale, ptq_row_place, ptq_panel_place

#define OFFSET_tsq2    tsq_offset<2>
#define OFFSET_tsq3    tsq_offset<3>
#define OFFSET_tsq4    tsq_offset<4>
#define OFFSET_bcq2    bcq_offset
#define OFFSET_bcq4    bcq_offset
#define OFFSET_ptq1_61 ptq_offset

#define ROW(name, LAYOUT, layout, weights, bytes, acts, rows, words, LAYOUT_OF_ACTS)                                        \
    { name, weights, bytes, words, MAX_##acts, dequantize_row_##layout, quantize_##layout, OFFSET_##layout, LAYOUT_OF_ACTS, \
      BOTH(quantize_row_##acts), BOTH(ggml_vec_dot_##layout##_##rows),                                                      \
      LAYOUT##_NROWS, layout##_repack, PANEL(quantize_panel_##acts), ggml_gemm_##layout##_generic, GEMM(ggml_gemm_##layout) },

#define Q8_TSQ_ROW(TYPE, name, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, ...) \
    ROW(#name, LAYOUT, layout, weights, bytes, acts, rows, 2, Q8_TSQ_LAYOUT)
#define Q8_PTQ_ROW(TYPE, name, LAYOUT, layout, id, weights, bytes, ACTS, acts, rows, ...) \
    ROW(#name, LAYOUT, layout, weights, bytes, acts, rows, 4, Q8_PTQ_LAYOUT)

static const type types[] = { TESSERAQ_TSQ_TYPES(Q8_TSQ_ROW) TESSERAQ_BCQ_TYPES(Q8_TSQ_ROW) TESSERAQ_PTQ_TYPES(Q8_PTQ_ROW) };

static const int NTYPES = sizeof(types)/sizeof(types[0]);

// ---- activations in rows: groups of blocks --------------------------------------------------------------------------------------

// word v of block i of a row of nb blocks, and number j
static uint8_t * row_word(const type & t, void * y, int nb, int i, int v) {
    const int first = i/Q8_GROUP*Q8_GROUP, m = nb - first < Q8_GROUP ? nb - first : Q8_GROUP;
    return (uint8_t *) y + first*t.activations() + 4*(v*m + i - first);
}

static uint8_t * row_number(const type & t, void * y, int nb, int i, int j) {
    const int first = i/Q8_GROUP*Q8_GROUP, m = nb - first < Q8_GROUP ? nb - first : Q8_GROUP;
    return (uint8_t *) y + first*t.activations() + 4*t.words*m + (i - first)*t.block + t.row_place(j);
}

// any bytes, or blocks as they come from floats up to 1
static void make_activations(const type & t, input & in, int nb, bool any, void * y) {
    in.bytes(y, (size_t) nb*t.activations());
    for (int i = 0; !any && i < nb; i++) {
        int8_t q[QK_PTQ];
        for (int j = 0; j < t.block; j++) {
            q[j] = (int8_t) *row_number(t, y, nb, i, j);
        }
        float d[2];
        for (int k = 0; k < t.words/2; k++) {
            uint16_t bits;
            memcpy(&bits, row_word(t, y, nb, i, k), sizeof(bits));
            d[k] = (bits & 0xFFF)/(4096.0f*127.0f);
        }
        uint32_t words[4];
        t.fill(q, d, words);
        for (int v = 0; v < t.words; v++) {
            memcpy(row_word(t, y, nb, i, v), &words[v], 4);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------

// the weights of a row, all of them finite
static memory * check_dequantize(const type & t, const uint8_t * row, int nb, bool at_end) {
    const int n = nb*t.block;
    memory * y = new memory(n*sizeof(float), at_end);
    t.dequantize(row, y->as<float>(), n);
    for (int i = 0; i < n; i++) {
        CHECK(std::isfinite(y->as<float>()[i]), "%s, weight %d is %g\n", t.name, i, y->as<float>()[i]);
    }
    return y;
}

static void check_vec_dot(const type & t, input & in, const memory & row, const float * weights, int nb, bool any, bool at_end) {
    memory y((size_t) nb*t.activations(), at_end);
    make_activations(t, in, nb, any, y.as());

    exact e;
    for (int i = 0; i < nb; i++) {
        for (int j = 0; j < t.block; j++) {
            float d;
            memcpy(&d, row_word(t, y.as(), nb, i, t.scale_of(j)), sizeof(d));
            e.add(weights[i*t.block + j], t.offset(row.as() + i*t.bytes, j), (double) d*(int8_t) *row_number(t, y.as(), nb, i, j));
        }
    }
    for (vec_dot_t f : t.vec_dot) {
        memory s(sizeof(float), at_end);
        f(nb*t.block, s.as<float>(), 0, row.as(), 0, y.as(), 0, 1);
        CHECK(any || e.is_near(*s.as<float>(), nb*t.block), "%s, %d blocks: %.9g, should be %.9g\n", t.name, nb, *s.as<float>(), e.sum);
    }
}

// activations as floats: any, or such as networks have, some of them small
static void make_floats(input & in, int n, bool any, float * y) {
    in.bytes(y, n*sizeof(float));
    for (int i = 0; !any && i < n; i++) {
        int32_t bits;
        memcpy(&bits, &y[i], sizeof(bits));
        y[i] = std::ldexp((float) (bits >> 8), -23 - (bits & 7)*(bits & 8));
    }
}

// rows of activations from floats: numbers are in range, and all kernels write the same ones
static void check_from_float(const type & t, input & in, int nb, bool any, bool at_end) {
    memory x(nb*t.block*sizeof(float), at_end);
    make_floats(in, nb*t.block, any, x.as<float>());

    memory a((size_t) nb*t.activations(), at_end), b(a.size(), at_end);
    t.from_float[0](x.as<float>(), a.as(), nb*t.block);
    t.from_float[1](x.as<float>(), b.as(), nb*t.block);
    CHECK(any || memcmp(a.as(), b.as(), a.size()) == 0, "%s, %d blocks: activations differ\n", t.name, nb);
    for (int i = 0; !any && i < nb*t.block; i++) {
        const int q = (int8_t) *row_number(t, a.as(), nb, i/t.block, i % t.block);
        CHECK(std::abs(q) <= t.max, "%s, activation %d is %d\n", t.name, i, q);
    }
}

static void check_gemm(const type & t, input & in, const memory & rows, int nrows, int nb, int w, bool any, bool at_end) {
    const int n = nb*t.block;

    memory x(rows.size(), at_end);
    t.repack(nrows, nb, rows.as(), x.as());

    memory panel((size_t) nb*w*t.activations(), at_end);
    memory simd (panel.size(), at_end);
    const bool has_simd = nrows == t.nrows;
    for (int c = 0; c < w; c++) {
        memory a(n*sizeof(float), at_end);
        make_floats(in, n, any, a.as<float>());
        t.quantize_panel[0](a.as<float>(), panel.as(), nb, w, c);
        if (has_simd) {
            t.quantize_panel[1](a.as<float>(), simd.as(), nb, w, c);
        }
    }
    CHECK(!has_simd || any || memcmp(panel.as(), simd.as(), panel.size()) == 0, "%s, %d blocks, %d columns: panels differ\n", t.name, nb, w);

    memory out(w*nrows*sizeof(float), at_end);
    float * s[TESSERAQ_NCOLS];
    for (int c = 0; c < w; c++) {
        s[c] = out.as<float>() + c*nrows;
    }
    for (int k = 0; k <= has_simd; k++) {
        if (k == 0) {
            t.gemm_generic(n, s, x.as(), panel.as(), w, nrows);
        } else {
            t.gemm(n, s, x.as(), simd.as(), w);
        }
        for (int r = 0; !any && r < nrows; r++) {
            const uint8_t * row = rows.as() + (size_t) r*nb*t.bytes;
            memory * weights = check_dequantize(t, row, nb, at_end);
            for (int c = 0; c < w; c++) {
                exact e;
                for (int i = 0; i < nb; i++) {
                    const uint8_t * p = panel.as() + (size_t) i*w*t.activations();
                    for (int j = 0; j < t.block; j++) {
                        float d;
                        memcpy(&d, p + 4*(t.scale_of(j)*w + c), sizeof(d));
                        const int    at = t.panel_place(j);
                        const int8_t q  = (int8_t) p[4*t.words*w + TESSERAQ_DEPTH*(at/TESSERAQ_DEPTH*w + c) + at % TESSERAQ_DEPTH];
                        e.add(weights->as<float>()[i*t.block + j], t.offset(row + i*t.bytes, j), (double) d*q);
                    }
                }
                CHECK(e.is_near(s[c][r], n), "%s, %d blocks, column %d of %d, row %d of %d: %.9g, should be %.9g (of %.9g)\n", t.name, nb, c, w, r, nrows, s[c][r], e.sum, e.magnitude);
            }
            delete weights;
        }
    }
}

// Activations of which number `at` is not finite: the product of a row is NaN. In a panel they are column `broken`, and the products with the
// other columns are what they are without it.
static void check_not_finite(const type & t, input & in, int nb, int w, int at, float value, bool at_end) {
    const int n = nb*t.block;

    memory x(n*sizeof(float), at_end);
    make_floats(in, n, false, x.as<float>());
    x.as<float>()[at] = value;

    memory row((size_t) nb*t.bytes, at_end);
    in.bytes(row.as(), row.size());
    memory y((size_t) nb*t.activations(), at_end);
    for (from_float_t from_float : t.from_float) {
        from_float(x.as<float>(), y.as(), n);
        for (vec_dot_t vec_dot : t.vec_dot) {
            memory s(sizeof(float), at_end);
            vec_dot(n, s.as<float>(), 0, row.as(), 0, y.as(), 0, 1);
            CHECK(std::isnan(*s.as<float>()), "%s, %d blocks, activation %d is %g: %g\n", t.name, nb, at, value, *s.as<float>());
        }
    }

    const int nrows  = t.nrows > 0 ? t.nrows : 3;
    const int broken = at % w;
    memory rows((size_t) nrows*nb*t.bytes, at_end), repacked(rows.size(), at_end);
    in.bytes(rows.as(), rows.size());
    t.repack(nrows, nb, rows.as(), repacked.as());
    memory columns((size_t) w*n*sizeof(float), at_end);
    make_floats(in, w*n, false, columns.as<float>());

    memory panel((size_t) nb*w*t.activations(), at_end);
    memory before((size_t) w*nrows*sizeof(float), at_end), after(before.size(), at_end);
    for (int k = 0; k <= (t.nrows > 0); k++) {
        for (const memory * out : { &before, &after }) {
            float * s[TESSERAQ_NCOLS];
            for (int c = 0; c < w; c++) {
                const bool is_broken = out == &after && c == broken;
                t.quantize_panel[k](is_broken ? x.as<float>() : columns.as<float>() + (size_t) c*n, panel.as(), nb, w, c);
                s[c] = out->as<float>() + c*nrows;
            }
            if (k == 0) {
                t.gemm_generic(n, s, repacked.as(), panel.as(), w, nrows);
            } else {
                t.gemm(n, s, repacked.as(), panel.as(), w);
            }
        }
        for (int i = 0; i < w*nrows; i++) {
            const float b = before.as<float>()[i], a = after.as<float>()[i];
            CHECK(i/nrows == broken ? std::isnan(a) : a == b, "%s, %d blocks, column %d of %d, where %d is broken: %g, without it %g\n",
                  t.name, nb, i/nrows, w, broken, a, b);
        }
    }
}

// whatever the weights and their importance are, there is a block for them
static void check_quantize(const type & t, input & in, bool any, bool at_end) {
    memory x(t.block*sizeof(float), at_end);
    memory w(t.block*sizeof(float), at_end);
    memory y(t.bytes, at_end);
    make_floats(in, t.block, any, x.as<float>());
    make_floats(in, t.block, any, w.as<float>());
    for (int i = 0; i < t.block; i++) {
        w.as<float>()[i] = std::fabs(w.as<float>()[i]);
    }
    for (const float * imatrix : { (const float *) nullptr, (const float *) w.as<float>() }) {
        CHECK(t.quantize(x.as<float>(), y.as(), 1, t.block, imatrix) == y.size(), "%s\n", t.name);
        delete check_dequantize(t, y.as(), 1, at_end);
    }
}

int LLVMFuzzerInitialize(int *, char ***) {
    for (int i = 0; i < 1 << 16; i++) {
        ggml_table_f32_f16[i] = GGML_FP16_TO_FP32((ggml_fp16_t) i);
    }
    bcq_init();
    return 0;
}

// the first five bytes say what is done with the others
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 5) {
        return 0;
    }
    const type & t    = types[data[0] % NTYPES];
    const int  nb     = 1 + data[1] % 36; // two groups of activations, and more
    const int  w      = 1 + data[2] % TESSERAQ_NCOLS;
    const int  plain  = 1 + data[3] % 17; // rows for the generic kernel, which takes any number of them
    const bool any    = data[4] & 1;
    const bool at_end = data[4] & 2;
    input in(data + 5, size - 5);

    {
        memory row((size_t) nb*t.bytes, at_end);
        in.bytes(row.as(), row.size());
        memory * weights = check_dequantize(t, row.as(), nb, at_end);
        check_vec_dot(t, in, row, weights->as<float>(), nb, any, at_end);
        delete weights;
    }
    check_from_float(t, in, nb, any, at_end);
    for (int nrows : { plain, t.nrows }) {
        if (nrows > 0) {
            memory rows((size_t) nrows*nb*t.bytes, at_end);
            in.bytes(rows.as(), rows.size());
            check_gemm(t, in, rows, nrows, nb, w, any, at_end);
        }
    }
    if (data[4] & 4) {
        check_quantize(t, in, any, at_end);
    }
    if (data[4] & 8) {
        const float values[] = { NAN, -NAN, INFINITY, -INFINITY };
        check_not_finite(t, in, nb, w, (data[3] | data[2] << 8) % (nb*t.block), values[data[4] >> 4 & 3], at_end);
    }
    return 0;
}
