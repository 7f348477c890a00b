#pragma once

// The universal codebooks of BCQ2, written by `scripts/run design codebooks`; tesseraq_gguf/types/bcq/bcq2.json holds the same
// numbers for Python.

#define BCQ2_UNIVERSAL_CODEBOOKS \
    { -31, -11,   2,  17 }, \
    { -18,  -6,   5,  17 }, \
    { -25,  -6,   8,  27 }, \
    { -15,   0,  12,  31 }
