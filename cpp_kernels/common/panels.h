#pragma once

// The choice among kernels by the width of a panel, which is an argument of templates.

#include "ggml.h"
#include "tesseraq/common/groups.h"

#include <type_traits>

// calls f(w) with w as a type
template <typename F> static void tesseraq_with_width(int w, F f) {
    switch (w) {
        case  1: f(std::integral_constant<int,  1>()); break;
        case  2: f(std::integral_constant<int,  2>()); break;
        case  3: f(std::integral_constant<int,  3>()); break;
        case  4: f(std::integral_constant<int,  4>()); break;
#if TESSERAQ_NCOLS > 4
        case  5: f(std::integral_constant<int,  5>()); break;
        case  6: f(std::integral_constant<int,  6>()); break;
        case  7: f(std::integral_constant<int,  7>()); break;
        case  8: f(std::integral_constant<int,  8>()); break;
#endif
#if TESSERAQ_NCOLS > 8
        case  9: f(std::integral_constant<int,  9>()); break;
        case 10: f(std::integral_constant<int, 10>()); break;
        case 11: f(std::integral_constant<int, 11>()); break;
        case 12: f(std::integral_constant<int, 12>()); break;
#endif
        default: GGML_ABORT("a panel has no %d columns", w);
    }
}
