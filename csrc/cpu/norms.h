// LayerNorm of rows that an op makes, forward and backward. Each row is finished before the next is
// begun: two at a time would hide a sum's latency, but the streams of reads that they make of every
// matrix are more than the CPU fetches ahead, and a pass over memory takes up to half as long again.
#pragma once

#include "cpu/rows.h"

namespace snk::cpu::SNK_ISA {

// Brings to the L2 cache what lies four rows of n further on: a row to come where rows are n apart.
// Past the last one, and of rows that lie elsewhere, it brings what nobody needs, and nothing breaks.
inline void fetch_ahead(const float* value, int64_t n) {
  constexpr int ROWS_AHEAD = 4;
  __builtin_prefetch(value + ROWS_AHEAD * n, 0, TO_L2);
}

struct RowStatistics {
  float mean, rstd;
};

// Statistics of a row whose values sum to about `total`, in a second pass over it: E[x²] − E[x]²
// would lose everything when the mean is large. The first mean is off by the rounding of a sum n
// times as large as a value; what is left about it is small, and corrects mean and variance.
inline RowStatistics row_statistics(const float* y, int64_t n, const Sum& total, float eps) {
  const float guess = total.total() / n;
  Sum deviations, squares;
  for_values(n, [&](auto v, int64_t j, auto chain) {
    const auto d = get<decltype(v)>(y + j) - guess;
    deviations.add(d, chain);
    squares.add(d * d, chain);
  });
  const float off = deviations.total() / n;
  const float variance = squares.total() / n - off * off;  // may be NaN, and stays it
  return {guess + off, 1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps)};
}

// y of an op, LN(y) if it is there, and its statistics if somebody wants them.
struct NormedOutput {
  const Target y, normed;
  float *const mean, *const rstd;
  const float eps;

  // Writes a row whose values are value(V(), j); `room` is for it while it is worked on, and fetch(j)
  // is called while there is time to fetch what rows to come are made of. LN is of the y that is
  // returned, or the backward, which starts from it, would not fit.
  template <typename Value, typename Fetch>
  void write(int64_t row, int64_t n, const float* weight, const float* bias, float* room,
             Value value, Fetch fetch) const {
    const Place to_y = y.place(row, room);
    Sum total;
    for_values(n, [&](auto v, int64_t j, auto chain) {
      const auto values = value(v, j);
      to_y.keep(j, values);
      total.add(values, chain);
    });
    y.round(row, to_y);
    if (!normed) return;
    const float* values = to_y.near;
    const RowStatistics statistics = row_statistics(values, n, total, eps);
    if (mean != nullptr) {
      mean[row] = statistics.mean;
      rstd[row] = statistics.rstd;
    }
    const Place to_normed = normed.place(row, room);
    for_values(n, [&](auto v, int64_t j, auto) {
      using V = decltype(v);
      fetch(j);
      const V normalized = (get<V>(values + j) - statistics.mean) * statistics.rstd;
      to_normed.last(j, V(normalized * get<V>(weight + j) + get<V>(bias + j)));
    });
    normed.end(row, to_normed);
  }
};

// A row of the backward: y, the gradients of LN(y) and of y itself, what else `finish` reads, and room
// for the gradient of y by way of both. What is absent is a row of zeros, so that all rows are worked
// on alike.
struct NormedRow {
  const float *y, *grad_normed, *grad_y, *other;
  float* grad;
  RowStatistics statistics;
};

// Gives finish(total, j), where total are values of the gradient of y, and adds to the sums that
// become the gradients of LN's weight and bias.
template <typename Finish>
inline void normalize_backward(const NormedRow& row, int64_t n, const float* weight,
                               float* sum_weight, float* sum_bias, Finish finish) {
  const float mean_of_y = row.statistics.mean, rstd = row.statistics.rstd;
  Sum weighted, weighted_deviation;
  for_values(n, [&](auto v, int64_t j, auto chain) {
    using V = decltype(v);
    const V inner = get<V>(row.grad_normed + j) * get<V>(weight + j);
    put(row.grad + j, inner);  // rounded: of a single value the mean takes away all
    weighted.add(inner, chain);
    weighted_deviation.add(inner * (get<V>(row.y + j) - mean_of_y), chain);
  });
  const float mean = weighted.total() / n;
  const float slope = weighted_deviation.total() * rstd / n;
  for_values(n, [&](auto v, int64_t j, auto) {
    using V = decltype(v);
    fetch_ahead(row.y + j, n);
    fetch_ahead(row.grad_normed + j, n);
    fetch_ahead(row.grad_y + j, n);
    fetch_ahead(row.other + j, n);
    const V upper = get<V>(row.grad_normed + j);
    const V normalized = (get<V>(row.y + j) - mean_of_y) * rstd;
    put(sum_weight + j, V(get<V>(sum_weight + j) + upper * normalized));
    put(sum_bias + j, V(get<V>(sum_bias + j) + upper));
    finish(v,
           V(rstd * (get<V>(row.grad + j) - mean - normalized * slope) + get<V>(row.grad_y + j)),
           j);
  });
}

}  // namespace snk::cpu::SNK_ISA
