#include "tesseraq/common/compiler.h"
#include "tesseraq/common/get-cols.h"

#if defined(TESSERAQ_AVX2)

#include <immintrin.h>

void ggml_vec_get_cols(int n, float * GGML_RESTRICT y, const float * GGML_RESTRICT x, const int32_t * GGML_RESTRICT cols) {
    int i = 0;
    // twice as fast as single loads; 16 numbers at once are no faster
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_i32gather_ps(x, _mm256_loadu_si256((const __m256i *) (cols + i)), sizeof(float)));
    }
    ggml_vec_get_cols_generic(n - i, y + i, x, cols + i);
}

#endif // defined(TESSERAQ_AVX2)
