// Launching on a device that need not be the calling thread's current one.
#pragma once

#include <cuda_runtime.h>

namespace snk::cuda {

template <typename Launch>
cudaError_t on_device(int device, Launch launch) {
  int previous;
  cudaError_t error = cudaGetDevice(&previous);
  if (error != cudaSuccess) return error;
  error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  error = launch();
  const cudaError_t restored = cudaSetDevice(previous);
  return error != cudaSuccess ? error : restored;
}

}  // namespace snk::cuda
