// Vectors, number formats and scratch memory of one instruction set.
//
// Everything here and in the files that include it lives in namespace snk::cpu::SNK_ISA and uses
// no out-of-line template of the standard library: the linker keeps one copy of such a function
// for the whole module, and that copy might be the one with AVX-512 in it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cpu/params.h"

namespace snk::cpu::SNK_ISA {

// Lanes of a vector, and the register tile of the GEMM: MR rows of two vectors, as many as leave
// registers free for two vectors of B and one broadcast of A.
#if defined(SNK_ISA_avx512)
constexpr int VL = 16, MR = 12;
#elif defined(SNK_ISA_avx2)
constexpr int VL = 8, MR = 6;
#else
constexpr int VL = 4, MR = 4;
#endif
constexpr int NR = 2 * VL;

constexpr int64_t LINE = 16;  // floats of a cache line
constexpr int TO_L2 = 2;      // how near a prefetch brings them

typedef float vec __attribute__((vector_size(VL * sizeof(float))));

// Anywhere in memory, which holds floats and nothing else: with memcpy, which may hold all things, the
// compiler would read pointers and sizes again after every store.
typedef float unaligned_vec __attribute__((vector_size(VL * sizeof(float)), aligned(sizeof(float))));

inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }

// Stores past the caches, to addresses that are multiples of a vector: memory that nobody reads
// soon need not be read first, as an ordinary store does. Others see it after stream_fence.
#if defined(SNK_ISA_avx512)
inline void stream(float* p, vec v) { _mm512_stream_ps(p, (__m512)v); }
inline void stream_fence() { _mm_sfence(); }
#elif defined(SNK_ISA_avx2)
inline void stream(float* p, vec v) { _mm256_stream_ps(p, (__m256)v); }
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream(float* p, vec v) { store(p, v); }
inline void stream_fence() {}
#endif

// each<N>(f): f(0), …, f(N − 1) with constants, so that arrays which they index become registers.
template <int N, typename F>
[[gnu::always_inline]] inline void each(F&& f) {
  if constexpr (N > 1) each<N - 1>(f);
  if constexpr (N > 0) f(std::integral_constant<int, N - 1>());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifted into place the exponent is 112 too small; one multiplication mends that, and makes
  // subnormals right as well.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t(u >> 16 | 0x40u)};  // NaN stays NaN
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};                  // to nearest even
}
template <>
inline f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 makes the hardware round to a multiple of 2⁻²⁴.
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return {uint16_t(sign | (float_to_bits(shifted) - float_to_bits(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13))};
#endif
}

// Calls f with a null pointer of the view's element type.
template <typename F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
  }
}

// The rows [first, first + count) of a view.
inline View rows_of(const View& view, int64_t first, int64_t count) {
  View rows = view;
  rows.rows = count;
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    rows.data = static_cast<T*>(view.data) + first * view.row_stride;
  });
  return rows;
}
inline View columns_of(const View& view, int64_t first, int64_t count) {
  return rows_of(view.transposed(), first, count).transposed();
}

// out[j] = view[row, j] in fp32.
inline void read_row(const View& view, int64_t row, float* out) {
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* in = static_cast<const T*>(view.data) + row * view.row_stride;
    if (view.col_stride == 1)
      for (int64_t j = 0; j < view.cols; ++j) out[j] = to_float(in[j]);
    else
      for (int64_t j = 0; j < view.cols; ++j) out[j] = to_float(in[j * view.col_stride]);
  });
}

// view[row, j] = in[j], rounded once.
inline void write_row(const View& view, int64_t row, const float* in) {
  with_type(view.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* out = static_cast<T*>(view.data) + row * view.row_stride;
    if (view.col_stride == 1)
      for (int64_t j = 0; j < view.cols; ++j) out[j] = from_float<T>(in[j]);
    else
      for (int64_t j = 0; j < view.cols; ++j) out[j * view.col_stride] = from_float<T>(in[j]);
  });
}

// Scratch memory of one thread. It is kept between calls, because touching fresh pages costs up to
// 40 % of a small op, but not when it has grown past `kept` bytes.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Room for n floats, aligned to a cache line, also for none; null when there is no memory. The old
  // content is gone.
  float* take(int64_t n) {
    const size_t bytes = round_up((n + 1) * sizeof(float), 64);
    if (bytes > size_) {
      std::free(data_);
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
    }
    return data_;
  }
  void release_if_large() {
    constexpr size_t kept = size_t(64) << 20;
    if (size_ <= kept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace snk::cpu::SNK_ISA
