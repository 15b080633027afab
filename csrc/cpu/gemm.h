// The register tile that all products are made of, and the packing that feeds it.
//
// Rows of a are packed into slices of MR, rows of b into panels of NR, both in fp32 and padded with
// zeros, so that one tile serves every shape, stride and number format. Products are summed over at
// most KC terms in registers before they are added to memory: an order that does not depend on the
// number of threads, so neither do the bits.
#pragma once

#include "cpu/rows.h"

namespace snk::cpu::SNK_ISA {

constexpr int64_t KC = 256;

// Transposes VL vectors in registers, by swapping ever larger blocks across the diagonal.
template <int HALF = 1>
inline void transpose(vec* rows) {
  if constexpr (HALF < VL) {
    typedef int lanes __attribute__((vector_size(VL * sizeof(int))));
    lanes low, high;
    for (int j = 0; j < VL; ++j) {
      low[j] = j & HALF ? VL + j - HALF : j;
      high[j] = j & HALF ? VL + j : j + HALF;
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) {
      if (i & HALF) continue;
      const vec a = rows[i], b = rows[i + HALF];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + HALF] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * HALF>(rows);
  }
}

// out[k][0..WIDTH) = the k-th terms of `count` vectors: vector i starts at in + i · vector_stride
// and has its terms `term_stride` apart. Not a float more is written: what lies behind may be a slice
// that another thread has packed.
template <int WIDTH, typename T>
inline void pack_slice(const T* in, int64_t vector_stride, int64_t term_stride, int64_t count,
                       int64_t terms, float* out) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (vector_stride == 1 && count == WIDTH) {
      for (; k < terms; ++k)
        std::memcpy(out + k * WIDTH, in + k * term_stride, WIDTH * sizeof(float));
      return;
    }
    // Term by term, vectors whose stride is a power of two would all fall into one set of the L1
    // cache. Where a group of lanes is wider than the slice, the next term overwrites the excess.
    if (term_stride == 1)
      for (; k + VL <= terms; k += VL)
        for (int group = 0; group < WIDTH; group += VL) {
          vec rows[VL];
#pragma GCC unroll 16
          for (int i = 0; i < VL; ++i)
            rows[i] = group + i < WIDTH && group + i < count
                          ? load(in + (group + i) * vector_stride + k)
                          : vec{};
          transpose(rows);
#pragma GCC unroll 16
          for (int i = 0; i < VL - 1; ++i) store(out + (k + i) * WIDTH + group, rows[i]);
          float* last = out + (k + VL - 1) * WIDTH + group;
          if (group + VL <= WIDTH || k + VL < terms)
            store(last, rows[VL - 1]);
          else
            std::memcpy(last, &rows[VL - 1], (WIDTH - group) * sizeof(float));
        }
  }
  for (; k < terms; ++k)
    for (int i = 0; i < WIDTH; ++i)
      out[k * WIDTH + i] =
          i < count ? to_float(in[i * vector_stride + k * term_stride]) : 0.0f;
}

// Packs the rows [row, row + count) of a view, terms along its columns from `first` on.
template <int WIDTH>
inline void pack(const View& view, int64_t row, int64_t count, int64_t first, int64_t terms,
                 float* out) {
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = static_cast<const T*>(view.data) + row * view.row_stride + first * view.col_stride;
    pack_slice<WIDTH>(in, view.row_stride, view.col_stride, count, terms, out);
  });
}

// All rows of a view in slices: that of rows [i, i + MR) begins at out + i · cols.
inline void pack_slices(const View& view, float* out) {
  for (int64_t i = 0; i < view.rows; i += MR)
    pack<MR>(view, i, smaller(MR, view.rows - i), 0, view.cols, out + i * view.cols);
}
inline int64_t slices_size(int64_t rows, int64_t terms) { return round_up(rows, MR) * terms; }

// c (MR × NR) = or += aᵀ b, where a has MR and b has NR values per term.
template <bool ADD>
[[gnu::noinline]] inline void full_tile(int64_t terms, const float* __restrict a, int64_t lda,
                                        const float* __restrict b, int64_t ldb,
                                        float* __restrict c, int64_t ldc) {
  vec acc[MR][2] = {};
  for (int64_t k = 0; k < terms; ++k, a += lda, b += ldb) {
    const vec b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i, c += ldc) {
    store(c, ADD ? load(c) + acc[i][0] : acc[i][0]);
    store(c + VL, ADD ? load(c + VL) + acc[i][1] : acc[i][1]);
  }
}

// The same for the rows × cols of c that there are.
inline void tile(bool add, int64_t terms, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, int64_t rows, int64_t cols) {
  if (rows >= MR && cols >= NR) {
    if (add)
      full_tile<true>(terms, a, lda, b, ldb, c, ldc);
    else
      full_tile<false>(terms, a, lda, b, ldb, c, ldc);
    return;
  }
  float edge[MR * NR];
  full_tile<false>(terms, a, lda, b, ldb, edge, NR);
  for (int64_t i = 0; i < smaller(rows, MR); ++i)
    for (int64_t j = 0; j < smaller(cols, NR); ++j)
      c[i * ldc + j] = (add ? c[i * ldc + j] : 0.0f) + edge[i * NR + j];
}

