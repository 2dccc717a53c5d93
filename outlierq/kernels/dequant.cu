// Packed weights of 4 or 8 bits as a dense 16-bit matrix [outputs, inputs], for products with so many tokens that an
// ordinary matrix product is the better kernel. One warp writes one tile: the lanes' fragments are put in order in shared
// memory, so that every row of the tile is written as 128 consecutive bytes.
#include "packed.cuh"

constexpr int DEQUANT_WARPS = 4, PITCH = TILE_K + 8;  // 8 more: rows start in different banks

// A pair times a float, rounded once.
template <class T>
OQ_DEVICE u32 times(u32 pair, float factor) {
  return T::narrow2(T::widen((u16)pair) * factor, T::widen((u16)(pair >> 16)) * factor);
}

template <class T, int CODE>
__global__ void __launch_bounds__(DEQUANT_WARPS * 32)
    dequant(const u32* packed, const u16* scale, const u16* zero, const float* factor, u16* dense, int outputs, int inputs, int group_shift,
            int groups) {
  __shared__ __align__(16) u16 ordered[DEQUANT_WARPS][TILE_N * PITCH];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int tiles = (inputs + TILE_K - 1) / TILE_K, strips = (outputs + TILE_N - 1) / TILE_N;
  i64 number = (i64)blockIdx.x * DEQUANT_WARPS + warp;
  if (number >= (i64)strips * tiles) return;
  int n0 = (int)(number / tiles) * TILE_N, k0 = (int)(number % tiles) * TILE_K;

  u32 words[Tile<CODE>::WORDS];
  read_tile<Tile<CODE>::WORDS>(words, packed + number * Tile<CODE>::SIZE, lane);
#pragma unroll
  for (int j = 0; j < 2; j++) {
    int column = 8 * j + lane / 4;
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
      Grid grid = read_grid<T, CODE>(scale, zero, n0 + column, k0 + 16 * kk, outputs, group_shift, groups);
      u32 b[2];
      fragment<T, CODE>(b, words, j, kk, grid);
      if (factor) b[0] = times<T>(b[0], *factor), b[1] = times<T>(b[1], *factor);
      u32* to = reinterpret_cast<u32*>(&ordered[warp][column * PITCH + 16 * kk + 2 * (lane % 4)]);
      to[0] = b[0], to[4] = b[1];
    }
  }
  __syncwarp();
  for (int i = lane; i < TILE_N * TILE_K / 8; i += 32) {
    int row = i / 8, k = i % 8 * 8;
    if (n0 + row < outputs && k0 + k < inputs)
      *reinterpret_cast<uint4*>(dense + (i64)(n0 + row) * inputs + k0 + k) =
          *reinterpret_cast<const uint4*>(&ordered[warp][row * PITCH + k]);
  }
}
