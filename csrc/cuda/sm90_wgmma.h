// The warpgroup matrix product of Hopper: D (64 × N, fp32, in registers) += A (64 × 16) · Bᵀ
// (N × 16), where all 128 threads of a warpgroup call together. Operands in shared memory are given
// by descriptors of K-major tiles with 128-byte swizzle (sm90_layout.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace snk::cuda::sm90 {

// Before the first product after registers were written.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of products so far.
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until only the last COUNT groups are under way: what the others read may be overwritten.
template <int COUNT>
__device__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}
// Ties accumulators to this point of the program, which for the compiler are as free to move as any
// register: they are cleared before wgmma_fence, and read after wgmma_wait<0>.
template <int SIZE>
__device__ void wgmma_settle(float (&d)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// The asm statement lists every accumulator as text ("%0, %1, …") and as operand; the macros below
// only write these lists.
#define SNK_TEN(tens)                                                                       \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens   \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define SNK_TEXT_30 SNK_TEN() SNK_TEN(1) SNK_TEN(2)
#define SNK_TEXT_32 SNK_TEXT_30 "%30, %31"
#define SNK_TEXT_48 SNK_TEXT_30 SNK_TEN(3) "%40, %41, %42, %43, %44, %45, %46, %47"
#define SNK_TEXT_64 SNK_TEXT_30 SNK_TEN(3) SNK_TEN(4) SNK_TEN(5) "%60, %61, %62, %63"

#define SNK_REGS_8(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),               \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SNK_REGS_32(i) SNK_REGS_8(i), SNK_REGS_8(i + 8), SNK_REGS_8(i + 16), SNK_REGS_8(i + 24)
#define SNK_REGS_48(i) SNK_REGS_32(i), SNK_REGS_8(i + 32), SNK_REGS_8(i + 40)
#define SNK_REGS_64(i) SNK_REGS_32(i), SNK_REGS_32(i + 32)

// Immediates: the accumulators are added to, neither operand is negated or transposed (both K-major).
#define SNK_WGMMA_TYPED(N, TYPE, SIZE, A_AND_B)                                             \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE              \
               " {" SNK_TEXT_##SIZE "}, " A_AND_B ", accumulate, 1, 1, 0, 0;\n}"            \
               : SNK_REGS_##SIZE(0)                                                         \
               : "l"(a), "l"(b))
#define SNK_WGMMA(N, SIZE, A_AND_B)                                                         \
  template <typename T>                                                                     \
  __device__ void wgmma(float(&d)[SIZE], uint64_t a, uint64_t b) {                          \
    if constexpr (std::is_same_v<T, __half>)                                                \
      SNK_WGMMA_TYPED(N, "f16", SIZE, A_AND_B);                                             \
    else                                                                                    \
      SNK_WGMMA_TYPED(N, "bf16", SIZE, A_AND_B);                                            \
  }

SNK_WGMMA(64, 32, "%32, %33")
SNK_WGMMA(96, 48, "%48, %49")
SNK_WGMMA(128, 64, "%64, %65")

#undef SNK_WGMMA
#undef SNK_WGMMA_TYPED
#undef SNK_REGS_64
#undef SNK_REGS_48
#undef SNK_REGS_32
#undef SNK_REGS_8
#undef SNK_TEXT_64
#undef SNK_TEXT_48
#undef SNK_TEXT_32
#undef SNK_TEXT_30
#undef SNK_TEN

}  // namespace snk::cuda::sm90
