#pragma once

// The codebooks of a unit of compilation: to be included in those that have kernels of BCQ.

#include "tesseraq/bcq/cuda/tables.cuh"

static __device__ bcq_device_tables bcq_device;

static const bcq_unit bcq_this_unit(&bcq_device);

// the 16 codewords of a codebook, + BCQ_OFFSET
static __device__ __forceinline__ uint4 bcq4_load_codebook(int selector) {
    return __ldg((const uint4 *) bcq_device.shifted[selector]);
}

// the 4 codewords of a codebook of BCQ2
static __device__ __forceinline__ uint32_t bcq2_load_codebook(int selector) {
    return __ldg((const uint32_t *) bcq_device.codeword2[selector]);
}
