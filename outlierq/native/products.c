/* Tokens times a weight of 4, 6 or 8 bits that stays packed: ops/compiled/products.py.

   A kernel for each kind of processor, all in one library; which of them a machine can run is asked of the machine. Every
   code is a number that bfloat16 and float32 hold exactly, so that only sums are rounded, in float32, group by group. */

#include <stdlib.h>

#include "products.h"
#include "workers.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ON_X86 1
#else
#define ON_X86 0
#endif
#if defined(__aarch64__) && defined(__GNUC__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#define ON_ARM 1
#else
#define ON_ARM 0
#endif

#define AHEAD 1024 /* words: of few tokens, a product waits for memory */
#define MOST_TOKENS 24 /* of a tile: their sums, and those of a group, stay in registers */

/* The number of tokens as a constant, so that loops over them are laid out. */
#define FOR_TOKENS(call) \
    switch (tile->tokens) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
        case 5: call(5); break; \
        case 6: call(6); break; \
        case 7: call(7); break; \
        case 8: call(8); break; \
        case 9: call(9); break; \
        case 10: call(10); break; \
        case 11: call(11); break; \
        case 12: call(12); break; \
        case 13: call(13); break; \
        case 14: call(14); break; \
        case 15: call(15); break; \
        case 16: call(16); break; \
        case 17: call(17); break; \
        case 18: call(18); break; \
        case 19: call(19); break; \
        case 20: call(20); break; \
        case 21: call(21); break; \
        case 22: call(22); break; \
        case 23: call(23); break; \
        case 24: call(24); break; \
    }
#define FOR_FEW_TOKENS(call) \
    switch (tile->tokens) { \
        case 1: call(1); break; \
        case 2: call(2); break; \
        case 3: call(3); break; \
        case 4: call(4); break; \
    }

/* A tile of float32 inputs by what its codes are: their bits, and whether they are floats or pairs. */
#define FOR_CODES(tile_of, m) \
    switch (tile->code->bits + (tile->code->exponent ? 16 : tile->code->paired ? 32 : 0)) { \
        case 4: tile_of(tile, 4, WHOLE, m); break; \
        case 8: tile_of(tile, 8, WHOLE, m); break; \
        case 20: tile_of(tile, 4, SMALL_FLOATS, m); break; \
        case 22: tile_of(tile, 6, SMALL_FLOATS, m); break; \
        case 24: tile_of(tile, 8, SMALL_FLOATS, m); break; \
        case 36: tile_of(tile, 4, PAIRED, m); break; \
    }

/* Of float32, for any processor. */
#define LANES 4
#define TARGET
#define NAME(x) any_##x
#if ON_ARM
#define FUSED(a, b, c) ((any_lanes)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#include "products_float.h"
#undef LANES
#undef TARGET
#undef NAME
#undef FUSED

#if ON_X86
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(x) avx2_##x
#define FUSED(a, b, c) ((avx2_lanes)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "products_float.h"
#undef LANES
#undef TARGET
#undef NAME
#undef FUSED

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define LANES 16
#define TARGET AVX512
#define NAME(x) avx512_##x
#define FUSED(a, b, c) ((avx512_lanes)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "products_float.h"
#undef LANES
#undef TARGET
#undef NAME
#undef FUSED
#endif

static void any_float(const struct tile *tile) {
#define CALL(m) FOR_CODES(any_tile, m)
    FOR_FEW_TOKENS(CALL)
#undef CALL
}

/* Sums of int8 products, [tokens][PANEL]; x: int8 [columns / 4][tokens][4]. */
static void any_int8(const struct tile *tile) {
    int32_t *y = tile->y;
    const uint32_t *words = tile->words;
    const int8_t *x = tile->x;
    memset(y, 0, tile->tokens * PANEL * sizeof *y);
    for (int64_t step = 0; step < tile->steps; step++, words += PANEL)
        for (int64_t t = 0; t < tile->tokens; t++, x += 4)
            for (int r = 0; r < PANEL; r++)
                for (int c = 0; c < 4; c++) y[t * PANEL + r] += x[c] * (int8_t)(words[r] >> 8 * c);
}

#if ON_X86
__attribute__((target("avx2,fma"))) static void avx2_float(const struct tile *tile) {
#define CALL(m) FOR_CODES(avx2_tile, m)
    FOR_FEW_TOKENS(CALL)
#undef CALL
}

