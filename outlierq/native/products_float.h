/* Products with float32 inputs, made once for every width of vectors: products.c says which.

   LANES: floats of a vector. TARGET: the instructions. NAME(x): a name of its own. FUSED(a, b, c): a * b + c. */

typedef float NAME(lanes) __attribute__((vector_size(4 * LANES)));
typedef int32_t NAME(ints) __attribute__((vector_size(4 * LANES)));

/* A column of words, as numbers; of 4 bits, even columns lie in the lower half of a word and odd ones in the upper. */
TARGET INLINE NAME(lanes) NAME(column)(const uint32_t *words, int bits, int column) {
    NAME(ints) word;
    int place = bits == 4 ? column / 2 + column % 2 * 4 : column;
    memcpy(&word, words, sizeof word);
    return __builtin_convertvector((word << (32 - bits - bits * place)) >> (32 - bits), NAME(lanes));
}

/* A tile of `tokens`; x: float32 [columns][tokens]. */
TARGET INLINE void NAME(tile)(const struct tile *tile, int bits, int tokens) {
    enum { VECTORS = PANEL / LANES };
    const NAME(lanes) nothing = {0};
    NAME(lanes) total[MOST_TOKENS][VECTORS], part[MOST_TOKENS][VECTORS];
    const uint32_t *words = tile->words;
    const float *x = tile->x, *scales = tile->scales, *offsets = tile->offsets, *sums = tile->sums;
    for (int t = 0; t < tokens; t++)
        for (int v = 0; v < VECTORS; v++) total[t][v] = nothing;
    for (int64_t g = 0; g < tile->groups; g++, scales += PANEL, sums += tokens) {
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) part[t][v] = nothing;
        for (int64_t step = 0; step < tile->steps; step++, words += PANEL)
#pragma GCC unroll 8
            for (int c = 0; c < 32 / bits; c++, x += tokens)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    NAME(lanes) codes = NAME(column)(words + v * LANES, bits, c);
#pragma GCC unroll 16
                    for (int t = 0; t < tokens; t++) part[t][v] = FUSED(codes, x[t] - nothing, part[t][v]);
                }
#pragma GCC unroll 16
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                NAME(lanes) factor;
                memcpy(&factor, scales + v * LANES, sizeof factor);
                total[t][v] = FUSED(part[t][v], factor, total[t][v]);
                if (!offsets) continue;
                memcpy(&factor, offsets + v * LANES, sizeof factor);
                total[t][v] = FUSED(factor, sums[t] - nothing, total[t][v]);
            }
        if (offsets) offsets += PANEL;
    }
    memcpy(tile->y, total, tokens * PANEL * sizeof(float));
}
