// sum = h + γ · s · branch and LN(sum), in one pass over memory, forward and backward.
#include "cpu/norms.h"

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

// The vectors of an op, in fp32, and a row of zeros.
struct Vectors {
  const float *layer_scale, *norm_weight, *norm_bias, *zeros;
};

constexpr int FORWARD_ROOM = 3, BACKWARD_ROOM = 6;  // rows of room

void forward_rows(const ResidualLayerNormForward& p, const NormedOutput& out, const Vectors& vectors,
                  int64_t first, int64_t last, float* room) {
  const int64_t N = p.h.cols;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  const float* gamma = vectors.layer_scale;
  for (int64_t row = first; row < last; ++row) {
    const float* h = row_values(p.h, row, room);
    const float* branch = row_values(p.branch, row, room + N);
    const float scale = row_scale.at(row);
    out.write(
        row, N, vectors.norm_weight, vectors.norm_bias, room + 2 * N,
        [&](auto v, int64_t j) {
          using V = decltype(v);
          return V(get<V>(h + j) + scale * get<V>(gamma + j) * get<V>(branch + j));
        },
        [&](int64_t j) {
          fetch_ahead(h + j, N);
          fetch_ahead(branch + j, N);
        });
  }
}

void backward_rows(const ResidualLayerNormBackward& p, const Target& grad_h,
                   const Target& grad_branch, const Vectors& vectors, int64_t first, int64_t last,
                   float* sums, float* room) {
  const int64_t N = p.sum.cols;
  const RowScale row_scale(p.drop_path_scale, p.rows_per_scale);
  const float *gamma = vectors.layer_scale, *mean = static_cast<const float*>(p.mean.data),
              *rstd = static_cast<const float*>(p.rstd.data);
  float *sum_weight = sums, *sum_bias = sums + N, *sum_scale = sums + 2 * N;
  // Where LN(sum) was not used, the sum does not matter either, not even where it is infinite.
  const bool normed = bool(p.grad_normed);
  const View sum = normed ? p.sum : View(), scaled_branch = p.grad_layer_scale ? p.branch : View();
  for (int64_t row = first; row < last; ++row) {
    const Place to_h = grad_h.place(row, room + 4 * N);
    const Place to_branch = grad_branch.place(row, room + 5 * N);
    const float scale = row_scale.at(row);
    const float* branch = values_or(scaled_branch, row, room + 3 * N, vectors.zeros);
    const NormedRow values{values_or(sum, row, room, vectors.zeros),
                           values_or(p.grad_normed, row, room + N, vectors.zeros),
                           values_or(p.grad_sum, row, room + 2 * N, vectors.zeros),
                           branch,
                           to_h.near,
                           normed ? RowStatistics{mean[row], rstd[row]} : RowStatistics{0, 0}};
    // The gradient of h is that of the sum.
    normalize_backward(values, N, normed ? vectors.norm_weight : vectors.zeros, sum_weight, sum_bias,
                       [&](auto v, auto total, int64_t j) {
                         using V = decltype(v);
                         const V scaled = scale * total;
                         put(sum_scale + j, V(get<V>(sum_scale + j) + scaled * get<V>(branch + j)));
                         to_h.last(j, total);
                         to_branch.last(j, V(scaled * get<V>(gamma + j)));
                       });
    grad_h.end(row, to_h);
    grad_branch.end(row, to_branch);
  }
}

}  // namespace

Status residual_layer_norm_forward(const ResidualLayerNormForward& p) {
  static thread_local Scratch scratch;
  const int64_t M = p.h.rows, N = p.h.cols;
  const int threads = threads_for(M, N, p.threads);
  const int64_t room = FORWARD_ROOM * N;
  const int64_t sizes[] = {N, N, N, Shares::room(threads), threads * room};
  Parts parts(scratch, sizes);
  if (!parts) return Status::out_of_memory;
  const Vectors vectors{read_or(p.layer_scale, 1.0f, N, parts.take()),
                        read_or(p.norm_weight, 1.0f, N, parts.take()),
                        read_or(p.norm_bias, 0.0f, N, parts.take()), nullptr};
  float *counters = parts.take(), *rooms = parts.take();
  const bool large = past_caches(4 * M * N);
  const NormedOutput out{Target(p.sum, large), Target(p.normed, large),
                         static_cast<float*>(p.mean.data), static_cast<float*>(p.rstd.data), p.eps};
  const int64_t step = smaller(2 * ROWS_AT_ONCE, M / threads + 1);
  const Shares shares(M, step, threads, counters);
#pragma omp parallel for num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    shares.work(thread, [&](int64_t first, int64_t last) {
      forward_rows(p, out, vectors, first, last, rooms + thread * room);
    });
    stream_fence();
  }
  return Status::ok;
}

Status residual_layer_norm_backward(const ResidualLayerNormBackward& p) {
  static thread_local Scratch scratch;
  const int64_t M = p.sum.rows, N = p.sum.cols;
  const int threads = threads_for(M, N, p.threads);
  const int64_t room = BACKWARD_ROOM * N;
  const int64_t sizes[] = {N, N, N, block_sums_size(M, 3 * N), Shares::room(threads),
                           threads * room};
  Parts parts(scratch, sizes);
  if (!parts) return Status::out_of_memory;
  const Vectors vectors{read_or(p.layer_scale, 1.0f, N, parts.take()),
                        read_or(p.norm_weight, 1.0f, N, parts.take()), nullptr,
                        read_or(View(), 0.0f, N, parts.take())};
  float *partial = parts.take(), *counters = parts.take(), *rooms = parts.take();
  const bool large = past_caches(6 * M * N);
  const Target grad_h(p.grad_h, large), grad_branch(p.grad_branch, large);
  const Shares shares(row_blocks(M), 1, threads, counters);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int thread = 0; thread < threads; ++thread) {
      shares.work(thread, [&](int64_t block, int64_t) {
        sum_rows_of_block(block, M, 3 * N, partial, [&](int64_t first, int64_t last, float* to) {
          backward_rows(p, grad_h, grad_branch, vectors, first, last, to,
                        rooms + thread * room);
        });
      });
      stream_fence();
    }
#pragma omp for
    for (int thread = 0; thread < threads; ++thread) {
      write_block_sums(partial, M, 3 * N, 0, p.grad_norm_weight, thread, threads);
      write_block_sums(partial, M, 3 * N, N, p.grad_norm_bias, thread, threads);
      write_block_sums(partial, M, 3 * N, 2 * N, p.grad_layer_scale, thread, threads);
    }
  }
  return Status::ok;
}

}  // namespace snk::cpu::SNK_ISA
