#pragma once

#include "cuda_runtime.h"

struct half {
    uint16_t x;
    half() = default;
    half(float f) {
        const unsigned sign = __float_as_uint(f) >> 16 & 0x8000;
        const float    a    = fabsf(f);
        if (!(a < 65520.0f)) { // rounds to infinity, or is not a number
            x = (uint16_t) (sign | (a > 0.0f ? 0x7C00 : 0x7E00));
            return;
        }
        // to the nearest, to even, as floats are rounded: by a sum with a number that leaves ten bits, or those of 2^-24
        const float magic = __uint_as_float((std::max(__float_as_uint(a) >> 23, 113u) + 13) << 23);
        const float round = (a + magic) - magic;
        x = (uint16_t) (sign | (round < 0x1p-14f ? (unsigned) (round*0x1p24f)
                                                  : (__float_as_uint(round) - (112u << 23)) >> 13));
    }
    operator float() const {
        const unsigned bits = x & 0x7FFF;
        const float    a    = bits < 0x0400 ? bits*0x1p-24f : __uint_as_float((bits << 13) + ((bits < 0x7C00 ? 112u : 224u) << 23));
        return x & 0x8000 ? -a : a;
    }
};
typedef half __half;

struct half2 {
    half x, y;
    half2() = default;
    half2(half x, half y) : x(x), y(y) {}
};
typedef half2 __half2;

inline half   __float2half(float f) { return half(f); }
inline float  __half2float(half h) { return h; }
inline half2  make_half2(float x, float y) { return half2(half(x), half(y)); }
inline half2  __floats2half2_rn(float x, float y) { return half2(half(x), half(y)); }
inline half2  __float22half2_rn(float2 f) { return half2(half(f.x), half(f.y)); }
inline float2 __half22float2(half2 h) { return { h.x, h.y }; }
inline float  __low2float(half2 h) { return h.x; }
inline float  __high2float(half2 h) { return h.y; }
inline half2  __half2half2(half h) { return half2(h, h); }
inline half   __low2half(half2 h) { return h.x; }
inline half   __high2half(half2 h) { return h.y; }
inline half2  __halves2half2(half x, half y) { return half2(x, y); }
inline half2  __hmul2(half2 a, half2 b) { return half2(half(a.x*b.x), half(a.y*b.y)); }
inline half2  __hadd2(half2 a, half2 b) { return half2(half(a.x + b.x), half(a.y + b.y)); }
inline half   __hmax(half a, half b) { return half(std::max<float>(a, b)); }
inline half2  __hmax2(half2 a, half2 b) { return half2(half(std::max<float>(a.x, b.x)), half(std::max<float>(a.y, b.y))); }
inline half2  operator*(half2 a, half2 b) { return __hmul2(a, b); }
inline half2  operator+(half2 a, half2 b) { return __hadd2(a, b); }
inline half2 & operator+=(half2 & a, half2 b) { return a = a + b; }
