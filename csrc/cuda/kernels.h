// The CUDA kernels' launchers: plain params in, a CUDA error code out (0 is success). They launch
// on the given stream of the given device and never synchronise.
#pragma once

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

int device_count();
const char* error_string(int error);

}  // namespace snk::cuda
