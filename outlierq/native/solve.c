/* Rounding a block of columns one after the other, where what one of them loses is passed on, and what whole groups of
   columns lose: ops/compiled/solving.py.

   Blocks are [columns, rows], so that a column is contiguous; 16 rows at a time are worked on in the cache. Every row is
   computed as if it were alone, with the operations of ops/search/sweep.py and refine.py in their order: equal bit for
   bit, whatever the number of rows. Compile without contraction of a * b + c and without -ffast-math. */

#include <stdlib.h>

#include "floats.h"

enum { LANES = 16 };
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t masks __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
enum kind { INTEGERS, FRACTIONAL_ZEROS, E2M1, E4M3 }; /* how a code follows from weight / scale: nearest_code */

/* scales, zeros: [groups, rows], the latter NULL when symmetric; group_of: [columns]. */
struct grid {
    int64_t kind;
    float code_min, code_max;
    const float *scales, *zeros;
    const int64_t *group_of;
};

INLINE float with_sign_of(float size, float value) {
    return as_float((as_bits(size) & 0x7FFFFFFF) | (as_bits(value) & 0x80000000u));
}

INLINE float size_of(float value) { return as_float(as_bits(value) & 0x7FFFFFFF); }

/* Steps of 0.5 below 2, of 1 below 4, of 2. */
INLINE float nearest_e2m1(float value) {
    value = smaller(larger(value, -6.0f), 6.0f);
    float size = size_of(value), step = (size >= 2 ? 1.0f : 0.5f) + (size >= 4 ? 1.0f : 0.0f);
    return with_sign_of(nearest(size / step) * step, value);
}

/* 3 bits of mantissa, and steps of 2^-9 below 2^-6. */
INLINE float nearest_e4m3(float value, float code_min, float code_max) {
    value = smaller(larger(value, code_min), code_max);
    uint32_t bits = as_bits(value) & 0x7FFFFFFF;
    float normal = as_float((bits + 0x7FFFF + (bits >> 20 & 1)) & 0xFFF00000u), size = as_float(bits);
    return with_sign_of(size < 0x1p-6f ? (size + 24576.0f) - 24576.0f : normal, value);
}

/* larger(), then smaller(), of 16 numbers: of a loop over them a compiler makes branches. */
INLINE void clamp(lanes *value, float least, float most) {
    const lanes low = least - (lanes){0}, high = most - (lanes){0};
    const masks above = *value > low;
    const lanes raised = (lanes)(((masks)*value & above) | ((masks)low & ~above));
    const masks below = raised < high;
    *value = (lanes)(((masks)raised & below) | ((masks)high & ~below));
}

/* nearest() of 16 numbers. */
INLINE void round_all(lanes *value) {
    clamp(value, -1048576.0f, 1048576.0f);
    *value = (*value + 12582912.0f) - 12582912.0f;
}

/* The codes nearest to `ratio` = weight / scale. */
INLINE void encode(const struct grid *grid, const float *ratio, const float *zero, float *restrict code) {
    float least = grid->code_min, most = grid->code_max;
    if (grid->kind == INTEGERS || grid->kind == FRACTIONAL_ZEROS) {
        lanes value = *(const lanes *)ratio;
        if (grid->kind == FRACTIONAL_ZEROS) value += *(const lanes *)zero;
        round_all(&value);
        if (grid->kind == INTEGERS) value += *(const lanes *)zero;
        clamp(&value, least, most);
        *(lanes *)code = value;
    }
    if (grid->kind == E2M1)
        for (int l = 0; l < LANES; l++) code[l] = nearest_e2m1(ratio[l]);
    if (grid->kind == E4M3)
        for (int l = 0; l < LANES; l++) code[l] = nearest_e4m3(ratio[l], least, most);
}

/* Up to 16 numbers, the rest filled up. */
INLINE void fetch(const float *from, int64_t count, float rest, float *restrict to) {
    if (count >= LANES)
        memcpy(to, from, sizeof(float) * LANES);
    else
        for (int l = 0; l < LANES; l++) to[l] = l < count ? from[l] : rest;
}

INLINE void keep(const float *from, int64_t count, float *restrict to) {
    memcpy(to, from, sizeof(float) * (count < LANES ? count : LANES));
}

INLINE void scale_and_zero(const struct grid *grid, int64_t column, int64_t rows, int64_t row, float *restrict scale,
                           float *restrict zero) {
    int64_t place = grid->group_of[column] * rows + row;
    fetch(grid->scales + place, rows - row, 1, scale);
    for (int l = 0; l < LANES; l++) zero[l] = 0;
    if (grid->zeros) fetch(grid->zeros + place, rows - row, 0, zero);
}

/* Columns that are rounded before what they lose is passed on to all later ones, which are then read and written once. */
enum { TOGETHER = 8 };

