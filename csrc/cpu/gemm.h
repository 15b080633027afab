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

// What becomes of the MR × NR values of a tile: they are stored to be looked at again, or leave as part
// of an output, a bias added.
struct Kept {
  float* c;
  int64_t ldc;
  void operator()(int64_t i, vec low, vec high) const {
    store(c + i * ldc, low);
    store(c + i * ldc + VL, high);
  }
};
struct Leaving {
  float* out;
  int64_t stride;
  const float* bias;
  bool streams;
  void operator()(int64_t i, vec low, vec high) const {
    float* row = out + i * stride;
    low += load(bias), high += load(bias + VL);
    if (streams)
      stream(row, low), stream(row + VL, high);
    else
      store(row, low), store(row + VL, high);
  }
};

// end(i, …) for the rows i of aᵀ b, or of c + aᵀ b, where a has MR and b has NR values per term; those
// of a that lie AHEAD terms further on are fetched.
template <bool ADD, int AHEAD = 0, typename End>
[[gnu::noinline]] inline void full_tile(int64_t terms, const float* __restrict a, int64_t lda,
                                        const float* __restrict b, int64_t ldb, const float* c,
                                        int64_t ldc, End end) {
  vec acc[MR][2] = {};
  for (int64_t k = 0; k < terms; ++k, a += lda, b += ldb) {
    if constexpr (AHEAD > 0) __builtin_prefetch(a + AHEAD * lda + MR - 1, 0, TO_L2);
    const vec b0 = load(b), b1 = load(b + VL);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      acc[i][0] += a[i] * b0;
      acc[i][1] += a[i] * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i, c += ldc)
    end(i, ADD ? load(c) + acc[i][0] : acc[i][0], ADD ? load(c + VL) + acc[i][1] : acc[i][1]);
}

// c = or += aᵀ b for the rows × cols of c that there are.
inline void tile(bool add, int64_t terms, const float* a, int64_t lda, const float* b, int64_t ldb,
                 float* c, int64_t ldc, int64_t rows, int64_t cols) {
  if (rows >= MR && cols >= NR) {
    if (add)
      full_tile<true>(terms, a, lda, b, ldb, c, ldc, Kept{c, ldc});
    else
      full_tile<false>(terms, a, lda, b, ldb, c, ldc, Kept{c, ldc});
    return;
  }
  float edge[MR * NR];
  full_tile<false>(terms, a, lda, b, ldb, edge, NR, Kept{edge, NR});
  for (int64_t i = 0; i < smaller(rows, MR); ++i)
    for (int64_t j = 0; j < smaller(cols, NR); ++j)
      c[i * ldc + j] = (add ? c[i * ldc + j] : 0.0f) + edge[i * NR + j];
}

// `cols` ≤ NR columns of a product: the memory where they are summed up, and the columns of an output
// to which they go in the end with a bias of NR values; without an output they stay.
struct Strip {
  float* c;
  int64_t ldc, cols;
  Target out = Target(View(), false);
  float bias[NR] = {};

  // Ends rows [first, first + MR), or as many as there are, with the last terms of their sums.
  void end(bool add, int64_t terms, const float* a, const float* b, int64_t first,
           int64_t rows) const {
    float* sums = c + first * ldc;
    if (out.direct() && rows >= MR && cols == NR) {
      const Leaving leaving{out.at(first), out.row_stride(), bias, out.streams()};
      if (add)
        full_tile<true>(terms, a, MR, b, NR, sums, ldc, leaving);
      else
        full_tile<false>(terms, a, MR, b, NR, sums, ldc, leaving);
      return;
    }
    tile(add, terms, a, MR, b, NR, sums, ldc, rows, cols);
    for (int64_t i = 0; out && i < smaller(rows, MR); ++i) {
      for (int64_t j = 0; j < cols; ++j) sums[i * ldc + j] += bias[j];
      out.write(first + i, sums + i * ldc);
    }
  }
};

// Fetches the matrix that is needed next into the L2 cache during other work: its lines are spread
// over so many calls.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const View& any, int64_t calls) {
    const View matrix = any.row_stride == 1 ? any.transposed() : any;
    if (!in_place(matrix)) return;
    next_ = static_cast<const float*>(matrix.data);
    row_stride_ = matrix.row_stride, cols_ = matrix.cols, rows_ = matrix.rows;
    lines_per_call_ = ceil_div(rows_ * ceil_div(cols_, LINE), larger(calls, 1));
  }
  void fetch() {
    Ahead now = *this;  // in registers: through memory each line would wait for the one before
    for (int64_t i = 0; i < lines_per_call_ && now.rows_ > 0; ++i) {
      __builtin_prefetch(now.next_ + now.col_, 0, TO_L2);
      now.col_ += LINE;
      if (now.col_ < cols_) continue;
      now.col_ = 0, now.next_ += row_stride_, --now.rows_;
    }
    *this = now;
  }

 private:
  const float* next_ = nullptr;
  int64_t row_stride_ = 0, cols_ = 0, rows_ = 0, col_ = 0, lines_per_call_ = 0;
};

