#pragma once

// What the kernels of all families compute with.

// scale of a block, E5M3 in the lowest byte, times 2^shift: the code is the head of a float, so the power of two is a part of what is
// added anyway
static __device__ __forceinline__ float e5m3_scale(uint32_t code, int shift) {
    return __uint_as_float(((code & 0xFF) << 20) + ((uint32_t) (103 + shift) << 23));
}

// numbers up to 127, in bytes, less a whole number: the high bits keep bytes from borrowing from each other
static __device__ __forceinline__ int subtract_bytes(uint32_t numbers, int whole) {
    return ((numbers | 0x80808080) - (uint32_t) whole*0x01010101) ^ 0x80808080;
}