AVX512 static void avx512_float(const struct tile *tile) {
#define CALL(m) FOR_CODES(avx512_tile, m)
    FOR_TOKENS(CALL)
#undef CALL
}

/* Four words of rows as 16 numbers of 16 bits; a token's four inputs beside each: exact, which maddubs is not. */
__attribute__((target("avx2"))) INLINE void avx2_int8_tile(const struct tile *tile, int tokens) {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int quarter = 0; quarter < 4; quarter++) {
        const uint32_t *words = tile->words + 4 * quarter;
        const int8_t *x = tile->x;
        __m256i sum[MOST_TOKENS];
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++) sum[t] = _mm256_setzero_si256();
        for (int64_t step = 0; step < tile->steps; step++, words += PANEL) {
            __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)words));
#pragma GCC unroll 24
            for (int t = 0; t < tokens; t++, x += 4) {
                int32_t four;
                memcpy(&four, x, 4);
                __m256i inputs = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
                sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(codes, inputs));
            }
        }
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++) { /* two halves of each row, side by side */
            __m256i parted = _mm256_permutevar8x32_epi32(sum[t], order);
            __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(parted), _mm256_extracti128_si256(parted, 1));
            _mm_storeu_si128((__m128i *)((int32_t *)tile->y + t * PANEL + 4 * quarter), whole);
        }
    }
}

__attribute__((target("avx2"))) static void avx2_int8(const struct tile *tile) {
#define CALL(m) avx2_int8_tile(tile, m)
    FOR_TOKENS(CALL)
#undef CALL
}

/* The instruction takes unsigned inputs: 128 more than they are, which `corrections` takes back. x: bytes, as above. */
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
VNNI INLINE void vnni_tile(const struct tile *tile, int tokens) {
    const uint32_t *words = tile->words, *x = tile->x;
    __m512i sum[MOST_TOKENS];
#pragma GCC unroll 24
    for (int t = 0; t < tokens; t++) sum[t] = _mm512_setzero_si512();
    for (int64_t step = 0; step < tile->steps; step++, words += PANEL, x += tokens) {
        __m512i codes = _mm512_loadu_si512(words);
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++)
            sum[t] = _mm512_dpbusd_epi32(sum[t], _mm512_set1_epi32((int32_t)x[t]), codes);
    }
#pragma GCC unroll 24
    for (int t = 0; t < tokens; t++) _mm512_storeu_si512((int32_t *)tile->y + t * PANEL, sum[t]);
}

/* Few tokens: four sums for each, which do not wait for each other. */
VNNI INLINE void vnni_chains(const struct tile *tile, int tokens) {
    enum { CHAINS = 4, FEW = 4 };
    const uint32_t *words = tile->words, *x = tile->x;
    __m512i sum[CHAINS][FEW];
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; c++)
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) sum[c][t] = _mm512_setzero_si512();
    int64_t step = 0;
    for (; step + CHAINS <= tile->steps; step += CHAINS)
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; c++, words += PANEL)
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++, x++)
                sum[c][t] = _mm512_dpbusd_epi32(sum[c][t], _mm512_set1_epi32((int32_t)*x), _mm512_loadu_si512(words));
    for (; step < tile->steps; step++, words += PANEL)
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++, x++)
            sum[0][t] = _mm512_dpbusd_epi32(sum[0][t], _mm512_set1_epi32((int32_t)*x), _mm512_loadu_si512(words));
#pragma GCC unroll 4
    for (int t = 0; t < tokens; t++) {
        __m512i whole = _mm512_add_epi32(_mm512_add_epi32(sum[0][t], sum[1][t]), _mm512_add_epi32(sum[2][t], sum[3][t]));
        _mm512_storeu_si512((int32_t *)tile->y + t * PANEL, whole);
    }
}

VNNI static void vnni_int8(const struct tile *tile) {
#define CALL(m) m <= 4 ? vnni_chains(tile, m <= 4 ? m : 4) : vnni_tile(tile, m)
    FOR_TOKENS(CALL)
#undef CALL
}

#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512bf16")))

