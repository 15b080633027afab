// What ops do row by row: read and write rows and vectors, normalise them, sum over them.
#pragma once

#include "cpu/vec.h"

namespace snk::cpu::SNK_ISA {

// A vector argument in fp32, every value `fallback` where it was not given.
inline void read_or(const View& view, float fallback, int64_t n, float* values) {
  if (view)
    read_row(view, 0, values);
  else
    for (int64_t j = 0; j < n; ++j) values[j] = fallback;
}

// The same in scratch memory; null without memory.
inline const float* vector_or(const View& view, float fallback, int64_t n, Scratch& scratch) {
  float* values = scratch.take(n);
  if (values != nullptr) read_or(view, fallback, n, values);
  return values;
}

// Whether rows of a view can be worked on where they lie.
inline bool in_place(const View& view) { return view.dtype == DType::f32 && view.col_stride == 1; }

// A row in fp32: where it lies if that is what it is, otherwise read into `room`.
inline const float* row_values(const View& view, int64_t row, float* room) {
  if (in_place(view)) return static_cast<const float*>(view.data) + row * view.row_stride;
  read_row(view, row, room);
  return room;
}

// Whether an output has left a core's own caches by the time the next op reads it.
inline bool past_caches(int64_t rows, int64_t cols) { return rows * cols >= 1 << 18; }

// An output whose rows are computed in place or elsewhere, and then written.
class Target {
 public:
  Target(const View& view, bool large)
      : view_(view), in_place_(in_place(view)), streams_(in_place_ && large && aligned(view)) {}

  float* row(int64_t row, float* room) const {
    return view_ && in_place_ && !streams_ ? at(row) : room;
  }
  void finish(int64_t row, float* values) const {
    if (!view_) return;
    if (streams_)
      for (int64_t j = 0; j < view_.cols; j += VL) stream(at(row) + j, load(values + j));
    else if (!in_place_)
      write_row_rounding(view_, row, values);
    else if (values != at(row))
      std::memcpy(at(row), values, view_.cols * sizeof(float));
  }

 private:
  static bool aligned(const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % sizeof(vec) == 0 && view.cols % VL == 0 &&
           view.row_stride % VL == 0;
  }
  float* at(int64_t row) const { return static_cast<float*>(view_.data) + row * view_.row_stride; }

