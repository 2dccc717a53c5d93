// Runs CUDA C++ kernels on a CPU, to test them where no GPU is: every CUDA thread is a fiber, blocks run one by one.
//
// Fibers stop only where CUDA threads meet (barriers, shuffles, mma, ldmatrix); what runs between two such points is not
// interleaved, but the order of threads and blocks and the moment at which asynchronous copies land follow a `schedule`:
//   0  warps and threads in order, copies land as late as allowed
//   1  warps and threads in reverse order, copies land at once
//   n  everything at random, seeded by n
// Between barriers a warp runs as far ahead of the others as it can.
// What this cannot show: the memory model, bank conflicts, speed. The wrappers below are written from the PTX manual
// (fragment layouts of mma.m16n8k16, m16n8k32 and ldmatrix); a misreading shared with the kernels stays unseen until
// the wrappers have been compared with a GPU.
//
// Faults can be switched on to prove that a test would see them: a barrier without effect (given by its source line), a
// wait for asynchronous copies that waits for one group less, mma's B registers swapped, shuffles that give back a
// lane's own value.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define OQ_DEVICE inline
#define OQ_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::shared_memory())

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace shim {

enum Fault { NONE, SKIP_BARRIER, WEAK_WAIT, SWAP_B, SKIP_SHUFFLE };
enum State { READY, AT_BLOCK, AT_WARP, DONE };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber;
using WarpOperation = void (*)(Fiber* const*);

struct Fiber {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  bool started;
  State state;
  dim3 thread;
  int lane;
  WarpOperation operation;           // what the lanes of this warp meet for
  uint32_t in[8], out[4];            // operands and results of it
  const void* address;
  std::vector<Copy> open;            // copies not yet committed
  std::vector<std::vector<Copy>> groups;
};

constexpr size_t STACK = 128 * 1024;
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline dim3 block_index, block_size, grid_size;
inline std::function<void()> body;
inline std::vector<char> shared;
inline std::mt19937 random_numbers;
inline int schedule;
inline Fault fault;
inline int fault_line;
inline std::string error;

inline void stop() {
  if (_setjmp(current->context) == 0) _longjmp(scheduler, 1);
}
inline void fail(const std::string& what) {
  if (error.empty()) error = what;
  current->state = DONE;
  stop();
}
inline void land(const Copy& copy) {
  if (copy.valid)
    memcpy(copy.to, copy.from, 16);
  else
    memset(copy.to, 0, 16);
}
inline void wait_for_groups(size_t still_allowed) {
  auto& groups = current->groups;
  while (groups.size() > still_allowed) {
    for (auto& copy : groups.front()) land(copy);
    groups.erase(groups.begin());
  }
}
inline void run_fiber() {
  body();
  current->state = DONE;
  wait_for_groups(0);
  for (auto& copy : current->open) land(copy);
  stop();
}
inline void meet_block() {
  current->state = AT_BLOCK;
  stop();
}
inline void meet_warp(WarpOperation operation) {
  current->operation = operation;
  current->state = AT_WARP;
  stop();
}
inline char* shared_memory() { return (char*)(((uintptr_t)shared.data() + 127) & ~(uintptr_t)127); }

// First entry of a fiber needs a context with its own stack; later switches are plain jumps, without system calls.
inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = STACK;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

inline std::vector<int> order(int count) {
  std::vector<int> numbers(count);
  for (int i = 0; i < count; i++) numbers[i] = schedule == 1 ? count - 1 - i : i;
  if (schedule > 1) std::shuffle(numbers.begin(), numbers.end(), random_numbers);
  return numbers;
}

inline void release_warp(Fiber* first, int lanes) {
  Fiber* warp[32];
  for (int lane = 0; lane < lanes; lane++) {
    warp[lane] = first + lane;
    if (warp[lane]->operation != warp[0]->operation) return void(error = "lanes of a warp meet for different things");
  }
  if (warp[0]->operation) {
    if (lanes < 32) return void(error = "a warp operation in an incomplete warp");
    warp[0]->operation(warp);
  }
  for (int lane = 0; lane < lanes; lane++) warp[lane]->state = READY;
}

inline void run_block(int threads, size_t shared_bytes) {
  shared.assign(shared_bytes + 256, (char)0xCD);  // poison: NaN-like in every type
  if ((int)fibers.size() < threads) fibers.resize(threads);
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.started = false, fiber.state = READY, fiber.lane = i % 32, fiber.thread = {(unsigned)i, 0, 0};
    fiber.open.clear(), fiber.groups.clear();
  }
  int warps = (threads + 31) / 32;
  while (error.empty()) {
    auto count = [&](int from, int to, State state) {
      return (int)std::count_if(&fibers[from], &fibers[to - 1] + 1, [=](Fiber& f) { return f.state == state; });
    };
    // One warp goes as far as it can before the next: they drift apart as much as the barriers allow.
    int chosen = -1;
    for (int warp : order(warps))
      if (chosen < 0 && count(32 * warp, std::min(threads, 32 * warp + 32), READY)) chosen = warp;
    if (chosen >= 0) {
      Fiber* first = &fibers[32 * chosen];
      int lanes = std::min(32, threads - 32 * chosen);
      for (int lane : order(lanes))
        if (first[lane].state == READY) resume(first[lane]);
      if (count(32 * chosen, 32 * chosen + lanes, AT_WARP) == lanes) release_warp(first, lanes);
      continue;
    }
    int done = count(0, threads, DONE), waiting = count(0, threads, AT_BLOCK);
    // As in CUDA since Volta, threads that have returned are not waited for.
    if (waiting && waiting == threads - done) {
      for (int i = 0; i < threads; i++)
        if (fibers[i].state == AT_BLOCK) fibers[i].state = READY;
    } else if (done == threads) {
      for (char* at = shared_memory() + shared_bytes; at < shared.data() + shared.size(); at++)
        if (*at != (char)0xCD) error = "a write past the end of shared memory";
      return;
    } else {
      error = "deadlock: threads wait at different barriers";
    }
  }
}

