// What the CPU kernels take: plain structs, no torch.
#pragma once

#include "view.h"

namespace snk::cpu {

// A stitch and its rows [first, last): y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ, and LN(y) by a norm of
// its own. Without a weight it is the identity, y = x. The gradients are for the backward.
struct StitchGroup {
  int64_t first, last;
  float scaling;
  View weight, bias, lora_A, lora_B, norm_weight, norm_bias;
  View grad_weight, grad_bias, grad_lora_A, grad_lora_B, grad_norm_weight, grad_norm_bias;

  // A weight without elements has no data either, but it has a shape.
  bool identity() const { return weight.rows == 0 && weight.cols == 0; }
};

// `normed` and the row statistics that its backward needs (fp32, one row of M values each) are
// absent together: then there is no LayerNorm.
struct StitchForward {
  View x;
  const StitchGroup* groups;
  int64_t count;
  float eps;
  View y, normed, mean, rstd;
  int threads;
};

// Absent `grad_normed`: there was no LayerNorm, or only y was used, and y and the statistics are
// not looked at. Absent `grad_y`: only LN(y) was used.
struct StitchBackward {
  View grad_y, grad_normed, x;
  const StitchGroup* groups;
  int64_t count;
  View y, mean, rstd, grad_x;
  int threads;
};

// sum = h + layer_scale · drop_path_scale · branch, and LN(sum). `drop_path_scale` has one value
// for every `rows_per_scale` rows. Absent scales are 1. Without a backward to come `mean` and `rstd`,
// the row statistics, may be absent.
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
