/* What the kernels of products.c share. A panel is 16 rows of a weight, stored so that a vector of 32-bit words holds one
   row in each. A step is one such vector with 8 codes of 4 bits or 4 of 8 bits, of as many columns; of 4 bits, those of
   even columns lie in the lower half of a word. Of 6 bits a step is three vectors of 16 columns: bytes of two with the
   lower four bits, column c in byte c % 4, halves 0, 1, 0, 1 by c / 4; and one with the upper two, pair c / 4 of a byte.
   Pairs of an outlier and its victim (OliVe) are codes of 4 bits of which -8 is none, but says that the number is 0 and the
   code of the other column of a pair an outlier's: a sign, two bits e and a bit m, (2 + m) * 2^(e + 2). */

#ifndef OUTLIERQ_PRODUCTS_H
#define OUTLIERQ_PRODUCTS_H

#include "floats.h"

#define PANEL 16

/* What a code is: an integer in two's complement, or a float of a sign, an exponent (bits: 0 for integers) and a mantissa.
   columns, words: of a step. paired: whether it may be an outlier or its victim. */
enum codes { INT4, INT8, E2M1, E4M3, E2M3, E3M2, VICTIMS };
struct code {
    int bits, columns, words, exponent, paired;
};
enum { VICTIM = -8 };
/* How the numbers of a tile are made of codes. */
enum { WHOLE, SMALL_FLOATS, PAIRED };

/* What 1 is once the exponent of such a float is moved to that of a float32: 2^-bias, as bits. */
INLINE int32_t least_power(const struct code *code) { return (128 - (1 << (code->exponent - 1))) << 23; }

/* A float of few bits. With its exponent moved it is a float32 f; but where the exponent is 0 there is no 1 before the
   mantissa, which counts double: 2 (f - 1), and that is no less than f anywhere else. No subnormal float32 is made. */
INLINE float of_small_float(uint32_t bits, const struct code *code) {
    uint32_t sign = bits >> (code->bits - 1) << 31, size = bits & ((1u << (code->bits - 1)) - 1);
    float one = as_float((uint32_t)least_power(code));
    float f = as_float((size << (24 - code->bits + code->exponent)) + as_bits(one));
    float subnormal = 2 * f - 2 * one;
    return as_float(as_bits(subnormal < f ? subnormal : f) | sign);
}

/* An outlier by its code from -7 to 7. */
INLINE int outlier_of(int code) {
    int size = (2 + (code & 1)) << ((code >> 1 & 3) + 2);
    return code < 0 ? -size : size;
}

/* bfloat16 numbers of a kernel's codes: of 4 bits twice, or those of pairs and behind them those of outliers; of others their low and their high bytes. Integers of 8 bits are
   half a step more than the code, whose size has 128 values; so are floats, whose sign is that of the code. */
struct numbers {
    uint16_t of_4_bits[32];
    uint8_t low[128], high[128];
};

/* Some tokens of one panel. */
struct tile {
    const uint32_t *words;
    const float *scales, *offsets; /* [groups][PANEL]; offsets may be NULL */
    const void *x;                 /* as the kernel likes it: see `arrange` of products.c */
    const float *sums;             /* [groups][tokens]: what the inputs of a group add up to */
    void *y;                       /* [tokens][PANEL]: float32, or the int32 sums of int8 */
    int64_t groups, steps;         /* of a group */
    const struct code *code;
    const struct numbers *numbers;
    int tokens;
};

#endif
