// Packed weights ("oq4", "oq8"; written by layout.py) as a warp reads them.
//
// A tile is 64 inputs (K) x 16 outputs (N). Tiles of one strip of 16 outputs follow each other, so a warp streams. In a
// tile every lane finds the codes of its own mma B fragments: lane l holds column g = l / 4 of both halves of the strip
// (j = 0, 1) and, for each of the four k16 steps kk, the inputs 16 kk + 2 t + {0, 1, 8, 9} with t = l % 4.
//   4 bits: word 2 j + kk / 2; the nibbles of a step are 2 (kk % 2) + {0, 4, 1, 5}, so that one shift and one
//           and-or give a pair of numbers MAGIC + code.
//   8 bits: word 4 j + kk; bytes in order.
// CODE says what a code is. 4 or 8: an unsigned integer of so many bits; the weight is scale * (code - zero), zero =
// 2^(bits - 1) for symmetric grids. E2M1 or E4M3: a float of 4 or 8 bits; the weight is scale * code, in groups of 16 or
// more, and sums count in units of one `factor`, if there is any. PAIRS: of two neighbours both are integers from -7 to 7
// in two's complement, or one is 1000, which stands for 0, and the other one an outlier (OliVe).
#pragma once
#include "ptx.cuh"

constexpr int TILE_K = 64, TILE_N = 16;
constexpr int FLOATS = 16, E2M1 = FLOATS + 4, E4M3 = FLOATS + 8, PAIRS = 2 * FLOATS + 4;

// 32-bit words of one lane in one tile, and of a whole tile.
template <int CODE>
struct Tile {
  static constexpr int WORDS = CODE % FLOATS;
  static constexpr int SIZE = 32 * WORDS;
};

// `tile` points to the first word of the tile, in any memory that `uint4` can be read from.
template <int WORDS>
OQ_DEVICE void read_tile(u32 (&words)[WORDS], const u32* tile, int lane) {
#pragma unroll
  for (int i = 0; i < WORDS / 4; i++) {
    uint4 v = reinterpret_cast<const uint4*>(tile)[i * 32 + lane];
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
}

// What a column needs in one group: the scale twice, and the zero point in the form that `fragment` subtracts.
struct Grid {
  u32 scale, zero;
};

// Floats of few bits, one in the low bits of each half, as 16-bit floats: moved to where T has its sign, exponent and
// mantissa, and multiplied with what their bias is less. Exact for subnormal ones, too, which are subnormal in T first.
template <class T, int EXPONENT, int MANTISSA>
OQ_DEVICE u32 wider(u32 codes) {
  constexpr u32 SIGN = 0x00010001u << (EXPONENT + MANTISSA), SIZE = SIGN - 0x00010001u;
  constexpr u32 LESS = (u32)(2 * T::BIAS + 1 - (1 << (EXPONENT - 1))) << T::MANTISSA;
  u32 moved = (codes & SIGN) << (15 - EXPONENT - MANTISSA) | (codes & SIZE) << (T::MANTISSA - MANTISSA);
  return T::mul2(moved, LESS * 0x00010001u);
}

// 8 bits in bfloat16 do not fit the magic numbers: those go through float32, and their zero point stays as it is.
template <class T, int CODE>
struct Codes;

template <class T>
struct Codes<T, E2M1> {
  static OQ_DEVICE u32 zero(u16) { return 0; }
  static constexpr u32 SYMMETRIC = 0;
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[4], int j, int kk, u32) {
    u32 q = words[2 * j + kk / 2] >> (8 * (kk % 2));
    pair[0] = wider<T, 2, 1>(q);
    pair[1] = wider<T, 2, 1>(q >> 4);
  }
};

template <class T>
struct Codes<T, E4M3> {
  static OQ_DEVICE u32 zero(u16) { return 0; }
  static constexpr u32 SYMMETRIC = 0;
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[8], int j, int kk, u32) {
    u32 q = words[4 * j + kk];
    pair[0] = wider<T, 4, 3>(__byte_perm(q, 0, 0x4140));
    pair[1] = wider<T, 4, 3>(__byte_perm(q, 0, 0x4342));
  }
};

