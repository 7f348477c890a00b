// mmvq.cu: quantize_q8_1 and mul_mat_vec_q as they are launched, against sums in double precision over the same activations

#include "mmvq.cu"
#include "quantize.cuh"

#include "kernels.h"

static std::vector<float> normal(size_t n, random_t & random) {
    std::normal_distribution<float> distribution(0.25f); // a mean, so that zero-points matter
    std::vector<float> x(n);
    for (float & value : x) {
        value = distribution(random);
    }
    return x;
}

// columns of activations, quantised by upstream's kernel, padded as upstream does
struct activations {
    int64_t                 stride; // blocks
    std::vector<block_q8_1> q;

    activations(const tested_type & type, int64_t ncols_x, int64_t n, random_t & random) :
            stride(GGML_PAD(ncols_x, MATRIX_ROW_PADDING)/QK8_1), q(n*stride) {
        const std::vector<float> x = normal(ncols_x*n, random);
        quantize_row_q8_1_cuda(x.data(), nullptr, q.data(), type.type, ncols_x, ncols_x, ncols_x*n, ncols_x*n,
            stride*QK8_1, n, 1, 1, nullptr);
    }
};

static double dot(const matrix & m, int64_t row, const block_q8_1 * y, double & magnitude) {
    double sum = 0.0;
    magnitude  = 0.0;
    for (int64_t i = 0; i < m.ncols; ++i) {
        const block_q8_1 & b = y[i/QK8_1];
        const double product = (double) m.weights[row*m.ncols + i] * (double) __low2float(b.ds) * b.qs[i%QK8_1];
        sum       += product;
        magnitude += std::abs(product);
    }
    return sum;
}

static void compare(const std::string & what, float found, double expected, double magnitude) {
    if (!(std::abs(found - expected) <= 1e-6*magnitude)) {
        fail(what + " is " + std::to_string(found) + ", not " + std::to_string(expected));
    }
}

static void check(const tested_type & t, int64_t nrows, int64_t ncols_x, int ncols_dst, bool any_scale, random_t & random) {
    const matrix      m(t, nrows, ncols_x, random, any_scale);
    const activations y(t, ncols_x, ncols_dst, random);
    std::vector<float> dst(nrows*ncols_dst, NAN);

    mul_mat_vec_q_switch_type(m.data.data(), t.type, y.q.data(), nullptr, {}, dst.data(), ncols_x, nrows, ncols_dst,
        m.blocks(), y.stride, nrows, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, nullptr);

    for (int j = 0; j < ncols_dst; ++j) {
        for (int64_t i = 0; i < nrows; ++i) {
            double magnitude;
            const double expected = dot(m, i, y.q.data() + j*y.stride, magnitude);
            compare(std::string(t.name) + ": row " + std::to_string(i) + " of " + std::to_string(nrows) + ", column " + std::to_string(j) +
                " of " + std::to_string(ncols_dst) + ", " + std::to_string(ncols_x) + " weights", dst[j*nrows + i], expected, magnitude);
        }
    }
}

// one activation that is not finite makes every product NaN
static void check_not_finite(const tested_type & t, float value, random_t & random) {
    const int64_t nrows = 4, ncols = 9*t.qk;
    const matrix m(t, nrows, ncols, random);
    std::vector<float> x = normal(ncols, random);
    x[random() % ncols] = value;
    const int64_t stride = GGML_PAD(ncols, MATRIX_ROW_PADDING)/QK8_1;
    std::vector<block_q8_1> q(stride);
    quantize_row_q8_1_cuda(x.data(), nullptr, q.data(), t.type, ncols, ncols, ncols, ncols, stride*QK8_1, 1, 1, 1, nullptr);
    std::vector<float> dst(nrows, 0.0f);
    mul_mat_vec_q_switch_type(m.data.data(), t.type, q.data(), nullptr, {}, dst.data(), ncols, nrows, 1,
        m.blocks(), stride, nrows, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, nullptr);
    for (int64_t i = 0; i < nrows; ++i) {
        if (!std::isnan(dst[i])) {
            fail(std::string(t.name) + ": one activation is " + std::to_string(value) + ", the product of row " + std::to_string(i) + " is " + std::to_string(dst[i]));
        }
    }
}

