// Number formats in device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "view.h"

namespace snk::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// A vector argument of any of the three formats; few bytes beside the rows.
struct Vector {
  const void* data;
  DType dtype;
  __device__ float at(int j, float if_absent) const {
    if (data == nullptr) return if_absent;
    if (dtype == DType::f16) return to_float(static_cast<const __half*>(data)[j]);
    if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(data)[j]);
    return static_cast<const float*>(data)[j];
  }
};

// Two halves in one register, the first in the lower bits: the order of memory and of the tensor
// cores' fragments.
template <typename T>
__device__ uint32_t pack(float first, float second) {
  const T low = from_float<T>(first), high = from_float<T>(second);
  uint16_t low_bits, high_bits;
  memcpy(&low_bits, &low, 2);
  memcpy(&high_bits, &high, 2);
  return low_bits | uint32_t(high_bits) << 16;
}
template <typename T>
__device__ float2 unpack(uint32_t word) {
  const uint16_t low_bits = uint16_t(word), high_bits = uint16_t(word >> 16);
  T low, high;
  memcpy(&low, &low_bits, 2);
  memcpy(&high, &high_bits, 2);
  return {to_float(low), to_float(high)};
}

}  // namespace snk::cuda
