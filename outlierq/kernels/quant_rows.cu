// Each token of x as int8 with one scale, its outlier columns taken out, in one pass over memory.
//
//   scale[m] = max |x[m, c]| over columns c that are no outliers / 127     (1 where that is 0)
//   codes[m, c] = round(x[m, c] / scale[m]), 0 in outlier columns          outliers[m, i] = x[m, columns[i]]
//
// A block owns a token and keeps it in shared memory. The maximum is taken over the bits of |x| as integers: the order is
// the same, and a NaN is larger than everything, so it reaches the scale and with it the whole row of the result.
#include "ptx.cuh"

constexpr int QUANT_THREADS = 256;

OQ_DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

// The largest `value` of the block; every thread gets it.
OQ_DEVICE u32 block_max(u32 value) {
  __shared__ u32 of_warp[QUANT_THREADS / 32];
  for (int mask = 16; mask; mask /= 2) value = larger(value, __shfl_xor_sync(0xffffffffu, value, mask));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < QUANT_THREADS / 32; w++) value = larger(value, of_warp[w]);
  return value;
}

OQ_DEVICE u32 four_codes(const float (&x)[4], float scale) {
  u32 packed = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) packed |= (u32)(__float2int_rn(x[i] / scale) & 255) << (8 * i);
  return packed;
}

// inputs: multiple of 16. outlier_pitch: columns of `outliers`; those past `outlier_count` become 0.
template <class T>
__global__ void __launch_bounds__(QUANT_THREADS)
    quant_rows(const u16* x, const int* columns, u8* codes, float* scale, u16* outliers, int inputs, int row_stride,
               int outlier_count, int outlier_pitch) {
  OQ_SHARED(u16, row);
  const u16* from = x + (i64)blockIdx.x * row_stride;
  for (int k = threadIdx.x * 8; k < inputs; k += QUANT_THREADS * 8)
    *reinterpret_cast<uint4*>(row + k) = *reinterpret_cast<const uint4*>(from + k);
  __syncthreads();
  for (int i = threadIdx.x; i < outlier_pitch; i += QUANT_THREADS) {
    u16 value = 0;
    int column = i < outlier_count ? columns[i] : -1;
    if (column >= 0 && column < inputs) value = row[column], row[column] = 0;
    outliers[(i64)blockIdx.x * outlier_pitch + i] = value;
  }
  __syncthreads();

  u32 largest = 0;
  for (int k = threadIdx.x * 8; k < inputs; k += QUANT_THREADS * 8) {
    uint4 v = *reinterpret_cast<const uint4*>(row + k);
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) largest = larger(largest, larger(pairs[i] & 0x7fffu, pairs[i] >> 16 & 0x7fffu));
  }
  largest = block_max(largest);
  float s = T::widen((u16)largest) / 127.0f;
  // Below the smallest normal number a division would give infinity: such a token counts as zero.
  if (s < 1.17549435e-38f) s = 1.0f;
  if (threadIdx.x == 0) scale[blockIdx.x] = s;

  for (int k = threadIdx.x * 16; k < inputs; k += QUANT_THREADS * 16) {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      uint2 v = *reinterpret_cast<const uint2*>(row + k + 4 * i);
      float f[4] = {T::widen((u16)v.x), T::widen((u16)(v.x >> 16)), T::widen((u16)v.y), T::widen((u16)(v.y >> 16))};
      packed[i] = four_codes(f, s);
    }
    *reinterpret_cast<uint4*>(codes + (i64)blockIdx.x * inputs + k) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
}
