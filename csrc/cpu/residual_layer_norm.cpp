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

// Threads for so much work: waking the others takes as long as some thousand values.
inline int threads_for(int64_t rows, int64_t cols, int most) {
  return rows * cols < 1 << 14 ? 1 : most;
}

// A row of the backward. What is absent is a row of zeros, what is not wanted goes to a row of
// room, so that all rows are worked on alike.
struct BackwardRow {
  const float *y, *grad_normed, *grad_sum, *branch;
  float *grad_h, *grad_branch;
  float scale;
  RowStatistics statistics;
};

// The vectors of the backward: LN's weight and γ, and the sums that become their gradients.
struct BackwardVectors {
  const float *norm_weight, *layer_scale;
  float *sum_weight, *sum_bias, *sum_scale;
};

// The sums are read and written for every row that adds to them, so ROWS rows add at a time.
template <int ROWS>
inline void backward_rows(const BackwardRow (&rows)[ROWS], int64_t n, const BackwardVectors& to) {
  float mean[ROWS], slope[ROWS];
  for (int i = 0; i < ROWS; ++i) {
    const BackwardRow& row = rows[i];
    Sum weighted, weighted_deviation;
    for_values(n, [&](auto v, int64_t j, int chain) {
      using V = decltype(v);
      const V inner = get<V>(row.grad_normed + j) * get<V>(to.norm_weight + j);
      put(row.grad_h + j, inner);  // rounded: of a single value the mean takes away all
      weighted.add(inner, chain);
      weighted_deviation.add(V(inner * (get<V>(row.y + j) - row.statistics.mean)), chain);
    });
    mean[i] = weighted.total() / n;
    slope[i] = weighted_deviation.total() * row.statistics.rstd / n;
  }
  for_values(n, [&](auto v, int64_t j, int) {
    using V = decltype(v);
    const V gamma = get<V>(to.layer_scale + j);
    V sum_weight = get<V>(to.sum_weight + j), sum_bias = get<V>(to.sum_bias + j),
      sum_scale = get<V>(to.sum_scale + j);
#pragma GCC unroll 2
    for (int i = 0; i < ROWS; ++i) {
      const BackwardRow& row = rows[i];
      const float rstd = row.statistics.rstd;
      const V upper = get<V>(row.grad_normed + j);
      const V normalized = (get<V>(row.y + j) - row.statistics.mean) * rstd;
      // The gradient of h is that of the sum, so it is where the parts meet.
      const V through_norm = rstd * (get<V>(row.grad_h + j) - mean[i] - normalized * slope[i]);
      const V total = through_norm + get<V>(row.grad_sum + j);
      const V scaled = row.scale * total;
      sum_weight += upper * normalized;
      sum_bias += upper;
      sum_scale += scaled * get<V>(row.branch + j);
      put(row.grad_h + j, total);
      put(row.grad_branch + j, V(scaled * gamma));
    }
    put(to.sum_weight + j, sum_weight);
    put(to.sum_bias + j, sum_bias);
    put(to.sum_scale + j, sum_scale);
  });
}

}  // namespace

Status residual_layer_norm_forward(const ResidualLayerNormForward& p) {
  static thread_local Scratch scale_scratch, weight_scratch, bias_scratch, rooms;
  const int64_t M = p.h.rows, N = p.h.cols;
  const int threads = threads_for(M, N, p.threads);
  const float* layer_scale = vector_or(p.layer_scale, 1.0f, N, scale_scratch);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, weight_scratch);
  const float* norm_bias = vector_or(p.norm_bias, 0.0f, N, bias_scratch);
  float* room = rooms.take(threads * 4 * N + 1);
  if (layer_scale == nullptr || norm_weight == nullptr || norm_bias == nullptr || room == nullptr)
    return Status::out_of_memory;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  float* mean = static_cast<float*>(p.mean.data);
  float* rstd = static_cast<float*>(p.rstd.data);
  const bool large = past_caches(M, N);
  const Target sum_rows(p.sum, large), normed_rows(p.normed, large);
