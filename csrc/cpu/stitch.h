// The parts that stitch.cpp and stitch_layer_norm.cpp share.
#pragma once

#include "cpu/gemm.h"
#include "cpu/rows.h"

namespace snk::cpu::SNK_ISA {

// Views of scratch memory.
inline View f32_matrix(float* data, int64_t rows, int64_t cols) {
  return {data, DType::f32, rows, cols, cols, 1};
}

// W + scaling · B A in fp32, or W itself where there is no low-rank part.
inline Status merged_weight(const View& weight, const View& lora_A, const View& lora_B,
                            float scaling, int threads, Scratch& packed, Scratch& merged,
                            View* out) {
  *out = weight;
  if (!lora_A) return Status::ok;
  float* values = merged.take(weight.rows * weight.cols);
  if (values == nullptr && weight.rows * weight.cols > 0) return Status::out_of_memory;
  *out = f32_matrix(values, weight.rows, weight.cols);
  const Product product{lora_B, lora_A.transposed()};
  return gemm(&product, 1, threads, packed, [&](int64_t row, float* low_rank) {
    float* w = values + row * weight.cols;
    read_row(weight, row, w);
    for (int64_t j = 0; j < weight.cols; ++j) w[j] += scaling * low_rank[j];
  });
}

// x Wᵀ + scaling · (x Aᵀ) Bᵀ, a row at a time, bias not added. With many rows it is less
// arithmetic to merge the weights first; with few, to run the low-rank part beside them.
template <typename Epilogue>
Status stitch_rows(const StitchForward& p, Epilogue epilogue) {
  static thread_local Scratch packed, low_rank;
  const int64_t M = p.x.rows, K = p.weight.cols, N = p.weight.rows, r = p.lora_A ? p.lora_A.rows : 0;
  if (M * (K + N) >= K * N || r == 0) {
    View weight;
    const Status status = merged_weight(p.weight, p.lora_A, p.lora_B, p.scaling, p.threads, packed,
                                        low_rank, &weight);
    if (status != Status::ok) return status;
    const Product product{p.x, weight};
    return gemm(&product, 1, p.threads, packed, epilogue);
  }
  float* s = low_rank.take(M * r);
  if (s == nullptr && M > 0) return Status::out_of_memory;
  const View S = f32_matrix(s, M, r);
  const Status status = gemm_into(p.x, p.lora_A, p.scaling, S, p.threads, packed);
  if (status != Status::ok) return status;
  const Product products[] = {{p.x, p.weight}, {S, p.lora_B}};
  return gemm(products, 2, p.threads, packed, epilogue);
}

// All gradients of a stitch but the bias's, which comes with the sums over rows.
inline Status stitch_products_backward(const StitchBackward& p) {
  static thread_local Scratch packed, merged, low_rank;
  const int64_t M = p.x.rows;
  Status status = Status::ok;
  if (p.grad_x) {
    View weight;
    status = merged_weight(p.weight, p.lora_A, p.lora_B, p.scaling, p.threads, packed, merged,
                           &weight);
    if (status != Status::ok) return status;
    status = gemm_into(p.grad_y, weight.transposed(), 1.0f, p.grad_x, p.threads, packed);
    if (status != Status::ok) return status;
  }
  if (p.grad_lora_A || p.grad_lora_B) {
    const int64_t r = p.lora_A.rows;
    float* values = low_rank.take(M * r);
    if (values == nullptr && M * r > 0) return Status::out_of_memory;
    const View S = f32_matrix(values, M, r);
    if (p.grad_lora_A) {  // dA = scaling · (dy B)ᵀ x
      status = gemm_into(p.grad_y, p.lora_B.transposed(), p.scaling, S, p.threads, packed);
      if (status != Status::ok) return status;
      status = gemm_into(S.transposed(), p.x.transposed(), 1.0f, p.grad_lora_A, p.threads, packed);
      if (status != Status::ok) return status;
    }
    if (p.grad_lora_B) {  // dB = scaling · dyᵀ (x Aᵀ)
      status = gemm_into(p.x, p.lora_A, p.scaling, S, p.threads, packed);
      if (status != Status::ok) return status;
      status =
          gemm_into(p.grad_y.transposed(), S.transposed(), 1.0f, p.grad_lora_B, p.threads, packed);
      if (status != Status::ok) return status;
    }
  }
  if (p.grad_weight)
    status = gemm_into(p.grad_y.transposed(), p.x.transposed(), 1.0f, p.grad_weight, p.threads,
                       packed);
  return status;
}

}  // namespace snk::cpu::SNK_ISA
