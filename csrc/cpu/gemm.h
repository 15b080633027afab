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
constexpr int64_t BAND = 8 * MR;  // rows; a band of C and its slices of A stay in the L2 cache

// out[k][0..WIDTH) = the k-th terms of `count` vectors: vector i starts at in + i · vector_stride
// and has its terms `term_stride` apart.
template <int WIDTH, typename T>
inline void pack_slice(const T* in, int64_t vector_stride, int64_t term_stride, int64_t count,
                       int64_t terms, float* out) {
  if (count == WIDTH) {
    for (int64_t k = 0; k < terms; ++k, out += WIDTH)
      for (int i = 0; i < WIDTH; ++i) out[i] = to_float(in[i * vector_stride + k * term_stride]);
  } else {
    for (int64_t k = 0; k < terms; ++k, out += WIDTH)
      for (int i = 0; i < WIDTH; ++i)
        out[i] = i < count ? to_float(in[i * vector_stride + k * term_stride]) : 0.0f;
  }
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
  const int64_t panels = ceil_div(N, NR), ld = panels * NR;
  int64_t terms = 0;
  for (int p = 0; p < count; ++p) terms += products[p].a.cols;
  float* packed_b = scratch.take(ld * terms);
  if (packed_b == nullptr && ld * terms > 0) return Status::out_of_memory;

  // Fewer rows than threads · BAND: smaller bands, so that no thread is idle. Never an empty one.
  const int64_t band = smaller(BAND, round_up(ceil_div(M, threads) + (M == 0), MR));
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch local;
    float* c = local.take(band * ld + band * KC);
    float* packed_a = c + band * ld;
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
    for (int64_t first = 0; first < M; first += band) {
      if (c == nullptr) {
#pragma omp atomic write
        failed = true;
        continue;
      }
      const int64_t rows = smaller(band, M - first);
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
