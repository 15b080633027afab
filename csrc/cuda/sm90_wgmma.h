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
// Closes the group of products so far and waits for it: then shared memory may be overwritten.
__device__ inline void wgmma_finish() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Ties registers to this point of the program, which for the compiler are as free to move as any:
// operands are written before wgmma_fence, results are read after wgmma_finish.
template <int SIZE>
__device__ void wgmma_settle(float (&d)[SIZE]) {
#pragma unroll
  for (int i = 0; i < SIZE; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int SIZE>
__device__ void wgmma_settle(uint32_t (&fragments)[SIZE][4]) {
#pragma unroll
  for (int i = 0; i < SIZE * 4; ++i) asm volatile("" : "+r"(fragments[i / 4][i % 4])::"memory");
}

// wgmma(d, a, b): A by descriptor. wgmma(d, fragment, b): A in registers. The asm statement lists
// every accumulator as text ("%0, %1, …") and as operand; the macros below only write these lists.
#define SNK_TEN(tens)                                                                       \
  "%" #tens "0, %" #tens "1, %" #tens "2, %" #tens "3, %" #tens "4, %" #tens "5, %" #tens   \
  "6, %" #tens "7, %" #tens "8, %" #tens "9, "
#define SNK_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define SNK_TEXT_32 SNK_TEN() SNK_TEN(1) SNK_TEN(2) "%30, %31"
#define SNK_TEXT_90                                                                         \
  SNK_TEN() SNK_TEN(1) SNK_TEN(2) SNK_TEN(3) SNK_TEN(4) SNK_TEN(5) SNK_TEN(6) SNK_TEN(7)    \
  SNK_TEN(8)
#define SNK_TEXT_96 SNK_TEXT_90 "%90, %91, %92, %93, %94, %95"
#define SNK_TEXT_128                                                                        \
  SNK_TEXT_90 SNK_TEN(9) SNK_TEN(10) SNK_TEN(11)                                            \
  "%120, %121, %122, %123, %124, %125, %126, %127"

#define SNK_REGS_8(i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),               \
      "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define SNK_REGS_32(i) SNK_REGS_8(i), SNK_REGS_8(i + 8), SNK_REGS_8(i + 16), SNK_REGS_8(i + 24)
#define SNK_REGS_96(i) SNK_REGS_32(i), SNK_REGS_32(i + 32), SNK_REGS_32(i + 64)
#define SNK_REGS_128(i) SNK_REGS_96(i), SNK_REGS_32(i + 96)

#define SNK_WGMMA(N, TYPE, TEXT, A_AND_B, TAIL, REGS, ...)                                  \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, 1, 0;\n"                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TEXT    \
               "}, " A_AND_B ", accumulate, " TAIL ";\n}"                                   \
               : REGS                                                                       \
               : __VA_ARGS__)

// Immediates: neither operand negated, neither transposed (both K-major).
#define SNK_WGMMA_SHARED(N, SIZE, A_AND_B)                                                  \
  template <typename T>                                                                     \
  __device__ void wgmma(float(&d)[SIZE], uint64_t a, uint64_t b) {                          \
    if constexpr (std::is_same_v<T, __half>)                                                \
      SNK_WGMMA(N, "f16", SNK_TEXT_##SIZE, A_AND_B, "1, 1, 0, 0", SNK_REGS_##SIZE(0),       \
                "l"(a), "l"(b));                                                            \
    else                                                                                    \
      SNK_WGMMA(N, "bf16", SNK_TEXT_##SIZE, A_AND_B, "1, 1, 0, 0", SNK_REGS_##SIZE(0),      \
                "l"(a), "l"(b));                                                            \
  }
#define SNK_WGMMA_REGISTERS(N, SIZE, A_AND_B)                                               \
  template <typename T>                                                                     \
  __device__ void wgmma(float(&d)[SIZE], const uint32_t(&a)[4], uint64_t b) {               \
    if constexpr (std::is_same_v<T, __half>)                                                \
      SNK_WGMMA(N, "f16", SNK_TEXT_##SIZE, A_AND_B, "1, 1, 0", SNK_REGS_##SIZE(0),          \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
    else                                                                                    \
      SNK_WGMMA(N, "bf16", SNK_TEXT_##SIZE, A_AND_B, "1, 1, 0", SNK_REGS_##SIZE(0),         \
                "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
  }

SNK_WGMMA_SHARED(16, 8, "%8, %9")
SNK_WGMMA_SHARED(64, 32, "%32, %33")
SNK_WGMMA_SHARED(192, 96, "%96, %97")
SNK_WGMMA_SHARED(256, 128, "%128, %129")
SNK_WGMMA_REGISTERS(192, 96, "{%96, %97, %98, %99}, %100")
SNK_WGMMA_REGISTERS(256, 128, "{%128, %129, %130, %131}, %132")

#undef SNK_WGMMA_REGISTERS
#undef SNK_WGMMA_SHARED
#undef SNK_WGMMA
#undef SNK_REGS_128
#undef SNK_REGS_96
#undef SNK_REGS_32
#undef SNK_REGS_8
#undef SNK_TEXT_128
#undef SNK_TEXT_96
#undef SNK_TEXT_90
#undef SNK_TEXT_32
#undef SNK_TEXT_8
#undef SNK_TEN

}  // namespace snk::cuda::sm90
