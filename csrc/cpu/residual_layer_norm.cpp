// sum = h + γ · s · branch and LN(sum), in one pass over memory, forward and backward.
#include "cpu/rows.h"

namespace snk::cpu::SNK_ISA {
namespace {

// Values of `drop_path_scale` by row.
class RowScale {
 public:
  RowScale(const View& scale, int64_t rows_per_scale) : scale_(scale), rows_(rows_per_scale) {}
  float at(int64_t row) const {
    if (!scale_) return 1.0f;
    float value = 1.0f;
    with_type(scale_.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      value = to_float(static_cast<const T*>(scale_.data)[row / rows_ * scale_.col_stride]);
    });
    return value;
  }

 private:
  const View& scale_;
  int64_t rows_;
};

}  // namespace

Status residual_layer_norm_forward(const ResidualLayerNormForward& p) {
  static thread_local Scratch scale_scratch, weight_scratch, bias_scratch, rooms;
  const int64_t M = p.h.rows, N = p.h.cols;
  const float* layer_scale = vector_or(p.layer_scale, 1.0f, N, scale_scratch);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, weight_scratch);
  const float* norm_bias = vector_or(p.norm_bias, 0.0f, N, bias_scratch);
  float* room = rooms.take(p.threads * 4 * N + 1);
  if (layer_scale == nullptr || norm_weight == nullptr || norm_bias == nullptr || room == nullptr)
    return Status::out_of_memory;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  float* mean = static_cast<float*>(p.mean.data);
  float* rstd = static_cast<float*>(p.rstd.data);
#pragma omp parallel for num_threads(p.threads)
  for (int thread = 0; thread < p.threads; ++thread) {
    float *room_h = room + thread * 4 * N, *room_branch = room_h + N, *room_sum = room_branch + N,
          *room_normed = room_sum + N;
    const int64_t height = ceil_div(M, p.threads);
    for (int64_t row = thread * height; row < smaller(M, (thread + 1) * height); ++row) {
      const float* h = row_values(p.h, row, room_h);
      const float* branch = row_values(p.branch, row, room_branch);
      float* sum = row_target(p.sum, row, room_sum);
      float* normed = row_target(p.normed, row, room_normed);
      const float s = row_scale.at(row);
      Sum total;
      for_values(N, [&](auto v, int64_t j, int chain) {
        using V = decltype(v);
        const V value = get<V>(h + j) + s * get<V>(layer_scale + j) * get<V>(branch + j);
        put(sum + j, value);
        total.add(value, chain);
        // The next row comes while this one is worked on; past the last one nothing happens.
        __builtin_prefetch(h + j + N);
        __builtin_prefetch(branch + j + N);
        __builtin_prefetch(sum + j + N, 1);
        __builtin_prefetch(normed + j, 1);
      });
      finish_row(p.sum, row, sum);
      const RowStatistics statistics = row_statistics(sum, N, total.total(), p.eps);
      mean[row] = statistics.mean;
      rstd[row] = statistics.rstd;
      normalize_row(sum, N, statistics, norm_weight, norm_bias, normed);
      finish_row(p.normed, row, normed);
    }
  }
  return Status::ok;
}

Status residual_layer_norm_backward(const ResidualLayerNormBackward& p) {
  static thread_local Scratch scale_scratch, weight_scratch, sums, rooms;
  const int64_t M = p.sum.rows, N = p.sum.cols;
  const float* layer_scale = vector_or(p.layer_scale, 1.0f, N, scale_scratch);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, weight_scratch);
  float* partial = sums.take(block_sums_size(M, 3 * N) + 1);
  float* room = rooms.take(ROW_BLOCKS * 4 * N + 1);
  if (layer_scale == nullptr || norm_weight == nullptr || partial == nullptr || room == nullptr)
    return Status::out_of_memory;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  const float* mean = static_cast<const float*>(p.mean.data);
  const float* rstd = static_cast<const float*>(p.rstd.data);
  for_row_blocks(M, 3 * N, p.threads, partial,
                 [&](int64_t row, int64_t block, float* sum_weight) {
    float *sum_bias = sum_weight + N, *sum_scale = sum_bias + N;
    float *room_in = room + block * 4 * N, *room_g = room_in + N, *room_h = room_g + N,
          *room_branch = room_h + N;
    // The gradient of h is that of the sum, so it is where the parts meet.
    float* d = p.grad_h ? row_target(p.grad_h, row, room_h) : room_h;
    if (p.grad_normed)
      normalize_row_backward(row_values(p.sum, row, room_in), row_values(p.grad_normed, row, room_g),
                             N, {mean[row], rstd[row]}, norm_weight, d, sum_weight, sum_bias);
    else
      std::memset(d, 0, N * sizeof(float));
    const float* direct = p.grad_sum ? row_values(p.grad_sum, row, room_g) : nullptr;
    const float* branch = p.grad_layer_scale ? row_values(p.branch, row, room_in) : nullptr;
    float* grad_branch = p.grad_branch ? row_target(p.grad_branch, row, room_branch) : nullptr;
    const float s = row_scale.at(row);
    for_values(N, [&](auto v, int64_t j, int) {
      using V = decltype(v);
      V total = get<V>(d + j);
      if (direct != nullptr) total += get<V>(direct + j);
      put(d + j, total);
      if (branch != nullptr)
        put(sum_scale + j, V(get<V>(sum_scale + j) + s * get<V>(branch + j) * total));
      if (grad_branch != nullptr) put(grad_branch + j, V(s * get<V>(layer_scale + j) * total));
    });
    if (p.grad_branch) finish_row(p.grad_branch, row, grad_branch);
    if (p.grad_h) finish_row(p.grad_h, row, d);
  });
  write_block_sums(partial, M, 3 * N, 0, p.grad_norm_weight);
  write_block_sums(partial, M, 3 * N, N, p.grad_norm_bias);
  write_block_sums(partial, M, 3 * N, 2 * N, p.grad_layer_scale);
  return Status::ok;
}

}  // namespace snk::cpu::SNK_ISA
