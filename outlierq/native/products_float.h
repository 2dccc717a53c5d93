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

/* A tile of `tokens`; x: float32 [columns][tokens]. Few tokens have several sums each, which do not wait for each other. */
TARGET INLINE void NAME(tile)(const struct tile *tile, int bits, int tokens) {
    enum { VECTORS = PANEL / LANES, CHAINS = 4 };
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
        for (int64_t step = 0; step < tile->steps; step++, words += PANEL)
#pragma GCC unroll 8
            for (int c = 0; c < 32 / bits; c++, x += tokens)
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    NAME(lanes) codes = NAME(column)(words + v * LANES, bits, c);
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
