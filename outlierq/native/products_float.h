/* Products with float32 inputs, made once for every width of vectors: products.c says which.

   LANES: floats of a vector. TARGET: the instructions. NAME(x): a name of its own. FUSED(a, b, c): a * b + c. */

typedef float NAME(lanes) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES)));

/* The codes of a column in the highest bits; what is below is of others. */
TARGET INLINE NAME(ints) NAME(codes)(const uint32_t *words, int bits, int column) {
    NAME(ints) word, upper;
    int place = bits == 4 ? column / 2 + column % 2 * 4 : column;
    if (bits != 6) {
        memcpy(&word, words, sizeof word);
        return word << (32 - bits - bits * place);
    }
    int byte = column % 4 * 8, part = column / 4;
    memcpy(&word, words + column / 8 * PANEL, sizeof word);
    memcpy(&upper, words + 2 * PANEL, sizeof upper);
    return (upper << (30 - byte - 2 * part) & (int32_t)0xC0000000) | (word << (28 - byte - part % 2 * 4) >> 2 & 0x3C000000);
}

/* A column of pairs: 0 where it is a victim, an outlier beside one. */
TARGET INLINE NAME(lanes) NAME(paired)(NAME(ints) own, NAME(ints) other) {
    NAME(ints) size = (2 + (own & 1)) << ((own >> 1 & 3) + 2), sign = own >> 31;
    NAME(ints) is_victim = own == VICTIM, is_outlier = other == VICTIM;
    NAME(ints) outlier = (size ^ sign) - sign;
    return __builtin_convertvector(((outlier & is_outlier) | (own & ~is_outlier)) & ~is_victim, NAME(lanes));
}

/* A column as numbers: `of_small_float` where they are floats. */
TARGET INLINE NAME(lanes) NAME(column)(const uint32_t *words, int bits, int kind, int column, const struct code *code) {
    NAME(ints) codes = NAME(codes)(words, bits, column);
    if (kind == PAIRED) return NAME(paired)(codes >> 28, NAME(codes)(words, bits, column ^ 1) >> 28);
    if (kind == WHOLE) return __builtin_convertvector(codes >> (32 - bits), NAME(lanes));
    int32_t one = least_power(code);
    NAME(ints) size = ((codes & (int32_t)(0x7FFFFFFFu >> (32 - bits) << (32 - bits))) >> (8 - code->exponent)) + one;
    NAME(ints) subnormal = (NAME(ints))((NAME(lanes))size * 2 - 2 * as_float((uint32_t)one));
    NAME(ints) is_less = subnormal < size; /* as of floats, which are all positive */
    return (NAME(lanes))((subnormal & is_less) | (size & ~is_less) | (codes & INT32_MIN));
}

/* A tile of `tokens`; x: float32 [columns][tokens]. Few tokens have several sums each, which do not wait for each other. */
TARGET INLINE void NAME(tile)(const struct tile *tile, int bits, int kind, int tokens) {
    enum { VECTORS = PANEL / LANES, CHAINS = 4 };
    const int step_words = bits == 6 ? 3 * PANEL : PANEL, columns = bits == 6 ? 16 : 32 / bits;
    const int together = bits == 6 ? 4 : columns; /* are laid out */
    const int chains = tokens == 1 ? CHAINS : tokens == 2 ? 2 : 1;
    const NAME(lanes) nothing = {0};
    NAME(lanes) part[CHAINS][MOST_TOKENS][VECTORS];
    const uint32_t *words = tile->words;
    const float *x = tile->x, *scales = tile->scales, *offsets = tile->offsets, *sums = tile->sums;
    float *total = tile->y;
    memset(total, 0, tokens * PANEL * sizeof *total);
    for (int64_t g = 0; g < tile->groups; g++, scales += PANEL, sums += tokens) {
#pragma GCC unroll 4
        for (int chain = 0; chain < chains; chain++)
#pragma GCC unroll 24
            for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) part[chain][t][v] = nothing;
        for (int64_t step = 0; step < tile->steps; step++, words += step_words)
            for (int first = 0; first < columns; first += together)
#pragma GCC unroll 8
                for (int c = 0; c < together; c++, x += tokens)
#pragma GCC unroll 4
                    for (int v = 0; v < VECTORS; v++) {
                        NAME(lanes) codes = NAME(column)(words + v * LANES, bits, kind, first + c, tile->code);
#pragma GCC unroll 24
                        for (int t = 0; t < tokens; t++) {
                            NAME(lanes) *sum = &part[c % chains][t][v];
                            *sum = FUSED(codes, x[t] - nothing, *sum);
                        }
                    }
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                NAME(lanes) factor, sum;
                float *place = total + t * PANEL + v * LANES;
#pragma GCC unroll 4
                for (int chain = 1; chain < chains; chain++) part[0][t][v] += part[chain][t][v];
                memcpy(&factor, scales + v * LANES, sizeof factor);
                memcpy(&sum, place, sizeof sum);
                sum = FUSED(part[0][t][v], factor, sum);
                if (offsets) {
                    memcpy(&factor, offsets + v * LANES, sizeof factor);
                    sum = FUSED(factor, sums[t] - nothing, sum);
                }
                memcpy(place, &sum, sizeof sum);
            }
        if (offsets) offsets += PANEL;
    }
}