// A pair of nibbles, one in the low bits of each half, as 16-bit floats. An outlier is (1 + m / 2) * 2^(e + 3).
template <class T>
OQ_DEVICE u32 resolved(u32 q) {
  constexpr u32 NORMAL = T::MAGIC + 0x00080008u, LEAST = (u32)(T::BIAS + 3) << T::MANTISSA;
  u32 outlier = (q & 0x00080008u) << 12 | (((q & 0x00070007u) << (T::MANTISSA - 1)) + LEAST * 0x00010001u);
  u32 normal = T::sub2((q ^ 0x00080008u) | T::MAGIC, NORMAL);
  u32 others = ((q ^ 0x00080008u) + 0x000f000fu) >> 4 & 0x00010001u;  // 1 where a nibble is no victim's
  u32 victims = (0x00010001u - others) * 0xffffu, outliers = __byte_perm(victims, 0, 0x1032);
  return (normal & ~(victims | outliers)) | (outlier & outliers);
}

template <class T>
struct Codes<T, PAIRS> {
  static OQ_DEVICE u32 zero(u16) { return 0; }
  static constexpr u32 SYMMETRIC = 0;
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[4], int j, int kk, u32) {
    u32 q = words[2 * j + kk / 2] >> (8 * (kk % 2));
    pair[0] = resolved<T>(q & 0x000f000fu);
    pair[1] = resolved<T>((q >> 4) & 0x000f000fu);
  }
};

template <class T>
struct Codes<T, 4> {
  static OQ_DEVICE u32 zero(u16 z) { return T::add2(both(z), T::MAGIC); }
  static constexpr u32 SYMMETRIC = T::MAGIC + 0x00080008u;
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[4], int j, int kk, u32 zero) {
    u32 q = words[2 * j + kk / 2] >> (8 * (kk % 2));
    pair[0] = T::sub2((q & 0x000f000fu) | T::MAGIC, zero);
    pair[1] = T::sub2(((q >> 4) & 0x000f000fu) | T::MAGIC, zero);
  }
};

template <>
struct Codes<Half, 8> {
  static OQ_DEVICE u32 zero(u16 z) { return Half::add2(both(z), Half::MAGIC); }
  static constexpr u32 SYMMETRIC = Half::MAGIC + 0x00800080u;
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[8], int j, int kk, u32 zero) {
    u32 q = words[4 * j + kk];
    pair[0] = Half::sub2(__byte_perm(q, 0x64646464u, 0x4140), zero);
    pair[1] = Half::sub2(__byte_perm(q, 0x64646464u, 0x4342), zero);
  }
};

template <>
struct Codes<Bfloat, 8> {
  static OQ_DEVICE u32 zero(u16 z) { return both(z); }
  static constexpr u32 SYMMETRIC = 0x43004300u;  // 128
  // 2^23 + byte is a float32; taking away 2^23 + zero is exact, and so is a difference below 256 in bfloat16.
  static OQ_DEVICE float value(u32 q, int byte, float offset) {
    return __uint_as_float(__byte_perm(q, 0x4b000000u, 0x7440 + byte)) - offset;
  }
  static OQ_DEVICE void centred(u32 (&pair)[2], const u32 (&words)[8], int j, int kk, u32 zero) {
    u32 q = words[4 * j + kk];
    float offset = 8388608.0f + Bfloat::widen((u16)zero);
    pair[0] = Bfloat::narrow2(value(q, 0, offset), value(q, 1, offset));
    pair[1] = Bfloat::narrow2(value(q, 2, offset), value(q, 3, offset));
  }
};

// Scale and zero point of output n, of the group that input k belongs to. Inputs past the last group belong to padding.
template <class T, int CODE>
OQ_DEVICE Grid read_grid(const u16* scale, const u16* zero, int n, int k, int outputs, int group_shift, int groups) {
  Grid grid = {0, Codes<T, CODE>::SYMMETRIC};
  if (n >= outputs) return grid;
  i64 at = (i64)smaller(k >> group_shift, groups - 1) * outputs + n;
  grid.scale = both(scale[at]);
  if (zero) grid.zero = Codes<T, CODE>::zero(zero[at]);
  return grid;
}

// Both registers of this lane's B fragment of step kk: dequantized weights.
template <class T, int CODE>
OQ_DEVICE void fragment(u32 (&b)[2], const u32 (&words)[Tile<CODE>::WORDS], int j, int kk, Grid grid) {
  Codes<T, CODE>::centred(b, words, j, kk, grid.zero);
  b[0] = T::mul2(b[0], grid.scale);
  b[1] = T::mul2(b[1], grid.scale);
}
