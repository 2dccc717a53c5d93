// y = scale_x scale_w (X W^T) + outliers outlier_weight^T + bias: int8 codes X, W summed exactly in int32, a few input
// channels in 16 bits (LLM.int8(), arXiv:2208.07339, Eq. 8), one pass, one write of y.
//
// Both kinds of input are read as rows of bytes, in slabs of 128: 128 codes or 64 numbers of 16 bits. A tensor core step
// takes 32 bytes of either kind, with the same fragments in the same lanes, so outlier columns are only more slabs of one
// pipeline. When the int8 slabs are done the sums become float32, and the 16-bit slabs are added to them.
// With few tokens the int8 slabs are split over `gridDim.z` blocks; integers add up to the same in any order.
#include "split.cuh"

constexpr int SLAB = 128, SLAB_CHUNKS = SLAB / 16, SLAB_STAGES = 3, WARPS_N = 4, BLOCK_OUTPUTS = 32 * WARPS_N;

// A matrix of which a block reads some rows: `bytes` of each, from `first` on; rows from `count` on are not there.
struct Rows {
  const u8* data;
  int first, count, bytes;
};

// Rows of 8 chunks of 16 bytes; chunks change places so that 8 neighbouring rows lie in different banks.
OQ_DEVICE int place(int row, int chunk) { return row * SLAB + (chunk ^ (row % 8)) * 16; }

template <int ROWS, int THREADS>
OQ_DEVICE void copy_slab(u8* to, Rows from, int slab) {
#pragma unroll
  for (int i = threadIdx.x; i < ROWS * SLAB_CHUNKS; i += THREADS) {
    int row = i / SLAB_CHUNKS, chunk = i % SLAB_CHUNKS, byte = slab * SLAB + chunk * 16;
    bool valid = from.first + row < from.count && byte < from.bytes;
    cp_async16(to + place(row, chunk), from.data + (valid ? (i64)(from.first + row) * from.bytes + byte : 0), valid);
  }
}

struct Int8 {
  static OQ_DEVICE void mma(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_s8(c, a, b0, b1); }
};

// All products of one slab: x and w point to this warp's first row.
template <class Multiply, class Sum, int MT>
OQ_DEVICE void multiply_slab(Sum (&c)[MT][4][4], const u8* x, const u8* w) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < SLAB / 32; step++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], x + place(16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      u32 b[4];
      ldmatrix_x4(b, w + place(16 * pair + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < MT; m++) {
        Multiply::mma(c[m][2 * pair], a[m], b[0], b[1]);
        Multiply::mma(c[m][2 * pair + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Grid: outputs / 128, tokens / (16 MT WARPS_M), parts of the inputs. A warp owns 16 MT tokens x 32 outputs.
// scale_x: one for each token, or one alone with scale_step 0. outlier_bytes: of a row of outliers, 0 without.
template <class T, int WARPS_M, int MT>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N)
    w8a8_outlier(const u8* x, const u8* weight, const float* scale_x, const float* scale_w, const u8* outliers,
                 const u8* outlier_weight, const u16* bias, u16* y, int* partial, u32* finished, int rows, int outputs,
                 int inputs, int outlier_bytes, int scale_step) {
  constexpr int BLOCK_TOKENS = 16 * MT * WARPS_M, THREADS = 32 * WARPS_M * WARPS_N;
  constexpr int STAGE = (BLOCK_TOKENS + BLOCK_OUTPUTS) * SLAB;
  OQ_SHARED(u8, stages);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int m0 = blockIdx.y * BLOCK_TOKENS, n0 = blockIdx.x * BLOCK_OUTPUTS;
  int warp_m = warp / WARPS_N * 16 * MT, warp_n = warp % WARPS_N * 32;

  // This block's slabs, numbered from 0: first those of int8, then those of outliers.
  int all = (inputs + SLAB - 1) / SLAB, share = (all + gridDim.z - 1) / gridDim.z, first = blockIdx.z * share;
  int low = smaller(share, all - first), total = low + (outlier_bytes + SLAB - 1) / SLAB;
  auto copy = [&](int i) {
    u8* to = stages + i % SLAB_STAGES * STAGE;
    bool is_low = i < low;
    int slab = is_low ? first + i : i - low, bytes = is_low ? inputs : outlier_bytes;
    copy_slab<BLOCK_TOKENS, THREADS>(to, {is_low ? x : outliers, m0, rows, bytes}, slab);
    copy_slab<BLOCK_OUTPUTS, THREADS>(to + BLOCK_TOKENS * SLAB, {is_low ? weight : outlier_weight, n0, outputs, bytes}, slab);
  };
  auto fill = [&](int from, int limit) {
    for (int i = from; i < from + SLAB_STAGES - 1; i++) {
      if (i < limit) copy(i);
      cp_async_commit();
    }
  };
  // Slab i has arrived for every thread; the stage of the slab before it is free and gets a new one.
  auto advance = [&](int i, int limit) {
    cp_async_wait<SLAB_STAGES - 2>();
    __syncthreads();
    if (i + SLAB_STAGES - 1 < limit) copy(i + SLAB_STAGES - 1);
    cp_async_commit();
    return stages + i % SLAB_STAGES * STAGE;
  };

  union {
    int all[MT * 16];
    int c[MT][4][4];
  } exact = {};
  bool split = gridDim.z > 1;
  int limit = split ? low : total;
  fill(0, limit);
  for (int i = 0; i < low; i++) {
    u8* stage = advance(i, limit);
    multiply_slab<Int8>(exact.c, stage + warp_m * SLAB, stage + (BLOCK_TOKENS + warp_n) * SLAB);
  }
  if (split) {
    if (!last_to_finish(exact.all, partial, finished)) return;
    fill(low, total);
  }

  float c[MT][4][4];
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = m0 + warp_m + 16 * m + 8 * half + lane / 4;
      float of_token = row < rows ? scale_x[row * scale_step] : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          int n = n0 + warp_n + 8 * j + lane % 4 * 2 + e;
          float of_output = n < outputs ? scale_w[n] : 0.0f;
          c[m][j][2 * half + e] = (float)exact.c[m][j][2 * half + e] * (of_token * of_output);
        }
    }
  for (int i = low; i < total; i++) {
    u8* stage = advance(i, total);
    multiply_slab<T>(c, stage + warp_m * SLAB, stage + (BLOCK_TOKENS + warp_n) * SLAB);
  }

#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int n = n0 + warp_n + 8 * j + lane % 4 * 2;
      if (n >= outputs) continue;
      float b0 = bias ? T::widen(bias[n]) : 0.0f, b1 = bias ? T::widen(bias[n + 1]) : 0.0f;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int row = m0 + warp_m + 16 * m + 8 * half + lane / 4;
        if (row < rows)
          *reinterpret_cast<u32*>(y + (i64)row * outputs + n) =
              T::narrow2(c[m][j][2 * half] + b0, c[m][j][2 * half + 1] + b1);
      }
    }
}