#pragma omp parallel for num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    float *room_h = room + thread * 4 * N, *room_branch = room_h + N, *room_sum = room_branch + N,
          *room_normed = room_sum + N;
    const int64_t height = ceil_div(M, threads);
    for (int64_t row = thread * height; row < smaller(M, (thread + 1) * height); ++row) {
      const float* h = row_values(p.h, row, room_h);
      const float* branch = row_values(p.branch, row, room_branch);
      float* sum = sum_rows.row(row, room_sum);
      float* normed = normed_rows.row(row, room_normed);
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
      });
      sum_rows.finish(row, sum);
      const RowStatistics statistics = row_statistics(sum, N, total.total(), p.eps);
      mean[row] = statistics.mean;
      rstd[row] = statistics.rstd;
      normalize_row(sum, N, statistics, norm_weight, norm_bias, normed);
      normed_rows.finish(row, normed);
    }
    stream_fence();
  }
  return Status::ok;
}

Status residual_layer_norm_backward(const ResidualLayerNormBackward& p) {
  static thread_local Scratch scale_scratch, weight_scratch, zero_scratch, sums, rooms;
  constexpr int ROWS = 2, ROOMS = 6 * ROWS;
  const int64_t M = p.sum.rows, N = p.sum.cols;
  const int threads = threads_for(M, N, p.threads);
  const float* layer_scale = vector_or(p.layer_scale, 1.0f, N, scale_scratch);
  const float* norm_weight = vector_or(p.norm_weight, 1.0f, N, weight_scratch);
  const float* zeros = vector_or(View(), 0.0f, N, zero_scratch);
  float* partial = sums.take(block_sums_size(M, 3 * N));
  float* room = rooms.take(threads * ROOMS * N);
  if (layer_scale == nullptr || norm_weight == nullptr || zeros == nullptr || partial == nullptr ||
      room == nullptr)
    return Status::out_of_memory;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  const float* mean = static_cast<const float*>(p.mean.data);
  const float* rstd = static_cast<const float*>(p.rstd.data);
  const bool large = past_caches(M, N);
  const Target grad_h(p.grad_h, large), grad_branch(p.grad_branch, large);
  const auto row_at = [&](int64_t row, float* own) {
    const auto values = [&](const View& view, int which) {
      return view ? row_values(view, row, own + which * N) : zeros;
    };
    // Where LN(sum) was not used, the sum does not matter either, not even where it is infinite.
    const bool normed = bool(p.grad_normed);
    return BackwardRow{
        normed ? values(p.sum, 0) : zeros,
        values(p.grad_normed, 1),
        values(p.grad_sum, 2),
        p.grad_layer_scale ? values(p.branch, 3) : zeros,
        grad_h.row(row, own + 4 * N),
        grad_branch.row(row, own + 5 * N),
        row_scale.at(row),
        normed ? RowStatistics{mean[row], rstd[row]} : RowStatistics{0, 0},
    };
  };
  const auto finish = [&](int64_t row, const BackwardRow& values) {
    grad_h.finish(row, values.grad_h);
    grad_branch.finish(row, values.grad_branch);
  };
  const int64_t blocks = row_blocks(M), share = ceil_div(blocks, threads);
#pragma omp parallel for num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    float *own = room + thread * ROOMS * N, *next = own + ROOMS / 2 * N;
    for (int64_t block = thread * share; block < smaller(blocks, (thread + 1) * share); ++block)
      sum_rows_of_block(block, M, 3 * N, partial, [&](int64_t row, int64_t end, float* to) {
        const BackwardVectors vectors{norm_weight, layer_scale, to, to + N, to + 2 * N};
        for (; row + ROWS <= end; row += ROWS) {
          const BackwardRow rows[ROWS] = {row_at(row, own), row_at(row + 1, next)};
          backward_rows(rows, N, vectors);
          finish(row, rows[0]);
          finish(row + 1, rows[1]);
        }
        if (row < end) {
          const BackwardRow rows[1] = {row_at(row, own)};
          backward_rows(rows, N, vectors);
          finish(row, rows[0]);
        }
      });
    stream_fence();
  }
  write_block_sums(partial, M, 3 * N, 0, p.grad_norm_weight);
  write_block_sums(partial, M, 3 * N, N, p.grad_norm_bias);
  write_block_sums(partial, M, 3 * N, 2 * N, p.grad_layer_scale);
  return Status::ok;
}

}  // namespace snk::cpu::SNK_ISA
