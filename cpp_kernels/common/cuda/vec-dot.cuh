#pragma once

// Dot products of our types with Q8_1, for MMVQ. Included by upstream's vecdotq.cuh, after get_int_b4.

#include "tesseraq/bcq/cuda/vec-dot.cuh"
#include "tesseraq/ptq/cuda/vec-dot.cuh"
#include "tesseraq/tsq/cuda/vec-dot.cuh"
