/* Sums of x x^T over tokens of bfloat16, in float32: ops/compiled/gram.py. For processors with AVX-512 for bfloat16. */

#include <stdlib.h>

#include "floats.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#include <immintrin.h>
#define ON_X86 1
#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

enum { PANEL = 64, HEIGHT = 4, VECTORS = PANEL / 16 };

int outlierq_adds_grams(void) {
#if ON_X86
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}

/* inputs [tokens, columns] as panels of 64 columns, [panels][pairs of tokens][64] words of two numbers; zeros fill up. */
void outlierq_gram_panels(const uint16_t *inputs, int64_t tokens, int64_t columns, uint32_t *restrict panels) {
    int64_t pairs = (tokens + 1) / 2, count = (columns + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < pairs; p++) {
        const uint16_t *even = inputs + 2 * p * columns, *odd = even + columns;
        for (int64_t panel = 0; panel < count; panel++) {
            uint32_t *words = panels + (panel * pairs + p) * PANEL;
            int64_t first = panel * PANEL, width = columns - first < PANEL ? columns - first : PANEL;
            for (int64_t c = 0; c < PANEL; c++) {
                uint32_t high = c < width && 2 * p + 1 < tokens ? odd[first + c] : 0;
                words[c] = (c < width ? even[first + c] : 0) | high << 16;
            }
        }
    }
}

#if ON_X86
/* Four columns from `left` on times the 64 of `right`: one sum over all tokens, pair after pair, added to `total`. */
BF16 INLINE void add_tile(const uint32_t *left, const uint32_t *right, int64_t pairs, float *total, int64_t stride,
                          int64_t height, int64_t width) {
    __m512 sum[HEIGHT][VECTORS];
    for (int i = 0; i < HEIGHT; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++, left += PANEL, right += PANEL) {
        __m512i columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) columns[v] = _mm512_loadu_si512(right + 16 * v);
        for (int i = 0; i < HEIGHT; i++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int32_t)left[i]);
            for (int v = 0; v < VECTORS; v++) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], one, (__m512bh)columns[v]);
        }
    }
    for (int64_t i = 0; i < height && i < HEIGHT; i++)
        for (int v = 0; v < VECTORS && 16 * v < width; v++) {
            __mmask16 there = width - 16 * v >= 16 ? 0xFFFF : (__mmask16)((1u << (width - 16 * v)) - 1);
            float *place = total + i * stride + 16 * v;
            __m512 before = _mm512_maskz_loadu_ps(there, place);
            _mm512_mask_storeu_ps(place, there, _mm512_add_ps(before, sum[i][v]));
        }
}
#endif

/* Add to the panels of `total` [columns, columns] on and above its diagonal, for the rows of one panel. */
#if ON_X86
BF16
#endif
void outlierq_add_gram(const uint32_t *panels, int64_t pairs, int64_t columns, int64_t panel, float *total) {
#if ON_X86
    int64_t count = (columns + PANEL - 1) / PANEL, top = panel * PANEL;
    for (int64_t other = panel; other < count; other++)
        for (int64_t i = 0; i < PANEL && top + i < columns; i += HEIGHT)
            add_tile(panels + panel * pairs * PANEL + i, panels + other * pairs * PANEL, pairs,
                     total + (top + i) * columns + other * PANEL, columns, columns - top - i, columns - other * PANEL);
#endif
}
