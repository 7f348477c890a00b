#pragma once

// Included by test-backend-ops.cpp, among its tests of operators.

// GGML_OP_GET_COLS
struct test_get_cols : public test_case {
    const std::array<int64_t, 4> ne;
    const int n; // columns to get
    const bool v; // view of the data

    std::string vars() override { return VARS_TO_STR3(ne, n, v); }

    test_get_cols(std::array<int64_t, 4> ne, int n, bool v) : ne(ne), n(n), v(v) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * in = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, v ? 2*ne[0] : ne[0], ne[1], ne[2], ne[3]);
        if (v) {
            in = ggml_view_4d(ctx, in, ne[0], ne[1], ne[2], ne[3], in->nb[1], in->nb[2], in->nb[3], ne[0]*in->nb[0]);
        }
        return ggml_get_cols(ctx, in, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n));
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != NULL; t = ggml_get_next_tensor(ctx, t)) {
            if (t->type == GGML_TYPE_I32) {
                std::vector<int> data(ggml_nelements(t));
                for (int & col : data) {
                    col = rand() % ne[0];
                }
                ggml_backend_tensor_set(t, data.data(), 0, data.size() * sizeof(int));
            } else if (!ggml_is_view_op(t->op)) {
                init_tensor_uniform(t);
            }
        }
    }
};
