// Every wrapper of ptx.cuh once, on given bits: what the GPU makes of them must be what the CPU emulation does.
//
// in: 32 lanes x 16 words. Words 0 to 5 are the fragments of mma (float16 or bfloat16 pairs, or bytes), 6 to 9 the sums,
// 10 and 11 pairs of 16-bit numbers, 12 and 13 float32, 14 and 15 any bits. out: 32 lanes x 32 words.
#include "ptx.cuh"

template <class T>
__global__ void __launch_bounds__(32) selftest(const u32* in, u32* out) {
  __shared__ __align__(128) u32 matrices[32][4], copied[32][4];
  int lane = threadIdx.x;
  const u32* mine = in + lane * 16;
  u32* result = out + lane * 32;
  const u32 a[4] = {mine[0], mine[1], mine[2], mine[3]};

  float sums[4];
  int counts[4];
  for (int i = 0; i < 4; i++) sums[i] = __uint_as_float(mine[6 + i]), counts[i] = (int)mine[6 + i];
  T::mma(sums, a, mine[4], mine[5]);
  mma_s8(counts, a, mine[4], mine[5]);
  for (int i = 0; i < 4; i++) result[i] = __float_as_uint(sums[i]), result[4 + i] = (u32)counts[i];

  for (int i = 0; i < 4; i++) matrices[lane][i] = mine[i];
  __syncthreads();
  u32 r[4];
  ldmatrix_x4(r, matrices[(lane * 5 + 3) % 32]);
  for (int i = 0; i < 4; i++) result[8 + i] = r[i];

  cp_async16(copied[lane], mine, lane % 3 != 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 4; i++) result[12 + i] = copied[(lane + 1) % 32][i];

  float x = __uint_as_float(mine[12]), y = __uint_as_float(mine[13]);
  result[16] = T::add2(mine[10], mine[11]);
  result[17] = T::sub2(mine[10], mine[11]);
  result[18] = T::mul2(mine[10], mine[11]);
  result[19] = T::narrow2(x, y);
  result[20] = T::narrow(x);
  result[21] = __float_as_uint(T::widen((u16)mine[10]));
  result[22] = __float_as_uint(min_nan(x, y));
  result[23] = __float_as_uint(max_nan(x, y));
  result[24] = (u32)__float2int_rn(x * 1000.0f);
  result[25] = __float_as_uint(x / y);
  result[26] = __byte_perm(mine[14], mine[15], 0x7160);
  result[27] = __shfl_xor_sync(0xffffffffu, mine[14], 5);
  uint4 v = load_streaming(reinterpret_cast<const uint4*>(mine));
  result[28] = v.x ^ v.y ^ v.z ^ v.w;
  result[29] = load_uncached(mine + 15);
  result[30] = both((u16)mine[14]);
  result[31] = __float_as_uint(load_uncached(reinterpret_cast<const float*>(mine + 12)));
}
