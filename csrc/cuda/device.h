// What the kernels ask of a GPU beyond plain C++: products of one warp on the tensor cores, loads
// with a cache policy, copies in the background, tickets, shared memory. Tests compile the kernels
// for the host, where tests/emulator/emulator.h stands in for CUDA and for these functions.

#pragma once

#include <cstdint>

#ifdef LIGHTNING_MAT_EMULATOR
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace lightning_mat {

// The block's dynamic shared memory, 16-byte aligned: all the shared memory that a kernel has.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ uint4 lightning_mat_shared_memory[];
  return reinterpret_cast<unsigned char*>(lightning_mat_shared_memory);
}

// d += a * b for one warp, whose lanes are g = lane / 4, t = lane % 4. Of the 16x8 sum a lane holds
// d[0], d[1] = (g, 2t), (g, 2t + 1) and d[2], d[3] = the same of row g + 8.
//
// The 16x8 matrix a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4).
// The 8x8 matrix b: (t, g), (t + 4, g). Bits below TF32's are ignored.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two elements in each register, the first in the low half.
// The 16x16 matrix a: (g, 2t), (g, 2t + 1) | the same of row g + 8 | both again, columns + 8.
// The 16x8 matrix b: (2t, g), (2t + 1, g) | the same of rows + 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest TF32 number, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// 16 aligned bytes of memory that nobody writes during the launch and that this block reads once.
__device__ __forceinline__ uint4 load_16(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}

// Copies from global to shared memory that go on while the thread computes. A thread waits for its
// own only; what it copied is for itself to read, until the block has met at a barrier.

// Starts to copy 16 aligned bytes past L1, or, where they are not inside, zeros.
__device__ __forceinline__ void copy_16(uint4* to, const void* from, bool inside) {
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}

// The copies started since the last group are a group.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups but the kLater last ones.
template <int kLater>
__device__ __forceinline__ void wait_for_groups() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLater) : "memory");
}

// What another block wrote earlier in this launch: from L2, as L1 could hold an older value.
__device__ __forceinline__ float load_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ double load_fresh(const double* p) { return __ldcg(p); }
__device__ __forceinline__ float4 load_fresh(const float4* p) { return __ldcg(p); }

// The counter's value before this call counted one more.
__device__ __forceinline__ unsigned take_ticket(unsigned* counter) {
  return atomicAdd(counter, 1u);
}

}  // namespace lightning_mat

#endif