/* Pairs of columns: (0, 1), (2, 3), (4, 5), (6, 7) of 4 bits. */
BF16 INLINE void pairs_of_4_bits(const uint32_t *words, __m512i table, __m512i pairs[4]) {
    __m512i eight = _mm512_loadu_si512(words);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) pairs[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(eight, 4 * p), table);
}

/* The same of outliers and victims: a table has the numbers of outliers in its second half. */
BF16 INLINE void pairs_with_victims(const uint32_t *words, __m512i table, __m512i pairs[4]) {
    const __m512i lowest = _mm512_set1_epi16(15), victim = _mm512_set1_epi16(8), second = _mm512_set1_epi16(16);
    __m512i eight = _mm512_loadu_si512(words);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        __m512i codes = _mm512_and_si512(_mm512_srli_epi16(eight, 4 * p), lowest);
        __m512i other = _mm512_rol_epi32(codes, 16);
        __m512i is_outlier = _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(other, victim), second);
        pairs[p] = _mm512_permutexvar_epi16(_mm512_or_si512(codes, is_outlier), table);
    }
}

/* Other codes need a table of bytes; `flip`: all bits where negative integers have the size of their complement. */
struct bytes { __m512i low[2], high[2], first, second, flip; };

BF16 INLINE struct bytes table_of_bytes(const struct tile *tile) {
    const uint8_t *low = tile->numbers->low, *high = tile->numbers->high;
    uint8_t first[64], second[64];
    for (int i = 0; i < 64; i++) {
        first[i] = (uint8_t)(i / 4 * 4 + i % 4 / 2 + i % 2 * 64); /* low and high byte of columns 0 and 1 of each row */
        second[i] = (uint8_t)(first[i] + 2);
    }
    return (struct bytes){{_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)},
                          {_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)},
                          _mm512_loadu_si512(first),
                          _mm512_loadu_si512(second),
                          _mm512_set1_epi8(tile->code->exponent ? 0 : -1)};
}

/* Pairs (0, 1) and (2, 3) of bytes; their highest bit is the sign. */
BF16 INLINE void pairs_of_bytes(__m512i codes, const struct bytes *table, __m512i pairs[2]) {
    __m512i size = _mm512_min_epu8(codes, _mm512_xor_si512(codes, table->flip));
    __m512i low = _mm512_permutex2var_epi8(table->low[0], size, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], size, table->high[1]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xF8); /* high | (codes & sign) */
    pairs[0] = _mm512_permutex2var_epi8(low, table->first, high);
    pairs[1] = _mm512_permutex2var_epi8(low, table->second, high);
}

/* Pairs of 16 columns of 6 bits, whose table has the sign. */
BF16 INLINE void pairs_of_6_bits(const uint32_t *words, const struct bytes *table, __m512i pairs[8]) {
    const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8(48);
    __m512i twos = _mm512_loadu_si512(words + 2 * PANEL);
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
        __m512i fours = _mm512_srli_epi16(_mm512_loadu_si512(words + part / 2 * PANEL), part % 2 * 4);
        __m512i above = part < 2 ? _mm512_slli_epi16(twos, 4 - 2 * part) : _mm512_srli_epi16(twos, 2 * part - 4);
        above = _mm512_and_si512(above, upper);
        pairs_of_bytes(_mm512_ternarylogic_epi32(above, fours, lower, 0xF8), table, pairs + 2 * part);
    }
}

