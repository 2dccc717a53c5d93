/* Codes into the words, bytes and blocks of file formats: ops/compiled/packing.py, on little-endian machines.

   The same bytes as ops/packing.py and export make with numpy and torch. Codes are bytes, of which the lowest `bits`
   count; `flip` is what is added to them modulo 2^bits, 0 or 2^(bits-1).
   Compile without contraction of a * b + c and without -ffast-math: both would change last bits. */

#include "floats.h"

enum block { Q4_0, Q4_1, Q8_0, MXFP4 };

INLINE int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

INLINE uint64_t word_at(const uint8_t *place) {
    uint64_t word;
    memcpy(&word, place, 8);
    return word;
}

INLINE uint64_t in_every_byte(uint8_t value) { return value * UINT64_C(0x0101010101010101); }

/* A word with the lowest `bits` of every `width` set. */
INLINE uint64_t mask(int bits, int width) {
    uint64_t found = 0;
    for (int place = 0; place < 64; place += width) found |= ((UINT64_C(1) << bits) - 1) << place;
    return found;
}

/* Eight E2M1 codes from the bytes of E4M3 numbers: bits 7, 6, 3 and 2 of each, but for the last bit of 0.5, the only
   number with bit 4 and without bit 3. */
INLINE uint64_t e2m1(uint64_t bytes) {
    uint64_t high = bytes >> 4, half = high & ~(bytes >> 3);
    return (high & in_every_byte(12)) | (bytes >> 2 & in_every_byte(3)) | (half & in_every_byte(1));
}

/* The codes themselves, 4 bits each. */
INLINE uint64_t nibbles(uint64_t bytes, uint64_t flip, int is_e2m1) {
    return is_e2m1 ? e2m1(bytes) : (bytes ^ flip) & in_every_byte(15);
}

/* Ask for bytes that are needed soon: processors see neither that pieces of many rows are read in turn nor that a page of
   memory is followed by the next. */
INLINE void fetch(const uint8_t *place, int64_t count) {
    for (int64_t i = 0; i < count; i += 64) FETCH(place + i);
}

/* `count` words of eight codes into `bits` bytes each: in a word codes, then pairs, then fours move together. */
INLINE void pack_eights(const uint8_t *codes, int64_t count, int bits, uint64_t flip, int is_e2m1, uint8_t *out) {
    enum { RUN = 128, AHEAD = 4 };
    uint64_t words[RUN], low[3], high[3], first = mask(bits, 8);
    for (int step = 0; step < 3; step++) {
        low[step] = mask(bits << step, 16 << step);
        high[step] = low[step] << (bits << step);
    }
    int gap = 8 - bits;
    for (int64_t start = 0; start < count; start += RUN) {
        int64_t run = at_most(count - start, RUN), last = run - (7 + bits) / bits;
        uint8_t *to = out + start * bits;
        fetch(codes + 8 * (start + AHEAD * RUN), 8 * at_most(count - start - AHEAD * RUN, RUN));
        for (int64_t i = 0; i < run; i++) {
            uint64_t word = word_at(codes + 8 * (start + i));
            word = is_e2m1 ? e2m1(word) : (word ^ flip) & first;
            word = (word & low[0]) | (word >> gap & high[0]);
            word = (word & low[1]) | (word >> 2 * gap & high[1]);
            words[i] = (word & low[2]) | (word >> 4 * gap & high[2]);
        }
        if (bits == 4) {
            for (int64_t i = 0; i < run; i++) {
                uint32_t half = (uint32_t)words[i];
                memcpy(to + 4 * i, &half, 4);
            }
            continue;
        }
        /* What a word writes too much, the next ones overwrite; the last ones write no more than they have. */
        for (int64_t i = 0; i <= last; i++) memcpy(to + i * bits, words + i, 8);
        for (int64_t i = last < 0 ? 0 : last + 1; i < run; i++)
            for (int byte = 0; byte < bits; byte++) to[i * bits + byte] = (uint8_t)(words[i] >> 8 * byte);
    }
}

/* The same for any width; of the usual one the compiler knows more. */
INLINE void pack_codes(const uint8_t *codes, int64_t count, int bits, int flip, uint8_t *out) {
    if (bits == 4)
        pack_eights(codes, count, 4, in_every_byte((uint8_t)flip), 0, out);
    else
        pack_eights(codes, count, bits, in_every_byte((uint8_t)flip), 0, out);
}

