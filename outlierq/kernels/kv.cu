// Keys and values of an attention cache in 4 or 8 bits, and back: x = code * scale + minimum, one pair for a group.
//
// Rows are tokens of one head. CHANNEL = 0: groups are `group` neighbouring numbers of a row (values); CHANNEL = 1: the
// same column of `group` successive rows (keys, whose outliers keep to channels). group: 32, 64, 128 or 256.
// Scale and minimum are 16-bit and rounded before the codes are derived. With 4 bits the even column is the low nibble.
#include "ptx.cuh"

constexpr int KV_THREADS = 128;

struct Range {
  float low, high;
};

// The grid of a group: scale = range / largest code, 1 where that is no normal number.
template <class T, int BITS>
OQ_DEVICE u32 affine_grid(Range range) {
  u16 scale = T::narrow((range.high - range.low) / (float)((1 << BITS) - 1));
  if (T::widen(scale) < 1.17549435e-38f) scale = T::narrow(1.0f);
  return scale | (u32)T::narrow(range.low) << 16;
}

template <class T, int BITS>
OQ_DEVICE u32 encode(float x, u32 grid) {
  int code = __float2int_rn((x - T::widen((u16)(grid >> 16))) / T::widen((u16)grid));
  return (u32)smaller(code < 0 ? 0 : code, (1 << BITS) - 1);
}

template <class T>
OQ_DEVICE void widen8(float (&f)[8], uint4 v) {
  u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = T::widen((u16)(pairs[i / 2] >> (16 * (i % 2))));
}

// A thread takes 8 numbers of a row; group / 8 neighbouring lanes agree on the range.
template <class T, int BITS>
OQ_DEVICE void quantize_rows(const u16* x, u8* codes, u16* scale, u16* minimum, i64 total, int group) {
  i64 number = (i64)blockIdx.x * KV_THREADS + threadIdx.x;
  bool inside = number * 8 < total;
  float f[8];
  widen8<T>(f, *reinterpret_cast<const uint4*>(x + (inside ? number * 8 : 0)));
  Range range = {f[0], f[0]};
#pragma unroll
  for (int i = 1; i < 8; i++) range = {min_nan(range.low, f[i]), max_nan(range.high, f[i])};
  for (int mask = group / 16; mask; mask /= 2) {
    range.low = min_nan(range.low, __shfl_xor_sync(0xffffffffu, range.low, mask));
    range.high = max_nan(range.high, __shfl_xor_sync(0xffffffffu, range.high, mask));
  }
  if (!inside) return;
  u32 grid = affine_grid<T, BITS>(range);
  if (number * 8 % group == 0) {
    scale[number * 8 / group] = (u16)grid;
    minimum[number * 8 / group] = (u16)(grid >> 16);
  }
  u32 packed[BITS / 4] = {};
#pragma unroll
  for (int i = 0; i < 8; i++) packed[i * BITS / 32] |= encode<T, BITS>(f[i], grid) << (i * BITS % 32);
#pragma unroll
  for (int i = 0; i < BITS / 4; i++) reinterpret_cast<u32*>(codes)[number * (BITS / 4) + i] = packed[i];
}

// A thread takes two neighbouring columns of a group of rows and goes through them twice.
template <class T, int BITS>
OQ_DEVICE void quantize_columns(const u16* x, u8* codes, u16* scale, u16* minimum, i64 total, int width, int group) {
  i64 number = (i64)blockIdx.x * KV_THREADS + threadIdx.x;
  int pairs = width / 2;
  if (number * 2 * group >= total) return;
  i64 of_group = number / pairs, row = of_group * group;
  int column = (int)(number % pairs) * 2;
  const u16* from = x + row * width + column;
  Range even = {T::widen(from[0]), T::widen(from[0])}, odd = {T::widen(from[1]), T::widen(from[1])};
  for (int i = 1; i < group; i++) {
    u32 v = *reinterpret_cast<const u32*>(from + (i64)i * width);
    float a = T::widen((u16)v), b = T::widen((u16)(v >> 16));
    even = {min_nan(even.low, a), max_nan(even.high, a)};
    odd = {min_nan(odd.low, b), max_nan(odd.high, b)};
  }
  u32 grids[2] = {affine_grid<T, BITS>(even), affine_grid<T, BITS>(odd)};
  i64 at = of_group * width + column;
  for (int i = 0; i < 2; i++) scale[at + i] = (u16)grids[i], minimum[at + i] = (u16)(grids[i] >> 16);
  for (int i = 0; i < group; i++) {
    u32 v = *reinterpret_cast<const u32*>(from + (i64)i * width);
    u32 a = encode<T, BITS>(T::widen((u16)v), grids[0]), b = encode<T, BITS>(T::widen((u16)(v >> 16)), grids[1]);
    i64 to = (row + i) * width + column;
    if (BITS == 8)
      *reinterpret_cast<u16*>(codes + to) = (u16)(a | b << 8);
    else
      codes[to / 2] = (u8)(a | b << 4);
  }
}

template <class T, int BITS, int CHANNEL>
__global__ void __launch_bounds__(KV_THREADS)
    kv_quant(const u16* x, u8* codes, u16* scale, u16* minimum, i64 total, int width, int group) {
  if (CHANNEL)
    quantize_columns<T, BITS>(x, codes, scale, minimum, total, width, group);
  else
    quantize_rows<T, BITS>(x, codes, scale, minimum, total, group);
}

// A thread gives 8 numbers of a row.
template <class T, int BITS, int CHANNEL>
__global__ void __launch_bounds__(KV_THREADS)
    kv_dequant(const u8* codes, const u16* scale, const u16* minimum, u16* x, i64 total, int width, int group) {
  i64 number = (i64)blockIdx.x * KV_THREADS + threadIdx.x, first = number * 8;
  if (first >= total) return;
  u32 packed[BITS / 4];
#pragma unroll
  for (int i = 0; i < BITS / 4; i++) packed[i] = reinterpret_cast<const u32*>(codes)[number * (BITS / 4) + i];
  float s[8], low[8];
  if (CHANNEL) {
    i64 at = first / width / group * width + first % width;
    widen8<T>(s, *reinterpret_cast<const uint4*>(scale + at));
    widen8<T>(low, *reinterpret_cast<const uint4*>(minimum + at));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) s[i] = T::widen(scale[first / group]), low[i] = T::widen(minimum[first / group]);
  }
  float f[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    u32 code = packed[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1);
    f[i] = (float)code * s[i] + low[i];
  }
  *reinterpret_cast<uint4*>(x + first) =
      make_uint4(T::narrow2(f[0], f[1]), T::narrow2(f[2], f[3]), T::narrow2(f[4], f[5]), T::narrow2(f[6], f[7]));
}
