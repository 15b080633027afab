// y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ, forward and backward.
#include "cpu/stitch.h"

namespace snk::cpu::SNK_ISA {

Status stitch_forward(const StitchForward& p) {
  static thread_local Scratch bias_scratch;
  const float* bias;
  if (!read_vector(p.bias, bias_scratch, &bias)) return Status::out_of_memory;
  return stitch_rows(p, [&](int64_t row, float* y) {
    if (bias != nullptr)
      for (int64_t j = 0; j < p.y.cols; ++j) y[j] += bias[j];
    write_row(p.y, row, y);
  });
}

Status stitch_backward(const StitchBackward& p) {
  if (p.grad_bias) {
    static thread_local Scratch sums, rows;
    const int64_t N = p.grad_y.cols;
    float* partial = sums.take(ROW_BLOCKS * N);
    float* row_of_block = rows.take(ROW_BLOCKS * N);
    if ((partial == nullptr || row_of_block == nullptr) && N > 0) return Status::out_of_memory;
    std::memset(partial, 0, ROW_BLOCKS * N * sizeof(float));
    for_row_blocks(p.grad_y.rows, p.threads, [&](int64_t row, int64_t block) {
      float* values = row_of_block + block * N;
      read_row(p.grad_y, row, values);
      for (int64_t j = 0; j < N; ++j) partial[block * N + j] += values[j];
    });
    write_block_sums(partial, N, p.grad_bias);
  }
  return stitch_products_backward(p);
}

}  // namespace snk::cpu::SNK_ISA
