#include "ggml.h"

struct ggml_tensor * ggml_get_cols(
        struct ggml_context * ctx,
        struct ggml_tensor  * a,
        struct ggml_tensor  * b) {
    GGML_ASSERT(a->type == GGML_TYPE_F32);
    GGML_ASSERT(b->type == GGML_TYPE_I32);
    GGML_ASSERT(ggml_is_vector(b));

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, b->ne[0], a->ne[1], a->ne[2], a->ne[3]);

    result->op     = GGML_OP_GET_COLS;
    result->src[0] = a;
    result->src[1] = b;

    return result;
}