/* A tile of `tokens`. x: pairs of bfloat16, [columns / 2][tokens], see `arrange`. */
BF16 INLINE void bf16_tile(const struct tile *tile, int bits, int paired, int tokens) {
    enum { PAIRS = 8 };
    const int pairs = bits == 6 ? 8 : 16 / bits, step_words = bits == 6 ? 3 * PANEL : PANEL;
    const int chains = tokens > 4 ? 1 : bits == 8 ? 2 : 4, is_raised = bits == 8 && !tile->code->exponent;
    const __m512i table = _mm512_loadu_si512(tile->numbers->of_4_bits);
    const struct bytes bytes = table_of_bytes(tile);
    const uint32_t *words = tile->words, *x = tile->x;
    const float *scales = tile->scales, *offsets = tile->offsets, *sums = tile->sums;
    float *total = tile->y;
    __m512 part[4][MOST_TOKENS];
    memset(total, 0, tokens * PANEL * sizeof *total);
    for (int64_t g = 0; g < tile->groups; g++, scales += PANEL, sums += tokens) {
#pragma GCC unroll 4
        for (int c = 0; c < chains; c++)
#pragma GCC unroll 24
            for (int t = 0; t < tokens; t++) part[c][t] = _mm512_setzero_ps();
        for (int64_t step = 0; step < tile->steps; step++, words += step_words) {
            __m512i codes[PAIRS];
            if (tokens <= 4) _mm_prefetch((const char *)(words + AHEAD), _MM_HINT_T0);
            if (paired) pairs_with_victims(words, table, codes);
            else if (bits == 4) pairs_of_4_bits(words, table, codes);
            else if (bits == 6) pairs_of_6_bits(words, &bytes, codes);
            else pairs_of_bytes(_mm512_loadu_si512(words), &bytes, codes);
#pragma GCC unroll 8
            for (int p = 0; p < pairs; p++)
#pragma GCC unroll 24
                for (int t = 0; t < tokens; t++, x++) {
                    __m512 *sum = &part[p % chains][t];
                    *sum = _mm512_dpbf16_ps(*sum, (__m512bh)codes[p], (__m512bh)_mm512_set1_epi32((int32_t)*x));
                }
        }
        __m512 scale = _mm512_loadu_ps(scales);
#pragma GCC unroll 24
        for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 4
            for (int c = 1; c < chains; c++) part[0][t] = _mm512_add_ps(part[0][t], part[c][t]);
            if (is_raised) part[0][t] = _mm512_fmadd_ps(_mm512_set1_ps(-0.5f), _mm512_set1_ps(sums[t]), part[0][t]);
            __m512 sum = _mm512_fmadd_ps(part[0][t], scale, _mm512_loadu_ps(total + t * PANEL));
            if (offsets) sum = _mm512_fmadd_ps(_mm512_loadu_ps(offsets), _mm512_set1_ps(sums[t]), sum);
            _mm512_storeu_ps(total + t * PANEL, sum);
        }
        if (offsets) offsets += PANEL;
    }
}

BF16 static void bf16_float(const struct tile *tile) {
#define CALL(m) \
    tile->code->paired ? bf16_tile(tile, 4, 1, m) : tile->code->bits == 4 ? bf16_tile(tile, 4, 0, m) : \
    tile->code->bits == 6 ? bf16_tile(tile, 6, 0, m) : bf16_tile(tile, 8, 0, m)
    FOR_TOKENS(CALL)
#undef CALL
}
#endif

#if ON_ARM
/* Four products at once into each of four sums; x: int8 [columns / 4][tokens][4]. */
__attribute__((target("arch=armv8.2-a+dotprod"))) static void dot_int8(const struct tile *tile) {
    for (int64_t t = 0; t < tile->tokens; t++) {
        const uint32_t *words = tile->words;
        const int8_t *x = (const int8_t *)tile->x + 4 * t;
        int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (int64_t step = 0; step < tile->steps; step++, words += PANEL, x += 4 * tile->tokens) {
            int8x16_t inputs = vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)x));
            for (int v = 0; v < 4; v++)
                sum[v] = vdotq_s32(sum[v], vreinterpretq_s8_u32(vld1q_u32(words + 4 * v)), inputs);
        }
        for (int v = 0; v < 4; v++) vst1q_s32((int32_t *)tile->y + t * PANEL + 4 * v, sum[v]);
    }
}
#endif

/* How a kernel likes its inputs: numbers of 32 bits, [columns / several][tokens], each of so many columns of one token. */
enum inputs { FLOATS, PAIRS, BYTES, RAISED_BYTES };

struct kernel {
    void (*run)(const struct tile *);
    enum inputs inputs;
    int most_tokens[2]; /* of a tile, with 4 bits and with more: as many sums as registers hold beside what decodes */
};

/* By the names that ops/compiled/products.py has for them. */
static const struct kernel kernels[] = {
    {any_float, FLOATS, {4, 4}},
    {any_int8, BYTES, {4, 4}},
#if ON_X86
    {avx2_float, FLOATS, {4, 4}},
    {avx2_int8, BYTES, {12, 12}},
    {avx512_float, FLOATS, {12, 12}},
    {vnni_int8, RAISED_BYTES, {24, 24}},
    {bf16_float, PAIRS, {16, 24}},
#elif ON_ARM
    {NULL}, {NULL}, {NULL}, {NULL}, {NULL},
    {dot_int8, BYTES, {4, 4}},
#endif
};

