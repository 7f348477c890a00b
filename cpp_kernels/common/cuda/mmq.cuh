#pragma once

// Our types in MMQ. Each has the tiles of one of upstream's types, from configuration to products, and a load_tiles of its own that
// fills them. Included at the top of upstream's mmq.cuh.

// the type of upstream that has the same tiles: Q5_1 has 8 bit integers, with a scale and an offset for every 32, Q8_0 the same without
// an offset
static constexpr __host__ __device__ ggml_type tesseraq_mmq_like(ggml_type type) {
    switch (type) {
        TESSERAQ_TSQ_TYPES(TESSERAQ_CASE)
            return GGML_TYPE_Q5_1;
        TESSERAQ_BCQ_TYPES(TESSERAQ_CASE)
            return GGML_TYPE_Q8_0;
        default:
            return GGML_TYPE_COUNT;
    }
}

static constexpr __host__ __device__ bool tesseraq_has_tiles(ggml_type type) {
    return tesseraq_mmq_like(type) != GGML_TYPE_COUNT;
}

// in upstream's functions of a type: what they say of the type with the same tiles
#define TESSERAQ_MMQ_LIKE(type, ...)                    \
    if (tesseraq_has_tiles(type)) {                     \
        const ggml_type like = tesseraq_mmq_like(type); \
        return __VA_ARGS__;                             \
    }

template <typename config_t>
static constexpr __host__ __device__ config_t tesseraq_mmq_config(ggml_type type, config_t like) {
    if (like.type != GGML_TYPE_COUNT) { // which says that there is none
        like.type = type;
    }
    return like;
}

#define TESSERAQ_MMQ_UTIL_FUNCS(type, J, fallback, prec_src1)                                 \
    if constexpr (tesseraq_has_tiles(type)) {                                                 \
        return tesseraq_mmq_util_funcs<type, J, fallback>(                                    \
            ggml_cuda_mmq_get_util_funcs<tesseraq_mmq_like(type), J, fallback, prec_src1>()); \
    }

#define TESSERAQ_CASE_MMQ(TYPE, type, LAYOUT, layout, ...)     \
    case GGML_TYPE_##TYPE:                                     \
        mul_mat_q_case<GGML_TYPE_##LAYOUT>(ctx, args, stream); \
        break;

#define TESSERAQ_DECL_MMQ_CASE(TYPE, type, LAYOUT, layout, ...) extern DECL_MMQ_CASE(GGML_TYPE_##LAYOUT);
