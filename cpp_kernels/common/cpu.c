#include "tesseraq/common/cpu.h"
#include "tesseraq/common/q8.h"
#include "tesseraq/common/reference.h"

// of this library: the address of another one's function is no constant everywhere
#define FROM_FLOAT(TYPE, type, LAYOUT, layout, ...)                                                \
    void quantize_row_##type(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k) {   \
        quantize_row_##layout##_ref(x, y, k);                                                      \
    }
TESSERAQ_TYPES(FROM_FLOAT)

ggml_to_float_t ggml_cpu_to_float(enum ggml_type type) {
#define CASE(TYPE, type, LAYOUT, layout, ...) case GGML_TYPE_##TYPE: return ggml_cpu_##layout##_to_fp32;
    switch (type) {
        TESSERAQ_TYPES(CASE)
        default: return ggml_get_type_traits(type)->to_float;
    }
#undef CASE
}

void ggml_cpu_whole_groups(enum ggml_type type, int64_t nb, int64_t * first, int64_t * last) {
    switch (type) {
        TESSERAQ_ACTIVATIONS(TESSERAQ_CASE)
            *first = *first == nb ? nb : *first - *first % Q8_GROUP;
            *last  = *last  == nb ? nb : *last  - *last  % Q8_GROUP;
            break;
        default:
            break;
    }
}
