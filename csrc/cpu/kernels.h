// The table of CPU kernels; there is one per instruction set, and dispatch.cpp hands out the best.
#pragma once

#include "cpu/params.h"

namespace snk::cpu {

struct Kernels {
  Status (*stitch_forward)(const StitchForward&);
  Status (*stitch_backward)(const StitchBackward&);
  Status (*residual_layer_norm_forward)(const ResidualLayerNormForward&);
  Status (*residual_layer_norm_backward)(const ResidualLayerNormBackward&);
};

// The kernels of the instruction set in use.
const Kernels& kernels();
const char* isa();
// Null-terminated list of what this machine can run, best first.
const char* const* supported_isas();
// False, and nothing changed, where this machine cannot run it.
bool use_isa(const char* name);
// Whether AMD made this machine's CPU.
bool is_amd();

}  // namespace snk::cpu
