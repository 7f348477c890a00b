#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include "ggml-cpu-impl.h"

#include "tesseraq/common/compiler.h"
#include "tesseraq/common/get-cols.h"

void ggml_vec_get_cols_generic(int n, float * GGML_RESTRICT y, const float * GGML_RESTRICT x, const int32_t * GGML_RESTRICT cols) {
    for (int i = 0; i < n; i++) {
        y[i] = x[cols[i]];
    }
}

#if !defined(TESSERAQ_AVX2)
void ggml_vec_get_cols(int n, float * GGML_RESTRICT y, const float * GGML_RESTRICT x, const int32_t * GGML_RESTRICT cols) {
    ggml_vec_get_cols_generic(n, y, x, cols);
}
#endif

void ggml_compute_forward_get_cols(const struct ggml_compute_params * params, struct ggml_tensor * dst) {
    const struct ggml_tensor * src0 = dst->src[0];
    const struct ggml_tensor * src1 = dst->src[1];

    GGML_ASSERT(src0->type == GGML_TYPE_F32 && src0->nb[0] == sizeof(float));
    GGML_ASSERT(src1->type == GGML_TYPE_I32 && src1->nb[0] == sizeof(int32_t));
    GGML_ASSERT(dst->type  == GGML_TYPE_F32 && dst->nb[0]  == sizeof(float));

    const int64_t n     = dst->ne[0];
    const int64_t nrows = ggml_nrows(dst);

    // threads share all numbers: of one row each has a part, of many each has some
    const int64_t first = n*nrows*params->ith/params->nth;
    const int64_t last  = n*nrows*(params->ith + 1)/params->nth;

    for (int64_t i = first; i < last;) {
        const int64_t row = i / n;
        const int64_t col = i % n;
        const int64_t end = MIN(n, col + last - i);

        const int64_t i1 = row % dst->ne[1];
        const int64_t i2 = row / dst->ne[1] % dst->ne[2];
        const int64_t i3 = row / dst->ne[1] / dst->ne[2];

        const float * x = (const float *) ((const char *) src0->data + i1*src0->nb[1] + i2*src0->nb[2] + i3*src0->nb[3]);
        float       * y = (float *) ((char *) dst->data + i1*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]);

        ggml_vec_get_cols((int) (end - col), y + col, x, (const int32_t *) src1->data + col);
        i += end - col;
    }
}