/* 8 * count codes as a bit string of count * bits bytes. */
FOR_EACH_PROCESSOR
void outlierq_pack(const uint8_t *codes, int64_t count, int bits, int flip, int is_e2m1, uint8_t *restrict out) {
    if (bits == 8)
        for (int64_t i = 0; i < 8 * count; i++) out[i] = codes[i] ^ (uint8_t)flip;
    else if (is_e2m1)
        pack_eights(codes, count, 4, 0, 1, out);
    else
        pack_codes(codes, count, bits, flip, out);
}

/* GPTQ: codes [rows, columns], columns a multiple of 32, as words [columns * bits / 32, rows], packed along columns.
   Some rows and columns at a time, so that what is transposed stays in the cache. */
FOR_EACH_PROCESSOR
void outlierq_pack_gptq(const uint8_t *codes, int64_t rows, int64_t columns, int bits, int flip,
                        uint32_t *restrict out) {
    enum { ROWS = 64, COLUMNS = 512 };
    uint32_t tile[ROWS][COLUMNS / 4];
    for (int64_t row = 0; row < rows; row += ROWS)
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            int64_t height = at_most(rows - row, ROWS), width = at_most(columns - column, COLUMNS);
            for (int64_t r = 0; r < height; r++) {
                const uint8_t *some = codes + (row + r) * columns + column;
                fetch(some + width, at_most(columns - column - width, COLUMNS));
                pack_codes(some, width / 8, bits, flip, (uint8_t *)tile[r]);
            }
            uint32_t *corner = out + column * bits / 32 * rows + row;
            for (int64_t w = 0; w < width * bits / 32; w++)
                for (int64_t r = 0; r < height; r++) corner[w * rows + r] = tile[r][w];
        }
}

/* AWQ: codes of 4 bits [rows, columns], rows a multiple of 8, as words [columns, rows / 8] of eight neighbouring rows
   in the order 0, 2, 4, 6, 1, 3, 5, 7. */
FOR_EACH_PROCESSOR
void outlierq_pack_awq(const uint8_t *codes, int64_t rows, int64_t columns, int flip, uint32_t *restrict out) {
    enum { EIGHTS = 32, COLUMNS = 256 };
    uint32_t tile[EIGHTS][COLUMNS];
    for (int64_t eight = 0; eight < rows / 8; eight += EIGHTS)
        for (int64_t column = 0; column < columns; column += COLUMNS) {
            int64_t height = at_most(rows / 8 - eight, EIGHTS), width = at_most(columns - column, COLUMNS);
            for (int64_t e = 0; e < height; e++) {
                const uint8_t *row = codes + 8 * (eight + e) * columns + column;
                for (int r = 0; r < 8; r++)
                    fetch(row + r * columns + width, at_most(columns - column - width, COLUMNS));
                for (int64_t c = 0; c < width; c++) {
#define PAIR(first) (uint8_t)((row[(first) * columns + c] & 15) | row[((first) + 2) * columns + c] << 4)
                    uint8_t pairs[4] = {PAIR(0), PAIR(4), PAIR(1), PAIR(5)};
                    tile[e][c] = (pairs[0] | pairs[1] << 8 | pairs[2] << 16 | (uint32_t)pairs[3] << 24) ^
                                 (uint32_t)flip * 0x11111111u;
                }
            }
            for (int64_t c = 0; c < width; c++)
                for (int64_t e = 0; e < height; e++) out[(column + c) * (rows / 8) + eight + e] = tile[e][c];
        }
}

/* Codes of 4 bits, 2 * run of them, as `run` bytes: the first in low halves, the others in high ones. */
INLINE void pack_halves(const uint8_t *codes, int run, uint64_t flip, int is_e2m1, uint8_t *out) {
    for (int i = 0; i < run; i += 8) {
        uint64_t low = nibbles(word_at(codes + i), flip, is_e2m1);
        low |= nibbles(word_at(codes + run + i), flip, is_e2m1) << 4;
        memcpy(out + i, &low, 8);
    }
}

/* Minima of Q4_1. */
INLINE void minima_of(const uint16_t *scales, const uint8_t *zeros, int64_t count, uint16_t *restrict minima) {
    for (int64_t i = 0; i < count; i++) minima[i] = to_float16(-(float)zeros[i] * of_float16(scales[i]));
}

