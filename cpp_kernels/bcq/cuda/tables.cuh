#pragma once

// Codebooks on the device. Those in use are a model's (bcq/lease.h), so they are data, and not part of the kernels.
//
// A __device__ variable belongs to the unit of compilation that it stands in, and kernels of BCQ are made in several: each such unit
// has a copy (unit.cuh), and a bcq_unit says where. Before a graph with BCQ tensors is computed, bcq_prepare copies what the
// kernels on the CPU look things up in to all of them, if a device has not got it yet.

#include "tesseraq/bcq/bcq.h"

// a codebook is loaded at once, and all of them are a line of the cache
struct alignas(128) bcq_device_tables {
    // of BCQ4
    uint8_t shifted [BCQ4_CODEBOOKS][BCQ4_LEVELS]; // codewords + BCQ_OFFSET
    int8_t  codeword[BCQ4_CODEBOOKS][BCQ4_LEVELS];

    // by a byte, an activation in quarters of its scale, and then by the codebook, in which lanes differ
    int8_t   nearest[256][BCQ4_CODEBOOKS]; // the nearest codeword
    uint16_t error  [256][BCQ4_CODEBOOKS]; // square of its error, in quarters

    // of BCQ2: a codebook is an integer
    int8_t codeword2[BCQ2_CODEBOOKS][BCQ2_LEVELS];
};

// the copy of a unit, in a list of all
struct bcq_unit {
    const void * symbol;
    bcq_unit   * next;

    explicit bcq_unit(const void * symbol);
};

// Gives the current device the codebooks in use, if a tensor of the graph needs any. The stream is not captured at the time.
void bcq_prepare(const ggml_cgraph * cgraph, cudaStream_t stream);
