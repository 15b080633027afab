// The launch of the Hopper kernel: tensor maps, cluster and grid.
#include "cuda/stitch_layer_norm_sm90.h"

#include <algorithm>
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
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidClusterSize;
  known[{kernel, device, slices}] = clusters;
  return cudaSuccess;
}

// How the columns and the shared memory of a CTA are split.
struct Layout {
  int slices, steps, stages, bytes;
};

// None if W does not fit into the shared memory of a cluster beside the shortest ring.
template <int WIDTH, int GROUPS>
std::optional<Layout> layout(int64_t in_features, int64_t out_features) {
  if (out_features > WIDTH * MAX_SLICES || in_features > STEP * MAX_STEPS) return std::nullopt;
  Layout found{};
  found.slices = int((out_features + WIDTH - 1) / WIDTH);
  found.steps = int((in_features + STEP - 1) / STEP);
  const auto bytes = [&] {
    return Shared<WIDTH, GROUPS>::bytes(found.steps, found.stages, found.slices);
  };
  // Fewer than three bands: see where `finish` sends.
  found.stages = std::min(3 * found.steps - 1, MAX_STAGES);
  while (bytes() > MAX_SHARED)
    if (--found.stages < 2) return std::nullopt;
  found.bytes = bytes();
  return found;
}

// Calls `take` with the kernel's width of a slice as a constant, and the layout, if there is one.
// What counts, in this order: a ring that is longer than the latency of memory, few columns that stay
// empty, clusters that fill the chip (its processors come in groups of 16 or 18), small clusters.
template <int GROUPS, typename Take>
void for_shape(int64_t in_features, int64_t out_features, const Take& take) {
  constexpr int LONG_RING = 4;
  using Cost = std::tuple<bool, int, bool, int>;
  int best = 0;
  Cost least;
  const auto look = [&](auto width) {
    const auto found = layout<width, GROUPS>(in_features, out_features);
    if (!found) return;
    const int slices = found->slices;
    const bool fills = (slices & (slices - 1)) == 0;
    const Cost cost{found->stages < std::min(LONG_RING, 3 * found->steps - 1), slices * width,
                    !fills, slices};
    if (best == 0 || cost < least) best = width, least = cost;
  };
  const auto take_best = [&](auto width) {
    if (best == width) take(width, *layout<width, GROUPS>(in_features, out_features));
  };
  const auto each = [](const auto& call) {
    call(std::integral_constant<int, 64>());
    call(std::integral_constant<int, 96>());
    call(std::integral_constant<int, 128>());
  };
  each(look);
  each(take_best);
}

// The groups from `first` on, as many as one launch takes.
template <typename T, int WIDTH, int GROUPS>
cudaError_t launch(const StitchLayerNorm& p, const Layout& layout, int first) {
  const int cols = int(p.y.cols), rows = int(p.y.rows), slices = layout.slices;
  Arguments<GROUPS> arguments{};
  arguments.groups = p.groups - first < GROUPS ? p.groups - first : GROUPS;
  cudaError_t error = tile_map(p.x, BAND, arguments.x);
  for (int i = 0; i < arguments.groups && error == cudaSuccess; ++i) {
    const Projection& own = p.projections[first + i];
    Group& group = arguments.group[i];
    error = tile_map(own.weight, WIDTH, group.weight);
    group.bias = {own.bias.data, own.bias.dtype};
    group.norm_weight = {own.norm_weight.data, own.norm_weight.dtype};
    group.norm_bias = {own.norm_bias.data, own.norm_bias.dtype};
  }
  if (error != cudaSuccess) return error;
  if (GROUPS > 1 && p.offsets_on_host)
    for (int i = 0; i <= arguments.groups; ++i)
      arguments.known[i] = int(std::clamp<int64_t>(p.offsets[first + i], 0, rows));
  else if (GROUPS > 1)
    arguments.offsets = p.offsets + first;
  arguments.y = p.y.data;
  arguments.normed = p.normed.data;
  arguments.mean = static_cast<float*>(p.mean.data);
  arguments.rstd = static_cast<float*>(p.rstd.data);
  arguments.rows = rows;
  arguments.cols = cols;
  arguments.steps = layout.steps;
  arguments.stages = layout.stages;
  arguments.slices = slices;
  arguments.eps = p.eps;
  arguments.per_column = 1.0f / float(cols);

  const auto kernel = stitch_layer_norm_sm90_kernel<T, WIDTH, GROUPS>;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {unsigned(slices), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(slices);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = MAX_SHARED;
  config.stream = static_cast<cudaStream_t>(p.stream);
  config.attrs = attributes;
  config.numAttrs = 1;  // occupancy is asked of the cluster alone
  int clusters;
  error = resident_clusters(kernel, config, p.device, slices, clusters);
  if (error != cudaSuccess) return error;
  // Where each group begins only the device knows: every group may end in a band of its own.
  const int bands = (rows - 1) / BAND + arguments.groups;
  config.gridDim = dim3(slices * (bands < clusters ? bands : clusters));
  config.dynamicSmemBytes = layout.bytes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

template <typename T>
cudaError_t launch_for_shape(const StitchLayerNorm& p) {
  cudaError_t error = cudaErrorInvalidValue;
  if (p.offsets == nullptr)
    for_shape<1>(p.x.cols, p.y.cols, [&](auto width, const Layout& layout) {
      error = launch<T, width, 1>(p, layout, 0);
    });
  else
    for_shape<MAX_GROUPS>(p.x.cols, p.y.cols, [&](auto width, const Layout& layout) {
      error = cudaSuccess;
      for (int first = 0; first < p.groups && error == cudaSuccess; first += MAX_GROUPS)
        error = launch<T, width, MAX_GROUPS>(p, layout, first);
    });
  return error;
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

std::optional<Sm90Kernel> sm90_kernel_for(int64_t in_features, int64_t out_features, bool grouped) {
  std::optional<Sm90Kernel> kernel;
  const auto take = [&](auto width, const Layout& layout) {
    kernel = Sm90Kernel{width, layout.slices, layout.stages, layout.bytes};
  };
  if (grouped) for_shape<MAX_GROUPS>(in_features, out_features, take);
  else for_shape<1>(in_features, out_features, take);
  return kernel;
}

}  // namespace snk::cuda