// a matrix times one column, the gate times it, silu of the second times the first, in one kernel
static void check_fused(const tested_type & t, random_t & random) {
    const int64_t nrows = 6;
    const int64_t ncols = 12*t.qk;
    const matrix      m(t, nrows, ncols, random);
    const matrix      gate(t, nrows, ncols, random);
    const activations y(t, ncols, 1, random);
    std::vector<float> dst(nrows, NAN);

    ggml_cuda_mm_fusion_args_device fusion = {};
    fusion.gate   = gate.data.data();
    fusion.glu_op = GGML_GLU_OP_SWIGLU;
    mul_mat_vec_q_switch_type(m.data.data(), t.type, y.q.data(), nullptr, fusion, dst.data(), ncols, nrows, 1,
        m.blocks(), y.stride, nrows, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, nullptr);

    for (int64_t i = 0; i < nrows; ++i) {
        double magnitude;
        const double g = dot(gate, i, y.q.data(), magnitude);
        const double x = dot(m,    i, y.q.data(), magnitude);
        compare(std::string(t.name) + " with a gate: row " + std::to_string(i), dst[i], x*g/(1 + exp(-g)), 20*magnitude);
    }
}

// Experts, by ids: some tokens, two experts for each. Rows that do not fill thread blocks would run into the next expert's.
static void check_experts(const tested_type & t, int64_t nrows, int n_tokens, random_t & random) {
    const int n_experts = 3;
    const int n_used    = 2;
    const int64_t ncols = 5*t.qk;
    const matrix      m(t, nrows*n_experts, ncols, random);
    const activations y(t, ncols, n_tokens, random); // one for all experts of a token
    std::vector<int32_t> ids;
    for (int i = 0; i < n_tokens; ++i) {
        ids.push_back(2 - i%3);
        ids.push_back((i + 3) % 2);
    }
    std::vector<float> dst(nrows*n_used*n_tokens, NAN);

    mul_mat_vec_q_switch_type(m.data.data(), t.type, y.q.data(), ids.data(), {}, dst.data(), ncols, nrows, n_tokens,
        m.blocks(), y.stride, nrows*n_used, n_experts, 1, n_used, m.blocks()*nrows, y.stride, nrows,
        1, 1, 0, 0, 0, n_used, nullptr);

    for (int64_t i = 0; i < (int64_t) dst.size(); ++i) {
        const int64_t slot  = i / nrows;
        const int64_t token = slot / n_used;
        double magnitude;
        const double expected = dot(m, ids[slot]*nrows + i%nrows, y.q.data() + token*y.stride, magnitude);
        compare(std::string(t.name) + " expert " + std::to_string(ids[slot]) + ", token " + std::to_string(token) + " of " +
            std::to_string(n_tokens) + ": row " + std::to_string(i%nrows) + " of " + std::to_string(nrows), dst[i], expected, magnitude);
    }
}

void check_mmvq(const types_t & types, random_t & random) {
    for (const tested_type * type : types) {
        const tested_type & t = *type;
        check(t, 5, 70*t.qk, 1, false, random); // more than one step
        check_not_finite(t, NAN, random);
        check_not_finite(t, -INFINITY, random);
        if (t.type == GGML_TYPE_BCQ4_A4) {
            continue; // other activations, and BCQ4's kernels
        }
        for (const int ncols_dst : { 1, 2, 3, 4, 5, 6, 7, 8 }) {
            check(t, ncols_dst == 1 ? 8 : 4, 9*t.qk, ncols_dst, false, random); // fewer weights than one step takes
        }
        check(t, 7, 70*t.qk, 1, true, random);
        check_fused(t, random);
        check_experts(t, 6, 1, random);
        check_experts(t, 6, 4, random);
    }
}
