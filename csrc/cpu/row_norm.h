// LayerNorm of one fp32 row, forward and backward: two passes, as E[x²] − E[x]² loses everything
// when a row's mean is large.
#pragma once

#include "cpu/vec.h"

namespace snk::cpu::SNK_ISA {

// Sum of f(j) for j in [0, n), where f takes an index and returns a vector or one float.
template <typename VectorTerm, typename Term>
inline float sum_over(int64_t n, VectorTerm vector_term, Term term) {
  vec total = {};
  int64_t j = 0;
  for (; j + VL <= n; j += VL) total += vector_term(j);
  float result = sum(total);
  for (; j < n; ++j) result += term(j);
  return result;
}

struct RowStatistics {
  float mean, rstd;
};

inline RowStatistics row_statistics(const float* y, int64_t n, float eps) {
  const float guess =
      sum_over(n, [&](int64_t j) { return load(y + j); }, [&](int64_t j) { return y[j]; }) / n;
  // The guess is off by the rounding of a sum n times as large as a value. What is left about it
  // is small, and corrects both.
  const float off = sum_over(n, [&](int64_t j) { return load(y + j) - guess; },
                             [&](int64_t j) { return y[j] - guess; }) /
                    n;
  const float mean = guess + off;
  const float variance = sum_over(
                             n,
                             [&](int64_t j) {
                               const vec d = load(y + j) - mean;
                               return d * d;
                             },
                             [&](int64_t j) { return (y[j] - mean) * (y[j] - mean); }) /
                         n;
  return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// y = LN(y) in place; weight and bias may be null.
inline void normalize_row(float* y, int64_t n, RowStatistics s, const float* weight,
                          const float* bias) {
  for (int64_t j = 0; j < n; ++j) y[j] = (y[j] - s.mean) * s.rstd;
  if (weight != nullptr)
    for (int64_t j = 0; j < n; ++j) y[j] *= weight[j];
  if (bias != nullptr)
    for (int64_t j = 0; j < n; ++j) y[j] += bias[j];
}

// Given y and the gradient g of LN(y): y becomes the normalised row x̂, and g becomes the gradient
// of y by way of LN. `weighted`, n floats of room, holds g · weight meanwhile.
inline void normalize_row_backward(float* y, const float* g, int64_t n, RowStatistics s,
                                   const float* weight, float* weighted) {
  for (int64_t j = 0; j < n; ++j) y[j] = (y[j] - s.mean) * s.rstd;
  for (int64_t j = 0; j < n; ++j) weighted[j] = weight != nullptr ? g[j] * weight[j] : g[j];
  const float mean_g = sum_over(n, [&](int64_t j) { return load(weighted + j); },
                                [&](int64_t j) { return weighted[j]; }) /
                       n;
  const float mean_gx = sum_over(n, [&](int64_t j) { return load(weighted + j) * load(y + j); },
                                 [&](int64_t j) { return weighted[j] * y[j]; }) /
                        n;
  for (int64_t j = 0; j < n; ++j)
    weighted[j] = s.rstd * (weighted[j] - mean_g - y[j] * mean_gx);
}

}  // namespace snk::cpu::SNK_ISA
