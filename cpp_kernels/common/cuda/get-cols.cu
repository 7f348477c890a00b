#include "tesseraq/common/cuda/get-cols.cuh"

#define GET_COLS_BLOCK_SIZE 256

// y[i3][i2][i1][i] = x[i3][i2][i1][cols[i]]; strides are in floats, and y has none
static __global__ void get_cols(
        const float * __restrict__ x, const int32_t * __restrict__ cols, float * __restrict__ y, const int64_t ncols,
        const int64_t ne1, const int64_t ne2, const int64_t nrows, const int64_t s1, const int64_t s2, const int64_t s3) {
    const int64_t i = (int64_t) GET_COLS_BLOCK_SIZE*blockIdx.x + threadIdx.x;
    if (i >= ncols) {
        return;
    }
    const int32_t col = cols[i];

    for (int64_t row = blockIdx.y; row < nrows; row += gridDim.y) {
        const int64_t i1 = row % ne1;
        const int64_t i2 = row / ne1 % ne2;
        const int64_t i3 = row / ne1 / ne2;
        y[row*ncols + i] = x[i1*s1 + i2*s2 + i3*s3 + col];
    }
}

void ggml_cuda_op_get_cols(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src0 = dst->src[0];
    const ggml_tensor * src1 = dst->src[1];

    GGML_ASSERT(src0->type == GGML_TYPE_F32 && src0->nb[0] == sizeof(float));
    GGML_ASSERT(src1->type == GGML_TYPE_I32 && ggml_is_contiguous(src1));
    GGML_ASSERT(dst->type  == GGML_TYPE_F32 && ggml_is_contiguous(dst));

    const int64_t ncols = dst->ne[0];
    const int64_t nrows = ggml_nrows(dst);
    if (nrows == 0) {
        return;
    }
    const dim3   blocks((ncols + GET_COLS_BLOCK_SIZE - 1)/GET_COLS_BLOCK_SIZE, std::min<int64_t>(nrows, 65535));
    cudaStream_t stream = ctx.stream();
    get_cols<<<blocks, GET_COLS_BLOCK_SIZE, 0, stream>>>(
        (const float *) src0->data, (const int32_t *) src1->data, (float *) dst->data, ncols, dst->ne[1], dst->ne[2], nrows,
        src0->nb[1]/sizeof(float), src0->nb[2]/sizeof(float), src0->nb[3]/sizeof(float));
}
