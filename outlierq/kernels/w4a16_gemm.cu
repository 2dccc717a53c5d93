// y = x W^T + bias for 5 to some 128 tokens and packed weights of 4 or 8 bits, on tensor cores.
//
// A block of four warps owns 16 MT tokens x 128 outputs, a warp all of the tokens and 32 of the outputs. Tiles of 64
// inputs pass through shared memory in four stages of asynchronous copies; weights are dequantized in registers, on the
// way from shared memory to the tensor core. The inputs may be split over `gridDim.z` blocks, so that a small layer, too,
// fills the GPU: each leaves its float32 sums in `partial`, and the one that finishes last adds them up in a fixed order.
// Nobody waits for anybody, and the result does not depend on timing.
#include "packed.cuh"
#include "split.cuh"

constexpr int GEMM_WARPS = 4, GEMM_THREADS = 32 * GEMM_WARPS, WARP_STRIPS = 2, STAGES = 4;
constexpr int BLOCK_STRIPS = GEMM_WARPS * WARP_STRIPS, BLOCK_N = BLOCK_STRIPS * TILE_N;

// Whatever the group size, of integers the scales of each 32 inputs lie there and then their zero points; of floats the
// scales of each 16 inputs.
template <int CODE, int MT>
struct __align__(128) Stage {
  static constexpr int SCALES = CODE > FLOATS ? 4 : 2;
  u16 x[16 * MT * TILE_K];
  u32 words[BLOCK_STRIPS * Tile<CODE>::SIZE];
  u16 grid[4][BLOCK_N];
};

// Rows of 8 chunks of 16 bytes; chunks change places so that the 8 rows of a matrix lie in different banks.
OQ_DEVICE int swizzled(int row, int chunk) { return (row * 8 + (chunk ^ (row % 8))) * 8; }

struct GemmArguments {
  const u32* packed;
  const u16 *scale, *zero, *x;
  int rows, outputs, inputs, row_stride, group_shift, groups;
};

// Start the copies of one tile of inputs: tokens from m0 on, outputs from n0 on. What lies outside becomes 0.
template <int CODE, int MT>
OQ_DEVICE void copy_tile(Stage<CODE, MT>& stage, const GemmArguments& of, int tile, int tiles, int m0, int n0) {
  int k0 = tile * TILE_K;
#pragma unroll
  for (int i = threadIdx.x; i < 16 * MT * 8; i += GEMM_THREADS) {
    int row = i / 8, chunk = i % 8, k = k0 + 8 * chunk;
    bool valid = m0 + row < of.rows && k < of.inputs;
    cp_async16(&stage.x[swizzled(row, chunk)], of.x + (valid ? (i64)(m0 + row) * of.row_stride + k : 0), valid);
  }
  constexpr int CHUNKS = Tile<CODE>::SIZE / 4, SCALES = Stage<CODE, MT>::SCALES;
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK_STRIPS * CHUNKS; i += GEMM_THREADS) {
    int strip = n0 / TILE_N + i / CHUNKS;
    bool valid = strip * TILE_N < of.outputs;
    i64 at = ((i64)strip * tiles + tile) * Tile<CODE>::SIZE + i % CHUNKS * 4;
    cp_async16(&stage.words[i * 4], of.packed + (valid ? at : 0), valid);
  }
  if (threadIdx.x < SCALES * BLOCK_N / 8) {
    int part = threadIdx.x / (BLOCK_N / 8), column = threadIdx.x % (BLOCK_N / 8) * 8;
    bool valid = n0 + column < of.outputs;
    i64 group = smaller((k0 + TILE_K / SCALES * part) >> of.group_shift, of.groups - 1);
    i64 at = valid ? group * of.outputs + n0 + column : 0;
    cp_async16(&stage.grid[part][column], of.scale + at, valid);
    if (SCALES == 2 && of.zero) cp_async16(&stage.grid[2 + part][column], of.zero + at, valid);
  }
}

