// get-cols.cu: columns of a view, bit for bit

#include "tesseraq/common/cuda/get-cols.cu"

#include "kernels.h"

// what the operator asks ggml for
extern "C" int64_t ggml_nrows(const ggml_tensor * t) { return t->ne[1]*t->ne[2]*t->ne[3]; }

extern "C" bool ggml_is_contiguous(const ggml_tensor * t) { return t->nb[0] == 4 && t->nb[1] == 4*(size_t) t->ne[0]; }

static ggml_tensor * tensor(ggml_type type, void * data, size_t size, const std::vector<int64_t> & ne, const std::vector<size_t> & stride) {
    ggml_tensor * t = new ggml_tensor();
    t->type = type;
    t->data = data;
    for (int i = 0; i < 4; ++i) {
        t->ne[i] = ne[i];
        t->nb[i] = size*stride[i];
    }
    return t;
}

void check_get_cols(const types_t &, random_t & random) {
    static ggml_backend_cuda_context * context = new ggml_backend_cuda_context(0); // nothing here could take it down

    // fewer columns than a block has threads, and more; rows with gaps
    for (const int64_t ncols : { 77, 256, 1000 }) {
        const int64_t ne1 = 5, ne2 = 3, ne3 = 2;
        const std::vector<size_t> stride = { 1, (size_t) ncols + 3, (ne1 + 1)*((size_t) ncols + 3), ne2*(ne1 + 1)*((size_t) ncols + 3) };
        std::vector<float> x(stride[3]*ne3);
        for (float & value : x) {
            value = (float) random();
        }
        std::vector<int32_t> cols(ncols);
        for (int32_t & col : cols) {
            col = random() % ncols;
        }
        std::vector<float> y(ncols*ne1*ne2*ne3);

        const size_t n = ncols;
        ggml_tensor * dst = tensor(GGML_TYPE_F32, y.data(), sizeof(float), { ncols, ne1, ne2, ne3 }, { 1, n, n*ne1, n*ne1*ne2 });
        dst->src[0] = tensor(GGML_TYPE_F32, x.data(),    sizeof(float),   { ncols, ne1, ne2, ne3 }, stride);
        dst->src[1] = tensor(GGML_TYPE_I32, cols.data(), sizeof(int32_t), { ncols, 1, 1, 1 },       { 1, n, n, n });
        ggml_cuda_op_get_cols(*context, dst);

        for (size_t i = 0; i < y.size(); ++i) {
            const size_t row = i/n;
            const float  expected = x[row%ne1*stride[1] + row/ne1%ne2*stride[2] + row/ne1/ne2*stride[3] + cols[i%n]];
            if (y[i] != expected) {
                fail("get_cols: number " + std::to_string(i) + " is " + std::to_string(y[i]) + ", not " + std::to_string(expected));
            }
        }
        delete dst->src[0];
        delete dst->src[1];
        delete dst;
    }
}
