// The CUDA kernels' launchers: plain params in, a CUDA error code out (0 is success). They launch
// on the given stream of the given device and never synchronise.
#pragma once

#include <optional>

#include "view.h"

namespace snk::cuda {

// W, A and B of a stitch, all of one dtype, in contiguous rows that begin and end at multiples of 16
// bytes, also where they are half as wide: pad the rank of both to a multiple of 8. Rank 0: W alone.
struct LowRank {
  View weight, lora_A, lora_B;
  float scaling;
};

// W + s · B A of each group, rounded once to the half-precision dtype of `merged`, which holds one
// below the other. The stitches are fp32 or of that dtype, as whose factors A and B are multiplied.
struct Merge {
  const LowRank* stitches;
  int groups;
  View merged;
  int device;
  void* stream;
};
int merge(const Merge&);

// A projection and the norm behind it.
struct Projection {
  View weight, bias, norm_weight, norm_bias;
};

// y = x Wᵀ + b and LN(y) in one kernel, for compute capability 9.0 alone. Group i, with parameters
// of its own, has rows offsets[i] up to offsets[i + 1]: groups + 1 values, which in device memory
// nobody looks at before the kernel does. A null pointer means one group of all rows.
// x and weight have the same half-precision dtype, and contiguous rows that begin and end at
// multiples of 16 bytes; y and normed too. `mean` and `rstd` are fp32.
struct StitchLayerNorm {
  View x;
  const int64_t* offsets;
  bool offsets_on_host;
  const Projection* projections;
  int groups;
  float eps;
  View y, normed, mean, rstd;
  int device;
  void* stream;
};
int stitch_layer_norm_sm90(const StitchLayerNorm&);

// The kernel that it launches for these sizes: the columns of a CTA, the CTAs of a cluster, the
// stages of its ring, and the bytes of shared memory that each CTA asks for at launch, which nothing
// else tells on a machine without a GPU. None where W does not fit into a cluster's shared memory, or
// leaves too little of it.
struct Sm90Kernel {
  int width, slices, stages, shared;
};
std::optional<Sm90Kernel> sm90_kernel_for(int64_t in_features, int64_t out_features, bool grouped);

int device_count();
const char* error_string(int error);

}  // namespace snk::cuda
