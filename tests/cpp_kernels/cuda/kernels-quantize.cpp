// quantize.cu: activations, for MMVQ and MMQ; those of BCQ4_A4 are what the C reference makes of them, to the bit

#include "quantize.cu"

#include "kernels.h"

static constexpr int QK = QK_BCQ;

// rows of numbers, of several kinds: as in models, large, small, zeros, and halfway between two quarters of the scale
static std::vector<float> rows(int64_t nrows, int64_t ncols, random_t & random) {
    std::normal_distribution<float> normal;
    std::vector<float> x(nrows*ncols);
    for (int64_t i = 0; i < nrows; ++i) {
        for (int64_t j = 0; j < ncols; ++j) {
            const int kind = (i + j/QK) % 5;
            x[i*ncols + j] = kind == 0 ? normal(random) : kind == 1 ? 1e4f*normal(random) : kind == 2 ? 1e-4f*normal(random) :
                             kind == 3 ? 0.0f : random() % 4 ? ((int) (random() % 497) - 248)/8.0f : 31.0f;
        }
    }
    return x;
}

// A block at x, or zeros behind the end of a row, against what has been written: d as it is stored, and a block of 32 after the other
static void compare(const std::string & where, const float * x, float d0, const int8_t * q0, float d1, const int8_t * q1, bool half_scale) {
    const std::vector<float> zeros(QK);
    int8_t q[QK];
    float  d;
    bcq_encode_generic(x ? x : zeros.data(), q, &d);
    if (half_scale) {
        d = half(d);
    }
    if (d0 != d || d1 != d) {
        fail(where + " has scales " + std::to_string(d0) + " and " + std::to_string(d1) + ", not " + std::to_string(d));
    }
    for (int i = 0; i < QK; ++i) {
        const int found = i < QK/2 ? q0[i] : q1[i - QK/2];
        if (found != q[i]) {
            fail(where + ": number " + std::to_string(i) + " is " + std::to_string(found) + ", not " + std::to_string(q[i]));
        }
    }
}

static void check_rows(random_t & random) {
    const int64_t nrows = 5, ncols = 9*QK, stride = ncols + 3, padded = GGML_PAD(ncols, MATRIX_ROW_PADDING);
    const std::vector<float> x = rows(nrows, stride, random);
    std::vector<block_q8_1> y(nrows*padded/QK8_1);
    quantize_row_q8_1_cuda(x.data(), nullptr, y.data(), GGML_TYPE_BCQ4_A4, ncols, stride, stride*nrows, stride*nrows,
        padded, nrows, 1, 1, nullptr);

    for (int64_t i = 0; i < nrows; ++i) {
        for (int64_t k = 0; k < padded; k += QK) {
            const block_q8_1 * b = &y[(i*padded + k)/QK8_1];
            compare("row " + std::to_string(i) + ", from " + std::to_string(k), k < ncols ? &x[i*stride + k] : nullptr,
                __low2float(b[0].ds), b[0].qs, __low2float(b[1].ds), b[1].qs, true);
        }
    }
}

// row i of the result, of nrows, is row of[i] of x
static void compare_mmq(const std::string & what, const std::vector<float> & x, int64_t ncols, const std::vector<block_q8_1_mmq> & y,
        const std::vector<int32_t> & of) {
    const int64_t nrows = (int64_t) of.size();
    for (int64_t i = 0; i < nrows; ++i) {
        for (int64_t k = 0; k < GGML_PAD(ncols, MATRIX_ROW_PADDING); k += QK) {
            const block_q8_1_mmq & b = y[k/QK8_1_MMQ*nrows + i];
            const int half_block = k % QK8_1_MMQ / QK;
            compare(what + ", row " + std::to_string(i) + ", from " + std::to_string(k), k < ncols ? &x[of[i]*ncols + k] : nullptr,
                b.d4[2*half_block],     b.qs + half_block*QK,
                b.d4[2*half_block + 1], b.qs + half_block*QK + QK8_1, false);
        }
    }
}

static void check_tiles(random_t & random) {
    const int64_t nrows = 4, ncols = 9*QK, padded = GGML_PAD(ncols, MATRIX_ROW_PADDING);
    const std::vector<float> x = rows(nrows, ncols, random);

    std::vector<block_q8_1_mmq> y(nrows*padded/QK8_1_MMQ);
    quantize_mmq_q8_1_cuda(x.data(), nullptr, y.data(), GGML_TYPE_BCQ4_A4, ncols, ncols, ncols*nrows, ncols*nrows,
        padded, nrows, 1, 1, nullptr);
    compare_mmq("for MMQ", x, ncols, y, { 0, 1, 2, 3 });

    const std::vector<int32_t> ids = { 3, 0, 0, 2, 1 };
    y.resize(ids.size()*padded/QK8_1_MMQ);
    quantize_mmq_q8_1_cuda(x.data(), ids.data(), y.data(), GGML_TYPE_BCQ4_A4, ncols, ncols, ncols*nrows, ncols*nrows,
        padded, ids.size(), 1, 1, nullptr);
    compare_mmq("by ids", x, ncols, y, ids);

    // tokens to the rows of two experts each
    const std::vector<int32_t> to = { 5, 2, 0, 7, 1, 3, 6, 4 };
    std::vector<int32_t> from(to.size());
    for (size_t i = 0; i < to.size(); ++i) {
        from[to[i]] = (int32_t) i/2;
    }
    y.assign(to.size()*padded/QK8_1_MMQ, block_q8_1_mmq());
    quantize_scatter_mmq_q8_1_cuda(x.data(), to.data(), y.data(), GGML_TYPE_BCQ4_A4, ncols, ncols, padded, nrows, to.size(), 2, nullptr);
    compare_mmq("scattered", x, ncols, y, from);
}

void check_quantize(const types_t &, random_t & random) {
    check_rows(random);
    check_tiles(random);
}
