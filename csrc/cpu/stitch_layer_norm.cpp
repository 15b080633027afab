// stitch followed by LayerNorm: y and LN(y) leave the cache once each, forward and backward.
#include "cpu/stitch.h"

namespace snk::cpu::SNK_ISA {

Status stitch_layer_norm_forward(const StitchLayerNormForward& p) {
  static thread_local Scratch bias_scratch, norm_weight_scratch, norm_bias_scratch;
  const int64_t N = p.stitch.y.cols;
  const float* bias = vector_or(p.stitch.bias, 0.0f, N, bias_scratch);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, norm_weight_scratch);
  const float* norm_bias = vector_or(p.norm_bias, 0.0f, N, norm_bias_scratch);
  if (bias == nullptr || norm_weight == nullptr || norm_bias == nullptr)
    return Status::out_of_memory;
  float* mean = static_cast<float*>(p.mean.data);
  float* rstd = static_cast<float*>(p.rstd.data);
  return stitch_rows(p.stitch, [&](int64_t row, float* y) {
    for (int64_t j = 0; j < N; ++j) y[j] += bias[j];
    // LN of the y that is returned, or the backward, which starts from it, would not fit.
    write_row_rounding(p.stitch.y, row, y);
    const RowStatistics statistics = row_statistics(y, N, sum_of(y, N), p.eps);
    mean[row] = statistics.mean;
    rstd[row] = statistics.rstd;
    normalize_row(y, N, statistics, norm_weight, norm_bias, y);
    write_row(p.normed, row, y);
  });
}

Status stitch_layer_norm_backward(const StitchLayerNormBackward& p) {
  static thread_local Scratch norm_weight_scratch, sums, rooms, total;
  const int64_t M = p.y.rows, N = p.y.cols;
  const float* mean = static_cast<const float*>(p.mean.data);
  const float* rstd = static_cast<const float*>(p.rstd.data);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, norm_weight_scratch);
  float* partial = sums.take(ROW_BLOCKS * 3 * N);
  float* room = rooms.take(ROW_BLOCKS * 2 * N);
  float* grad_y = total.take(M * N);
  if (norm_weight == nullptr || ((partial == nullptr || room == nullptr) && N > 0) ||
      (grad_y == nullptr && M * N > 0))
    return Status::out_of_memory;

  for_row_blocks(M, 3 * N, p.stitch.threads, partial,
                 [&](int64_t row, int64_t block, float* sum_weight) {
    float *sum_norm_bias = sum_weight + N, *sum_bias = sum_norm_bias + N;
    float *room_y = room + block * 2 * N, *room_g = room_y + N;
    const float* y = row_values(p.y, row, room_y);
    const float* g = row_values(p.grad_normed, row, room_g);
    float* d = grad_y + row * N;
    normalize_row_backward(y, g, N, {mean[row], rstd[row]}, norm_weight, d, sum_weight,
                           sum_norm_bias);
    const float* direct = p.stitch.grad_y ? row_values(p.stitch.grad_y, row, room_g) : nullptr;
    for_values(N, [&](auto v, int64_t j, int) {
      using V = decltype(v);
      V total = get<V>(d + j);
      if (direct != nullptr) total += get<V>(direct + j);
      put(d + j, total);
      put(sum_bias + j, V(get<V>(sum_bias + j) + total));
    });
  });
  write_block_sums(partial, 3 * N, p.grad_norm_weight);
  write_block_sums(partial + N, 3 * N, p.grad_norm_bias);
  write_block_sums(partial + 2 * N, 3 * N, p.stitch.grad_bias);

  StitchBackward products = p.stitch;
  products.grad_y = f32_matrix(grad_y, M, N);
  const Status status = stitch_products_backward(products);
  total.release_if_large();
  return status;
}

}  // namespace snk::cpu::SNK_ISA
