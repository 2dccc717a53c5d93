/* What the kernels of products.c share. A panel is 16 rows of a weight, stored so that a vector of 32-bit words holds one
   row in each: 8 codes of 4 bits or 4 of 8 bits, in two's complement, of as many columns; of 4 bits, those of even columns lie in the
   lower half of a word. */

#ifndef OUTLIERQ_PRODUCTS_H
#define OUTLIERQ_PRODUCTS_H

#include "floats.h"

#define PANEL 16

/* Some tokens of one panel. */
struct tile {
    const uint32_t *words;
    const float *scales, *offsets; /* [groups][PANEL]; offsets may be NULL */
    const void *x;                 /* as the kernel likes it: see `arrange` of products.c */
    const float *sums;             /* [groups][tokens]: what the inputs of a group add up to */
    void *y;                       /* [tokens][PANEL]: float32, or the int32 sums of int8 */
    int64_t groups, steps;         /* words of a row in a group */
    int bits, tokens;
};

#endif
