// Fuzz target: any bytes are rows of TSQ blocks. Dequantization, dot products, repacking and the products of repacked rows must
// neither read nor write outside of what they are given, must give finite numbers where those exist, and SIMD must agree with
// plain arithmetic. For libFuzzer (scripts/fuzz), or with fuzz_main.cpp as a program of its own.

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-impl.h"
#include "tesseraq/tsq-cpu.h"
#include "tesseraq/tsq-repack.h"

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

    void add(double v) {
        sum       += v;
        magnitude += std::fabs(v);
    }

    bool is_near(float s, int n) const { return std::fabs(s - sum) <= 4e-7*std::sqrt((double) n)*magnitude + 1e-30; }
};

static int nbits_of(const uint8_t * name) { return 2 + *name % 3; }

// ---- what vec_dot meets: Q8_TSQ, in groups of blocks ---------------------------------------------------------------------------

static size_t activations_size(int nb) { return nb*Q8_TSQ_BLOCK_SIZE; }

// blocks of the group that block i is in
static int group_size(int nb, int i) {
    const int left = nb - i/Q8_TSQ_GROUP*Q8_TSQ_GROUP;
    return left < Q8_TSQ_GROUP ? left : Q8_TSQ_GROUP;
}

// any bytes, or blocks as they come from floats up to 1
static void make_activations(input & in, int nb, bool any, void * y) {
    in.bytes(y, activations_size(nb));
    for (int i = 0; !any && i < nb; i++) {
        uint8_t * group = (uint8_t *) y + i/Q8_TSQ_GROUP*Q8_TSQ_GROUP*Q8_TSQ_BLOCK_SIZE;
        const int m = group_size(nb, i), b = i % Q8_TSQ_GROUP;

        int sum = 0;
        for (int j = 0; j < QK_TSQ; j++) {
            sum += (int8_t) group[8*m + b*QK_TSQ + j];
        }
        uint16_t bits;
        memcpy(&bits, group + 4*b, sizeof(bits));
        const float   d    = (bits & 0xFFF)/(4096.0f*127.0f);
        const int16_t s[2] = { (int16_t) -sum, (int16_t) sum };
        memcpy(group + 4*b,       &d, sizeof(d));
        memcpy(group + 4*m + 4*b, s,  sizeof(s));
    }
}

// adds the products of block i of nb, whose weights are d*(q - z)
static void add_products(exact & e, int nb, int i, double d, double z, const uint8_t * q, const void * y) {
    const uint8_t * group = (const uint8_t *) y + i/Q8_TSQ_GROUP*Q8_TSQ_GROUP*Q8_TSQ_BLOCK_SIZE;
    const int m = group_size(nb, i), b = i % Q8_TSQ_GROUP;

    float da;
    memcpy(&da, group + 4*b, sizeof(da));
    for (int j = 0; j < QK_TSQ; j++) {
        const double a = d*da*(int8_t) group[8*m + b*QK_TSQ + j];
        e.add(a*q[j]);
        e.add(-a*z);
    }
}

