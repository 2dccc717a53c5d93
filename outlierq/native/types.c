/* Rounding weights to the types of GGUF: ops/grid.py and ops/search/type_search.py without statistics, bit for bit.

   16 groups at a time, a lane for each. A search takes their columns one after the other, so that nothing is added up
   across lanes: sums over columns are those of `tree_sum`, column j with column j + n / 2 and so on. Only the sums of a
   report are added up in any order. Compile without contraction of a * b + c and without -ffast-math. */

#include "floats.h"

enum { LANES = 16, MOST_COLUMNS = 32, LEVELS = 16, FITS = 3 };
enum grid { SYMMETRIC, MINIMA, TABLE }; /* how a weight follows from its code: s q, s q - m, s table[q] */
enum outcome { DONE, NOT_FINITE, SCALE_TOO_LARGE };
typedef float lanes[LANES];

static const float COARSE[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f, 0.7f, 0.62f, 0.54f, 0.45f, 0.35f};
static const float FINE[] = {-0.03f, 0.03f, -0.015f, 0.015f};
enum { COARSES = sizeof COARSE / sizeof *COARSE, FINES = sizeof FINE / sizeof *FINE };

/* block: groups that share units, 0 where scales are plain. turns: a scale of the other sign is tried, too. table: the
   values of codes, rising, and between them where the nearer one changes. */
struct type {
    int32_t grid, columns, block, turns;
    float code_min, code_max, small_min, small_max;
    float table[LEVELS], between[LEVELS];
};

/* Scales and minima of the groups, and what the grid errs with them. */
struct numbers {
    lanes scale, minimum, error;
};

/* Groups [lane][columns], and [columns][lane] where scales are searched; their range, and the best so far with the shares
   of the range that it comes from. */
struct search {
    float rows[LANES * MOST_COLUMNS];
    lanes w[MOST_COLUMNS], low, high, low_share, high_share;
    struct numbers best;
};

#define FOR_LANES _Pragma("omp simd") for (int l = 0; l < LANES; l++)

INLINE float code_of(float ratio, float zero, const struct type *type, enum grid grid) {
    if (grid == TABLE) {
        float code = type->table[0];
        float next; /* read in any case, and no loop within lanes: so that lanes are taken together */
#define RISE(i) next = type->table[i + 1], code = ratio > type->between[i] ? next : code;
        RISE(0) RISE(1) RISE(2) RISE(3) RISE(4) RISE(5) RISE(6) RISE(7) RISE(8) RISE(9) RISE(10) RISE(11) RISE(12)
        RISE(13) RISE(14)
        return code;
    }
    /* the ends are integers: so it is the same whether a number is rounded before or after it is held between them */
    float held = smaller(larger(grid == MINIMA ? ratio + zero : ratio, type->code_min), type->code_max);
    return (held + ROUNDER) - ROUNDER;
}

/* By what weights are divided, and what is added then. */
INLINE void divisors(const struct numbers *n, enum grid grid, float *restrict scale, float *restrict zero) {
    FOR_LANES {
        scale[l] = n->scale[l] == 0 ? 1.0f : n->scale[l];
        zero[l] = grid == MINIMA ? n->minimum[l] / scale[l] : 0.0f;
    }
}

/* terms [count] are added up pairwise. */
INLINE void fold(lanes *terms, int count, float *restrict sum) {
    for (int half = count / 2; half; half /= 2)
        for (int j = 0; j < half; j++)
            FOR_LANES terms[j][l] += terms[j + half][l];
    FOR_LANES sum[l] = terms[0][l];
}

INLINE float squared_change(float w, float code, const struct numbers *n, int l, enum grid grid) {
    float value = code * n->scale[l], change = (grid == MINIMA ? value - n->minimum[l] : value) - w;
    return change * change;
}

/* The error of some numbers with the nearest codes. */
INLINE void measure(const struct search *s, struct numbers *n, const struct type *type, enum grid grid, int columns) {
    lanes scale, zero, terms[MOST_COLUMNS / 2];
    divisors(n, grid, scale, zero);
    for (int j = 0; j < columns / 2; j++) {
        const float *one = s->w[j], *other = s->w[j + columns / 2];
        FOR_LANES {
            float first = squared_change(one[l], code_of(one[l] / scale[l], zero[l], type, grid), n, l, grid);
            float second = squared_change(other[l], code_of(other[l] / scale[l], zero[l], type, grid), n, l, grid);
            terms[j][l] = first + second;
        }
    }
    fold(terms, columns / 2, n->error);
}