inline void launch(dim3 grid, unsigned threads, size_t shared_bytes, int with_schedule, const std::function<void()>& kernel) {
  grid_size = grid, block_size = {threads, 1, 1}, body = kernel, schedule = with_schedule, error.clear();
  random_numbers.seed(with_schedule);
  for (int i : order((int)(grid.x * grid.y * grid.z))) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block((int)threads, shared_bytes);
    if (!error.empty()) return;
  }
}

// ---- numbers

inline float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline float half_to_float(uint16_t v) {
  static const std::vector<float> table = [] {
    std::vector<float> all(65536);
    for (unsigned i = 0; i < 65536; i++) {
      int exponent = i >> 10 & 31, mantissa = i & 1023;
      float value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                   : std::ldexp((float)mantissa, -24);
      all[i] = i >> 15 ? -value : value;
    }
    return all;
  }();
  return table[v];
}
// Through double, which holds every sum and product of two halves exactly: one rounding in all.
inline uint16_t half_from(double v) {
  if (std::isnan(v)) return 0x7fff;
  uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  v = std::fabs(v);
  if (v >= 65520.0) return sign | 0x7c00;
  int exponent = v == 0 ? -14 : std::max(-14, std::ilogb(v));
  double units = std::nearbyint(std::ldexp(v, 10 - exponent));
  return sign | (uint16_t)((exponent + 14) * 1024 + (int)units);  // units >= 1024 for normal numbers, carries included
}
inline float bfloat_to_float(uint16_t v) { return from_bits((uint32_t)v << 16); }
inline uint16_t bfloat_from(float f) {
  if (std::isnan(f)) return 0x7fff;
  uint32_t bits = to_bits(f);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Sums and products of two bfloat16: float64 is exact, then rounded to odd in float32 so that the last rounding is right.
inline uint16_t bfloat_from_exact(double v) {
  float f = (float)v;
  if (std::isfinite(f) && (double)f != v && !(to_bits(f) & 1)) {
    f = std::nextafterf(f, (double)f < v ? INFINITY : -INFINITY);
  }
  return bfloat_from(f);
}

// ---- what lanes of a warp do together

inline void shuffle(Fiber* const* warp) {
  for (int lane = 0; lane < 32; lane++) warp[lane]->out[0] = warp[warp[lane]->in[1] & 31]->in[0];
}
template <class V>
V exchange(V value, int source) {
  static_assert(sizeof(V) == 4);
  if (fault == SKIP_SHUFFLE) return value;
  memcpy(&current->in[0], &value, 4);
  current->in[1] = (uint32_t)source;
  meet_warp(shuffle);
  memcpy(&value, &current->out[0], 4);
  return value;
}

inline void load_matrices(Fiber* const* warp) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      memcpy(&warp[lane]->out[i], (const char*)warp[8 * i + lane / 4]->address + lane % 4 * 4, 4);
}

