// The only file with inline PTX, and the only one that knows whether a GPU is there: every kernel uses these wrappers.
// With OQ_CPU defined the same names come from a header that emulates them, and the kernels run as C++ on a CPU.
//
// 16-bit floats are `u16` in memory and pairs of them `u32` in registers (low half = first element), so no CUDA header
// is needed. `Half` and `Bfloat` say what the bits mean; both have the same members:
//   widen(u16) -> float      narrow(float) -> u16, round to nearest even     narrow2(lo, hi) -> u32
//   add2, sub2, mul2 on pairs, each result rounded once       mma(c, a, b0, b1): c += A B, m16n8k16, float32 sums
//   MANTISSA, BIAS: bits of the mantissa, what is added to exponents
//   MAGIC: two numbers whose low mantissa bits are an unsigned integer added to 2^10 (fp16) or 2^7 (bf16)
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#ifdef OQ_CPU
#include "cuda_cpu_shim.h"
#else

#define OQ_DEVICE __device__ __forceinline__
// Dynamic shared memory, aligned for 16-byte copies.
#define OQ_SHARED(type, name)                                                 \
  extern __shared__ __align__(128) unsigned char oq_dynamic_shared_memory[]; \
  type* name = reinterpret_cast<type*>(oq_dynamic_shared_memory)

// 16 bytes from global to shared memory, in the background; zeros when `valid` is false (the address is not read then).
OQ_DEVICE void cp_async16(void* to, const void* from, bool valid) {
  u32 address = (u32)__cvta_generic_to_shared(to);
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
OQ_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of this thread's committed groups are still under way.
template <int N>
OQ_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
OQ_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  u32 address = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c += A B for int8, m16n8k32, exact in int32.
OQ_DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once: 16 bytes past the first-level cache.
OQ_DEVICE uint4 load_streaming(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// What another block has written in this launch: past the first-level cache, which may be out of date.
OQ_DEVICE u32 load_uncached(const u32* from) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}
OQ_DEVICE int load_uncached(const int* from) { return (int)load_uncached(reinterpret_cast<const u32*>(from)); }
OQ_DEVICE float load_uncached(const float* from) {
  return __uint_as_float(load_uncached(reinterpret_cast<const u32*>(from)));
}

// A NaN wins, unlike in fminf and fmaxf.
OQ_DEVICE float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
OQ_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

struct Half {
  static constexpr int MANTISSA = 10, BIAS = 15;
  static constexpr u32 MAGIC = 0x64006400u;
  static OQ_DEVICE float widen(u16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
  }
  static OQ_DEVICE u16 narrow(float f) {
    u16 v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
  }
  static OQ_DEVICE u32 narrow2(float lo, float hi) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
  }
  static OQ_DEVICE u32 add2(u32 a, u32 b) {
    u32 r;
    asm("add.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static OQ_DEVICE u32 sub2(u32 a, u32 b) {
    u32 r;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static OQ_DEVICE u32 mul2(u32 a, u32 b) {
    u32 r;
    asm("mul.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
  static OQ_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// add2, sub2 and mul2 as fused multiply-adds: sm_80 has no other bfloat16 arithmetic.
struct Bfloat {
  static constexpr int MANTISSA = 7, BIAS = 127;
  static constexpr u32 MAGIC = 0x43004300u;
  static constexpr u32 ONE = 0x3f803f80u, SIGN = 0x80008000u;
  static OQ_DEVICE float widen(u16 v) { return __uint_as_float((u32)v << 16); }
  static OQ_DEVICE u16 narrow(float f) {
    u16 v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
  }
  static OQ_DEVICE u32 narrow2(float lo, float hi) {
    u32 v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
  }
  static OQ_DEVICE u32 fma2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
  }
  static OQ_DEVICE u32 add2(u32 a, u32 b) { return fma2(a, ONE, b); }
  static OQ_DEVICE u32 sub2(u32 a, u32 b) { return fma2(b, ONE | SIGN, a); }
  static OQ_DEVICE u32 mul2(u32 a, u32 b) { return fma2(a, b, SIGN); }
  static OQ_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
#endif

OQ_DEVICE u32 both(u16 v) { return (u32)v * 0x00010001u; }
OQ_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