// Fetches the matrix that is needed next into the L2 cache, some lines at a time, during other work.
class Ahead {
 public:
  Ahead() = default;
  explicit Ahead(const View& matrix) {
    if (!in_place(matrix)) return;
    next_ = static_cast<const float*>(matrix.data);
    row_stride_ = matrix.row_stride, cols_ = matrix.cols, rows_ = matrix.rows;
  }
  int64_t lines() const { return rows_ * ceil_div(cols_, LINE); }
  void fetch(int64_t lines) {
    constexpr int TO_L2 = 2;
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(next_ + col_, 0, TO_L2);
      col_ += LINE;
      if (col_ < cols_) continue;
      col_ = 0, next_ += row_stride_, --rows_;
    }
  }

 private:
  const float* next_ = nullptr;
  int64_t row_stride_ = 0, cols_ = 0, rows_ = 0, col_ = 0;
};

// `cols` ≤ NR columns of c (rows × ldc) = or += slices of `rows` rows times a panel.
inline void times_panel(bool add, int64_t rows, int64_t terms, const float* slices,
                        const float* panel, float* c, int64_t ldc, int64_t cols, Ahead ahead = {}) {
  const int64_t tiles = ceil_div(rows, MR) * ceil_div(terms, KC);
  const int64_t some = ceil_div(ahead.lines(), larger(tiles, 1));
  int64_t k = 0;
  do {  // once at least, as no terms at all make zeros
    const int64_t kc = smaller(KC, terms - k);
    for (int64_t i = 0; i < rows; i += MR) {
      ahead.fetch(some);
      tile(add || k > 0, kc, slices + i * terms + k * MR, MR, panel + k * NR, NR, c + i * ldc, ldc,
           rows - i, cols);
    }
    k += kc;
  } while (k < terms);
}

// Slices, KC terms apart, of the columns [first, first + count) of rows [row, row + terms) of u.
inline void gather_columns(const View& u, int64_t row, int64_t terms, int64_t first, int64_t count,
                           float* slices) {
  if (in_place(u) && count % MR == 0) {
    // Row by row, all lines of a row at once: each comes from afar. Those of the next terms come while
    // these are worked on; past the last row nothing happens.
    const float* in = static_cast<const float*>(u.data) + row * u.row_stride + first;
    for (int64_t k = 0; k < terms; ++k, in += u.row_stride) {
      for (int64_t i = 0; i < count; i += LINE) __builtin_prefetch(in + KC * u.row_stride + i, 0, 2);
      for (int64_t i = 0; i < count; i += MR)
        std::memcpy(slices + i * KC + k * MR, in + i, MR * sizeof(float));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += MR)
    pack<MR>(u.transposed(), first + i, smaller(MR, count - i), row, terms, slices + i * KC);
}

// Rows [first, first + count) of out = uᵀ v: a sum over the rows of u and v. `room` holds
// transposed_product_size(v.cols) floats. The columns of u are gathered first: rows are often a power
// of two apart, and fall into one set of the L1 cache. Those of v are read where they lie, if they
// lie in rows of floats.
constexpr int64_t STRIP = 4 * MR;  // rows of out at a time, so that lines of u are used whole
inline int64_t transposed_product_size(int64_t cols) {
  return STRIP * round_up(cols, NR) + (STRIP + NR) * KC;
}
inline void transposed_product(const View& u, const View& v, int64_t first, int64_t count,
                               const View& out, float* room) {
  const int64_t ldc = round_up(v.cols, NR);
  float *c = room, *slices = c + STRIP * ldc, *panel = slices + STRIP * KC;
  int64_t m = 0;
  do {  // once at least, as no rows at all make zeros
    const int64_t terms = smaller(KC, u.rows - m);
    gather_columns(u, m, terms, first, count, slices);
    for (int64_t j = 0; j < v.cols; j += NR) {
      const float* b = static_cast<const float*>(v.data) + m * v.row_stride + j;
      int64_t ldb = v.row_stride;
      if (!in_place(v) || j + NR > v.cols) {
        pack<NR>(v.transposed(), j, smaller(NR, v.cols - j), m, terms, panel);
        b = panel;
        ldb = NR;
      }
      for (int64_t i = 0; i < count; i += MR)
        tile(m > 0, terms, slices + i * KC, MR, b, ldb, c + i * ldc + j, ldc, MR, NR);
    }
    m += terms;
  } while (m < u.rows);
  write_rows(out, first, count, c, ldc);
}

}  // namespace snk::cpu::SNK_ISA
