// stitch followed by LayerNorm: y and LN(y) leave the cache once each, forward and backward.
#include "cpu/stitch.h"

namespace snk::cpu::SNK_ISA {

Status stitch_layer_norm_forward(const StitchLayerNormForward& p) {
  static thread_local Scratch bias_scratch, norm_weight_scratch, norm_bias_scratch;
  const float *bias, *norm_weight, *norm_bias;
  if (!read_vector(p.stitch.bias, bias_scratch, &bias) ||
      !read_vector(p.norm_weight, norm_weight_scratch, &norm_weight) ||
      !read_vector(p.norm_bias, norm_bias_scratch, &norm_bias))
    return Status::out_of_memory;
  const int64_t N = p.stitch.y.cols;
  float* mean = static_cast<float*>(p.mean.data);
  float* rstd = static_cast<float*>(p.rstd.data);
  return stitch_rows(p.stitch, [&](int64_t row, float* y) {
    if (bias != nullptr)
      for (int64_t j = 0; j < N; ++j) y[j] += bias[j];
    // LN of the y that is returned, or the backward, which starts from it, would not fit.
    write_row_rounding(p.stitch.y, row, y);
    const RowStatistics statistics = row_statistics(y, N, p.eps);
    mean[row] = statistics.mean;
    rstd[row] = statistics.rstd;
    normalize_row(y, N, statistics, norm_weight, norm_bias);
    write_row(p.normed, row, y);
  });
}

Status stitch_layer_norm_backward(const StitchLayerNormBackward& p) {
  static thread_local Scratch norm_weight_scratch, sums, rows, total;
  const float* norm_weight;
  if (!read_vector(p.norm_weight, norm_weight_scratch, &norm_weight)) return Status::out_of_memory;
  const int64_t M = p.y.rows, N = p.y.cols;
  const float* mean = static_cast<const float*>(p.mean.data);
  const float* rstd = static_cast<const float*>(p.rstd.data);

  // Per block: sums of d(norm weight), d(norm bias) and d(bias), and two rows to work in.
  float* partial = sums.take(ROW_BLOCKS * 3 * N);
  float* work = rows.take(ROW_BLOCKS * 2 * N);
  float* grad_y = total.take(M * N);
  if ((partial == nullptr || work == nullptr || grad_y == nullptr) && M * N > 0)
    return Status::out_of_memory;
  std::memset(partial, 0, ROW_BLOCKS * 3 * N * sizeof(float));
  for_row_blocks(M, p.stitch.threads, [&](int64_t row, int64_t block) {
    float *y = work + block * 2 * N, *g = y + N, *d = grad_y + row * N;
    float *sum_weight = partial + block * 3 * N, *sum_norm_bias = sum_weight + N,
          *sum_bias = sum_norm_bias + N;
    read_row(p.y, row, y);
    read_row(p.grad_normed, row, g);
    normalize_row_backward(y, g, N, {mean[row], rstd[row]}, norm_weight, d);
    for (int64_t j = 0; j < N; ++j) sum_weight[j] += g[j] * y[j];
    for (int64_t j = 0; j < N; ++j) sum_norm_bias[j] += g[j];
    if (p.stitch.grad_y) {
      read_row(p.stitch.grad_y, row, g);
      for (int64_t j = 0; j < N; ++j) d[j] += g[j];
    }
    for (int64_t j = 0; j < N; ++j) sum_bias[j] += d[j];
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
