// What the runtime says of devices and errors.
#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace snk::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace snk::cuda