/* line[k] += step[i] * factor[i][k] for `steps` columns i in turn and `count` columns k of 16 rows. */
INLINE void pass_on(float (*restrict line)[LANES], const float *factor, int64_t stride, int64_t count,
                    const float (*step)[LANES], int64_t steps) {
    if (steps == TOGETHER) {
        for (int64_t k = 0; k < count; k++) {
            lanes sum = *(lanes *)line[k];
            for (int i = 0; i < TOGETHER; i++) sum += *(const lanes *)step[i] * factor[i * stride + k];
            *(lanes *)line[k] = sum;
        }
    } else {
        for (int64_t i = 0; i < steps; i++)
            for (int64_t k = 0; k < count; k++) *(lanes *)line[k] += *(const lanes *)step[i] * factor[i * stride + k];
    }
}

/* After column `i` of so many was rounded: pass on what it loses to those it is together with, and what all of these
   lose to those after them. step: of the columns together. */
INLINE void pass_in_turn(float (*restrict line)[LANES], const float *factor, int64_t stride, int64_t columns, int64_t i,
                         const float (*step)[LANES]) {
    int64_t first = i / TOGETHER * TOGETHER, last = first + TOGETHER < columns ? first + TOGETHER : columns;
    pass_on(line + i + 1, factor + i * stride + i + 1, stride, last - i - 1, step + i - first, 1);
    if (i + 1 == last)
        pass_on(line + last, factor + first * stride + last, stride, columns - last, step, last - first);
}

/* GPTQ inside a block: ops/search/sweep.py. values: W, becomes W - Q. errors: what the columns before pull, becomes E.
   codes: result; all [columns, rows]. factor: R's corner [columns, stride]; inverse: of its diagonal. 1 without memory. */
FOR_EACH_PROCESSOR
int outlierq_sweep(const struct grid *grid, int64_t columns, int64_t rows, float *values, float *errors, float *codes,
                   const float *factor, int64_t stride, const float *inverse) {
    float(*line)[LANES] = malloc(columns * sizeof(*line));
    if (!line) return 1;
    for (int64_t row = 0; row < rows; row += LANES) {
        float w[LANES], scale[LANES], zero[LANES], ratio[LANES], code[LANES], step[TOGETHER][LANES], error[LANES];
        for (int64_t i = 0; i < columns; i++) fetch(errors + i * rows + row, rows - row, 0, line[i]);
        for (int64_t i = 0; i < columns; i++) {
            float own = factor[i * stride + i], *lost = step[i % TOGETHER];
            int64_t place = i * rows + row;
            fetch(values + place, rows - row, 0, w);
            scale_and_zero(grid, i, rows, row, scale, zero);
            for (int l = 0; l < LANES; l++) ratio[l] = (w[l] + line[i][l] * inverse[i]) / scale[l];
            encode(grid, ratio, zero, code);
            for (int l = 0; l < LANES; l++) {
                lost[l] = w[l] - (code[l] - zero[l]) * scale[l];
                error[l] = line[i][l] + lost[l] * own;
            }
            keep(code, rows - row, codes + place);
            keep(lost, rows - row, values + place);
            keep(error, rows - row, errors + place);
            pass_in_turn(line, factor, stride, columns, i, step);
        }
    }
    free(line);
    return 0;
}

/* Coordinate descent inside a block: ops/search/refine.py. codes: changed; residuals: H (W - Q)^T; moved: what Q gained
   is added to it; all [columns, rows]. gains: [rows], what the error lost is added. hessian: the block's corner
   [columns, stride]; inverse: of its diagonal. 1 without memory. */
FOR_EACH_PROCESSOR
int outlierq_descend(const struct grid *grid, int64_t columns, int64_t rows, float *codes, const float *residuals,
                     float *moved, double *gains, const float *hessian, int64_t stride, const float *inverse) {
    float(*line)[LANES] = malloc(columns * sizeof(*line));
    if (!line) return 1;
    for (int64_t row = 0; row < rows; row += LANES) {
        float scale[LANES], zero[LANES], ratio[LANES], code[LANES], value[LANES], sum[LANES], step[TOGETHER][LANES];
        double gain[LANES] = {0};
        for (int64_t i = 0; i < columns; i++) fetch(residuals + i * rows + row, rows - row, 0, line[i]);
        for (int64_t i = 0; i < columns; i++) {
            float own = hessian[i * stride + i], *change = step[i % TOGETHER];
            int64_t place = i * rows + row;
            fetch(codes + place, rows - row, 0, code);
            fetch(moved + place, rows - row, 0, sum);
            scale_and_zero(grid, i, rows, row, scale, zero);
            for (int l = 0; l < LANES; l++) {
                value[l] = (code[l] - zero[l]) * scale[l];
                ratio[l] = (value[l] + line[i][l] * inverse[i]) / scale[l];
            }
            encode(grid, ratio, zero, code);
            for (int l = 0; l < LANES; l++) {
                change[l] = (code[l] - zero[l]) * scale[l] - value[l];
                gain[l] += (double)(change[l] * (line[i][l] * 2 - change[l] * own));
                sum[l] += change[l];
            }
            keep(code, rows - row, codes + place);
            keep(sum, rows - row, moved + place);
            for (int l = 0; l < LANES; l++) change[l] = -change[l];
            pass_in_turn(line, hessian, stride, columns, i, step);
        }
        for (int l = 0; l < LANES && row + l < rows; l++) gains[row + l] += gain[l];
    }
    free(line);
    return 0;
}

