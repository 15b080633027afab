// A strided matrix, the number formats and the status that all compiled kernels share.
#pragma once

#include <cstdint>

namespace snk {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// A strided matrix that somebody else owns. `data == nullptr` means "not given" for an input and
// "not wanted" for an output. A vector is a matrix of one row.
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  View transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

enum class Status : int { ok = 0, out_of_memory = 1 };

}  // namespace snk
