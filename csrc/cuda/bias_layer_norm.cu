// The LayerNorm part of stitch_layer_norm with both outputs: one warp holds a row in registers, so
// the row is read once and the variance is taken about the true mean.
#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/number.h"

namespace snk::cuda {
namespace {

constexpr int WARP = 32;
constexpr int ROWS_PER_BLOCK = 4;
// Values per lane: a warp holds rows of up to 32 · 64 = 2048 values.
constexpr int MAX_VALUES = 64;

__device__ float warp_sum(float x) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <typename T, int VALUES>
__global__ void __launch_bounds__(WARP* ROWS_PER_BLOCK)
    bias_layer_norm_kernel(const T* __restrict__ gemm, Vector bias, Vector norm_weight,
                           Vector norm_bias, float eps, int64_t rows, int cols,
                           T* __restrict__ y, T* __restrict__ normed, float* __restrict__ mean_out,
                           float* __restrict__ rstd_out) {
  const int64_t row = int64_t(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.y;
  if (row >= rows) return;
  const int lane = threadIdx.x;
  const int64_t start = row * cols;

  float value[VALUES];
  float total = 0;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int j = i * WARP + lane;
    // Rounded before the statistics: LN of the y that is returned, which the backward starts from.
    value[i] = j < cols ? to_float(from_float<T>(to_float(gemm[start + j]) + bias.at(j, 0.0f))) : 0;
    total += value[i];
  }
  const float mean = warp_sum(total) / cols;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const float d = i * WARP + lane < cols ? value[i] - mean : 0.0f;
    squares += d * d;
  }
  const float rstd = rsqrtf(warp_sum(squares) / cols + eps);
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int j = i * WARP + lane;
    if (j < cols) {
      y[start + j] = from_float<T>(value[i]);
      normed[start + j] = from_float<T>((value[i] - mean) * rstd * norm_weight.at(j, 1.0f) +
                                        norm_bias.at(j, 0.0f));
    }
  }
  if (lane == 0) {
    mean_out[row] = mean;
    rstd_out[row] = rstd;
  }
}

template <typename T, int VALUES>
cudaError_t launch(const BiasLayerNorm& p) {
  const int64_t rows = p.gemm.rows;
  const dim3 block(WARP, ROWS_PER_BLOCK);
  const unsigned blocks = unsigned((rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK);
  bias_layer_norm_kernel<T, VALUES><<<blocks, block, 0, static_cast<cudaStream_t>(p.stream)>>>(
      static_cast<const T*>(p.gemm.data), {p.bias.data, p.bias.dtype},
      {p.norm_weight.data, p.norm_weight.dtype}, {p.norm_bias.data, p.norm_bias.dtype}, p.eps, rows,
      int(p.gemm.cols), static_cast<T*>(p.y.data), static_cast<T*>(p.normed.data),
      static_cast<float*>(p.mean.data), static_cast<float*>(p.rstd.data));
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_for_width(const BiasLayerNorm& p) {
  const int64_t cols = p.gemm.cols;
  if (cols <= WARP * 12) return launch<T, 12>(p);
  if (cols <= WARP * 32) return launch<T, 32>(p);
  if (cols <= WARP * MAX_VALUES) return launch<T, MAX_VALUES>(p);
  return cudaErrorInvalidValue;
}

}  // namespace

int bias_layer_norm(const BiasLayerNorm& p) {
  if (p.gemm.rows == 0 || p.gemm.cols == 0) return cudaSuccess;
  return on_device(p.device, [&] {
    switch (p.gemm.dtype) {
      case DType::f32: return launch_for_width<float>(p);
      case DType::f16: return launch_for_width<__half>(p);
      case DType::bf16: return launch_for_width<__nv_bfloat16>(p);
    }
    return cudaErrorInvalidValue;
  });
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace snk::cuda
