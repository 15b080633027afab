// What the CPU kernels take: plain structs, no torch.
#pragma once

#include "view.h"

namespace snk::cpu {

// y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ
struct StitchForward {
  View x, weight, bias, lora_A, lora_B;
  float scaling;
  View y;
  int threads;
};

// Also LN(y) and the row statistics that its backward needs (fp32, one row of M values each).
struct StitchLayerNormForward {
  StitchForward stitch;
  View norm_weight, norm_bias;
  float eps;
  View normed, mean, rstd;
};

struct StitchBackward {
  View grad_y, x, weight, lora_A, lora_B;
  float scaling;
  View grad_x, grad_weight, grad_bias, grad_lora_A, grad_lora_B;
  int threads;
};

// `stitch.grad_y` may be absent: then only LN(y) was used.
struct StitchLayerNormBackward {
  StitchBackward stitch;
  View grad_normed, y, mean, rstd, norm_weight;
  View grad_norm_weight, grad_norm_bias;
};

// sum = h + layer_scale · drop_path_scale · branch, and LN(sum). `drop_path_scale` has one value
// for every `rows_per_scale` rows. Absent scales are 1.
struct ResidualLayerNormForward {
  View h, branch, layer_scale, drop_path_scale;
  int64_t rows_per_scale;
  View norm_weight, norm_bias;
  float eps;
  View sum, normed, mean, rstd;
  int threads;
};

// Either incoming gradient may be absent.
struct ResidualLayerNormBackward {
  View grad_sum, grad_normed, branch, layer_scale, drop_path_scale;
  int64_t rows_per_scale;
  View sum, mean, rstd, norm_weight;
  View grad_h, grad_branch, grad_layer_scale, grad_norm_weight, grad_norm_bias;
  int threads;
};

}  // namespace snk::cpu