template <class T, int CODE, int MT>
OQ_DEVICE void multiply_tile(float (&c)[MT][WARP_STRIPS][2][4], const Stage<CODE, MT>& stage, bool has_zero) {
  constexpr int SCALES = Stage<CODE, MT>::SCALES, WORDS = Tile<CODE>::WORDS;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 words[WARP_STRIPS][WORDS];
#pragma unroll
  for (int p = 0; p < WARP_STRIPS; p++)
    read_tile<WORDS>(words[p], stage.words + (warp * WARP_STRIPS + p) * Tile<CODE>::SIZE, lane);
  Grid grid[WARP_STRIPS][2];
#pragma unroll
  for (int kk = 0; kk < 4; kk++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], &stage.x[swizzled(16 * m + lane % 16, 2 * kk + lane / 16)]);
#pragma unroll
    for (int p = 0; p < WARP_STRIPS; p++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        if (kk * SCALES % 4 == 0) {
          int column = (warp * WARP_STRIPS + p) * TILE_N + 8 * j + lane / 4;
          grid[p][j].scale = both(stage.grid[kk * SCALES / 4][column]);
          grid[p][j].zero = SCALES == 2 && has_zero ? Codes<T, CODE>::zero(stage.grid[2 + kk / 2][column])
                                                    : Codes<T, CODE>::SYMMETRIC;
        }
        u32 b[2];
        fragment<T, CODE>(b, words[p], j, kk, grid[p][j]);
#pragma unroll
        for (int m = 0; m < MT; m++) T::mma(c[m][p][j], a[m], b[0], b[1]);
      }
  }
}

// factor: of all sums, or null. Grid: outputs / 128, tokens / (16 MT), parts of the inputs. partial: float32 [y][x][z][16 MT * 128], finished: zeros [y][x].
// Three blocks a multiprocessor: left to itself, ptxas keeps to 128 registers on sm_120 and spills.
template <class T, int CODE, int MT>
__global__ void __launch_bounds__(GEMM_THREADS, 3)
    w4a16_gemm(const u32* packed, const u16* scale, const u16* zero, const float* factor, const u16* x, const u16* bias,
               u16* y, float* partial, u32* finished, int rows, int outputs, int inputs, int row_stride, int group_shift,
               int groups) {
  typedef Stage<CODE, MT> OneStage;
  OQ_SHARED(OneStage, stages);
  GemmArguments of = {packed, scale, zero, x, rows, outputs, inputs, row_stride, group_shift, groups};
  int tiles = (inputs + TILE_K - 1) / TILE_K, share = (tiles + gridDim.z - 1) / gridDim.z;
  int first = blockIdx.z * share, count = smaller(share, tiles - first);
  int m0 = blockIdx.y * 16 * MT, n0 = blockIdx.x * BLOCK_N;
  union {
    float all[MT * WARP_STRIPS * 8];
    float c[MT][WARP_STRIPS][2][4];
  } sums = {};

  for (int i = 0; i < STAGES - 1; i++) {
    if (i < count) copy_tile<CODE, MT>(stages[i], of, first + i, tiles, m0, n0);
    cp_async_commit();
  }
  for (int i = 0; i < count; i++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    // The stage written now was read in the step before, which everybody has left.
    int next = i + STAGES - 1;
    if (next < count) copy_tile<CODE, MT>(stages[next % STAGES], of, first + next, tiles, m0, n0);
    cp_async_commit();
    multiply_tile<T, CODE, MT>(sums.c, stages[i % STAGES], zero != nullptr);
  }

  if (gridDim.z > 1 && !last_to_finish(sums.all, partial, finished)) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float unit = factor ? *factor : 1.0f;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int p = 0; p < WARP_STRIPS; p++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int n = n0 + (warp * WARP_STRIPS + p) * TILE_N + 8 * j + lane % 4 * 2;
        if (n >= outputs) continue;
        float b0 = bias ? T::widen(bias[n]) : 0.0f, b1 = bias ? T::widen(bias[n + 1]) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int row = m0 + 16 * m + 8 * half + lane / 4;
          if (row < rows)
            *reinterpret_cast<u32*>(y + (i64)row * outputs + n) =
                T::narrow2(sums.c[m][p][j][2 * half] * unit + b0, sums.c[m][p][j][2 * half + 1] * unit + b1);
        }
      }
}
