// csrc/cuda/sm90_wgmma.h for the stand-in machine: a thread computes its own fragment, from where
// the descriptors say that the operands lie.
#pragma once

#include "cuda/sm90.h"

namespace snk::cuda::sm90 {

template <typename T>
float operand(uint64_t descriptor, int row, int k) {
  T value;
  std::memcpy(&value, shared_memory() + operand_address(descriptor, row, k), 2);
  return float(value);
}

// d += a · bᵀ for this thread's two rows of A (PTX ISA, "Register Fragments" of m64nNk16).
template <typename T, int SIZE>
void accumulate(float (&d)[SIZE], const float (&a)[2][16], uint64_t b) {
  const int member = threadIdx.x % 4;
  for (int i = 0; i < SIZE; i += 4)
    for (int odd = 0; odd < 2; ++odd) {
      const int column = i / 4 * 8 + member * 2 + odd;
      for (int k = 0; k < 16; ++k) {
        const float factor = operand<T>(b, column, k);
        d[i + odd] += a[0][k] * factor;
        d[i + 2 + odd] += a[1][k] * factor;
      }
    }
}

template <typename T, int SIZE>
void wgmma(float (&d)[SIZE], uint64_t a, uint64_t b) {
  const int row = int(threadIdx.x) % 128 / 32 * 16 + int(threadIdx.x) % 32 / 4;
  current->products.back().push_back([&d, a, b, row] {
    float rows[2][16];
    for (int k = 0; k < 16; ++k) {
      rows[0][k] = operand<T>(a, row, k);
      rows[1][k] = operand<T>(a, row + 8, k);
    }
    accumulate<T>(d, rows, b);
  });
}

inline void wgmma_fence() {}
inline void wgmma_commit() { current->products.emplace_back(); }
template <int COUNT>
void wgmma_wait() {
  machine::wait_until([moment = machine::now + machine::random_delay() / 4] {
    return machine::now >= moment;
  });
  auto& groups = current->products;
  for (; groups.size() > COUNT + 1; groups.erase(groups.begin()))
    for (auto& product : groups.front()) product();
  machine::exchange(0, 0);  // the lanes of a warp wait together
}
template <typename Registers>
void wgmma_settle(Registers&) {}

}  // namespace snk::cuda::sm90