/* Whether this machine, and its system, run a kernel. */
int outlierq_runs_kernel(int number) {
    if (number >= (int)(sizeof kernels / sizeof *kernels) || !kernels[number].run) return 0;
#if ON_X86
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    int bf16 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    const int needs[] = {1, 1, avx2, avx2, avx512, avx512 && __builtin_cpu_supports("avx512vnni"), bf16};
    return needs[number];
#elif ON_ARM
    return number < 2 || (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    return 1;
#endif
}

static const struct code codes[] = {{4, 8, 1, 0, 0}, {8, 4, 1, 0, 0},  {4, 8, 1, 2, 0}, {8, 4, 1, 4, 0},
                                    {6, 16, 3, 2, 0}, {6, 16, 3, 3, 0}, {4, 8, 1, 0, 1}};

/* How scales are stored: as float32, as bytes of E4M3 that a number divides, or as powers of two, 2^(byte - 127). */
enum scales { PLAIN, DIVIDED, POWERS };

/* A call: `outlierq_multiply_panels` names its parts. */
struct product {
    const struct kernel *kernel;
    const struct code *code;
    struct numbers numbers;
    const uint32_t *words;
    const void *scales;
    const float *offsets, *token_scales, *sums;
    const uint32_t *x;
    void *y;
    int64_t rows, groups, steps, panel_words, tokens;
    float divisor;
    enum scales kind;
    int are_integers, tokens_of_tile, inputs_of_step, needs_sums, *failed;
    enum dtype dtype;
};

/* A scale that is stored as a byte, but for the divisor; 2^-127 is no normal float32. */
INLINE float scale_of_byte(uint8_t byte, enum scales kind) {
    if (kind == POWERS) return as_float(byte ? (uint32_t)byte << 23 : 1u << 22);
    return of_small_float(byte, codes + E4M3);
}

FOR_EACH_PROCESSOR
static void read_scales(const uint8_t *stored, enum scales kind, int64_t count, float *restrict scales) {
    for (int64_t i = 0; i < count; i++) scales[i] = scale_of_byte(stored[i], kind);
}

static void make_numbers(const struct code *code, struct numbers *numbers) {
    for (int i = 0; i < 32; i++) {
        float number = code->exponent ? of_small_float(i & 15, codes + E2M1) : (float)((i & 15) - (i & 8) * 2);
        if (code->paired) number = (i & 15) == 8 ? 0 : i < 16 ? number : (float)outlier_of((int)number);
        numbers->of_4_bits[i] = to_bfloat16(number);
    }
    for (int i = 0; i < 128; i++) {
        uint32_t bits = (uint32_t)i & ((1u << code->bits) - 1);
        uint16_t number = to_bfloat16(code->exponent ? of_small_float(bits, code) : (float)i + 0.5f);
        numbers->low[i] = number & 0xFF;
        numbers->high[i] = number >> 8;
    }
}

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sums of int8 as numbers, in place. */
INLINE void scale_sums(const struct product *p, int64_t panel, int64_t first_token, int tokens, float (*values)[PANEL]) {
    float scales[PANEL] = {0};
    memcpy(scales, (const float *)p->scales + panel * PANEL, least(PANEL, p->rows - panel * PANEL) * sizeof *scales);
    int32_t corrections[PANEL] = {0};
    if (p->kernel->inputs == RAISED_BYTES)
        memcpy(corrections, p->words + ((panel + 1) * p->panel_words - PANEL), sizeof corrections);
    for (int t = 0; t < tokens; t++) {
        float step = p->token_scales ? p->token_scales[first_token + t] : 1;
        for (int r = 0; r < PANEL; r++) {
            uint32_t sum = as_bits(values[t][r]) - (uint32_t)corrections[r];
            values[t][r] = (float)(int32_t)sum * scales[r] * step;
        }
    }
}

/* Rows of a panel in their places of y, [tokens][rows]. */
INLINE void store(const struct product *p, int64_t panel, int64_t first_token, int tokens, float (*values)[PANEL]) {
    int64_t count = least(PANEL, p->rows - panel * PANEL), size = p->dtype == FLOAT32 ? 4 : 2;
    char *y = (char *)p->y + (first_token * p->rows + panel * PANEL) * size;
    uint16_t halves[MOST_TOKENS * PANEL];
    if (p->dtype == BFLOAT16)
        for (int i = 0; i < tokens * PANEL; i++) halves[i] = to_bfloat16(values[0][i]);
    if (p->dtype == FLOAT16)
        for (int i = 0; i < tokens * PANEL; i++) halves[i] = to_float16(values[0][i]);
    const char *row = p->dtype == FLOAT32 ? (char *)values : (char *)halves;
    for (int t = 0; t < tokens; t++, y += p->rows * size, row += PANEL * size)
        if (count == PANEL && size == 2) memcpy(y, row, PANEL * 2);
        else memcpy(y, row, count * size);
}

/* What a panel's numbers count in, [groups][PANEL]; own: memory for it. */
INLINE const float *scales_of_panel(const struct product *p, int64_t panel, float *own) {
    int64_t count = p->groups * PANEL;
    if (p->are_integers) return NULL;
    if (p->kind == PLAIN) return (const float *)p->scales + panel * count;
    read_scales((const uint8_t *)p->scales + panel * count, p->kind, count, own);
    return own;
}

FOR_EACH_PROCESSOR
static void multiply_panels(const void *job, int64_t first, int64_t end) {
    const struct product *p = job;
    int64_t inputs = p->groups * p->steps * p->inputs_of_step;
    float *own = malloc(p->kind == PLAIN ? 1 : p->groups * PANEL * sizeof *own);
    if (!own) __atomic_store_n(p->failed, 1, __ATOMIC_RELAXED);
    for (int64_t panel = first; panel < end && own; panel++) {
        const float *scales = scales_of_panel(p, panel, own);
        for (int64_t t = 0; t < p->tokens; t += p->tokens_of_tile) {
            float values[MOST_TOKENS][PANEL];
            int tokens = (int)least(p->tokens_of_tile, p->tokens - t);
            const float *offsets = p->offsets ? p->offsets + panel * p->groups * PANEL : NULL;
            struct tile tile = {p->words + panel * p->panel_words,
                                scales,
                                offsets,
                                p->x + t * inputs,
                                p->sums + t * p->groups,
                                values,
                                p->groups,
                                p->steps,
                                p->code,
                                &p->numbers,
                                tokens};
            p->kernel->run(&tile);
            if (p->are_integers) scale_sums(p, panel, t, tokens, values);
            if (p->kind == DIVIDED)
                for (int i = 0; i < tokens; i++)
                    for (int r = 0; r < PANEL; r++) values[i][r] /= p->divisor;
            store(p, panel, t, tokens, values);
        }
    }
    free(own);
}

/* One token's words of inputs into their places beside those of the other tokens of its tile. Not FOR_EACH_PROCESSOR:
   compilers would take the scattering stores of AVX-512, which are slower than plain ones. */
static void arrange(const uint32_t *row, uint32_t flip, int64_t words, int tokens, uint32_t *x) {
    for (int64_t i = 0; i < words; i++, x += tokens) *x = row[i] ^ flip;
}

/* One token's inputs as float32, and what those of each group add up to. */
FOR_EACH_PROCESSOR
static void read_token(const void *inputs, int dtype, int64_t start, int64_t columns, float *row) {
    read_row(inputs, dtype, start, columns, row);
}

FOR_EACH_PROCESSOR
static void add_up(const float *row, int64_t groups, int64_t width, int tokens, float *sums) {
    for (int64_t g = 0; g < groups; g++, row += width) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t c = 0; c < width; c++) sum += row[c];
        sums[g * tokens] = sum;
    }
}