INLINE void keep_better(struct search *s, const struct numbers *other, const float *low, const float *high) {
    FOR_LANES {
        int better = other->error[l] < s->best.error[l];
        s->best.scale[l] = better ? other->scale[l] : s->best.scale[l];
        s->best.minimum[l] = better ? other->minimum[l] : s->best.minimum[l];
        s->best.error[l] = better ? other->error[l] : s->best.error[l];
        s->low_share[l] = better ? low[l] : s->low_share[l];
        s->high_share[l] = better ? high[l] : s->high_share[l];
    }
}

/* The numbers that put these shares of the range on the ends of the codes; turned: the largest weight on the end that
   does not reach as far. */
INLINE void of_range(const struct search *s, const float *low, const float *high, int turned, const struct type *type,
                     enum grid grid, struct numbers *n) {
    FOR_LANES {
        float bottom = s->low[l] * low[l], top = s->high[l] * high[l];
        float extreme = s->high[l] >= -s->low[l] ? s->high[l] : s->low[l];
        float width = larger(top - bottom, 0.0f) / type->code_max;
        float reach = extreme * high[l] / (turned ? type->code_max : type->code_min);
        n->scale[l] = grid == MINIMA ? width : reach;
        n->minimum[l] = -bottom;
    }
}

INLINE void try_shares(struct search *s, const float *low, const float *high, int turned, const struct type *type,
                       enum grid grid, int columns) {
    struct numbers other;
    of_range(s, low, high, turned, type, grid, &other);
    measure(s, &other, type, grid, columns);
    keep_better(s, &other, low, high);
}

/* The numbers that fit the nearest codes of the best ones in closed form. */
INLINE void fit(const struct search *s, struct numbers *n, const struct type *type, enum grid grid, int columns) {
    lanes scale, zero, squares[MOST_COLUMNS / 2], products[MOST_COLUMNS / 2], codes[MOST_COLUMNS / 2];
    lanes weights[MOST_COLUMNS / 2], power, target, cross, level;
    divisors(&s->best, grid, scale, zero);
    for (int j = 0; j < columns / 2; j++) {
        const float *one = s->w[j], *other = s->w[j + columns / 2];
        FOR_LANES {
            float first = code_of(one[l] / scale[l], zero[l], type, grid);
            float second = code_of(other[l] / scale[l], zero[l], type, grid);
            squares[j][l] = first * first + second * second;
            products[j][l] = first * one[l] + second * other[l];
            codes[j][l] = first + second;
            weights[j][l] = one[l] + other[l];
        }
    }
    fold(squares, columns / 2, power);
    fold(products, columns / 2, target);
    if (grid != MINIMA) {
        FOR_LANES n->scale[l] = power[l] > 0 ? target[l] / power[l] : s->best.scale[l];
        FOR_LANES n->minimum[l] = 0;
        return;
    }
    fold(codes, columns / 2, cross);
    fold(weights, columns / 2, level);
    FOR_LANES {
        float whole = (float)columns, determinant = power[l] * whole - cross[l] * cross[l];
        float fitted = (target[l] * whole - level[l] * cross[l]) / determinant;
        float lowest = (cross[l] * target[l] - power[l] * level[l]) / determinant;
        int usable = determinant > 1e-6f * power[l] * whole;
        fitted = usable ? fitted : s->best.scale[l];
        lowest = usable ? lowest : s->best.minimum[l];
        int is_stored = !type->block || (lowest >= 0 && fitted > 0);
        n->scale[l] = is_stored ? fitted : s->best.scale[l];
        n->minimum[l] = is_stored ? lowest : s->best.minimum[l];
    }
}

