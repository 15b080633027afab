// A packed GEMM whose rows reach an epilogue while they are still in cache.
//
// Threads own bands of rows. A band of A is packed into slices of MR rows, B once for all threads
// into panels of NR columns, both in fp32 and padded with zeros, so that the one register tile
// below serves every shape, stride and number format. Products are summed over at most KC
// terms in registers before they are added to the band: the same order for any number of threads,
// so the same bits.
#pragma once

#include "cpu/vec.h"

namespace snk::cpu::SNK_ISA {

constexpr int64_t KC = 256;
constexpr int64_t BAND = 8 * MR;  // rows at most; a band of C and its slices of A stay in L2

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
// and has its terms `term_stride` apart. Writes up to VL floats past the end of out.
template <int WIDTH, typename T>
inline void pack_slice(const T* in, int64_t vector_stride, int64_t term_stride, int64_t count,
                       int64_t terms, float* out) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
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
          for (int i = 0; i < VL; ++i) store(out + (k + i) * WIDTH + group, rows[i]);
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

// c (MR × NR, rows ldc apart) = or += a (terms × MR) ᵀ · b (terms × NR)
template <bool ADD>
inline void tile(int64_t terms, const float* __restrict a, const float* __restrict b,
                 float* __restrict c, int64_t ldc) {
  vec acc[MR][2] = {};
  for (int64_t k = 0; k < terms; ++k, a += MR, b += NR) {
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

// One term of a sum of products: rows of `a` (M × K) times rows of `b` (N × K).
struct Product {
  View a, b;
};

// For every row of Σ a·bᵀ over the products, in bands: epilogue(row, values), where values are N
// floats that it may overwrite. `scratch` keeps the packed b.
template <typename Epilogue>
Status gemm(const Product* products, int count, int threads, Scratch& scratch, Epilogue epilogue) {
  const int64_t M = products[0].a.rows, N = products[0].b.rows;
  const int64_t panels = ceil_div(N, NR);
  // Rows of a band are a cache line longer than needed: a power of two apart, all rows of a tile
  // would fall into one set of the L1 cache.
  const int64_t ld = panels * NR + 16;
  int64_t terms = 0;
  for (int p = 0; p < count; ++p) terms += products[p].a.cols;
  float* packed_b = scratch.take(panels * NR * terms + VL);
  if (packed_b == nullptr) return Status::out_of_memory;

  // Bands of about equal height, as many for each thread, none above BAND.
  const int64_t slices = ceil_div(M, MR);
  const int64_t bands = threads * ceil_div(slices, threads * (BAND / MR));
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch local;
    float* c = local.take(BAND * ld + BAND * KC + VL);
    float* packed_a = c + BAND * ld;
#pragma omp for
    for (int64_t panel = 0; panel < panels; ++panel) {
      // A panel holds the terms of all products, one product after the other.
      float* out = packed_b + panel * NR * terms;
      for (int p = 0; p < count; ++p) {
        const View& b = products[p].b;
        pack<NR>(b, panel * NR, smaller(NR, N - panel * NR), 0, b.cols, out);
        out += NR * b.cols;
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t band = 0; band < bands; ++band) {
      if (c == nullptr) {
#pragma omp atomic write
        failed = true;
        continue;
      }
      const int64_t first = band * slices / bands * MR;
      const int64_t rows = smaller((band + 1) * slices / bands * MR, M) - first;
      const float* b = packed_b;
      bool add = false;
      for (int p = 0; p < count; ++p) {
        const View& a = products[p].a;
        for (int64_t k = 0; k < a.cols; k += KC) {
          const int64_t kc = smaller(KC, a.cols - k);
          for (int64_t i = 0; i < rows; i += MR)
            pack<MR>(a, first + i, smaller(MR, rows - i), k, kc, packed_a + i * kc);
          for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t i = 0; i < rows; i += MR) {
              const float* panel_b = b + panel * NR * terms;
              float* out = c + i * ld + panel * NR;
              if (add)
                tile<true>(kc, packed_a + i * kc, panel_b, out, ld);
              else
                tile<false>(kc, packed_a + i * kc, panel_b, out, ld);
            }
          b += kc * NR;
          add = true;
        }
      }
      if (!add) std::memset(c, 0, rows * ld * sizeof(float));  // no terms at all: K = 0
      for (int64_t i = 0; i < rows; ++i) epilogue(first + i, c + i * ld);
    }
    local.release_if_large();
  }
  scratch.release_if_large();
  return failed ? Status::out_of_memory : Status::ok;
}

// out = alpha · a · bᵀ. The longer side of the result becomes the rows, which is what threads share.
inline Status gemm_into(View a, View b, float alpha, View out, int threads, Scratch& scratch) {
  if (a.rows < b.rows) {
    const View swapped = a;
    a = b;
    b = swapped;
    out = out.transposed();
  }
  const Product product{a, b};
  return gemm(&product, 1, threads, scratch, [&](int64_t row, float* values) {
    for (int64_t j = 0; j < out.cols; ++j) values[j] *= alpha;
    write_row(out, row, values);
  });
}

}  // namespace snk::cpu::SNK_ISA
