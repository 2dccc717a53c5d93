// y = x W^T + bias for few tokens (1 to 8) and packed weights of 4 or 8 bits: bound by reading the weights once.
//
// A block owns 16 outputs. Its warps share the tiles of K among them, each a run of neighbours, and add up their sums in
// shared memory in a fixed order: the result does not depend on timing. The tokens are the rows of mma's A operand; rows
// 8 to 15 stay zero, which costs nothing because memory, not the tensor core, is the limit. x is small and shared by all
// blocks, so it is read through the cache.
#include "packed.cuh"

constexpr int GEMV_WARPS = 8, GEMV_ROWS = 8;

// The inputs 16 kk + 2 t + {0, 1} and {8, 9} of token `row`, as the even registers of an A fragment.
OQ_DEVICE void read_tokens(u32 (&a)[4], const u16* x, int row, int k, int rows, int inputs, int row_stride) {
  a[0] = a[1] = a[2] = a[3] = 0;
  if (row < rows && k < inputs) {
    const u16* at = x + (i64)row * row_stride + k;
    a[0] = *reinterpret_cast<const u32*>(at);
    a[2] = *reinterpret_cast<const u32*>(at + 8);
  }
}

// PARTS: groups of a tile, 4 of 16 inputs, 2 of 32, else 1. group_shift: log2 of the group size, 30 for one group.
// factor: of all sums, or null.
template <class T, int CODE, int PARTS>
__global__ void __launch_bounds__(GEMV_WARPS * 32)
    w4a16_gemv(const u32* packed, const u16* scale, const u16* zero, const float* factor, const u16* x, const u16* bias, u16* y, int rows,
               int outputs, int inputs, int row_stride, int group_shift, int groups) {
  constexpr int AHEAD = 4;  // tiles a warp has under way: 2 KB of 4-bit weights
  __shared__ float partial[GEMV_WARPS][GEMV_ROWS][TILE_N];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int row = lane / 4, t = lane % 4, n0 = blockIdx.x * TILE_N;
  int tiles = (inputs + TILE_K - 1) / TILE_K, share = (tiles + warps - 1) / warps;
  int first = warp * share, last = smaller(first + share, tiles);
  const u32* strip = packed + (i64)blockIdx.x * tiles * Tile<CODE>::SIZE;
  float c[2][4] = {};

  for (int tile = first; tile < last; tile += AHEAD) {
    u32 words[AHEAD][Tile<CODE>::WORDS];
    Grid grid[AHEAD][PARTS][2];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (tile + i >= last) break;
      const uint4* from = reinterpret_cast<const uint4*>(strip + (i64)(tile + i) * Tile<CODE>::SIZE);
#pragma unroll
      for (int v = 0; v < Tile<CODE>::WORDS / 4; v++) {
        uint4 q = load_streaming(from + v * 32 + lane);
        words[i][4 * v] = q.x, words[i][4 * v + 1] = q.y, words[i][4 * v + 2] = q.z, words[i][4 * v + 3] = q.w;
      }
#pragma unroll
      for (int h = 0; h < PARTS; h++)
#pragma unroll
        for (int j = 0; j < 2; j++)
          grid[i][h][j] = read_grid<T, CODE>(scale, zero, n0 + 8 * j + row, (tile + i) * TILE_K + TILE_K / PARTS * h,
                                             outputs, group_shift, groups);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (tile + i >= last) break;
#pragma unroll
      for (int kk = 0; kk < 4; kk++) {
        u32 a[4], b[2];
        read_tokens(a, x, row, (tile + i) * TILE_K + 16 * kk + 2 * t, rows, inputs, row_stride);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          fragment<T, CODE>(b, words[i], j, kk, grid[i][kk * PARTS / 4][j]);
          T::mma(c[j], a, b[0], b[1]);
        }
      }
    }
  }

  for (int j = 0; j < 2; j++)
    for (int e = 0; e < 2; e++) partial[warp][row][8 * j + 2 * t + e] = c[j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * TILE_N; i += blockDim.x) {
    int m = i / TILE_N, column = i % TILE_N, n = n0 + column;
    if (n >= outputs) continue;
    float sum = 0.0f;
    for (int w = 0; w < warps; w++) sum += partial[w][m][column];
    if (factor) sum *= *factor;
    y[(i64)m * outputs + n] = T::narrow(bias ? sum + T::widen(bias[n]) : sum);
  }
}
