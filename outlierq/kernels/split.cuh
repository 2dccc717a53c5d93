// A sum split over the blocks of grid dimension z.
#pragma once
#include "ptx.cuh"

// Leave this block's sums, and tell whether all blocks of this part of y have done so; then `c` holds the sum of all.
// partial: [y][x][z][COUNT][threads] numbers; finished: [y][x] counters that start at 0.
template <class V, int COUNT>
OQ_DEVICE bool last_to_finish(V (&c)[COUNT], V* partial, u32* finished) {
  __shared__ bool last;
  int part = blockIdx.y * gridDim.x + blockIdx.x, parts = gridDim.z, threads = blockDim.x;
  V* here = partial + (i64)part * parts * COUNT * threads + threadIdx.x;
#pragma unroll
  for (int i = 0; i < COUNT; i++) here[(i64)(blockIdx.z * COUNT + i) * threads] = c[i];
  __threadfence();
  __syncthreads();  // orders memory between blocks: no CPU test can show it
  if (threadIdx.x == 0) last = atomicAdd(&finished[part], 1u) == parts - 1;
  __syncthreads();
  if (!last) return false;
  __threadfence();
#pragma unroll
  for (int i = 0; i < COUNT; i++) c[i] = 0;
  for (int z = 0; z < parts; z++)
#pragma unroll
    for (int i = 0; i < COUNT; i++) c[i] += load_uncached(&here[(i64)(z * COUNT + i) * threads]);
  return true;
}
