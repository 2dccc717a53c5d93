/* Rounding a block of columns one after the other, where what one of them loses is passed on: ops/compiled/solving.py.

   Blocks are [columns, rows], so that a column is contiguous; 16 rows at a time are worked on in the cache. Every row is
   computed as if it were alone, with the operations of ops/search/sweep.py and refine.py in their order: equal bit for
   bit, whatever the number of rows. Compile without contraction of a * b + c and without -ffast-math. */

#include <stdlib.h>

#include "floats.h"

enum { LANES = 16 };
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

/* The codes nearest to `ratio` = weight / scale. */
INLINE void encode(const struct grid *grid, const float *ratio, const float *zero, float *restrict code) {
    float least = grid->code_min, most = grid->code_max;
    if (grid->kind == INTEGERS)
        for (int l = 0; l < LANES; l++) code[l] = smaller(larger(nearest(ratio[l]) + zero[l], least), most);
    if (grid->kind == FRACTIONAL_ZEROS)
        for (int l = 0; l < LANES; l++) code[l] = smaller(larger(nearest(ratio[l] + zero[l]), least), most);
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

/* line[k] += step * factor[k] for some columns of 16 rows. */
INLINE void pass_on(float (*restrict line)[LANES], const float *factor, int64_t count, const float *step) {
    for (int64_t k = 0; k < count; k++)
        for (int l = 0; l < LANES; l++) line[k][l] += step[l] * factor[k];
}

/* GPTQ inside a block: ops/search/sweep.py. values: W, becomes W - Q. errors: what the columns before pull, becomes E.
   codes: result; all [columns, rows]. factor: R's corner [columns, stride]; inverse: of its diagonal. 1 without memory. */
FOR_EACH_PROCESSOR
int outlierq_sweep(const struct grid *grid, int64_t columns, int64_t rows, float *values, float *errors, float *codes,
                   const float *factor, int64_t stride, const float *inverse) {
    float(*line)[LANES] = malloc(columns * sizeof(*line));
    if (!line) return 1;
    for (int64_t row = 0; row < rows; row += LANES) {
        float w[LANES], scale[LANES], zero[LANES], ratio[LANES], code[LANES], lost[LANES], error[LANES];
        for (int64_t i = 0; i < columns; i++) fetch(errors + i * rows + row, rows - row, 0, line[i]);
        for (int64_t i = 0; i < columns; i++) {
            const float *corner = factor + i * stride;
            int64_t place = i * rows + row;
            fetch(values + place, rows - row, 0, w);
            scale_and_zero(grid, i, rows, row, scale, zero);
            for (int l = 0; l < LANES; l++) ratio[l] = (w[l] + line[i][l] * inverse[i]) / scale[l];
            encode(grid, ratio, zero, code);
            for (int l = 0; l < LANES; l++) {
                lost[l] = w[l] - (code[l] - zero[l]) * scale[l];
                error[l] = line[i][l] + lost[l] * corner[i];
            }
            keep(code, rows - row, codes + place);
            keep(lost, rows - row, values + place);
            keep(error, rows - row, errors + place);
            pass_on(line + i + 1, corner + i + 1, columns - i - 1, lost);
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
        float scale[LANES], zero[LANES], ratio[LANES], code[LANES], value[LANES], step[LANES], sum[LANES];
        double gain[LANES] = {0};
        for (int64_t i = 0; i < columns; i++) fetch(residuals + i * rows + row, rows - row, 0, line[i]);
        for (int64_t i = 0; i < columns; i++) {
            const float *corner = hessian + i * stride;
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
                step[l] = (code[l] - zero[l]) * scale[l] - value[l];
                gain[l] += (double)(step[l] * (line[i][l] * 2 - step[l] * corner[i]));
                sum[l] += step[l];
            }
            keep(code, rows - row, codes + place);
            keep(sum, rows - row, moved + place);
            for (int l = 0; l < LANES; l++) step[l] = -step[l];
            pass_on(line + i + 1, corner + i + 1, columns - i - 1, step);
        }
        for (int l = 0; l < LANES && row + l < rows; l++) gains[row + l] += gain[l];
    }
    free(line);
    return 0;
}