  const View& view_;
  bool in_place_, streams_;
};

// A vector or, for what is left of a row, one value.
template <typename V>
inline V get(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V>
inline void put(float* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

constexpr int CHAINS = 4;  // sums in flight, as an addition takes four cycles

// body(V(), j, chain) for the values from j on of a row of n, where V is vec or float.
template <typename Body>
inline void for_values(int64_t n, Body body) {
  int64_t j = 0;
  for (; j + CHAINS * VL <= n; j += CHAINS * VL)
#pragma GCC unroll 4
    for (int chain = 0; chain < CHAINS; ++chain) body(vec(), j + chain * VL, chain);
  for (; j + VL <= n; j += VL) body(vec(), j, 0);
  for (; j < n; ++j) body(0.0f, j, 0);
}

// A sum of what for_values hands out.
class Sum {
 public:
  void add(vec v, int chain) { lanes_[chain] += v; }
  void add(float v, int) { rest_ += v; }
  float total() const {
    const vec v = (lanes_[0] + lanes_[1]) + (lanes_[2] + lanes_[3]);
    // In halves: one lane after another takes as long as half a row of 384.
    float lanes[VL];
    std::memcpy(lanes, &v, sizeof(v));
    for (int half = VL / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return rest_ + lanes[0];
  }

 private:
  vec lanes_[CHAINS] = {};
  float rest_ = 0;
};

inline float sum_of(const float* y, int64_t n) {
  Sum sum;
  for_values(n, [&](auto v, int64_t j, int chain) { sum.add(get<decltype(v)>(y + j), chain); });
  return sum.total();
}

struct RowStatistics {
  float mean, rstd;
};

// Statistics of a row whose values sum to about `total`, in a second pass over it: E[x²] − E[x]²
// would lose everything when the mean is large. The first mean is off by the rounding of a sum n
// times as large as a value; what is left about it is small, and corrects mean and variance.
inline RowStatistics row_statistics(const float* y, int64_t n, float total, float eps) {
  const float guess = total / n;
  Sum deviations, squares;
  for_values(n, [&](auto v, int64_t j, int chain) {
    const auto d = get<decltype(v)>(y + j) - guess;
    deviations.add(d, chain);
    squares.add(d * d, chain);
  });
  const float off = deviations.total() / n;
  const float variance = squares.total() / n - off * off;
  return {guess + off, 1.0f / __builtin_sqrtf((variance > 0 ? variance : 0) + eps)};
}

// out = LN(y); out may be y.
inline void normalize_row(const float* y, int64_t n, RowStatistics s, const float* weight,
                          const float* bias, float* out) {
  for_values(n, [&](auto v, int64_t j, int) {
    using V = decltype(v);
    put(out + j, V((get<V>(y + j) - s.mean) * s.rstd * get<V>(weight + j) + get<V>(bias + j)));
  });
}

// Given y and the gradient g of LN(y): `grad` becomes the gradient of y by way of LN. Adds to the
// sums that become the gradients of LN's weight and bias.
inline void normalize_row_backward(const float* y, const float* g, int64_t n, RowStatistics s,
                                   const float* weight, float* grad, float* sum_weight,
                                   float* sum_bias) {
  Sum weighted, weighted_normalized;
  for_values(n, [&](auto v, int64_t j, int chain) {
    using V = decltype(v);
    const V upper = get<V>(g + j), normalized = (get<V>(y + j) - s.mean) * s.rstd;
    const V inner = upper * get<V>(weight + j);
    put(sum_weight + j, V(get<V>(sum_weight + j) + upper * normalized));
    put(sum_bias + j, V(get<V>(sum_bias + j) + upper));
    put(grad + j, inner);
    weighted.add(inner, chain);
    weighted_normalized.add(V(inner * normalized), chain);
  });
  const float mean = weighted.total() / n, slope = weighted_normalized.total() / n;
  for_values(n, [&](auto v, int64_t j, int) {
    using V = decltype(v);
    const V normalized = (get<V>(y + j) - s.mean) * s.rstd;
    put(grad + j, V(s.rstd * (get<V>(grad + j) - mean - normalized * slope)));
  });
}

// The sums over rows that become the gradients of vectors. Rows are cut into blocks whose number
// does not depend on the threads; a few rows at a time are summed in fp32, and such sums in fp64, so
// that the error does not grow with the number of rows.
constexpr int64_t ROW_BLOCKS = 64, ROWS_AT_ONCE = 16;

inline int64_t row_blocks(int64_t rows) {
  return smaller(ROW_BLOCKS, ceil_div(rows, ROWS_AT_ONCE));
}

// Floats that hold `width` fp64 sums for each block of rows, and behind them room to make them.
inline int64_t block_sums_size(int64_t rows, int64_t width) {
  return round_up(row_blocks(rows) * 3 * width, 2);
}
inline double* block_sums(float* partial, int64_t block, int64_t width) {
  return reinterpret_cast<double*>(partial) + block * width;
}

// some(first, last, sums) for the rows of a block, some at a time and in order, where sums are
// `width` floats to add to.
template <typename Some>
inline void sum_rows_of_block(int64_t block, int64_t rows, int64_t width, float* partial,
                              Some some) {
  const int64_t blocks = row_blocks(rows);
  const int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
  double* total = block_sums(partial, block, width);
  float* sums = partial + (2 * blocks + block) * width;
  for (int64_t i = first; i < last; i += ROWS_AT_ONCE) {
    std::memset(sums, 0, width * sizeof(float));
    some(i, smaller(i + ROWS_AT_ONCE, last), sums);
    for (int64_t j = 0; j < width; ++j) total[j] = (i > first ? total[j] : 0.0) + sums[j];
  }
}

// row(index, sums) for the rows of a block, in order.
template <typename Row>
inline void sum_row_block(int64_t block, int64_t rows, int64_t width, float* partial, Row row) {
  sum_rows_of_block(block, rows, width, partial, [&](int64_t index, int64_t end, float* sums) {
    for (; index < end; ++index) row(index, sums);
  });
}

// row(index, block, sums) for all rows, the blocks shared by the threads. `partial` holds
// block_sums_size(rows, width) floats.
template <typename Row>
inline void for_row_blocks(int64_t rows, int64_t width, int threads, float* partial, Row row) {
#pragma omp parallel for num_threads(threads)
  for (int64_t block = 0; block < row_blocks(rows); ++block)
    sum_row_block(block, rows, width, partial,
                  [&](int64_t index, float* sums) { row(index, block, sums); });
}

// Writes what the blocks sum to, from value `first` of `width` on, to the vector `out`, if it is
// wanted.
inline void write_block_sums(float* partial, int64_t rows, int64_t width, int64_t first,
                             const View& out) {
  if (!out) return;
  constexpr int64_t AT_ONCE = 64;
  for (int64_t j = 0; j < out.cols; j += AT_ONCE) {
    const int64_t count = smaller(AT_ONCE, out.cols - j);
    double total[AT_ONCE] = {};
    for (int64_t block = 0; block < row_blocks(rows); ++block) {
      const double* sums = block_sums(partial, block, width) + first + j;
      for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
    }
    float rounded[AT_ONCE];
    for (int64_t i = 0; i < count; ++i) rounded[i] = total[i];
    write_row(rows_of(out.transposed(), j, count).transposed(), 0, rounded);
  }
}

// Rows [first, first + count) of a view from values that lie `stride` apart by row.
inline void write_rows(const View& view, int64_t first, int64_t count, const float* values,
                       int64_t stride) {
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(view.data) + first * view.row_stride;
    if (view.row_stride == 1)  // a transposed matrix: along its columns
      for (int64_t j = 0; j < view.cols; ++j)
        for (int64_t i = 0; i < count; ++i)
          out[i + j * view.col_stride] = from_float<T>(values[i * stride + j]);
    else
      for (int64_t i = 0; i < count; ++i) write_row(view, first + i, values + i * stride);
  });
}

}  // namespace snk::cpu::SNK_ISA
