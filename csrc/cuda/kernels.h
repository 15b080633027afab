// The CUDA kernels' launchers: plain params in, a CUDA error code out (0 is success). They launch
// on the given stream of the given device and never synchronise.
#pragma once

#include <optional>

#include "view.h"

namespace snk::cuda {

// y = gemm + bias and LN(y), from the output of a GEMM; the row statistics too. All rows are
// contiguous; `mean` and `rstd` are fp32.
struct BiasLayerNorm {
  View gemm, bias, norm_weight, norm_bias;
  float eps;
  View y, normed, mean, rstd;
  int device;
  void* stream;
};
int bias_layer_norm(const BiasLayerNorm&);

// The parameters of a stitch and of the norm behind it.
struct Stitch {
  View weight, bias, lora_A, lora_B;
  float scaling;
  View norm_weight, norm_bias;
};

// y = x Wᵀ + b + s (x Aᵀ) Bᵀ and LN(y) in one kernel, for compute capability 9.0 alone. Group i, with
// a stitch of its own, has rows offsets[i] up to offsets[i + 1]: groups + 1 values, which in device
// memory nobody looks at before the kernel does. A null pointer means one group of all rows.
// x, weight, lora_A and lora_B have the same half-precision dtype, and contiguous rows that begin
// and end at multiples of 16 bytes: for lora_B pad the rank. Up to 2048 columns and rank 64; y,
// normed and the statistics as above.
struct StitchLayerNorm {
  View x;
  const int64_t* offsets;
  bool offsets_on_host;
  const Stitch* stitches;
  int groups;
  float eps;
  View y, normed, mean, rstd;
  int device;
  void* stream;
};
int stitch_layer_norm_sm90(const StitchLayerNorm&);

// The kernel that it launches for so many columns and such a rank, the highest of all groups: the
// columns of a CTA, the rank it is built for, and the bytes of shared memory that each CTA asks for
// at launch, which nothing else tells on a machine without a GPU. None takes a higher rank or more
// columns.
struct Sm90Kernel {
  int width, rank, shared;
};
std::optional<Sm90Kernel> sm90_kernel_for(int64_t cols, int64_t rank);

int device_count();
const char* error_string(int error);

}  // namespace snk::cuda
