// Number formats in device code.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

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
__device__ uint32_t pack(float first, float second);
template <>
__device__ inline uint32_t pack<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

template <typename T>
__device__ float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<__half>(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  return __half22float2(pair);
}
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t word) {
  __nv_bfloat162 pair;
  memcpy(&pair, &word, 4);
  return __bfloat1622float2(pair);
}

}  // namespace snk::cuda
