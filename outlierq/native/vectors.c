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

/* Cells that the sizes of four weights fall into, so many for each, the last without end, and codewords that are nearest
   somewhere in one. */
enum { WIDTH = 4, EACH = 16, CELLS = EACH * EACH * EACH * EACH, NEAR = 16, RIVALS = 8, HAS_MORE = 128 };
#define SURELY 0.01f /* more than sums of squares of codewords are rounded by */

/* Whether a word is farther than a rival from every point of a cell: of the difference of the squared distances, linear in
   every size, the least. low: the near corner. The values of a word are `number` apart. */
INLINE int is_never_nearest(const float *word, const float *rival, int64_t number, const float *low, float step) {
    float least = 0;
    for (int j = 0; j < WIDTH; j++) {
        float one = word[j * number], other = rival[j * number];
        float high = low[j] + 1.5f * step < EACH * step ? low[j] + step : INFINITY;
        if (one != other) least += one * one - other * other - 2 * (one - other) * (one > other ? high : low[j]);
    }
    return least > SURELY;
}

INLINE void put_word(const float *word, int64_t number, uint8_t *near, int64_t place) {
    uint8_t *row = near + place / NEAR * WIDTH * NEAR;
    for (int j = 0; j < WIDTH; j++) row[j * NEAR + place % NEAR] = (uint8_t)word[j * number];
}

/* The words nearest to the middle of a cell: nearly all others are never nearest beside one of them. */
INLINE void rivals_of(const float *words, int64_t number, const float *low, float step, int64_t *rivals) {
    float distance[RIVALS];
    int count = 0;
    for (int64_t word = 0; word < number; word++) {
        float sum = 0;
        for (int j = 0; j < WIDTH; j++) {
            float apart = words[j * number + word] - (low[j] + step / 2);
            sum += apart * apart;
        }
        int place = count < RIVALS ? count++ : RIVALS;
        for (; place > 0 && distance[place - 1] > sum; place--)
            if (place < RIVALS) distance[place] = distance[place - 1], rivals[place] = rivals[place - 1];
        if (place < RIVALS) distance[place] = sum, rivals[place] = word;
    }
}

/* The codewords that are nearest somewhere in a cell, in their order, 16 a row, the first again where there are fewer. Those
   beyond have rows behind those of all cells, and the first byte of the cell's row has its highest bit set.
   near: [rows, 4, 16], of which `most` fit. more: [cells + 1], where the further rows of each begin. words: [4, number], whole
   numbers of seven bits. step: of the cells. The number of rows; 0 where they do not fit. */
FOR_EACH_PROCESSOR
int64_t outlierq_near_words(const float *words, int64_t number, float step, int64_t most, uint8_t *near, int32_t *more) {
    int64_t rows = CELLS;
    for (int64_t cell = 0; cell < CELLS; cell++) {
        float low[WIDTH];
        int64_t rivals[RIVALS], count = 0, first = 0, row = cell;
        for (int j = 0; j < WIDTH; j++) low[j] = (float)(cell >> 4 * (WIDTH - 1 - j) & (EACH - 1)) * step;
        rivals_of(words, number, low, step, rivals);
        more[cell] = (int32_t)rows;
        for (int64_t word = 0; word < number; word++) {
            int is_far = 0;
            for (int r = 0; r < RIVALS && !is_far; r++)
                is_far = is_never_nearest(words + word, words + rivals[r], number, low, step);
            if (is_far) continue;
            if (!count) first = word;
            if (count && count % NEAR == 0) row = rows++;
            if (row >= most) return 0;
            put_word(words + word, number, near, row * NEAR + count++ % NEAR);
        }
        for (; count % NEAR; count++) put_word(words + first, number, near, row * NEAR + count % NEAR);
        if (row != cell) near[cell * WIDTH * NEAR] |= HAS_MORE;
    }
    more[CELLS] = (int32_t)rows;
    return rows;
}

/* The cell of the sizes of u. */
INLINE int32_t cell_of(const float *u, float step) {
    int32_t cell = 0;
    for (int j = 0; j < WIDTH; j++) {
        float place = smaller(fabsf(u[j]) / step, EACH - 1);
        cell = cell * EACH + (int32_t)(place >= 0 ? place : 0); /* NaN goes anywhere */
    }
    return cell;
}

/* The nearest to sizes u of 16 words [4, 16], where it is nearer than `least`. */
INLINE void nearest_of_row(const float *u, const uint8_t *words, float *least, float *size) {
    float distance[NEAR] = {0}, nearest_here = INFINITY;
    int32_t first = NEAR;
    for (int j = 0; j < WIDTH; j++) {
        float twice = 2 * fabsf(u[j]);
#pragma omp simd
        for (int i = 0; i < NEAR; i++) {
            float g = (float)(words[j * NEAR + i] & ~HAS_MORE);
            distance[i] += g * (g - twice);
        }
    }
#pragma omp simd reduction(min : nearest_here)
    for (int i = 0; i < NEAR; i++) nearest_here = smaller(distance[i], nearest_here);
    if (!(nearest_here < *least)) return;
    *least = nearest_here;
#pragma omp simd reduction(min : first)
    for (int i = 0; i < NEAR; i++) {
        int32_t place = distance[i] == nearest_here ? i : NEAR;
        first = place < first ? place : first;
    }
    for (int j = 0; j < WIDTH; j++) size[j] = (float)(words[j * NEAR + first % NEAR] & ~HAS_MORE);
}

/* The nearest codewords with signs where all weights count alike. ratio, out: [count, 4]. near, more, step: as above. */
FOR_EACH_PROCESSOR
void outlierq_nearest_in_cells(const float *ratio, int64_t count, const uint8_t *near, const int32_t *more, float step,
                               float *out) {
    enum { RUN = 64, ROW = WIDTH * NEAR };
    for (int64_t start = 0; start < count; start += RUN) {
        int64_t run = count - start < RUN ? count - start : RUN;
        int32_t cells[RUN]; /* all are asked for before the first is needed: they lie anywhere */
        for (int64_t v = 0; v < run; v++) {
            cells[v] = cell_of(ratio + (start + v) * WIDTH, step);
            FETCH(near + (int64_t)cells[v] * ROW);
        }
        for (int64_t v = 0; v < run; v++) {
            const float *u = ratio + (start + v) * WIDTH;
            const uint8_t *words = near + (int64_t)cells[v] * ROW;
            float size[WIDTH] = {0}, least = INFINITY, *to = out + (start + v) * WIDTH;
            nearest_of_row(u, words, &least, size);
            if (words[0] & HAS_MORE)
                for (int64_t row = more[cells[v]]; row < more[cells[v] + 1]; row++)
                    nearest_of_row(u, near + row * ROW, &least, size);
            for (int j = 0; j < WIDTH; j++) to[j] = u[j] < 0 ? -size[j] : size[j];
        }
    }
}
