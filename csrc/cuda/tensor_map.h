// Tensor maps: what the copy engine knows about a matrix.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/sm90_layout.h"
#include "view.h"

namespace snk::cuda {

// A contiguous half-precision matrix whose rows begin at multiples of 16 bytes, read in tiles of
// `tile_rows` × 64, 128-byte swizzled. Outside the matrix a tile is zero.
//
// The encoder belongs to the driver. It is asked for at run time, because a module that links
// libcuda does not load where there is no driver.
inline cudaError_t tile_map(const View& matrix, int tile_rows, CUtensorMap& map) {
  static void* const encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr;
  }();
  if (encoder == nullptr) return cudaErrorInsufficientDriver;

  const cuuint64_t size[2] = {cuuint64_t(matrix.cols), cuuint64_t(matrix.rows)};
  const cuuint64_t row_bytes[1] = {size[0] * 2};
  const cuuint32_t tile[2] = {sm90::TILE_K, cuuint32_t(tile_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encoder)(
      &map,
      matrix.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      2, matrix.data, size, row_bytes, tile, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // The runtime's error numbers are the driver's.
  return cudaError_t(result);
}

}  // namespace snk::cuda
