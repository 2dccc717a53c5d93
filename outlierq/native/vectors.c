/* The nearest codewords with signs of vectors of 8 weights: ops/codebooks.py, which does the same in torch. */

#include <math.h>

#include "floats.h"

enum { SIGNS = 8, MOST_WORDS = 1024 };

/* Number of the codeword nearest to sizes u under the weights m, of `number` ones that lie value by value: of
   sum m (g - u)^2 only what differs between them, g (m g - 2 m u). */
INLINE int64_t nearest_word(const float *u, const float *m, int width, const float *words, int64_t number) {
    float distance[MOST_WORDS], least = INFINITY;
    for (int64_t word = 0; word < number; word++) distance[word] = 0;
    for (int j = 0; j < width; j++) {
        const float *g = words + j * number;
        float weight = m[j], twice = 2 * m[j] * u[j];
#pragma omp simd
        for (int64_t word = 0; word < number; word++) distance[word] += g[word] * (weight * g[word] - twice);
    }
#pragma omp simd reduction(min : least)
    for (int64_t word = 0; word < number; word++) least = distance[word] < least ? distance[word] : least;
    for (int64_t word = 0; word < number; word++)
        if (distance[word] == least) return word;
    return 0; /* where a weight is NaN */
}

/* ratio, out: [count, 8]. importance: [period, 8], of vector v the row v modulo period. words: [width, number], 4 or 8
   values of at most 1024 codewords. even_signs: of 8 weights an even number is negative; the cheapest one is turned. */
FOR_EACH_PROCESSOR
void outlierq_nearest_vectors(const float *ratio, int64_t count, const float *importance, int64_t period,
                              const float *words, int64_t number, int width, int even_signs, float *out) {
    for (int64_t vector = 0; vector < count; vector++) {
        const float *given = ratio + vector * SIGNS, *m = importance + vector % period * SIGNS;
        float size[SIGNS], sign[SIGNS];
        int negative = 0, cheapest = 0;
        for (int j = 0; j < SIGNS; j++) {
            sign[j] = given[j] < 0 ? -1.0f : 1.0f;
            size[j] = fabsf(given[j]);
            negative += given[j] < 0;
            if (m[j] * size[j] * size[j] < m[cheapest] * size[cheapest] * size[cheapest]) cheapest = j;
        }
        if (even_signs && negative % 2) {
            size[cheapest] = -size[cheapest];
            sign[cheapest] = -sign[cheapest];
        }
        for (int start = 0; start < SIGNS; start += width) {
            int64_t word = nearest_word(size + start, m + start, width, words, number);
            for (int j = 0; j < width; j++)
                out[vector * SIGNS + start + j] = sign[start + j] * words[j * number + word];
        }
    }
}
