// convert.cu: to float32, bit for bit; to float16 and bfloat16, as the float32 number rounds. Contiguous, and row by row.

#include "convert.cu"

#include "kernels.h"

template <typename dst_t>
static void compare(const matrix & m, const std::vector<dst_t> & y, const char * what) {
    for (size_t i = 0; i < y.size(); ++i) {
        const dst_t expected = dst_t(m.weights[i]);
        if (memcmp(&y[i], &expected, sizeof(expected)) != 0) {
            fail(std::string(m.type.name) + " " + what + ": weight " + std::to_string(i) + " is " + std::to_string((float) y[i]) +
                 ", not " + std::to_string((float) expected));
        }
    }
}

template <typename dst_t, typename cont_t, typename nc_t>
static void check(const matrix & m, cont_t cont, nc_t nc, const char * what) {
    if (!cont || !nc) {
        fail(std::string(m.type.name) + " has no conversion: " + what);
    }
    std::vector<dst_t> y(m.weights.size());
    cont(m.data.data(), y.data(), (int64_t) y.size(), nullptr);
    compare(m, y, what);

    std::fill(y.begin(), y.end(), dst_t(0.0f));
    nc(m.data.data(), y.data(), m.ncols, m.nrows, 1, 1, m.blocks(), m.blocks()*m.nrows, m.blocks()*m.nrows, nullptr);
    compare(m, y, what);
}

void check_dequantize(const types_t & types, random_t & random) {
    for (const tested_type * t : types) {
        const tested_type & type = *t;
        for (const bool any_scale : { false, true }) {
            const matrix m(type, 9, 9*type.qk, random, any_scale);
            check<float>      (m, ggml_get_to_fp32_cuda(type.type), ggml_get_to_fp32_nc_cuda(type.type), "float32");
            check<half>       (m, ggml_get_to_fp16_cuda(type.type), ggml_get_to_fp16_nc_cuda(type.type), "float16");
            check<nv_bfloat16>(m, ggml_get_to_bf16_cuda(type.type), ggml_get_to_bf16_nc_cuda(type.type), "bfloat16");
        }
    }
}