/* The best real numbers. */
INLINE void search_numbers(struct search *s, const struct type *type, enum grid grid, int columns) {
    lanes low, high;
    FOR_LANES s->low_share[l] = s->high_share[l] = 1.0f;
    of_range(s, s->low_share, s->high_share, 0, type, grid, &s->best);
    measure(s, &s->best, type, grid, columns);
    for (int turned = 0; turned <= type->turns; turned++)
        for (int i = !turned; i < COARSES; i++) {
            FOR_LANES low[l] = COARSE[i];
            try_shares(s, low, low, turned, type, grid, columns);
        }
    for (int i = 0; i < FINES; i++)
        for (int end = 0; end <= (grid == MINIMA); end++) {
            FOR_LANES low[l] = s->low_share[l] + (end ? 0.0f : FINE[i]);
            FOR_LANES high[l] = s->high_share[l] + (end || grid != MINIMA ? FINE[i] : 0.0f);
            try_shares(s, low, high, 0, type, grid, columns);
        }
    for (int i = 0; i < FITS; i++) {
        struct numbers fitted;
        fit(s, &fitted, type, grid, columns);
        measure(s, &fitted, type, grid, columns);
        keep_better(s, &fitted, s->low_share, s->high_share);
    }
}

/* A number as float16 has it; the smallest there is instead of 0, or 1 where the number is 0 itself. */
INLINE float stored(float value, enum grid grid) {
    float rounded = of_float16(to_float16(value)), smallest = value > 0 ? 0x1p-24f : 1.0f;
    rounded = rounded == 0 ? smallest : rounded;
    return grid == TABLE && value == 0 ? 0x1p-24f : rounded; /* no value of a table is 0 */
}

INLINE float size_of(float value) { return as_float(as_bits(value) & 0x7FFFFFFF); }

INLINE int is_too_large(float value) { return size_of(value) >= 65520.0f; }

/* The unit in which the largest of `count` numbers is the largest small number, with the sign of that. */
INLINE float unit_of(const float *numbers, int count, float small_min, float small_max, enum grid grid, int *outcome) {
    float largest = numbers[0];
    for (int i = 1; i < count; i++) {
        int is_larger = small_min < 0 ? size_of(numbers[i]) > size_of(largest) : numbers[i] > largest;
        largest = is_larger ? numbers[i] : largest;
    }
    float each = largest / (small_min < 0 ? small_min : small_max);
    if (is_too_large(each)) *outcome = SCALE_TOO_LARGE;
    float whole = stored(size_of(each), grid);
    return each < 0 ? -whole : whole;
}

/* The nearest small scale, never 0. */
INLINE float small_scale(float ratio, const struct type *type) {
    float rounded = smaller(larger(nearest(ratio), type->small_min), type->small_max);
    return rounded == 0 ? (ratio < 0 ? -1.0f : 1.0f) : rounded;
}

INLINE float small_minimum(float ratio, const struct type *type) {
    return smaller(larger(nearest(ratio), 0.0f), type->small_max);
}

/* Small numbers and their units. */
struct small {
    lanes scale, minimum, scale_unit, minimum_unit;
};

INLINE void of_small(const struct small *small, struct numbers *n) {
    FOR_LANES n->scale[l] = small->scale[l] * small->scale_unit[l];
    FOR_LANES n->minimum[l] = small->minimum[l] * small->minimum_unit[l];
}

/* One of the small numbers a step lower or higher where that errs less; the largest of a block stays. */
INLINE void try_neighbours(const struct search *s, struct small *small, int of_minima, const struct type *type,
                           enum grid grid, int columns) {
    struct numbers now, moved;
    lanes fixed;
    float *number = of_minima ? small->minimum : small->scale;
    FOR_LANES fixed[l] = size_of(number[l]) >= type->small_max;
    of_small(small, &now);
    measure(s, &now, type, grid, columns);
    for (int step = -1; step <= 1; step += 2) {
        struct small other = *small;
        float *changed = of_minima ? other.minimum : other.scale;
        FOR_LANES {
            float next = number[l] + (float)step;
            next = of_minima ? small_minimum(next, type) : small_scale(next, type);
            changed[l] = fixed[l] ? number[l] : next;
        }
        of_small(&other, &moved);
        measure(s, &moved, type, grid, columns);
        FOR_LANES number[l] = moved.error[l] < now.error[l] ? changed[l] : number[l];
        FOR_LANES now.error[l] = smaller(moved.error[l], now.error[l]);
    }
}

/* What becomes of the groups: by lane, and units by block. zero: minima in steps of codes. */
struct made {
    lanes zero;
    uint8_t small[LANES], small_minima[LANES];
    uint16_t scales[LANES], minima[LANES], units[LANES];
    int outcome;
};

/* The one of `columns` weights that is farthest from 0, of equally far ones the first. */
INLINE float extreme_of(const float *w, int columns) {
    float largest = 0;
    int first = columns;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < columns; j++) largest = larger(size_of(w[j]), largest);
