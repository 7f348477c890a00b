// Our CUDA kernels on the host: decoding, MMVQ and MMQ against the C reference, in upstream's own kernels under a small emulator.

#include "kernels.h"

#include "ggml-impl.h"
#include "tesseraq/bcq/cuda/tables.cuh"

#include <algorithm>

emulator::block * emulator::running = nullptr;

// bytes of a block that are scales
static size_t scales(ggml_type type) {
    return tesseraq_has_order(type) ? 2 : 1;
}

#define TESTED_TYPE(TYPE, type, LAYOUT, layout, id, weights, bytes, ...) \
    { GGML_TYPE_##TYPE, weights, bytes, scales(GGML_TYPE_##TYPE), #type, dequantize_row_##layout },

const std::vector<tested_type> tested_types = { TESSERAQ_TYPES(TESTED_TYPE) };

matrix::matrix(const tested_type & type, int64_t nrows, int64_t ncols, random_t & random, bool any_scale) :
        type(type), nrows(nrows), ncols(ncols), data(GGML_PAD(nrows*(ncols/type.qk)*type.block_size, sizeof(uint32_t))), weights(nrows*ncols) {
    for (uint8_t & byte : data) {
        byte = (uint8_t) random();
    }
    for (size_t i = 0; !any_scale && i < nrows*blocks()*type.block_size; ++i) {
        if (i % type.block_size < type.scales) {
            data[i] = (uint8_t) (120 + random() % 48); // 2^-9 ... 2^-4
        }
    }
    type.dequantize(data.data(), weights.data(), (int64_t) weights.size());
}

std::vector<float> as_multiplied(const tested_type & type, const std::vector<float> & x) {
    std::vector<float> y = x;
    for (size_t i = 0; type.type == GGML_TYPE_BCQ4_A4 && i < x.size(); i += QK_BCQ) {
        int8_t q[QK_BCQ];
        float  d;
        bcq_encode_generic(&x[i], q, &d);
        for (int j = 0; j < QK_BCQ; ++j) {
            y[i + j] = d*q[j];
        }
    }
    return y;
}

void fail(const std::string & what) {
    printf("%s\n", what.c_str());
    exit(1);
}

// ------------------------------------------------------------ what the backend would say

const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = [] {
        ggml_cuda_device_info info = {};
        info.device_count         = 1;
        info.devices[0].cc        = __CUDA_ARCH__;
        info.devices[0].nsm       = 4;
        info.devices[0].smpbo     = 100*1024;
        info.devices[0].warp_size = 32;
        return info;
    }();
    return info;
}

int ggml_cuda_get_device() { return 0; }

void ggml_cuda_error(const char * stmt, const char *, const char *, int, const char * msg) {
    fail(std::string(stmt) + ": " + msg);
}

void ggml_cuda_set_device(int) {}

extern "C" int64_t ggml_blck_size(ggml_type type) {
    for (const tested_type & t : tested_types) {
        if (t.type == type) {
            return t.qk;
        }
    }
    fail("the block of a type that is not tested is asked for");
}

extern "C" void ggml_abort(const char * file, int line, const char * format, ...) {
    fail(std::string(file) + ":" + std::to_string(line) + ": " + format);
}

extern "C" void ggml_critical_section_start(void) {}
extern "C" void ggml_critical_section_end(void) {}

// ------------------------------------------------------------ codebooks of a model

static std::vector<int8_t> own_codebooks(int count, int levels, random_t & random) {
    std::vector<int8_t> codebooks(count*levels);
    for (int8_t & c : codebooks) {
        c = (int8_t) (random() % (2*BCQ_MAX_CODE + 1)) - BCQ_MAX_CODE;
    }
    for (int b = 0; b < count; ++b) {
        std::sort(&codebooks[b*levels], &codebooks[b*levels] + levels);
    }
    return codebooks;
}

// takes the universal codebooks of a layout (none) or others into use, as a model does that is loaded, and computes a graph of one product
static void use(bcq_layout layout, ggml_type type, const int8_t * codebooks) {
    if (!bcq_acquire(layout, codebooks)) {
        fail("codebooks are refused");
    }
    ggml_tensor weights = {}, product = {}, * nodes[] = { &product };
    weights.type   = type;
    product.src[0] = &weights;

    ggml_cgraph graph = {};
    graph.n_nodes = 1;
    graph.nodes   = nodes;
    bcq_prepare(&graph, nullptr);
}

int main(int argc, char ** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    random_t random(20);
    const auto check = part == "dequantize" ? check_dequantize : part == "get_rows" ? check_get_rows :
        part == "get_cols" ? check_get_cols : part == "quantize" ? check_quantize : part == "mmvq" ? check_mmvq : part == "mmq" ? check_mmq : nullptr;
    if (!check) {
        fail("no such part: " + part);
    }
    types_t all, with_codebooks;
    for (const tested_type & t : tested_types) {
        all.push_back(&t);
        if (tesseraq_has_codebooks(t.type)) {
            with_codebooks.push_back(&t);
        }
    }
#define USE_UNIVERSAL(LAYOUT, ...) use(BCQ_LAYOUT_##LAYOUT, GGML_TYPE_##LAYOUT, nullptr);
    TESSERAQ_CODEBOOKS(USE_UNIVERSAL)
    check(all, random);
#define USE_OWN(LAYOUT, layout, count, levels, key) \
    bcq_release(BCQ_LAYOUT_##LAYOUT);               \
    use(BCQ_LAYOUT_##LAYOUT, GGML_TYPE_##LAYOUT, own_codebooks(count, levels, random).data());
    TESSERAQ_CODEBOOKS(USE_OWN)
    check(with_codebooks, random);
    printf("%s: all ok\n", part.c_str());
    return 0;
}
