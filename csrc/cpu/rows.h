// What ops do row by row: read and write rows and vectors, normalise them, sum over them.
#pragma once

#include "cpu/vec.h"

namespace snk::cpu::SNK_ISA {

// A vector argument in fp32, every value `fallback` where it was not given; null without memory.
inline const float* vector_or(const View& view, float fallback, int64_t n, Scratch& scratch) {
  float* values = scratch.take(n + 1);  // + 1, as an empty vector must not look like no memory
  if (values == nullptr) return nullptr;
  if (view)
    read_row(view, 0, values);
  else
    for (int64_t j = 0; j < n; ++j) values[j] = fallback;
  return values;
}

// A row in fp32: where it lies if that is what it is, otherwise read into `room`.
inline const float* row_values(const View& view, int64_t row, float* room) {
  if (view.dtype == DType::f32 && view.col_stride == 1)
    return static_cast<const float*>(view.data) + row * view.row_stride;
  read_row(view, row, room);
  return room;
}

// Where to compute a row of an output: in place if it is fp32, otherwise in `room`, from where
// write_row_rounding must take it.
inline float* row_target(const View& view, int64_t row, float* room) {
  if (view.dtype == DType::f32 && view.col_stride == 1)
    return static_cast<float*>(view.data) + row * view.row_stride;
  return room;
}
inline void finish_row(const View& view, int64_t row, float* values) {
  if (!(view.dtype == DType::f32 && view.col_stride == 1)) write_row_rounding(view, row, values);
}

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

// LayerNorm takes two passes, as E[x²] − E[x]² loses everything when a row's mean is large.
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

// out = LN(y); out may be y.
inline void normalize_row(const float* y, int64_t n, RowStatistics s, const float* weight,
                          const float* bias, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = (y[j] - s.mean) * s.rstd * weight[j] + bias[j];
}

// Given y and the gradient g of LN(y): `normalized` becomes x̂, and `grad` the gradient of y by way
// of LN. Adds to the sums that become the gradients of LN's weight and bias.
inline void normalize_row_backward(const float* y, const float* g, int64_t n, RowStatistics s,
                                   const float* weight, float* __restrict normalized,
                                   float* __restrict grad, float* __restrict sum_weight,
                                   float* __restrict sum_bias) {
  for (int64_t j = 0; j < n; ++j) {
    normalized[j] = (y[j] - s.mean) * s.rstd;
    grad[j] = g[j] * weight[j];
    sum_weight[j] += g[j] * normalized[j];
    sum_bias[j] += g[j];
  }
  const float mean_g = sum_over(n, [&](int64_t j) { return load(grad + j); },
                                [&](int64_t j) { return grad[j]; }) /
                       n;
  const float mean_gx = sum_over(n, [&](int64_t j) { return load(grad + j) * load(normalized + j); },
                                 [&](int64_t j) { return grad[j] * normalized[j]; }) /
                        n;
  for (int64_t j = 0; j < n; ++j)
    grad[j] = s.rstd * (grad[j] - mean_g - normalized[j] * mean_gx);
}

// The sums over rows that become the gradients of vectors: rows are cut into blocks whose number
// does not depend on the threads, each block is summed in order, then the blocks are.
constexpr int64_t ROW_BLOCKS = 64;

// row(index, block, sums) for all rows, in order within a block, the blocks shared by the threads.
// `partial` holds ROW_BLOCKS times `width` sums, which start at zero.
template <typename Row>
inline void for_row_blocks(int64_t rows, int64_t width, int threads, float* partial, Row row) {
  const int64_t height = ceil_div(rows, ROW_BLOCKS);
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < ROW_BLOCKS; ++block) {
    float* sums = partial + block * width;
    std::memset(sums, 0, width * sizeof(float));
    for (int64_t i = block * height; i < smaller(rows, (block + 1) * height); ++i)
      row(i, block, sums);
  }
}

// Writes Σ over blocks of partial[block · stride + j] to the vector `out`, if it is wanted.
inline void write_block_sums(const float* partial, int64_t stride, const View& out) {
  if (!out) return;
  with_type(out.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t j = 0; j < out.cols; ++j) {
      float total = 0;
      for (int64_t block = 0; block < ROW_BLOCKS; ++block) total += partial[block * stride + j];
      static_cast<T*>(out.data)[j * out.col_stride] = from_float<T>(total);
    }
  });
}

}  // namespace snk::cpu::SNK_ISA
