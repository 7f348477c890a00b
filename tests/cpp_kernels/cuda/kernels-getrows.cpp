// getrows.cu: the rows that are asked for, bit for bit

#include "getrows.cu"

#include "kernels.h"

void check_get_rows(const types_t & types, random_t & random) {
    for (const tested_type * t : types) {
        const tested_type & type = *t;
        const matrix m(type, 11, 5*type.qk, random, true);
        const std::vector<int32_t> ids = { 10, 0, 7, 7, 3 };
        std::vector<float> y(ids.size()*m.ncols);

        const size_t nb01 = m.blocks()*type.block_size;
        const size_t nb10 = sizeof(int32_t);
        const size_t nb11 = nb10*ids.size();
        const size_t nb1  = sizeof(float)*m.ncols;
        const size_t nb2  = nb1*ids.size();
        ggml_cuda_get_rows_switch_src0_type(m.data.data(), type.type, ids.data(), y.data(), m.ncols, nb01, nb01*m.nrows, nb01*m.nrows,
            (int64_t) ids.size(), 1, 1, nb10, nb11, nb11, nb1, nb2, nb2, nullptr);

        for (size_t i = 0; i < y.size(); ++i) {
            const float expected = m.weights[ids[i/m.ncols]*m.ncols + i%m.ncols];
            if (memcmp(&y[i], &expected, sizeof(expected)) != 0) {
                fail(std::string(type.name) + " get_rows: number " + std::to_string(i) + " is " + std::to_string(y[i]) +
                     ", not " + std::to_string(expected));
            }
        }
    }
}
