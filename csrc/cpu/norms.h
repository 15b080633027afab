// LayerNorm of rows that an op makes, forward and backward. ROWS of them go together: what differs
// by column only is read once for all, and where one row waits for its sums another is worked on.
#pragma once

#include "cpu/rows.h"

namespace snk::cpu::SNK_ISA {

constexpr int ROWS = 2;

// some(row, std::integral_constant) for the rows [first, last), ROWS at a time and then one by one.
template <typename Some>
inline void for_rows(int64_t first, int64_t last, Some some) {
  for (; first + ROWS <= last; first += ROWS) some(first, std::integral_constant<int, ROWS>());
  for (; first < last; ++first) some(first, std::integral_constant<int, 1>());
}

struct RowStatistics {
  float mean, rstd;
};

// Statistics of rows whose values sum to about `total`, in a second pass over them: E[x²] − E[x]²
// would lose everything when the mean is large. The first mean is off by the rounding of a sum n
// times as large as a value; what is left about it is small, and corrects mean and variance.
template <int R>
inline void row_statistics(const float* const (&y)[R], int64_t n, const Sum (&total)[R], float eps,
                           RowStatistics (&statistics)[R]) {
  float guess[R];
  each<R>([&](auto i) { guess[i] = total[i].total() / n; });
  Sum deviations[R], squares[R];
  for_values(n, [&](auto v, int64_t j, auto chain) {
    each<R>([&](auto i) {
      const auto d = get<decltype(v)>(y[i] + j) - guess[i];
      deviations[i].add(d, chain);
      squares[i].add(d * d, chain);
    });
  });
  each<R>([&](auto i) {
    const float off = deviations[i].total() / n;
    const float variance = squares[i].total() / n - off * off;  // may be NaN, and stays it
    statistics[i] = {guess[i] + off,
                     1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps)};
  });
}

// y of an op, and LN(y) with its statistics if it is there.
struct NormedOutput {
  const Target y, normed;
  float *const mean, *const rstd;
  const float eps;

  // Writes R rows from `row` on, whose values are value(V(), i, j); room[i] is for row i while it is
  // worked on. LN is of the y that is returned, or the backward, which starts from it, would not fit.
  template <int R, typename Value>
  void write(int64_t row, int64_t n, const float* weight, const float* bias,
             float* const (&room)[R], Value value) const {
    Place place[R];
    each<R>([&](auto i) { place[i] = y.place(row + i, room[i]); });
    Sum total[R];
    for_values(n, [&](auto v, int64_t j, auto chain) {
      each<R>([&](auto i) {
        const auto values = value(v, i, j);
        place[i].keep(j, values);
        total[i].add(values, chain);
      });
    });
    each<R>([&](auto i) { y.round(row + i, place[i]); });
    if (!normed) return;
    RowStatistics statistics[R];
    const float* rows[R];
    each<R>([&](auto i) { rows[i] = place[i].near; });
    row_statistics(rows, n, total, eps, statistics);
    each<R>([&](auto i) {
      mean[row + i] = statistics[i].mean;
      rstd[row + i] = statistics[i].rstd;
      place[i] = normed.place(row + i, room[i]);
    });
    for_values(n, [&](auto v, int64_t j, auto) {
      using V = decltype(v);
      const V w = get<V>(weight + j), b = get<V>(bias + j);
      each<R>([&](auto i) {
        const V d = get<V>(rows[i] + j) - statistics[i].mean;
        place[i].last(j, V(d * statistics[i].rstd * w + b));
      });
    });
    each<R>([&](auto i) { normed.end(row + i, place[i]); });
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

// Gives finish(total, j), where total[i] are values of the gradient of y of row i, and adds to the
// sums that become the gradients of LN's weight and bias. R rows at a time, as the sums are read and
// written each time. What is read next comes meanwhile; past the last row nothing happens.
template <int R, typename Finish>
inline void normalize_backward(const NormedRow (&rows)[R], int64_t n, const float* weight,
                               float* sum_weight, float* sum_bias, Finish finish) {
  Sum weighted[R], weighted_deviation[R];
  for_values(n, [&](auto v, int64_t j, auto chain) {
    using V = decltype(v);
    const V w = get<V>(weight + j);
    each<R>([&](auto i) {
      __builtin_prefetch(rows[i].grad_y + j);
      __builtin_prefetch(rows[i].other + j);
      const V inner = get<V>(rows[i].grad_normed + j) * w;
      put(rows[i].grad + j, inner);  // rounded: of a single value the mean takes away all
      weighted[i].add(inner, chain);
      weighted_deviation[i].add(inner * (get<V>(rows[i].y + j) - rows[i].statistics.mean), chain);
    });
  });
  float mean[R], slope[R];
  each<R>([&](auto i) {
    mean[i] = weighted[i].total() / n;
    slope[i] = weighted_deviation[i].total() * rows[i].statistics.rstd / n;
  });
  for_values(n, [&](auto v, int64_t j, auto) {
    using V = decltype(v);
    V to_weight = get<V>(sum_weight + j), to_bias = get<V>(sum_bias + j), total[R];
    each<R>([&](auto i) {
      __builtin_prefetch(rows[i].y + j + R * n);
      __builtin_prefetch(rows[i].grad_normed + j + R * n);
      const float rstd = rows[i].statistics.rstd;
      const V upper = get<V>(rows[i].grad_normed + j);
      const V normalized = (get<V>(rows[i].y + j) - rows[i].statistics.mean) * rstd;
      to_weight += upper * normalized;
      to_bias += upper;
      total[i] = rstd * (get<V>(rows[i].grad + j) - mean[i] - normalized * slope[i]) +
                 get<V>(rows[i].grad_y + j);
    });
    put(sum_weight + j, to_weight);
    put(sum_bias + j, to_bias);
    finish(v, total, j);
  });
}

}  // namespace snk::cpu::SNK_ISA
