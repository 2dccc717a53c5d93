/* What the compiled code of this folder shares: code for each kind of processor, bytes that are asked for early, floats of 16
   and 32 bits, rounding. */

#ifndef OUTLIERQ_FLOATS_H
#define OUTLIERQ_FLOATS_H

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__ELF__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#elif defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#ifdef __GNUC__
#define FETCH(place) __builtin_prefetch(place)
#else
#define FETCH(place)
#endif
#define INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32, BFLOAT16, FLOAT16 };

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

/* Half precision: 5 bits of exponent with bias 15, 10 of mantissa. As if of single precision, it is 2^112 too small. */
INLINE float of_float16(uint16_t half) {
    float size = as_float((uint32_t)(half & 0x7FFF) << 13) * 0x1p112f;
    uint32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0u;
    return as_float(as_bits(size) | special | (uint32_t)(half & 0x8000) << 16);
}

/* To the nearest, ties to even; every NaN is the same one. */
INLINE uint16_t to_float16(float value) {
    uint32_t sign = as_bits(value) >> 16 & 0x8000, bits = as_bits(value) & 0x7FFFFFFF;
    float size = as_float(bits);
    uint32_t small = as_bits(size + 0.5f) - as_bits(0.5f); /* below 2^-14 in steps of 2^-24, as at 0.5 */
    uint32_t normal = (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
    uint32_t found = size < 0x1p-14f ? small : size < 65520.0f ? normal : 0x7C00;
    return (uint16_t)(sign | (bits > 0x7F800000u ? 0x7E00 : found));
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t found = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000u ? 0x7FC0 : found);
}

INLINE float larger(float a, float b) { return a > b ? a : b; }
INLINE float smaller(float a, float b) { return a < b ? a : b; }

/* 1.5 * 2^23, beyond which a float has no fraction: added and taken away again, it leaves the nearest integer, ties to
   even. */
#define ROUNDER 12582912.0f

/* Nearest integer. Larger numbers saturate later anyway. */
INLINE float nearest(float value) {
    value = smaller(larger(value, -1048576.0f), 1048576.0f);
    return (value + ROUNDER) - ROUNDER;
}

/* `count` numbers from number `start` on, as float32. */
INLINE void read_row(const void *numbers, enum dtype dtype, int64_t start, int64_t count, float *row) {
    const uint16_t *halves = (const uint16_t *)numbers + start;
    if (dtype == FLOAT32) memcpy(row, (const float *)numbers + start, count * 4);
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) row[i] = as_float((uint32_t)halves[i] << 16);
    if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++) row[i] = of_float16(halves[i]);
}

#endif