#pragma omp simd reduction(min : first)
    for (int j = 0; j < columns; j++) {
        int place = size_of(w[j]) == largest ? j : columns;
        first = place < first ? place : first;
    }
    return w[first % columns]; /* none where one is NaN */
}

/* The largest weight of each group on the smallest code, or the range between the codes' ends. */
INLINE void plain_range(struct search *s, const struct type *type, enum grid grid, int columns) {
    if (grid == MINIMA) {
        FOR_LANES s->best.scale[l] = (s->high[l] - s->low[l]) / type->code_max;
        return;
    }
    for (int l = 0; l < LANES; l++) s->best.scale[l] = extreme_of(s->rows + l * columns, columns);
    FOR_LANES s->best.scale[l] /= type->code_min;
}

/* Real numbers as small ones in units of each block; `searched`: neighbours are tried. */
INLINE void in_units(struct search *s, struct small *small, int searched, const struct type *type, enum grid grid,
                     int columns, struct made *made) {
    lanes lowest;
    FOR_LANES lowest[l] = searched ? s->best.minimum[l] : grid == MINIMA ? -s->low[l] : 0.0f;
    for (int first = 0; first < LANES; first += type->block) {
        float unit = unit_of(s->best.scale + first, type->block, type->small_min, type->small_max, grid, &made->outcome);
        float other = 1;
        if (grid == MINIMA) other = unit_of(lowest + first, type->block, 0, type->small_max, grid, &made->outcome);
        for (int l = first; l < first + type->block; l++) small->scale_unit[l] = unit, small->minimum_unit[l] = other;
        uint16_t *units = made->units + first / type->block * (grid == MINIMA ? 2 : 1);
        units[0] = to_float16(unit);
        if (grid == MINIMA) units[1] = to_float16(other);
    }
    FOR_LANES {
        float ratio = searched ? s->best.minimum[l] / small->minimum_unit[l] : 0.0f;
        if (!searched) { /* the zero point first, as for any grid of a range */
            float zero = s->best.scale[l] > 0 ? lowest[l] / s->best.scale[l] : 0.0f;
            ratio = zero * s->best.scale[l] / small->minimum_unit[l];
        }
        small->minimum[l] = grid == MINIMA ? small_minimum(ratio, type) : 0.0f;
        small->scale[l] = small_scale(s->best.scale[l] / small->scale_unit[l], type);
    }
    if (searched && grid == MINIMA) try_neighbours(s, small, 1, type, grid, columns);
    if (searched) try_neighbours(s, small, 0, type, grid, columns);
    of_small(small, &s->best);
    FOR_LANES {
        made->zero[l] = grid == MINIMA ? s->best.minimum[l] / s->best.scale[l] : 0.0f;
        made->small[l] = (uint8_t)(int32_t)small->scale[l];
        made->small_minima[l] = (uint8_t)(int32_t)small->minimum[l];
    }
}

/* Scales, and minima, in float16. */
INLINE void as_halves(struct search *s, int searched, enum grid grid, struct made *made) {
    int is_wrong[LANES], any = 0;
    FOR_LANES {
        float exact = s->best.scale[l], scale = stored(exact, grid);
        float lowest = searched ? s->best.minimum[l] : grid == MINIMA ? -s->low[l] / scale * scale : 0.0f;
        is_wrong[l] = is_too_large(exact) | (grid == MINIMA && is_too_large(lowest));
        s->best.scale[l] = scale;
        made->scales[l] = to_float16(scale);
        made->zero[l] = grid == MINIMA ? of_float16(to_float16(lowest)) / scale : 0.0f;
        made->minima[l] = to_float16(-made->zero[l] * scale);
    }
    for (int l = 0; l < LANES; l++) any |= is_wrong[l];
    if (any) made->outcome = SCALE_TOO_LARGE;
}

/* Codes [lane][columns] of the groups, and sums of the squares of the weights and of their errors. */
INLINE void encode_groups(const struct search *s, const struct made *made, const struct type *type, enum grid grid,
                          int columns, int used, uint8_t *restrict codes, double *sums) {
    lanes changes = {0}, squares = {0};
    for (int group = 0; group < used; group++)
        for (int first = group * columns; first < (group + 1) * columns; first += LANES) {
            const float *w = s->rows + first;
            uint8_t *to = codes + first;
            float scale = s->best.scale[group], zero = made->zero[group];
            int32_t whole[LANES]; /* bytes at once would take lanes four at a time */
            FOR_LANES {
                float code = code_of(w[l] / scale, zero, type, grid), change = (code - zero) * scale - w[l];
                changes[l] += change * change;
                squares[l] += w[l] * w[l];
                whole[l] = (int32_t)code;
            }
            FOR_LANES to[l] = (uint8_t)whole[l];
        }
    for (int l = 0; l < LANES; l++) sums[0] += squares[l], sums[1] += changes[l];
}