enum { WIDEST = 256, AT_ONCE = 4 };

/* The codes of a group of 16 rows, less their zero points, and their scales. w, code: [columns][LANES]. */
INLINE void read_group(const struct grid *grid, int64_t group, int64_t columns, int64_t rows, int64_t row,
                       const float (*w)[LANES], float (*restrict code)[LANES], float *restrict scale) {
    float zero[LANES], ratio[LANES];
    scale_and_zero(grid, group * columns, rows, row, scale, zero);
    for (int64_t i = 0; i < columns; i++) {
        for (int l = 0; l < LANES; l++) ratio[l] = w[i][l] / scale[l];
        encode(grid, ratio, zero, code[i]);
        for (int l = 0; l < LANES; l++) code[i][l] -= zero[l];
    }
}

/* sum over columns i from `first` to `last` of matrix[j][i] x[i], in their order, for four j from its first row on. */
INLINE void four_sums(const float *matrix, int64_t stride, const float (*x)[LANES], int64_t first, int64_t last,
                      lanes *restrict sum) {
    for (int64_t i = first; i < last; i++)
        for (int j = 0; j < AT_ONCE; j++) sum[j] += *(const lanes *)x[i] * matrix[j * stride + i];
}

/* d^T B d for the change d that rounding makes to each group: W [groups][rows / 16][columns][16], filled up, read once
   from its beginning to its end; B [groups, columns, columns] symmetric, errors [groups, rows]. columns: a multiple of
   4, 256 at most. Sums run over the columns in their order. */
FOR_EACH_PROCESSOR
void outlierq_group_errors(const struct grid *grid, int64_t groups, int64_t columns, int64_t rows, const float *values,
                           const float *blocks, float *errors) {
    const float(*w)[LANES] = (const float(*)[LANES])values;
    float change[WIDEST][LANES], scale[LANES];
    for (int64_t group = 0; group < groups; group++) {
        const float *block = blocks + group * columns * columns;
        for (int64_t row = 0; row < rows; row += LANES, w += columns) {
            lanes total = {0};
            read_group(grid, group, columns, rows, row, w, change, scale);
            for (int64_t i = 0; i < columns; i++)
                for (int l = 0; l < LANES; l++) change[i][l] = change[i][l] * scale[l] - w[i][l];
            for (int64_t j = 0; j < columns; j += AT_ONCE) {
                lanes sum[AT_ONCE] = {0};
                four_sums(block + j * columns, columns, (const float(*)[LANES])change, 0, j, sum);
                for (int q = 0; q < AT_ONCE; q++) {
                    const float *line = block + (j + q) * columns + j;
                    const lanes own = *(lanes *)change[j + q];
                    for (int p = 0; p < q; p++) sum[q] += *(lanes *)change[j + p] * line[p];
                    total += own * (sum[q] * 2 + own * line[q]);
                }
            }
            keep((const float *)&total, rows - row, errors + group * rows + row);
        }
    }
}

/* c^T B c and c^T B w for the codes c of each group, less their zero points; arguments as above. */
FOR_EACH_PROCESSOR
void outlierq_group_fits(const struct grid *grid, int64_t groups, int64_t columns, int64_t rows, const float *values,
                         const float *blocks, float *powers, float *products) {
    const float(*w)[LANES] = (const float(*)[LANES])values;
    float code[WIDEST][LANES], scale[LANES];
    for (int64_t group = 0; group < groups; group++) {
        const float *block = blocks + group * columns * columns;
        for (int64_t row = 0; row < rows; row += LANES, w += columns) {
            lanes power = {0}, product = {0};
            read_group(grid, group, columns, rows, row, w, code, scale);
            for (int64_t j = 0; j < columns; j += AT_ONCE) {
                lanes sum[AT_ONCE] = {0};
                four_sums(block + j * columns, columns, (const float(*)[LANES])code, 0, columns, sum);
                for (int q = 0; q < AT_ONCE; q++) {
                    power += sum[q] * *(lanes *)code[j + q];
                    product += sum[q] * *(const lanes *)w[j + q];
                }
            }
            keep((const float *)&power, rows - row, powers + group * rows + row);
            keep((const float *)&product, rows - row, products + group * rows + row);
        }
    }
}