/* All inputs [tokens, columns] in the kernel's order, filled up with zeros; row: memory for a token, cleared. */
static void arrange_all(const struct product *p, const void *inputs, int64_t columns, uint32_t *x, float *sums, float *row) {
    int64_t stored = p->groups * p->steps * p->code->columns, words = p->groups * p->steps * p->inputs_of_step;
    enum inputs kind = p->kernel->inputs;
    int64_t size = kind == FLOATS ? 4 : kind == PAIRS ? 2 : 1;
    float *given = row + stored;
    for (int64_t t = 0; t < p->tokens; t++) {
        int64_t first = t / p->tokens_of_tile * p->tokens_of_tile, place = t - first;
        int tokens = (int)least(p->tokens_of_tile, p->tokens - first);
        if (kind == FLOATS || p->needs_sums) read_token(inputs, p->dtype, t * columns, columns, row);
        if (p->needs_sums) add_up(row, p->groups, stored / p->groups, tokens, sums + first * p->groups + place);
        if (kind != FLOATS) memcpy(given, (const char *)inputs + t * columns * size, columns * size);
        arrange((uint32_t *)(kind == FLOATS ? row : given), kind == RAISED_BYTES ? 0x80808080u : 0, words, tokens,
                x + first * words + place);
    }
}

/* Tokens are dealt out evenly to as few tiles as there can be. */
INLINE int tile_size(int64_t tokens, int most) {
    int64_t tiles = (tokens + most - 1) / most;
    return (int)((tokens + tiles - 1) / tiles);
}

