/* The two ends of an int8 product, each in one pass over memory: ops/compiled/rounding.py.

   The same operations in the same order as runtime/cpu.py does with torch, so results are equal bit for bit. */

#include <float.h>
#include <stdlib.h>

#include "floats.h"

/* inputs [tokens, columns] as codes, with one step for each token: its largest |x| / 127, and 1 where that is no normal
   number. A NaN or an infinity among the inputs makes the step one. Gives 0, or 1 without memory. */
FOR_EACH_PROCESSOR
int outlierq_round_tokens(const void *inputs, int dtype, int64_t tokens, int64_t columns, int8_t *restrict codes,
                          float *restrict steps) {
    float *row = malloc(columns * sizeof(float));
    if (!row) return 1;
    for (int64_t t = 0; t < tokens; t++, codes += columns) {
        uint32_t largest = 0; /* compared as integers, a NaN is larger than all numbers */
        read_row(inputs, dtype, t * columns, columns, row);
        for (int64_t i = 0; i < columns; i++) {
            uint32_t size = as_bits(row[i]) & 0x7FFFFFFF;
            largest = size > largest ? size : largest;
        }
        float step = as_float(largest) / 127;
        if (step < FLT_MIN) step = 1;
        steps[t] = step;
        for (int64_t i = 0; i < columns; i++) codes[i] = (int8_t)(int32_t)nearest(row[i] / step);
    }
    free(row);
    return 0;
}

/* values [rows, columns], each row times its scale, as bfloat16. */
FOR_EACH_PROCESSOR
void outlierq_scale_rows(const float *values, const float *scales, int64_t rows, int64_t columns,
                         uint16_t *restrict scaled) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * columns; i < (r + 1) * columns; i++) scaled[i] = to_bfloat16(values[i] * scales[r]);
}
