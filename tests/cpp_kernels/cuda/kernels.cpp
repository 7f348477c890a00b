// Our CUDA kernels on the host: decoding, MMVQ and MMQ against the C reference, in upstream's own kernels under a small emulator.

#include "kernels.h"

emulator::block * emulator::running = nullptr;

template <typename block_t, void (*dequantize_row)(const block_t *, float *, int64_t)>
static void dequantize(const void * x, float * y, int64_t k) {
    dequantize_row((const block_t *) x, y, k);
}

const tsq_type tsq_types[3] = {
    { GGML_TYPE_TSQ2, 2, "tsq2", dequantize<block_tsq2, dequantize_row_tsq2> },
    { GGML_TYPE_TSQ3, 3, "tsq3", dequantize<block_tsq3, dequantize_row_tsq3> },
    { GGML_TYPE_TSQ4, 4, "tsq4", dequantize<block_tsq4, dequantize_row_tsq4> },
};

matrix::matrix(const tsq_type & type, int64_t nrows, int64_t ncols, random_t & random, bool any_scale) :
        type(type), nrows(nrows), ncols(ncols), data(nrows*(ncols/QK_TSQ)*TSQ_BLOCK_SIZE(type.nbits)), weights(nrows*ncols) {
    for (uint8_t & byte : data) {
        byte = (uint8_t) random();
    }
    for (size_t i = 0; !any_scale && i < data.size(); i += TSQ_BLOCK_SIZE(type.nbits)) {
        data[i] = (uint8_t) (120 + random() % 48); // 2^-9 ... 2^-4
    }
    type.dequantize(data.data(), weights.data(), (int64_t) weights.size());
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

extern "C" int64_t ggml_blck_size(ggml_type) { return QK_TSQ; }

extern "C" void ggml_abort(const char * file, int line, const char * format, ...) {
    fail(std::string(file) + ":" + std::to_string(line) + ": " + format);
}

int main(int argc, char ** argv) {
    const std::string part = argc > 1 ? argv[1] : "";
    random_t random(20);
    if (part == "dequantize") {
        check_dequantize(random);
    } else if (part == "get_rows") {
        check_get_rows(random);
    } else if (part == "mmvq") {
        check_mmvq(random);
    } else if (part == "mmq") {
        check_mmq(random);
    } else {
        fail("no such part: " + part);
    }
    printf("%s: all ok\n", part.c_str());
    return 0;
}