/* Blocks of 32 columns of GGUF, one after the other: scale, in Q4_1 minimum -zero * scale, codes. `scales` (float16, or
   bytes in MXFP4) and `zeros`: [rows, groups], each for so many blocks. order: the source's row at each place, or NULL.
*/
INLINE void blocks_of(enum block kind, const uint8_t *codes, int64_t rows, int64_t groups, int64_t blocks,
                      const void *scales, const uint8_t *zeros, const int64_t *order, uint8_t *restrict out) {
    enum { RUN = 64 };
    uint16_t minima[RUN];
    for (int64_t place = 0; place < rows; place++)
        for (int64_t g = 0; g < groups; g++) {
            int64_t group = (order ? order[place] : place) * groups + g;
            uint16_t scale = kind == MXFP4 ? ((const uint8_t *)scales)[group] : ((const uint16_t *)scales)[group];
            if (kind == Q4_1 && g % RUN == 0)
                minima_of((const uint16_t *)scales + group, zeros + group, at_most(groups - g, RUN), minima);
            int head = kind == MXFP4 ? 1 : kind == Q4_1 ? 4 : 2;
            for (int64_t block = group * blocks; block < (group + 1) * blocks; block++) {
                memcpy(out, &scale, kind == MXFP4 ? 1 : 2);
                if (kind == Q4_1) memcpy(out + 2, minima + g % RUN, 2);
                if (kind == Q8_0)
                    memcpy(out + head, codes + block * 32, 32);
                else
                    pack_halves(codes + block * 32, 16, in_every_byte(kind == Q4_0 ? 8 : 0), kind == MXFP4, out + head);
                out += head + (kind == Q8_0 ? 32 : 16);
            }
        }
}

FOR_EACH_PROCESSOR
void outlierq_gguf_blocks(enum block kind, const uint8_t *codes, int64_t rows, int64_t groups, int64_t blocks,
                          const void *scales, const uint8_t *zeros, const int64_t *order, uint8_t *restrict out) {
    if (kind == Q4_0) blocks_of(Q4_0, codes, rows, groups, blocks, scales, zeros, order, out);
    if (kind == Q4_1) blocks_of(Q4_1, codes, rows, groups, blocks, scales, zeros, order, out);
    if (kind == Q8_0) blocks_of(Q8_0, codes, rows, groups, blocks, scales, zeros, order, out);
    if (kind == MXFP4) blocks_of(MXFP4, codes, rows, groups, blocks, scales, zeros, order, out);
}

/* Superblocks of 256 columns of Q4_K: units of scales and of minima (4 bytes), scales and minima of 8 groups with 6
   bits each (12 bytes), codes (128 bytes, of 64 columns the first 32 in low halves). order: as above. */
FOR_EACH_PROCESSOR
void outlierq_gguf_superblocks(const uint8_t *codes, int64_t rows, int64_t blocks, const uint8_t *scales,
                               const uint8_t *minima, const uint8_t *units, const int64_t *order,
                               uint8_t *restrict out) {
    for (int64_t place = 0; place < rows; place++)
        for (int64_t b = 0; b < blocks; b++, out += 144) {
            int64_t block = (order ? order[place] : place) * blocks + b;
            const uint8_t *scale = scales + block * 8, *minimum = minima + block * 8;
            memcpy(out, units + block * 4, 4);
            for (int i = 0; i < 4; i++) {
                out[4 + i] = (uint8_t)(scale[i] | scale[4 + i] >> 4 << 6);
                out[8 + i] = (uint8_t)(minimum[i] | minimum[4 + i] >> 4 << 6);
                out[12 + i] = (uint8_t)((scale[4 + i] & 15) | minimum[4 + i] << 4);
            }
            for (int pair = 0; pair < 4; pair++)
                pack_halves(codes + block * 256 + pair * 64, 32, 0, 0, out + 16 + pair * 32);
        }
}

/* One byte of eight bits, those at `shift` of eight codes, the first in the lowest. */
INLINE uint8_t bits_of(const uint8_t *codes, int shift) {
    return (uint8_t)((word_at(codes) >> shift & in_every_byte(1)) * UINT64_C(0x0102040810204080) >> 56);
}