static int run(struct product *p, const void *inputs, int64_t columns, int threads) {
    if (!p->tokens) return 0;
    int columns_of_step = p->code->columns, failed = 0;
    int64_t stored = p->groups * p->steps * columns_of_step;
    p->inputs_of_step = p->kernel->inputs == FLOATS ? columns_of_step : p->kernel->inputs == PAIRS ? columns_of_step / 2 : 1;
    p->tokens_of_tile = tile_size(p->tokens, p->kernel->most_tokens[p->code->bits > 4]);
    p->needs_sums = p->offsets || (p->kernel->inputs == PAIRS && p->code == codes + INT8);
    p->failed = &failed;
    make_numbers(p->code, &p->numbers);
    int64_t words = p->tokens * p->groups * p->steps * p->inputs_of_step;
    uint32_t *x = malloc((words + p->tokens * p->groups) * 4);
    float *row = calloc(stored * 2, sizeof(float));
    if (x && row) {
        p->x = x;
        p->sums = (float *)(x + words);
        arrange_all(p, inputs, columns, x, (float *)(x + words), row);
        in_shares(multiply_panels, p, (p->rows + PANEL - 1) / PANEL, threads);
    }
    failed |= !x || !row;
    free(x);
    free(row);
    return failed;
}

/* inputs [tokens, columns] times a weight, into y [tokens, rows]; both of `dtype`. Panels hold words [panels][groups][
   steps][words of a step][PANEL]; scales, of a `kind`, and offsets: [panels][groups][PANEL], the latter what is added to
   all numbers of a group, or NULL. Where columns fill no whole groups, codes of more do not count. Gives 0, or 1 without
   memory. */
int outlierq_multiply_panels(int kernel, const uint32_t *words, enum codes code, const void *scales, enum scales kind,
                      const float *divisor, const float *offsets, int64_t rows, int64_t columns, int64_t groups,
                      int64_t steps, const void *inputs, int dtype, int64_t tokens, void *y, int threads) {
    struct product product = {.kernel = kernels + kernel, .code = codes + code, .words = words, .scales = scales,
                              .kind = kind, .divisor = divisor ? *divisor : 1, .offsets = offsets, .y = y, .rows = rows,
                              .groups = groups, .steps = steps, .panel_words = groups * steps * codes[code].words * PANEL,
                              .tokens = tokens, .dtype = dtype};
    return run(&product, inputs, columns, threads);
}

/* int8 inputs times a weight of 8 bits with a scale per row, and one per token unless NULL, into y of `dtype`. In each
   panel's words [steps + 1][PANEL], the last are 128 times the sums of the rows' codes. Sums are exact. */
int outlierq_multiply_int8(int kernel, const uint32_t *words, const float *scales, int64_t rows, int64_t columns,
                           const int8_t *inputs, const float *token_scales, int64_t tokens, void *y, int dtype,
                           int threads) {
    int64_t steps = columns / 4;
    struct product product = {.kernel = kernels + kernel, .words = words, .scales = scales, .token_scales = token_scales,
                              .y = y, .rows = rows, .groups = 1, .steps = steps, .panel_words = (steps + 1) * PANEL,
                              .code = codes + INT8, .tokens = tokens, .are_integers = 1, .dtype = dtype};
    return run(&product, inputs, columns, threads);
}

