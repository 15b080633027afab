// The launch of the Hopper kernel: tensor maps, cluster and grid.
#include "cuda/stitch_layer_norm_sm90.h"

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.h"
#include "cuda/tensor_map.h"

namespace snk::cuda {
namespace {

using namespace sm90;

// How many clusters of this kernel the device runs at a time: asked once, as it takes longer than a
// launch. The kernel's shared memory limit is raised on the way.
template <typename Kernel>
cudaError_t resident_clusters(Kernel kernel, const cudaLaunchConfig_t& config, int device,
                              int slices, int& clusters) {
  // By kernel too: all of them have the same type, and so share this map.
  static std::map<std::tuple<Kernel, int, int>, int> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find({kernel, device, slices});
  if (found != known.end()) {
    clusters = found->second;
    return cudaSuccess;
  }
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidClusterSize;
  known[{kernel, device, slices}] = clusters;
  return cudaSuccess;
}

cudaError_t describe(const Stitch& stitch, int width, int rank, Group& group) {
  cudaError_t error = tile_map(stitch.weight, width, group.weight);
  if (rank > 0 && error == cudaSuccess) {
    const bool low_rank = stitch.lora_A.rows > 0;
    // Without one, the zeros that lie beyond W.
    error = tile_map(low_rank ? stitch.lora_A : stitch.weight, rank, group.lora_A);
    if (error == cudaSuccess)
      error = tile_map(low_rank ? stitch.lora_B : stitch.weight, width, group.lora_B);
    group.low_rank_row = low_rank ? 0 : int(stitch.weight.rows);
  }
  group.bias = {stitch.bias.data, stitch.bias.dtype};
  group.norm_weight = {stitch.norm_weight.data, stitch.norm_weight.dtype};
  group.norm_bias = {stitch.norm_bias.data, stitch.norm_bias.dtype};
  group.scaling = stitch.scaling;
  return error;
}

// The groups from `first` on, as many as one launch takes.
template <typename T, int WIDTH, int RANK, int GROUPS>
cudaError_t launch(const StitchLayerNorm& p, int first) {
  const int cols = int(p.y.cols), rows = int(p.y.rows), slices = sm90::slices(cols);
  Arguments<GROUPS> arguments{};
  arguments.groups = p.groups - first < GROUPS ? p.groups - first : GROUPS;
  cudaError_t error = tile_map(p.x, BAND, arguments.x);
  for (int i = 0; i < arguments.groups && error == cudaSuccess; ++i)
    error = describe(p.stitches[first + i], WIDTH, RANK, arguments.group[i]);
  if (error != cudaSuccess) return error;
  if (GROUPS > 1 && p.offsets_on_host)
    for (int i = 0; i <= arguments.groups; ++i) arguments.known[i] = int(p.offsets[first + i]);
  else if (GROUPS > 1)
    arguments.offsets = p.offsets + first;
  arguments.y = p.y.data;
  arguments.normed = p.normed.data;
  arguments.mean = static_cast<float*>(p.mean.data);
  arguments.rstd = static_cast<float*>(p.rstd.data);
  arguments.rows = rows;
  arguments.cols = cols;
  arguments.k_steps = int((p.x.cols + TILE_K - 1) / TILE_K);
  arguments.slices = slices;
  arguments.eps = p.eps;
  arguments.per_column = 1.0f / float(cols);

  const auto kernel = stitch_layer_norm_sm90_kernel<T, WIDTH, RANK, GROUPS>;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(slices), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(slices);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = Shared<WIDTH, RANK>::BYTES;
  config.stream = static_cast<cudaStream_t>(p.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters;
  error = resident_clusters(kernel, config, p.device, slices, clusters);
  if (error != cudaSuccess) return error;
  // Where each group begins only the device knows: every group may end in a band of its own.
  const int bands = (rows - 1) / BAND + arguments.groups;
  config.gridDim = dim3(slices * (bands < clusters ? bands : clusters));
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename T, int WIDTH, int RANK>
cudaError_t launch_groups(const StitchLayerNorm& p) {
  if (p.offsets == nullptr) return launch<T, WIDTH, RANK, 1>(p, 0);
  cudaError_t error = cudaSuccess;
  for (int first = 0; first < p.groups && error == cudaSuccess; first += MAX_GROUPS)
    error = launch<T, WIDTH, RANK, MAX_GROUPS>(p, first);
  return error;
}

// Calls `take` with the slice width and the padded rank of the kernel for so many columns and such a
// rank, as constants.
template <int WIDTH, typename Take>
cudaError_t for_rank(int64_t rank, const Take& take) {
  using Width = std::integral_constant<int, WIDTH>;
  if (rank == 0) return take(Width(), std::integral_constant<int, 0>());
  if (rank <= 16) return take(Width(), std::integral_constant<int, 16>());
  if (rank <= 64) return take(Width(), std::integral_constant<int, 64>());
  return cudaErrorInvalidValue;
}

template <typename Take>
cudaError_t for_shape(int64_t cols, int64_t rank, const Take& take) {
  if (cols > MAX_SLICES * MAX_WIDTH) return cudaErrorInvalidValue;
  return slice_width(int(cols)) == 192 ? for_rank<192>(rank, take) : for_rank<MAX_WIDTH>(rank, take);
}

template <typename T>
cudaError_t launch_for_shape(const StitchLayerNorm& p) {
  int64_t rank = 0;
  for (int i = 0; i < p.groups; ++i)
    if (p.stitches[i].lora_A.rows > rank) rank = p.stitches[i].lora_A.rows;
  return for_shape(p.y.cols, rank, [&](auto width, auto padded) {
    return launch_groups<T, decltype(width)::value, decltype(padded)::value>(p);
  });
}

}  // namespace

int stitch_layer_norm_sm90(const StitchLayerNorm& p) {
  if (p.y.rows == 0 || p.y.cols == 0) return cudaSuccess;
  return on_device(p.device, [&] {
    switch (p.x.dtype) {
      case DType::f16: return launch_for_shape<__half>(p);
      case DType::bf16: return launch_for_shape<__nv_bfloat16>(p);
      default: return cudaErrorInvalidValue;
    }
  });
}

std::optional<Sm90Kernel> sm90_kernel_for(int64_t cols, int64_t rank) {
  Sm90Kernel kernel{};
  const cudaError_t error = for_shape(cols, rank, [&](auto width, auto padded) {
    kernel = {width, padded, Shared<decltype(width)::value, decltype(padded)::value>::BYTES};
    return cudaSuccess;
  });
  return error == cudaSuccess ? std::optional(kernel) : std::nullopt;
}

}  // namespace snk::cuda