/* What each group reaches: down and up, each from 0 on where a block needs that. */
INLINE void ranges(struct search *s, const struct type *type, enum grid grid, int columns) {
    int holds_zero = grid == MINIMA && type->block;
    for (int l = 0; l < LANES; l++) {
        const float *w = s->rows + l * columns;
        float low = holds_zero ? 0.0f : w[0], high = low;
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int j = 0; j < columns; j++) {
            low = smaller(w[j], low);
            high = larger(w[j], high);
        }
        s->low[l] = low + 0.0f, s->high[l] = high + 0.0f;
    }
}

/* Groups of the weights from number `start` on, one in each lane; zeros in those that are not used. */
INLINE void fetch_groups(const void *weights, enum dtype dtype, int64_t start, int columns, int used, int searched,
                         struct search *s) {
    if (used < LANES) memset(s->rows, 0, sizeof s->rows);
    read_row(weights, dtype, start, (int64_t)used * columns, s->rows);
    if (!searched) return;
    for (int j = 0; j < columns; j++)
        for (int l = 0; l < LANES; l++) s->w[j][l] = s->rows[l * columns + j];
}

/* Where everything goes: codes [groups, columns]; scales and minima of the groups, float16 or of a byte; units. */
struct output {
    uint8_t *codes, *scales, *minima;
    uint16_t *units;
};

INLINE void put(const struct made *made, const struct type *type, enum grid grid, int64_t group, int used,
                const struct output *out) {
    if (!type->block) {
        memcpy(out->scales + group * 2, made->scales, used * 2);
        if (grid == MINIMA) memcpy(out->minima + group * 2, made->minima, used * 2);
        return;
    }
    int units = grid == MINIMA ? 2 : 1;
    memcpy(out->scales + group, made->small, used);
    if (grid == MINIMA) memcpy(out->minima + group, made->small_minima, used);
    memcpy(out->units + group / type->block * units, made->units, used / type->block * units * 2);
}

INLINE int round_groups(const void *weights, enum dtype dtype, const struct type *type, enum grid grid, int columns,
                        int searched, int64_t groups, const struct output *out, double *sums) {
    struct search s;
    for (int64_t group = 0; group < groups; group += LANES) {
        int used = groups - group < LANES ? (int)(groups - group) : LANES;
        struct made made = {.outcome = DONE};
        struct small small;
        fetch_groups(weights, dtype, group * columns, columns, used, searched, &s);
        if (searched || grid == MINIMA) ranges(&s, type, grid, columns);
        if (searched)
            search_numbers(&s, type, grid, columns);
        else
            plain_range(&s, type, grid, columns);
        if (type->block)
            in_units(&s, &small, searched, type, grid, columns, &made);
        else
            as_halves(&s, searched, grid, &made);
        encode_groups(&s, &made, type, grid, columns, used, out->codes + group * columns, sums);
        put(&made, type, grid, group, used, out);
        if (!(sums[0] < 1.7976931348623157e308)) return NOT_FINITE;
        if (made.outcome) return made.outcome;
    }
    return DONE;
}

/* weights: [groups, columns], groups of all rows. sums: of the squares of the weights, and of their errors. */
FOR_EACH_PROCESSOR
int outlierq_round_types(const void *weights, enum dtype dtype, const struct type *type, int searched, int64_t groups,
                         const struct output *out, double *sums) {
    sums[0] = sums[1] = 0;
#define ROUND(grid, columns) round_groups(weights, dtype, type, grid, columns, searched, groups, out, sums)
    if (type->grid == SYMMETRIC && type->columns == 16) return ROUND(SYMMETRIC, 16);
    if (type->grid == SYMMETRIC) return ROUND(SYMMETRIC, 32);
    if (type->grid == TABLE) return ROUND(TABLE, 32);
    return type->columns == 16 ? ROUND(MINIMA, 16) : ROUND(MINIMA, 32);
}
