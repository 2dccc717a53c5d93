// Hadamard transform of rows: y = x M^T / sqrt(n), M = core (x) Sylvester, n = order * size with size a power of two.
//
// A block owns a row and keeps it in shared memory in float32. Neighbouring numbers are combined in registers first (up to
// 8), then at growing distances up to `size`; at last the core, a small matrix of +-1, is applied across the pieces.
#include "ptx.cuh"

constexpr int FWHT_THREADS = 256;

// n: multiple of 8. core: [order, order], or its transpose for the inverse; not read for order 1.
template <class T>
__global__ void __launch_bounds__(FWHT_THREADS)
    fwht(const u16* x, const signed char* core, u16* y, int n, int order, int row_stride, float factor) {
  OQ_SHARED(float, row);
  const u16* from = x + (i64)blockIdx.x * row_stride;
  u16* to = y + (i64)blockIdx.x * n;
  int size = n / order;

  for (int k = threadIdx.x * 8; k < n; k += FWHT_THREADS * 8) {
    uint4 v = *reinterpret_cast<const uint4*>(from + k);
    u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float f[8];
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = T::widen((u16)(pairs[i / 2] >> (16 * (i % 2))));
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      if (step >= size) break;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i & step) continue;
        float a = f[i], b = f[i + step];
        f[i] = a + b, f[i + step] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) row[k + i] = f[i];
  }
  for (int step = 8; step < size; step *= 2) {
    __syncthreads();  // one for each distance
    for (int i = threadIdx.x; i < n / 2; i += FWHT_THREADS) {
      int at = i / step * 2 * step + i % step;
      float a = row[at], b = row[at + step];
      row[at] = a + b, row[at + step] = a - b;
    }
  }
  __syncthreads();
  for (int k = threadIdx.x * 2; k < n; k += FWHT_THREADS * 2) {
    float sums[2] = {};
    for (int e = 0; e < 2; e++) {
      int piece = (k + e) / size, place = (k + e) % size;
      if (order == 1) sums[e] = row[k + e];
      for (int p = 0; order > 1 && p < order; p++) {
        float v = row[p * size + place];
        sums[e] += core[piece * order + p] > 0 ? v : -v;
      }
    }
    *reinterpret_cast<u32*>(to + k) = T::narrow2(sums[0] * factor, sums[1] * factor);
  }
}
