#include "ggml-cuda/common.cuh"
#include "ggml-impl.h"

#include "tesseraq/bcq/cuda/tables.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>

static bcq_unit * bcq_units = nullptr; // is there before any constructor runs

bcq_unit::bcq_unit(const void * symbol) : symbol(symbol), next(bcq_units) {
    bcq_units = this;
}

static bool bcq_is_in(const ggml_cgraph * cgraph) {
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        const ggml_tensor * src0 = cgraph->nodes[i]->src[0];
        if (src0 && tesseraq_has_codebooks(src0->type)) {
            return true;
        }
    }
    return false;
}

void bcq_prepare(const ggml_cgraph * cgraph, cudaStream_t stream) {
    static std::mutex        mutex;
    static bool              ready[GGML_CUDA_MAX_DEVICES];
    static bcq_device_tables tables[GGML_CUDA_MAX_DEVICES]; // what a device has

    if (!bcq_is_in(cgraph)) {
        return;
    }

    int device; // the one that this is, however many backends there are for it
    CUDA_CHECK(cudaGetDevice(&device));

    bcq_init();

    std::lock_guard<std::mutex> lock(mutex);
    bcq_device_tables & t = tables[device];
    if (ready[device] && memcmp(t.codeword,  bcq4_tables.codeword, sizeof(t.codeword))  == 0
                      && memcmp(t.codeword2, bcq2_tables.codeword, sizeof(t.codeword2)) == 0) {
        return;
    }

    memcpy(t.codeword,  bcq4_tables.codeword, sizeof(t.codeword));
    memcpy(t.codeword2, bcq2_tables.codeword, sizeof(t.codeword2));
    memcpy(t.shifted,   bcq4_tables.shifted,  sizeof(t.shifted));
    for (int u = -128; u < 128; ++u) {
        for (int b = 0; b < BCQ4_CODEBOOKS; ++b) {
            const int n = bcq4_tables.nearest4[b][u >> 1 & 127];
            const int e = std::min(std::abs(n - u), 127);
            t.nearest[u & 255][b] = n/4;
            t.error  [u & 255][b] = e*e;
        }
    }

    // Nobody uses other codebooks meanwhile: those of a layout change when no model with tensors of it is loaded, and what is in use is
    // written over with the same. Other streams may use these as soon as this returns.
    for (const bcq_unit * unit = bcq_units; unit; unit = unit->next) {
        CUDA_CHECK(cudaMemcpyToSymbolAsync(unit->symbol, &t, sizeof(t), 0, cudaMemcpyHostToDevice, stream));
    }
    CUDA_CHECK(cudaStreamSynchronize(stream));
    ready[device] = true;
}