typedef void (*vec_dot_t)(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

#if defined(GGML_CPU_GENERIC)
static const vec_dot_t vec_dot[][2] = {
    { ggml_vec_dot_tsq2_q8_tsq, ggml_vec_dot_tsq2_q8_tsq },
    { ggml_vec_dot_tsq3_q8_tsq, ggml_vec_dot_tsq3_q8_tsq },
    { ggml_vec_dot_tsq4_q8_tsq, ggml_vec_dot_tsq4_q8_tsq },
};
#else
static const vec_dot_t vec_dot[][2] = {
    { ggml_vec_dot_tsq2_q8_tsq, ggml_vec_dot_tsq2_q8_tsq_generic },
    { ggml_vec_dot_tsq3_q8_tsq, ggml_vec_dot_tsq3_q8_tsq_generic },
    { ggml_vec_dot_tsq4_q8_tsq, ggml_vec_dot_tsq4_q8_tsq_generic },
};
#endif

// -------------------------------------------------------------------------------------------------------------------------------

static void dequantize(int nbits, const void * x, float * y, int64_t k) {
    switch (nbits) {
        case 2: dequantize_row_tsq2((const block_tsq2 *) x, y, k); break;
        case 3: dequantize_row_tsq3((const block_tsq3 *) x, y, k); break;
        case 4: dequantize_row_tsq4((const block_tsq4 *) x, y, k); break;
    }
}

static size_t quantize(int nbits, const float * x, void * y, int64_t k, const float * imatrix) {
    switch (nbits) {
        case 2:  return quantize_tsq2(x, y, 1, k, imatrix);
        case 3:  return quantize_tsq3(x, y, 1, k, imatrix);
        default: return quantize_tsq4(x, y, 1, k, imatrix);
    }
}

static void check_dequantize(int nbits, const memory & row, int nb, bool at_end) {
    const int n = nb*QK_TSQ;
    memory y(n*sizeof(float), at_end);
    dequantize(nbits, row.as(), y.as<float>(), n);
    for (int i = 0; i < n; i++) {
        CHECK(std::isfinite(y.as<float>()[i]), "tsq%d, weight %d is %g\n", nbits, i, y.as<float>()[i]);
    }
}

static void check_vec_dot(input & in, int nbits, const memory & row, int nb, bool any, bool at_end) {
    memory y(activations_size(nb), at_end);
    make_activations(in, nb, any, y.as());

    exact e;
    for (int i = 0; i < nb; i++) {
        const uint8_t * b = row.as() + i*TSQ_BLOCK_SIZE(nbits);
        uint8_t q[QK_TSQ];
        tsq_unpack(b + TSQ_CODES, nbits, q);
        add_products(e, nb, i, tsq_decode_d(b[0]), tsq_decode_z(b[1], nbits), q, y.as());
    }
    for (vec_dot_t f : vec_dot[nbits - 2]) {
        memory s(sizeof(float), at_end);
        f(nb*QK_TSQ, s.as<float>(), 0, row.as(), 0, y.as(), 0, 1);
        CHECK(any || e.is_near(*s.as<float>(), nb*QK_TSQ), "tsq%d, %d blocks: %.9g, should be %.9g\n", nbits, nb, *s.as<float>(), e.sum);
    }
}

// activations for a panel: any floats, or such as networks have, some of them small
static void make_floats(input & in, int n, bool any, float * y) {
    in.bytes(y, n*sizeof(float));
    for (int i = 0; !any && i < n; i++) {
        int32_t bits;
        memcpy(&bits, &y[i], sizeof(bits));
        y[i] = std::ldexp((float) (bits >> 8), -23 - (bits & 7)*(bits & 8));
    }
}

static void check_gemm(input & in, int nbits, const memory & rows, int nrows, int nb, int w, bool any, bool at_end) {
    const int n = nb*QK_TSQ;

    memory x(rows.size(), at_end);
    tsq_repack(nbits, nrows, nb, rows.as(), x.as());

    memory panel(nb*w*TSQ_PANEL_BLOCK_SIZE, at_end);
    memory simd (nb*w*TSQ_PANEL_BLOCK_SIZE, at_end);
    const bool has_simd = nrows == TSQ_NROWS;
    for (int c = 0; c < w; c++) {
        memory a(n*sizeof(float), at_end);
        make_floats(in, n, any, a.as<float>());
        tsq_quantize_panel_generic(a.as<float>(), panel.as(), nb, w, c);
#if TSQ_NROWS > 0
        if (has_simd) {
            tsq_quantize_panel(a.as<float>(), simd.as(), nb, w, c);
        }
#endif
    }
    CHECK(!has_simd || any || memcmp(panel.as(), simd.as(), panel.size()) == 0, "tsq%d, %d blocks, %d columns: panels differ\n", nbits, nb, w);

    memory out(w*nrows*sizeof(float), at_end);
    float * s[TSQ_NCOLS];
    for (int c = 0; c < w; c++) {
        s[c] = out.as<float>() + c*nrows;
    }
    for (int k = 0; k <= has_simd; k++) {
        if (k == 0) {
            ggml_gemm_tsq_generic(nbits, n, s, x.as(), panel.as(), w, nrows);
#if TSQ_NROWS > 0
        } else {
            ggml_gemm_tsq(nbits, n, s, x.as(), simd.as(), w);
#endif
        }
        for (int c = 0; !any && c < w; c++) {
            for (int r = 0; r < nrows; r++) {
                exact e;
                for (int i = 0; i < nb; i++) {
                    const uint8_t * b = rows.as()  + (r*nb + i)*TSQ_BLOCK_SIZE(nbits);
                    const uint8_t * p = panel.as() + i*w*TSQ_PANEL_BLOCK_SIZE;
                    uint8_t q[QK_TSQ];
                    float   da;
                    tsq_unpack(b + TSQ_CODES, nbits, q);
                    memcpy(&da, p + 4*c, sizeof(da));
                    for (int j = 0; j < QK_TSQ; j++) {
                        const int8_t qa = (int8_t) p[8*w + TSQ_DEPTH*(j/TSQ_DEPTH*w + c) + j % TSQ_DEPTH];
                        e.add((double) tsq_decode_d(b[0])*(q[j] - tsq_decode_z(b[1], nbits))*da*qa);
                    }
                }
                CHECK(e.is_near(s[c][r], n), "tsq%d, %d blocks, column %d of %d, row %d of %d: %.9g, should be %.9g\n", nbits, nb, c, w, r, nrows, s[c][r], e.sum);
            }
        }
    }
}

// whatever the weights and their importance are, there is a block for them
static void check_quantize(input & in, int nbits, bool any, bool at_end) {
    memory x(QK_TSQ*sizeof(float), at_end);
    memory w(QK_TSQ*sizeof(float), at_end);
    memory y(TSQ_BLOCK_SIZE(nbits), at_end);
    make_floats(in, QK_TSQ, any, x.as<float>());
    make_floats(in, QK_TSQ, any, w.as<float>());
    for (int i = 0; i < QK_TSQ; i++) {
        w.as<float>()[i] = std::fabs(w.as<float>()[i]);
    }
    CHECK(quantize(nbits, x.as<float>(), y.as(), QK_TSQ, nullptr) == y.size(), "tsq%d\n", nbits);
    check_dequantize(nbits, y, 1, at_end);
    CHECK(quantize(nbits, x.as<float>(), y.as(), QK_TSQ, w.as<float>()) == y.size(), "tsq%d\n", nbits);
    check_dequantize(nbits, y, 1, at_end);
}

int LLVMFuzzerInitialize(int *, char ***) {
    for (int i = 0; i < 1 << 16; i++) {
        ggml_table_f32_f16[i] = GGML_FP16_TO_FP32((ggml_fp16_t) i);
    }
    return 0;
}

// the first five bytes say what is done with the others
int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size < 5) {
        return 0;
    }
    const int  nbits  = nbits_of(data);
    const int  nb     = 1 + data[1] % 36; // two groups of activations, and more
    const int  w      = 1 + data[2] % TSQ_NCOLS;
    const int  plain  = 1 + data[3] % 17; // rows for the generic kernel, which takes any number of them
    const bool any    = data[4] & 1;
    const bool at_end = data[4] & 2;
    input in(data + 5, size - 5);

    {
        memory row((size_t) nb*TSQ_BLOCK_SIZE(nbits), at_end);
        in.bytes(row.as(), row.size());
        check_dequantize(nbits, row, nb, at_end);
        check_vec_dot(in, nbits, row, nb, any, at_end);
    }
    for (int nrows : { plain, TSQ_NROWS }) {
        if (nrows > 0) {
            memory rows((size_t) nrows*nb*TSQ_BLOCK_SIZE(nbits), at_end);
            in.bytes(rows.as(), rows.size());
            check_gemm(in, nbits, rows, nrows, nb, w, any, at_end);
        }
    }
    if (data[4] & 4) {
        check_quantize(in, nbits, any, at_end);
    }
    return 0;
}