// A fragment of mma.m16n8kK with elements of `bytes` bytes: element (row, k) of A lies in lane 4 (row % 8) + k' / e and
// register (row >= 8) + 2 (k >= K / 2), with k' = k % (K / 2) and e = 4 / bytes elements per register; element (k, column)
// of B in lane 4 column + k' / e and register (k >= K / 2). C: rows l / 4 and l / 4 + 8, columns 2 (l % 4) + {0, 1}.
template <int BYTES, class Value, class Sum, Value (*READ)(uint32_t, int)>
void multiply(Fiber* const* warp) {
  constexpr int EACH = 4 / BYTES, K = 32 / BYTES;
  Value a[16][K], b[K][8];
  int swapped = fault == SWAP_B;
  for (int k = 0; k < K; k++) {
    int lane = k % (K / 2) / EACH, high = k >= K / 2, at = k % EACH;
    for (int row = 0; row < 16; row++) a[row][k] = READ(warp[4 * (row % 8) + lane]->in[(row >= 8) + 2 * high], at);
    for (int column = 0; column < 8; column++) b[k][column] = READ(warp[4 * column + lane]->in[4 + (high ^ swapped)], at);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      Sum sum;
      memcpy(&sum, &warp[lane]->out[i], 4);
      for (int k = 0; k < K; k++) sum += (Sum)a[row][k] * (Sum)b[k][column];
      memcpy(&warp[lane]->out[i], &sum, 4);
    }
}
inline float half_at(uint32_t v, int i) { return half_to_float((uint16_t)(v >> (16 * i))); }
inline float bfloat_at(uint32_t v, int i) { return bfloat_to_float((uint16_t)(v >> (16 * i))); }
inline int byte_at(uint32_t v, int i) { return (int8_t)(v >> (8 * i)); }
template <class Sum>
void multiply_add(WarpOperation operation, Sum (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  memcpy(current->in, a, 16);
  current->in[4] = b0, current->in[5] = b1;
  memcpy(current->out, c, 16);
  meet_warp(operation);
  memcpy(c, current->out, 16);
}

// ---- launching by name: arguments arrive as an array of pointers to them, as in cuLaunchKernel

using Entry = std::function<void(void**)>;
template <class... P, size_t... I>
Entry entry(void (*kernel)(P...), std::index_sequence<I...>) {
  return [kernel](void** arguments) { kernel(*(std::remove_cv_t<P>*)arguments[I]...); };
}
template <class... P>
Entry entry(void (*kernel)(P...)) {
  return entry(kernel, std::index_sequence_for<P...>{});
}
struct Instance {
  const char* name;
  Entry entry;
  std::vector<size_t> sizes;
};
template <class... P>
Instance instance(const char* name, void (*kernel)(P...)) {
  return {name, entry(kernel), {sizeof(P)...}};
}
}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

inline void __syncthreads(int line = __builtin_LINE()) {
  if (shim::fault == shim::SKIP_BARRIER && shim::fault_line == line) return;
  shim::meet_block();
}
inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  if (shim::fault == shim::SKIP_BARRIER && shim::fault_line == line) return;
  shim::meet_warp(nullptr);
}
inline void __threadfence() {}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return shim::exchange(value, shim::current->lane ^ mask);
}
template <class V>
V __shfl_sync(unsigned, V value, int source) {
  return shim::exchange(value, source);
}
template <class V>
V atomicAdd(V* to, V value) {
  V old = *to;
  *to += value;
  return old;
}
inline float __uint_as_float(unsigned v) { return shim::from_bits(v); }
inline unsigned __float_as_uint(float v) { return shim::to_bits(v); }
inline float __int_as_float(int v) { return shim::from_bits((unsigned)v); }
inline int __float_as_int(float v) { return (int)shim::to_bits(v); }
inline int __float2int_rn(float v) { return std::isnan(v) ? 0 : (int)std::nearbyint(std::clamp(v, -2147483648.0f, 2147483520.0f)); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return r;
}
inline uint4 load_streaming(const uint4* from) { return *from; }
inline float min_nan(float a, float b) { return std::isnan(a) || a < b ? a : b; }
inline float max_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }
template <class V>
V load_uncached(const V* from) {
  return *from;
}

