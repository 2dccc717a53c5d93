/* Rounding a weight to the nearest point of its min-max grid in one pass over memory: ops/compiled/rounding.py.

   The same operations in the same order as ops/grid.py, so codes, scales and zero points are equal bit for bit.
   Compile without contraction of a * b + c and without -ffast-math: both would change last bits. */

#include <stdlib.h>

#include "floats.h"

enum outcome { DONE, NOT_FINITE, SCALE_TOO_LARGE, NO_MEMORY };

struct scheme {
    int32_t dtype, scale_dtype; /* enum dtype: of the weights, of the scales */
    int32_t symmetric;
    float code_min, code_max;
};

/* Keep a scale, which is not negative, and give it as it will be read back. Zero becomes 1: all its weights are 0; one
   that would be rounded to zero becomes the smallest there is. */
INLINE float stored(float scale, enum dtype dtype, void *scales, int64_t place) {
    float rounded = scale;
    if (dtype == BFLOAT16) rounded = as_float((uint32_t)to_bfloat16(scale) << 16);
    if (dtype == FLOAT16) rounded = of_float16(to_float16(scale));
    if (rounded == 0) rounded = scale == 0 ? 1.0f : dtype == FLOAT16 ? 0x1p-24f : 0x1p-126f;
    if (dtype == FLOAT32) ((float *)scales)[place] = rounded;
    if (dtype == BFLOAT16) ((uint16_t *)scales)[place] = to_bfloat16(rounded);
    if (dtype == FLOAT16) ((uint16_t *)scales)[place] = to_float16(rounded);
    return rounded;
}

/* The range of a group, extended to hold 0, and what its squares add up to (NaN or infinite: a weight is, too). */
INLINE double range_of(const float *w, int64_t count, float *low, float *high) {
    float least = 0, most = 0, squares = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : squares)
    for (int64_t i = 0; i < count; i++) {
        least = w[i] < least ? w[i] : least;
        most = w[i] > most ? w[i] : most;
        squares += w[i] * w[i];
    }
    *low = least;
    *high = most;
    return squares;
}

/* The codes of a group; gives the sum of its squared errors. */
INLINE double encode(const float *w, int64_t count, float scale, float zero, float code_min, float code_max,
                     uint8_t *restrict codes) {
    float changes = 0;
#pragma omp simd reduction(+ : changes)
    for (int64_t i = 0; i < count; i++) {
        float code = smaller(larger(nearest(w[i] / scale) + zero, code_min), code_max);
        float change = (code - zero) * scale - w[i];
        changes += change * change;
        codes[i] = (uint8_t)(int32_t)code;
    }
    return changes;
}

/* weights: [rows, groups * columns]. codes: the same shape, a byte each. scales, zero_points: [rows, groups]; the latter
   NULL when symmetric. sums: what the squares of the weights and of the errors add up to. */
FOR_EACH_PROCESSOR
int outlierq_round_rows(const void *weights, const struct scheme *scheme, int64_t rows, int64_t groups, int64_t columns,
                        uint8_t *codes, void *scales, uint8_t *zero_points, double *sums) {
    float *row = malloc(groups * columns * sizeof(float)), low, high;
    if (!row) return NO_MEMORY;
    enum outcome outcome = DONE;
    sums[0] = sums[1] = 0;
    for (int64_t r = 0; r < rows && outcome == DONE; r++) {
        read_row(weights, scheme->dtype, r * groups * columns, groups * columns, row);
        for (int64_t g = 0; g < groups; g++) {
            const float *group = row + g * columns;
            int64_t place = r * groups + g;
            sums[0] += range_of(group, columns, &low, &high);
            float range = scheme->symmetric ? larger(high, -low) : high - low, zero = 0;
            float scale = stored(range / scheme->code_max, scheme->scale_dtype, scales, place);
            if (scale > 3.4028235e38f) outcome = SCALE_TOO_LARGE;
            if (!scheme->symmetric) {
                zero = smaller(nearest(-low / scale), scheme->code_max);
                zero_points[place] = (uint8_t)(int32_t)zero;
            }
            sums[1] += encode(group, columns, scale, zero, scheme->code_min, scheme->code_max,
                              codes + place * columns);
        }
        if (!(sums[0] < 1.7976931348623157e308)) outcome = NOT_FINITE;
    }
    free(row);
    return outcome;
}
