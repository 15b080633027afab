#include <cstring>

#include "cpu/kernels.h"

// Every op file is compiled once per instruction set, into a namespace of that name.
#define SNK_DECLARE_ISA(isa)                                             \
  namespace snk::cpu::isa {                                              \
  Status stitch_forward(const StitchForward&);                           \
  Status stitch_backward(const StitchBackward&);                         \
  Status residual_layer_norm_forward(const ResidualLayerNormForward&);   \
  Status residual_layer_norm_backward(const ResidualLayerNormBackward&); \
  constexpr Kernels table{                                               \
      stitch_forward,                                                    \
      stitch_backward,                                                   \
      residual_layer_norm_forward,                                       \
      residual_layer_norm_backward,                                      \
  };                                                                     \
  }

SNK_DECLARE_ISA(portable)
#if defined(__x86_64__)
SNK_DECLARE_ISA(avx2)
SNK_DECLARE_ISA(avx512)
#endif

namespace snk::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool runs_here;
};

#if defined(__x86_64__)
const Isa isas[] = {
    {"avx512", &avx512::table,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("f16c")},
    {"avx2", &avx2::table,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c")},
    {"portable", &portable::table, true},
};
#else
const Isa isas[] = {{"portable", &portable::table, true}};
#endif

const Isa* best() {
  for (const Isa& isa : isas)
    if (isa.runs_here) return &isa;
  return nullptr;  // never: portable runs everywhere
}

const Isa* current = best();

}  // namespace

const Kernels& kernels() { return *current->table; }
const char* isa() { return current->name; }

const char* const* supported_isas() {
  static const char* names[4] = {};
  int n = 0;
  for (const Isa& isa : isas)
    if (isa.runs_here) names[n++] = isa.name;
  return names;
}

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

bool use_isa(const char* name) {
  for (const Isa& isa : isas)
    if (isa.runs_here && std::strcmp(isa.name, name) == 0) {
      current = &isa;
      return true;
    }
  return false;
}

}  // namespace snk::cpu