/* The codes of a row of a panel, a byte each. Four bits: a half of a word has every second column; they are parted to
   bytes of 8, then made signed. */
INLINE void codes_of_row(const uint32_t *words, int bits, int64_t steps, int8_t *row) {
    if (bits == 8)
        for (int64_t i = 0; i < steps; i++) memcpy(row + 4 * i, words + i * PANEL, 4);
    if (bits == 4)
        for (int64_t i = 0; i < steps; i++, words += PANEL) {
            uint64_t low = *words & 0xFFFF, high = *words >> 16, both;
            low = (low | low << 24) & 0x000000FF000000FFu;
            high = (high | high << 24) & 0x000000FF000000FFu;
            both = ((low | low << 12) & 0x000F000F000F000Fu) | ((high | high << 12) & 0x000F000F000F000Fu) << 8;
            both = ((both ^ 0x0808080808080808u) + 0x7878787878787878u) ^ 0x8080808080808080u; /* less 8 in each byte */
            memcpy(row + 8 * i, &both, 8);
        }
    if (bits == 6)
        for (int64_t i = 0; i < steps; i++, words += 3 * PANEL)
            for (int part = 0; part < 4; part++) {
                uint32_t fours = words[part / 2 * PANEL] >> part % 2 * 4 & 0x0F0F0F0Fu;
                uint32_t four = fours | (words[2 * PANEL] >> 2 * part & 0x03030303u) << 4;
                memcpy(row + 16 * i + 4 * part, &four, 4);
            }
}

/* Codes of pairs as numbers, in place. */
void outlierq_resolve_pairs(int8_t *row, int64_t columns) {
    for (int64_t i = 0; i + 1 < columns; i += 2)
        for (int64_t odd = 0; odd < 2; odd++)
            if (row[i + odd] == VICTIM) {
                row[i + odd] = 0;
                row[i + 1 - odd] = (int8_t)outlier_of(row[i + 1 - odd]);
                break;
            }
}

INLINE float number_of(int8_t code, const struct code *kind) {
    return kind->exponent ? of_small_float((uint8_t)code & ((1u << kind->bits) - 1), kind) : (float)code;
}

/* Codes as numbers of `dtype`. */
INLINE void numbers_of(const int8_t *row, const struct code *kind, int64_t count, float scale, float offset,
                       enum dtype dtype, void *numbers) {
    float *wide = numbers;
    uint16_t *half = numbers;
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < count; i++) wide[i] = number_of(row[i], kind) * scale + offset;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) half[i] = to_bfloat16(number_of(row[i], kind) * scale + offset);
    if (dtype == FLOAT16)
        for (int64_t i = 0; i < count; i++) half[i] = to_float16(number_of(row[i], kind) * scale + offset);
}

INLINE float scale_at(const void *scales, enum scales kind, float divisor, int64_t place) {
    if (!scales) return 1;
    if (kind == PLAIN) return ((const float *)scales)[place];
    return scale_of_byte(((const uint8_t *)scales)[place], kind) / divisor;
}

/* Whole panels as numbers [panels * PANEL][columns] of `dtype`: code * scale + offset; scales NULL: the codes. row: memory
   for the codes of one. */
FOR_EACH_PROCESSOR
void outlierq_decode_panels(const uint32_t *words, int64_t panel_words, enum codes code, const void *scales,
                            enum scales kind, const float *divisor, const float *offsets, int64_t panels,
                            int64_t columns, int64_t groups, int dtype, int8_t *restrict row, char *restrict numbers) {
    const struct code *of = codes + code;
    int64_t width = columns / groups, size = dtype == FLOAT32 ? 4 : 2;
    for (int64_t p = 0; p < panels; p++, words += panel_words)
        for (int r = 0; r < PANEL; r++) {
            codes_of_row(words + r, of->bits, columns / of->columns, row);
            if (of->paired) outlierq_resolve_pairs(row, columns);
            for (int64_t g = 0; g < groups; g++, numbers += width * size) {
                int64_t place = (p * groups + g) * PANEL + r;
                float scale = scale_at(scales, kind, divisor ? *divisor : 1, place), offset = offsets ? offsets[place] : 0;
                numbers_of(row + g * width, of, width, scale, offset, dtype, numbers);
            }
        }
}
