// y = x Wᵀ + b + scaling · (x Aᵀ) Bᵀ, forward and backward.
#include "cpu/stitch.h"

namespace snk::cpu::SNK_ISA {

Status stitch_forward(const StitchForward& p) {
  static thread_local Scratch bias_scratch;
  const float* bias = vector_or(p.bias, 0.0f, p.y.cols, bias_scratch);
  if (bias == nullptr) return Status::out_of_memory;
  return stitch_rows(p, [&](int64_t row, float* y) {
    for (int64_t j = 0; j < p.y.cols; ++j) y[j] += bias[j];
    write_row(p.y, row, y);
  });
}

Status stitch_backward(const StitchBackward& p) {
  if (p.grad_bias) {
    static thread_local Scratch sums, rooms;
    const int64_t N = p.grad_y.cols;
    float* partial = sums.take(ROW_BLOCKS * N);
    float* room = rooms.take(ROW_BLOCKS * N);
    if ((partial == nullptr || room == nullptr) && N > 0) return Status::out_of_memory;
    for_row_blocks(p.grad_y.rows, N, p.threads, partial, [&](int64_t row, int64_t block, float* sum) {
      const float* values = row_values(p.grad_y, row, room + block * N);
      for (int64_t j = 0; j < N; ++j) sum[j] += values[j];
    });
    write_block_sums(partial, N, p.grad_bias);
  }
  return stitch_products_backward(p);
}

}  // namespace snk::cpu::SNK_ISA
