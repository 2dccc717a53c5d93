/* Numbers of a few bits out of the blocks of GGUF: `spread` of load/gguf/superblocks.py. Shares nothing with pack.c, so that
   what reads a file back is not what wrote it. */

#include "floats.h"

/* Zeros and ones in eight bytes out of the bits of one, the lowest first. */
INLINE uint64_t ones_of(uint8_t byte) {
    uint64_t each = byte * UINT64_C(0x0101010101010101) & UINT64_C(0x8040201008040201);
    return (each + UINT64_C(0x7F7F7F7F7F7F7F7F)) >> 7 & UINT64_C(0x0101010101010101);
}

/* Eight bytes at a time; run: a multiple of 8. */
INLINE void spread_runs(const uint8_t *raw, int64_t runs, int bits, int run, uint8_t *restrict out) {
    uint64_t mask = ((UINT64_C(1) << bits) - 1) * UINT64_C(0x0101010101010101);
    for (int64_t r = 0; r < runs; r++, raw += run)
        for (int place = 0; place < 8; place += bits, out += run)
            for (int i = 0; i < run; i += 8) {
                uint64_t some;
                memcpy(&some, raw + i, 8);
                some = some >> place & mask;
                memcpy(out + i, &some, 8);
            }
}

/* raw: of each of `blocks` blocks, `stride` bytes apart, `runs` runs of `run` bytes. out: 8 / bits times as many numbers: of
   each run first the lowest bits of all its bytes, then the next. 0 for runs that no type has. */
FOR_EACH_PROCESSOR
int outlierq_spread(const uint8_t *raw, int64_t blocks, int64_t stride, int64_t runs, int bits, int run,
                    uint8_t *restrict out) {
#define SPREAD(width, length) \
    if (bits == width && run == length) { \
        for (int64_t b = 0; b < blocks; b++) \
            spread_runs(raw + b * stride, runs, width, length, out + b * runs * length * (8 / width)); \
        return 1; \
    }
    SPREAD(1, 32) SPREAD(2, 32) SPREAD(4, 8) SPREAD(4, 16) SPREAD(4, 32) SPREAD(4, 64)
    if (bits != 1 || run != 1) return 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t i = 0; i < runs; i++) {
            uint64_t ones = ones_of(raw[b * stride + i]);
            memcpy(out + 8 * (b * runs + i), &ones, 8);
        }
    return 1;
}
