#pragma once

// The codebooks of a unit of compilation: to be included in those that have kernels of BCQ.

#include "tesseraq/cuda/bcq-tables.cuh"

static __device__ __align__(128) bcq_device_tables bcq_device; // a codebook is loaded at once, all of them are a line of the cache

static const bcq_unit bcq_this_unit(&bcq_device);

// the 16 codewords of a codebook, + BCQ_OFFSET
static __device__ __forceinline__ uint4 bcq_load_codebook(int selector) {
    return __ldg((const uint4 *) bcq_device.shifted[selector]);
}
