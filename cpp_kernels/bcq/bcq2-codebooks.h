#pragma once

// The universal codebooks of BCQ2.

#define BCQ2_UNIVERSAL_CODEBOOKS \
    { -31, -10,  10,  31 }, \
    { -24,  -9,   2,  15 }, \
    { -20,  -6,   6,  20 }, \
    { -15,  -2,   9,  24 }
