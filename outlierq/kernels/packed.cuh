// Packed weights ("oq4", "oq8"; written by layout.py) as a warp reads them.
//
// A tile is 64 inputs (K) x 16 outputs (N). Tiles of one strip of 16 outputs follow each other, so a warp streams. In a
// tile every lane finds the codes of its own mma B fragments: lane l holds column g = l / 4 of both halves of the strip
// (j = 0, 1) and, for each of the four k16 steps kk, the inputs 16 kk + 2 t + {0, 1, 8, 9} with t = l % 4.
//   4 bits: word 2 j + kk / 2; the nibbles of a step are 2 (kk % 2) + {0, 4, 1, 5}, so that one shift and one
//           and-or give a pair of numbers MAGIC + code.
//   8 bits: word 4 j + kk; bytes in order.
// Codes are unsigned; the weight is scale * (code - zero), zero = 2^(BITS - 1) for symmetric grids.
#pragma once
#include "ptx.cuh"

constexpr int TILE_K = 64, TILE_N = 16;

// 32-bit words of one lane in one tile, and of a whole tile.
template <int BITS>
struct Tile {
  static constexpr int WORDS = BITS;
  static constexpr int SIZE = 32 * BITS;
};

// `tile` points to the first word of the tile, in any memory that `uint4` can be read from.
template <int BITS>
OQ_DEVICE void read_tile(u32 (&words)[BITS], const u32* tile, int lane) {
#pragma unroll
  for (int i = 0; i < BITS / 4; i++) {
    uint4 v = reinterpret_cast<const uint4*>(tile)[i * 32 + lane];
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
}

// What a column needs in one group: the scale twice, and the zero point in the form that `fragment` subtracts.
struct Grid {
  u32 scale, zero;
};

// 8 bits in bfloat16 do not fit the magic numbers: those go through float32, and their zero point stays as it is.
template <class T, int BITS>
struct Codes;

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
template <class T, int BITS>
OQ_DEVICE Grid read_grid(const u16* scale, const u16* zero, int n, int k, int outputs, int group_shift, int groups) {
  Grid grid = {0, Codes<T, BITS>::SYMMETRIC};
  if (n >= outputs) return grid;
  i64 at = (i64)smaller(k >> group_shift, groups - 1) * outputs + n;
  grid.scale = both(scale[at]);
  if (zero) grid.zero = Codes<T, BITS>::zero(zero[at]);
  return grid;
}

// Both registers of this lane's B fragment of step kk: dequantized weights.
template <class T, int BITS>
OQ_DEVICE void fragment(u32 (&b)[2], const u32 (&words)[BITS], int j, int kk, Grid grid) {
  Codes<T, BITS>::centred(b, words, j, kk, grid.zero);
  b[0] = T::mul2(b[0], grid.scale);
  b[1] = T::mul2(b[1], grid.scale);
}
