/* What the compiled code of this folder shares: code for each kind of processor, and floats of 16 and 32 bits. */

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

#endif