// Tiles of a product of so many rows and terms, a panel wide.
inline int64_t tiles_of(int64_t rows, int64_t terms) {
  return ceil_div(rows, MR) * ceil_div(terms, KC);
}

// A strip = or += slices of `rows` rows times a panel; `last`: nothing more is added to it.
inline void times_panel(bool add, bool last, int64_t rows, int64_t terms, const float* slices,
                        const float* panel, const Strip& strip, Ahead& ahead) {
  int64_t k = 0;
  do {  // once at least, as no terms at all make zeros
    const int64_t kc = smaller(KC, terms - k);
    const bool ends = last && k + kc == terms;
    for (int64_t i = 0; i < rows; i += MR) {
      ahead.fetch();
      const float *a = slices + i * terms + k * MR, *b = panel + k * NR;
      if (ends)
        strip.end(add || k > 0, kc, a, b, i, rows - i);
      else
        tile(add || k > 0, kc, a, MR, b, NR, strip.c + i * strip.ldc, strip.ldc, rows - i,
             strip.cols);
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
      for (int64_t i = 0; i < count; i += LINE)
        __builtin_prefetch(in + KC * u.row_stride + i, 0, TO_L2);
      for (int64_t i = 0; i < count; i += MR)
        std::memcpy(slices + i * KC + k * MR, in + i, MR * sizeof(float));
    }
    return;
  }
  for (int64_t i = 0; i < count; i += MR)
    pack<MR>(u.transposed(), first + i, smaller(MR, count - i), row, terms, slices + i * KC);
}

// Rows [first, first + count) of out = uᵀ v: a sum over the rows of u and v. `room` holds
// transposed_product_size(v.cols) floats. The columns of u that many columns of v meet are gathered
// first: rows are often a power of two apart, and fall into one set of the L1 cache. For few they are
// read where they lie, fetched ahead. The columns of v are read where they lie, if they lie in rows of
// floats.
constexpr int TERMS_AHEAD = 48;
constexpr int64_t OUT_ROWS = 4 * MR;  // of out at a time, so that lines of u are used whole
inline int64_t transposed_product_size(int64_t cols) {
  return OUT_ROWS * round_up(cols, NR) + (OUT_ROWS + NR) * KC;
}
inline void transposed_product(const View& u, const View& v, int64_t first, int64_t count,
                               const View& out, float* room) {
  const int64_t ldc = round_up(v.cols, NR);
  float *c = room, *slices = c + OUT_ROWS * ldc, *panel = slices + OUT_ROWS * KC;
  const bool gathers = !in_place(u) || count % MR != 0 || v.cols > 4 * NR;
  int64_t m = 0;
  do {  // once at least, as no rows at all make zeros
    const int64_t terms = smaller(KC, u.rows - m);
    if (gathers) gather_columns(u, m, terms, first, count, slices);
    for (int64_t j = 0; j < v.cols; j += NR) {
      const float* b = static_cast<const float*>(v.data) + m * v.row_stride + j;
      int64_t ldb = v.row_stride;
      if (!in_place(v) || j + NR > v.cols) {
        pack<NR>(v.transposed(), j, smaller(NR, v.cols - j), m, terms, panel);
        b = panel;
        ldb = NR;
      }
      for (int64_t i = 0; i < count; i += MR) {
        float* to = c + i * ldc + j;
        if (gathers) {
          tile(m > 0, terms, slices + i * KC, MR, b, ldb, to, ldc, MR, NR);
          continue;
        }
        const float* a = static_cast<const float*>(u.data) + m * u.row_stride + first + i;
        if (m > 0)
          full_tile<true, TERMS_AHEAD>(terms, a, u.row_stride, b, ldb, to, ldc, Kept{to, ldc});
        else
          full_tile<false, TERMS_AHEAD>(terms, a, u.row_stride, b, ldb, to, ldc, Kept{to, ldc});
      }
    }
    m += terms;
  } while (m < u.rows);
  write_rows(out, first, count, c, ldc);
}

}  // namespace snk::cpu::SNK_ISA
