#pragma once

// Blocks of 64 activations of BCQ4_A4 to codewords, with the instructions of this processor, as bcq_encode_generic does it.

#if defined(__aarch64__)
#include "tesseraq/bcq/arm-encode.h"
#else
#include "tesseraq/bcq/x86-encode.h"
#endif
