// What ops do row by row: read and write rows and vectors, sum over them.
#pragma once

#include "cpu/vec.h"

namespace snk::cpu::SNK_ISA {

// Parts of one piece of scratch memory, each of which begins on a cache line. They are a line longer
// than needed: a power of two apart, all would fall into one set of the L1 cache.
class Parts {
 public:
  template <int COUNT>
  Parts(Scratch& scratch, const int64_t (&sizes)[COUNT]) : sizes_(sizes) {
    int64_t total = 0;
    for (const int64_t size : sizes) total += padded(size);
    next_ = scratch.take(total);
  }
  // False without memory; the parts are then null.
  explicit operator bool() const { return next_ != nullptr; }
  float* take() {
    if (next_ == nullptr) return nullptr;
    float* part = next_;
    next_ += padded(*sizes_++);
    return part;
  }
  static int64_t padded(int64_t n) { return round_up(n, 16) + 16; }

 private:
  const int64_t* sizes_;
  float* next_;
};

// A vector argument in fp32, every value `fallback` where it was not given; gives `values`.
inline const float* read_or(const View& view, float fallback, int64_t n, float* values) {
  if (view)
    read_row(view, 0, values);
  else
    for (int64_t j = 0; j < n; ++j) values[j] = fallback;
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

// The same, or `zeros` where there is no view.
inline const float* values_or(const View& view, int64_t row, float* room, const float* zeros) {
  return view ? row_values(view, row, room) : zeros;
}

// Whether what an op reads and writes, so many values, is more than caches keep until the next op
// comes. Its outputs then go past them: there is nothing to be kept, and less to be read.
inline bool past_caches(int64_t values) { return values >= 2 << 20; }

// A vector or, for what is left of a row, one value.
template <typename V>
inline V get(const float* p) {
  if constexpr (std::is_same_v<V, vec>)
    return load(p);
  else
    return *p;
}
inline void put(float* p, vec v) { store(p, v); }
inline void put(float* p, float v) { *p = v; }

// A row of an output while it is worked on: where its values are kept, and where they are streamed to,
// or null.
struct Place {
  float *near, *far;

  // A value that is looked at again.
  template <typename V>
  void keep(int64_t j, V v) const {
    put(near + j, v);
    if constexpr (std::is_same_v<V, vec>)
      if (far != nullptr) stream(far + j, v);
  }
  // A value that is not: it is kept only where it is not streamed.
  template <typename V>
  void last(int64_t j, V v) const {
    if constexpr (std::is_same_v<V, vec>)
      if (far != nullptr) return stream(far + j, v);
    put(near + j, v);
  }
};

// An output whose rows are computed in their place or, if they are to be rounded or to go past the
// caches, elsewhere.
class Target {
 public:
  Target(const View& view, bool large)
      : view_(view), in_place_(in_place(view)), streams_(in_place_ && large && aligned(view)) {}

  explicit operator bool() const { return bool(view_); }
  // Where a row is worked on: in its place, or in `room`, as where there is no view.
  Place place(int64_t row, float* room) const {
    if (!in_place_) return {room, nullptr};
    return streams_ ? Place{room, at(row)} : Place{at(row), nullptr};
  }
  // Ends a row that was worked on there.
  void end(int64_t row, Place place) const {
    if (view_ && !in_place_) write_row(view_, row, place.near);
  }
  // The same, and what is kept of it becomes what was written: what follows then belongs to that.
  void round(int64_t row, Place place) const {
    end(row, place);
    if (view_.dtype != DType::f32) read_row(view_, row, place.near);
  }
  // Where values may be written as they are made; streamed if it says so.
  bool direct() const { return in_place_; }
  bool streams() const { return streams_; }
  int64_t row_stride() const { return view_.row_stride; }
  float* at(int64_t row) const { return static_cast<float*>(view_.data) + row * view_.row_stride; }
  // Writes a row that was made elsewhere.
  void write(int64_t row, const float* values) const {
    if (streams_)
      for (int64_t j = 0; j < view_.cols; j += VL) stream(at(row) + j, load(values + j));
    else if (in_place_)
      std::memcpy(at(row), values, view_.cols * sizeof(float));
    else
      write_row(view_, row, values);
  }

 private:
  static bool aligned(const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % sizeof(vec) == 0 && view.cols % VL == 0 &&
           view.row_stride % VL == 0;
  }

  View view_;
  bool in_place_, streams_;
};

constexpr int CHAINS = 2;  // sums of a row in flight

// body(V(), j, chain) for the values from j on of a row of n, where V is vec or float.
template <typename Body>
inline void for_values(int64_t n, Body body) {
  constexpr std::integral_constant<int, 0> first;
  int64_t j = 0;
  for (; j + CHAINS * VL <= n; j += CHAINS * VL)
    each<CHAINS>([&](auto chain) { body(vec(), j + chain * VL, chain); });
  for (; j + VL <= n; j += VL) body(vec(), j, first);
  for (; j < n; ++j) body(0.0f, j, first);
}

// A sum of what for_values hands out.
class Sum {
 public:
  template <typename Chain>
  void add(vec v, Chain) {
    lanes_[Chain::value] += v;
  }
  template <typename Chain>
  void add(float v, Chain) {
    rest_ += v;
  }
  float total() const {
    static_assert(CHAINS == 2);
    vec v = lanes_[0] + lanes_[1];
    fold<VL / 2>(v);
    return rest_ + v[0];
  }

 private:
  // Adds halves, then halves of those: one lane after another takes as long as half a row of 384.
  template <int HALF>
  static void fold(vec& v) {
    typedef int lanes __attribute__((vector_size(VL * sizeof(int))));
    lanes other;
    for (int i = 0; i < VL; ++i) other[i] = i ^ HALF;
    v += __builtin_shuffle(v, other);
    if constexpr (HALF > 1) fold<HALF / 2>(v);
  }

  vec lanes_[CHAINS] = {};
  float rest_ = 0;
};

// [0, n) in a share for each thread, which is likely to have made those rows and to read them again,
// and which helps with the others' shares when it is done with its own: of two cores one is often
// slower.
class Shares {
 public:
  static int64_t room(int threads) { return threads * LINE; }
  Shares(int64_t n, int64_t step, int threads, float* room)
      : n_(n), step_(step), threads_(threads), next_(reinterpret_cast<int64_t*>(room)) {
    for (int share = 0; share < threads; ++share) next_[share * APART] = border(share);
  }
  // some(first, last) for what is there to do, at most `step` at a time.
  template <typename Some>
  void work(int thread, Some some) const {
    for (int i = 0; i < threads_; ++i) {
      const int share = (thread + i) % threads_;
      int64_t &next = next_[share * APART], first;
      for (;;) {
#pragma omp atomic capture
        {
          first = next;
          next += step_;
        }
        if (first >= border(share + 1)) break;
        some(first, smaller(first + step_, border(share + 1)));
      }
    }
  }

 private:
  static constexpr int64_t APART = LINE * sizeof(float) / sizeof(int64_t);  // a cache line each
  int64_t border(int share) const {
    return smaller(share * ceil_div(n_, step_) / threads_ * step_, n_);
  }

  int64_t n_, step_;
  int threads_;
  int64_t* next_;
};

// The sums over rows that become the gradients of vectors. Rows are cut into blocks whose number
// does not depend on the threads; a few rows at a time are summed in fp32, and such sums in fp64, so
// that the error does not grow with the number of rows.
constexpr int64_t ROW_BLOCKS = 64, ROWS_AT_ONCE = 16;

inline int64_t row_blocks(int64_t rows) {
  return smaller(ROW_BLOCKS, ceil_div(rows, 2 * ROWS_AT_ONCE));
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

// Writes what the blocks sum to, from value `first` of `width` on, to the vector `out`, if it is
// wanted; or one of `parts` of that.
inline void write_block_sums(float* partial, int64_t rows, int64_t width, int64_t first,
                             const View& out, int part = 0, int parts = 1) {
  if (!out) return;
  constexpr int64_t AT_ONCE = 64;
  for (int64_t j = part * AT_ONCE; j < out.cols; j += parts * AT_ONCE) {
    const int64_t count = smaller(AT_ONCE, out.cols - j);
    double total[AT_ONCE] = {};
    for (int64_t block = 0; block < row_blocks(rows); ++block) {
      const double* sums = block_sums(partial, block, width) + first + j;
      for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
    }
    float rounded[AT_ONCE];
    for (int64_t i = 0; i < count; ++i) rounded[i] = total[i];
    write_row(columns_of(out, j, count), 0, rounded);
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