/* `bits` bits of each code, those from `shift` on: of each run of bytes first the lowest bits of all, then the next. */
INLINE void fields_of(const uint8_t *codes, int64_t runs, int shift, int bits, int run, uint8_t *restrict out) {
    for (int64_t r = 0; r < runs; r++, codes += run * (8 / bits), out += run)
        for (int i = 0; i < run; i++) {
            uint8_t byte = 0;
            for (int place = 0; place < 8; place += bits)
                byte |= (uint8_t)((codes[place / bits * run + i] >> shift & ((1 << bits) - 1)) << place);
            out[i] = byte;
        }
}

/* The same for the runs of GGUF, of which the compiler knows more; 0 for others. codes: runs * run * 8 / bits. */
FOR_EACH_PROCESSOR
int outlierq_pack_fields(const uint8_t *codes, int64_t runs, int shift, int bits, int run, uint8_t *restrict out) {
#define FIELDS(width, length) \
    if (bits == width && run == length) return fields_of(codes, runs, shift, width, length, out), 1;
    FIELDS(1, 32) FIELDS(2, 32) FIELDS(4, 8) FIELDS(4, 16) FIELDS(4, 32) FIELDS(4, 64)
    if (bits != 1 || run != 1) return 0;
    for (int64_t i = 0; i < runs; i++) out[i] = bits_of(codes + 8 * i, shift);
    return 1;
}

INLINE float number_at(const void *numbers, enum dtype dtype, int64_t place) {
    if (dtype == FLOAT32) return ((const float *)numbers)[place];
    uint16_t half = ((const uint16_t *)numbers)[place];
    return dtype == BFLOAT16 ? as_float((uint32_t)half << 16) : of_float16(half);
}

/* (code - zero) * scale of a group, rounded to `dtype`. */
INLINE void dequantize_group(const uint8_t *codes, int is_signed, int64_t columns, float scale, float zero,
                             enum dtype dtype, void *restrict out) {
    for (int64_t i = 0; i < columns; i++) {
        float value = ((float)(is_signed ? (int8_t)codes[i] : (int32_t)codes[i]) - zero) * scale;
        if (dtype == FLOAT32) ((float *)out)[i] = value;
        if (dtype == BFLOAT16) ((uint16_t *)out)[i] = to_bfloat16(value);
        if (dtype == FLOAT16) ((uint16_t *)out)[i] = to_float16(value);
    }
}

/* Weights in the dtype of their scales. groups: of all rows, each of so many columns. zeros: NULL when symmetric. */
FOR_EACH_PROCESSOR
void outlierq_dequantize(const uint8_t *codes, int64_t groups, int64_t columns, const void *scales, enum dtype dtype,
                         const uint8_t *zeros, void *restrict out) {
    for (int64_t group = 0; group < groups; group++) {
        const uint8_t *some = codes + group * columns;
        float scale = number_at(scales, dtype, group), zero = zeros ? (float)zeros[group] : 0.0f;
        int64_t place = group * columns;
#define GROUP(is_signed, kind, type) dequantize_group(some, is_signed, columns, scale, zero, kind, (type *)out + place)
        if (dtype == FLOAT32 && zeros) GROUP(0, FLOAT32, float);
        if (dtype == FLOAT32 && !zeros) GROUP(1, FLOAT32, float);
        if (dtype == BFLOAT16 && zeros) GROUP(0, BFLOAT16, uint16_t);
        if (dtype == BFLOAT16 && !zeros) GROUP(1, BFLOAT16, uint16_t);
        if (dtype == FLOAT16 && zeros) GROUP(0, FLOAT16, uint16_t);
        if (dtype == FLOAT16 && !zeros) GROUP(1, FLOAT16, uint16_t);
    }
}

/* Whether in any of `count` numbers of `width` bytes, 1 or 2, all bits of `mask` are set: those of a NaN or Inf. */
FOR_EACH_PROCESSOR
int outlierq_any_masked(const void *numbers, int64_t count, int width, int mask) {
    const uint8_t *bytes = numbers;
    const uint16_t *halves = numbers;
    int found = 0;
    if (width == 1)
        for (int64_t i = 0; i < count; i++) found |= (bytes[i] & mask) == mask;
    else
        for (int64_t i = 0; i < count; i++) found |= (halves[i] & mask) == mask;
    return found;
}
