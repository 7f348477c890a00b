#pragma once

// E5M3: the 8-bit float that scales of weights are stored as, 2^(e - 24) * (1 + m/8), e = code >> 3, m = code & 7.

#include <stdint.h>
#include <string.h>

// code to float: the code is the head of the float's exponent and mantissa, so a shift and an add decode it
static inline float e5m3_decode(uint8_t code) {
    const uint32_t bits = ((uint32_t) code << 20) + ((uint32_t) 103 << 23);
    float d;
    memcpy(&d, &bits, sizeof(d));
    return d;
}

// code nearest to a scale; what is smaller or larger than all codes gets the nearest end
static inline uint8_t e5m3_encode(float d) {
    uint32_t bits;
    memcpy(&bits, &d, sizeof(bits));
    const int code = (int) ((bits + (1u << 19)) >> 20) - (103 << 3);
    return code < 0 ? 0 : code > 255 ? 255 : code;
}