inline void cp_async16(void* to, const void* from, bool valid) {
  if (((uintptr_t)to | (valid ? (uintptr_t)from : 0)) & 15) shim::fail("cp.async of an address that is no multiple of 16");
  shim::Copy copy = {to, from, valid};
  bool at_once = shim::schedule == 1 || (shim::schedule > 1 && shim::random_numbers() & 1);
  if (at_once)
    shim::land(copy);
  else
    shim::current->open.push_back(copy);
}
inline void cp_async_commit() {
  shim::current->groups.push_back(std::move(shim::current->open));
  shim::current->open.clear();
}
template <int N>
void cp_async_wait() {
  shim::wait_for_groups(N + (shim::fault == shim::WEAK_WAIT));
}
inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  if ((uintptr_t)row & 15) shim::fail("ldmatrix of an address that is no multiple of 16");
  shim::current->address = row;
  shim::meet_warp(shim::load_matrices);
  memcpy(r, shim::current->out, 16);
}
inline void mma_s8(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  shim::multiply_add(shim::multiply<1, int, int, shim::byte_at>, c, a, b0, b1);
}

struct Half {
  static constexpr int MANTISSA = 10, BIAS = 15;
  static constexpr unsigned MAGIC = 0x64006400u;
  static float widen(uint16_t v) { return shim::half_to_float(v); }
  static uint16_t narrow(float f) { return shim::half_from(f); }
  static unsigned narrow2(float lo, float hi) { return narrow(lo) | (unsigned)narrow(hi) << 16; }
  template <class F>
  static unsigned pairwise(unsigned a, unsigned b, F f) {
    return shim::half_from(f((double)shim::half_at(a, 0), (double)shim::half_at(b, 0))) |
           (unsigned)shim::half_from(f((double)shim::half_at(a, 1), (double)shim::half_at(b, 1))) << 16;
  }
  static unsigned add2(unsigned a, unsigned b) { return pairwise(a, b, std::plus<>()); }
  static unsigned sub2(unsigned a, unsigned b) { return pairwise(a, b, std::minus<>()); }
  static unsigned mul2(unsigned a, unsigned b) { return pairwise(a, b, std::multiplies<>()); }
  static void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    shim::multiply_add(shim::multiply<2, float, float, shim::half_at>, c, a, b0, b1);
  }
};

struct Bfloat {
  static constexpr int MANTISSA = 7, BIAS = 127;
  static constexpr unsigned MAGIC = 0x43004300u;
  static float widen(uint16_t v) { return shim::bfloat_to_float(v); }
  static uint16_t narrow(float f) { return shim::bfloat_from(f); }
  static unsigned narrow2(float lo, float hi) { return narrow(lo) | (unsigned)narrow(hi) << 16; }
  template <class F>
  static unsigned pairwise(unsigned a, unsigned b, F f) {
    return shim::bfloat_from_exact(f((double)shim::bfloat_at(a, 0), (double)shim::bfloat_at(b, 0))) |
           (unsigned)shim::bfloat_from_exact(f((double)shim::bfloat_at(a, 1), (double)shim::bfloat_at(b, 1))) << 16;
  }
  static unsigned add2(unsigned a, unsigned b) { return pairwise(a, b, std::plus<>()); }
  static unsigned sub2(unsigned a, unsigned b) { return pairwise(a, b, std::minus<>()); }
  static unsigned mul2(unsigned a, unsigned b) { return pairwise(a, b, std::multiplies<>()); }
  static void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    shim::multiply_add(shim::multiply<2, float, float, shim::bfloat_at>, c, a, b0, b1);
  }
};
