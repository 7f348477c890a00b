#pragma once

// TSQ tensors repacked at load for the CPU backend. Panels of activations are those of Q8_TSQ (common/q8.h).

#include "tesseraq/common/buffer.h"
#include "tesseraq/common/q8.h"
#include "tesseraq/tsq/tsq.h"

// rows of a group
#define TSQ2_NROWS TESSERAQ_NROWS
#define TSQ3_NROWS TESSERAQ_NROWS
#define TSQ4_NROWS TESSERAQ_NROWS

// A group of rows is a sequence of pairs of blocks; a last block without a partner stands alone. A pair is
//     uint8_t d[rows], z[rows] of the first block, d[rows], z[rows] of the second, codes of the first, codes of the second
// and the codes of a block are vectors of TESSERAQ_DEPTH*rows bytes. Byte TESSERAQ_DEPTH*r + j of a vector belongs to row r and to columns
// TESSERAQ_DEPTH*g + j, for the groups of columns g that the vector holds, out of n = 64/TESSERAQ_DEPTH:
//     TSQ2: vector v, bits 2*k and up: group n/4*k + v
//     TSQ4: vector v, bits 4*k and up: group n/2*k + v
//     TSQ3: vectors 3*t to 3*t + 2, bits 0-2 and 3-5: groups 8*t to 8*t + 5
//           group 8*t + 6: high two bits in bits 6-7 of vector 3*t,     low bit in bit 6 of vector 3*t + 2
//           group 8*t + 7: high two bits in bits 6-7 of vector 3*t + 1, low bit in bit 7 of vector 3*t + 2
// All of it together is as large as the rows were.
