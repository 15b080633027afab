// snkernels._C: the compiled kernels, called with tensors. Shapes, number formats and devices are
// checked where a tensor becomes a View (tensor.h).
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "plain.h"
#include "run_cpu.h"
#include "tensor.h"

namespace py = pybind11;

#ifdef SNK_WITH_CUDA
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cuda/kernels.h"

namespace pybind11::detail {
// What Python was told of a tensor by `view`: (pointer, dtype, rows, cols, row_stride, col_stride),
// or None.
template <>
struct type_caster<snk::View> {
  PYBIND11_TYPE_CASTER(snk::View, const_name("tuple[int, int, int, int, int, int] | None"));

  bool load(handle source, bool) {
    value = snk::View();
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 6) return false;
    int64_t field[6];
    for (int i = 0; i < 6; ++i) {
      field[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
      if (field[i] == -1 && PyErr_Occurred()) throw error_already_set();
    }
    value = {reinterpret_cast<void*>(field[0]), snk::DType(field[1]), field[2], field[3], field[4],
             field[5]};
    return true;
  }

  static handle cast(const snk::View& view, return_value_policy, handle) {
    return make_tuple(reinterpret_cast<uintptr_t>(view.data), int(view.dtype), view.rows, view.cols,
                      view.row_stride, view.col_stride)
        .release();
  }
};
}  // namespace pybind11::detail
#endif

namespace {

using py::handle;
using snk::ANY, snk::run_cpu, snk::View, snk::vector_of, snk::view_of;

// (first row, last row, scaling, weight, bias, lora_A, lora_B, norm_weight, norm_bias), and for the
// backward the gradients of those six if they are wanted; all tensors or None.
snk::cpu::StitchGroup group_of(handle source, int64_t in_features, int64_t out_features,
                               bool backward) {
  const auto members = source.cast<py::tuple>();
  const int64_t per_tensor = backward ? 2 : 1, tensors = (int64_t(members.size()) - 3) / per_tensor;
  if (members.size() != size_t(3 + 6 * per_tensor))
    throw py::value_error("tensors must hold 6 for each group, but one has " +
                          std::to_string(tensors));
  const auto at = [&](size_t i) { return handle(PyTuple_GET_ITEM(members.ptr(), i)); };
  if (at(3).is_none() && in_features != out_features)
    throw py::value_error("weight must be given to get from " + std::to_string(in_features) + " to " +
                          std::to_string(out_features) + " features, but it is None");
  if (at(5).is_none() != at(6).is_none()) throw py::value_error("lora_A and lora_B go together");
  snk::cpu::StitchGroup group{};
  group.first = at(0).cast<int64_t>();
  group.last = at(1).cast<int64_t>();
  group.scaling = at(2).cast<float>();
  group.weight = view_of("weight", at(3), out_features, in_features);
  group.bias = vector_of("bias", at(4), out_features);
  group.lora_A = view_of("lora_A", at(5), ANY, in_features);
  group.lora_B = view_of("lora_B", at(6), out_features, group.lora_A.rows);
  group.norm_weight = vector_of("norm_weight", at(7), out_features);
  group.norm_bias = vector_of("norm_bias", at(8), out_features);
  if (backward) {
    group.grad_weight = view_of("grad_weight", at(9), out_features, in_features);
    group.grad_bias = vector_of("grad_bias", at(10), out_features);
    group.grad_lora_A = view_of("grad_lora_A", at(11), group.lora_A.rows, in_features);
    group.grad_lora_B = view_of("grad_lora_B", at(12), out_features, group.lora_A.rows);
    group.grad_norm_weight = vector_of("grad_norm_weight", at(13), out_features);
    group.grad_norm_bias = vector_of("grad_norm_bias", at(14), out_features);
  }
  return group;
}

// All groups. Each begins where the one before it ends, and so they cover the rows: kernels neither
// look at others nor leave any out.
std::vector<snk::cpu::StitchGroup> groups_of(const py::list& groups, int64_t rows,
                                             int64_t in_features, int64_t out_features,
                                             bool backward) {
  std::vector<snk::cpu::StitchGroup> all;
  all.reserve(groups.size());
  int64_t end = 0;
  bool rising = true;
  for (const auto& source : groups) {
    const auto& group = all.emplace_back(group_of(source, in_features, out_features, backward));
    rising = rising && group.first == end && group.last >= end;
    end = group.last;
  }
  if (rising && end == rows) return all;
  std::string message = "group_offsets must rise from 0 to the " + std::to_string(rows) +
                        " rows of x, but the groups have rows";
  for (const auto& group : all)
    message += " [" + std::to_string(group.first) + ", " + std::to_string(group.last) + ")";
  throw py::value_error(message);
}

// One value for each `rows_per_scale` of the rows; the last may have fewer.
View scale_of(handle drop_path_scale, int64_t rows, int64_t rows_per_scale) {
  const View scale = vector_of("drop_path_scale", drop_path_scale, ANY);
  if (scale && scale.cols * rows_per_scale < rows)
    throw py::value_error("drop_path_scale must have a value for every row");
  return scale;
}

void bind_cpu(py::module_& m) {
  using namespace snk::cpu;
  m.def("cpu_isa", &isa, "Name of the instruction set in use.");
  m.def("cpu_isas", [] {
    py::list names;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) names.append(*name);
    return names;
  }, "Instruction sets that this machine runs, best first.");
  m.def("cpu_is_amd", &is_amd, "Whether AMD made this machine's CPU.");
  m.def("cpu_use_isa", [](const std::string& name) {
    if (!use_isa(name.c_str())) throw py::value_error("this machine cannot run " + name);
  }, "Makes the CPU kernels use another instruction set.");

  m.def("stitch_forward", [](handle x, const py::list& groups, int64_t features, float eps,
                             handle y, handle normed, handle mean, handle rstd, int threads) {
    StitchForward p;
    p.x = view_of("x", x, ANY, ANY);
    const int64_t rows = p.x.rows;
    const auto own = groups_of(groups, rows, p.x.cols, features, false);
    p.groups = own.data();
    p.count = int64_t(own.size());
    p.eps = eps;
    p.y = view_of("y", y, rows, features);
    p.normed = view_of("normed", normed, rows, features);
    p.mean = vector_of("mean", mean, rows);
    p.rstd = vector_of("rstd", rstd, rows);
    p.threads = threads;
    run_cpu(kernels().stitch_forward, p);
  });
  m.def("stitch_backward", [](handle grad_y, handle grad_normed, handle x, const py::list& groups,
                              int64_t features, handle y, handle mean, handle rstd, handle grad_x,
                              int threads) {
    StitchBackward p;
    p.x = view_of("x", x, ANY, ANY);
    const int64_t rows = p.x.rows;
    p.grad_y = view_of("grad_y", grad_y, rows, features);
    p.grad_normed = view_of("grad_normed", grad_normed, rows, features);
    const auto own = groups_of(groups, rows, p.x.cols, features, true);
    p.groups = own.data();
    p.count = int64_t(own.size());
    p.y = view_of("y", y, rows, features);
    p.mean = vector_of("mean", mean, rows);
    p.rstd = vector_of("rstd", rstd, rows);
    p.grad_x = view_of("grad_x", grad_x, rows, p.x.cols);
    p.threads = threads;
    run_cpu(kernels().stitch_backward, p);
  });
  m.def("residual_layer_norm_forward",
        [](handle h, handle branch, handle layer_scale, handle drop_path_scale,
           int64_t rows_per_scale, handle norm_weight, handle norm_bias, float eps, handle sum,
           handle normed, handle mean, handle rstd, int threads) {
          ResidualLayerNormForward p;
          p.h = view_of("h", h, ANY, ANY);
          const int64_t rows = p.h.rows, features = p.h.cols;
          p.branch = view_of("branch", branch, rows, features);
          p.layer_scale = vector_of("layer_scale", layer_scale, features);
          p.drop_path_scale = scale_of(drop_path_scale, rows, rows_per_scale);
          p.rows_per_scale = rows_per_scale;
          p.norm_weight = vector_of("norm_weight", norm_weight, features);
          p.norm_bias = vector_of("norm_bias", norm_bias, features);
          p.eps = eps;
          p.sum = view_of("sum", sum, rows, features);
          p.normed = view_of("normed", normed, rows, features);
          p.mean = vector_of("mean", mean, rows);
          p.rstd = vector_of("rstd", rstd, rows);
          p.threads = threads;
          run_cpu(kernels().residual_layer_norm_forward, p);
        });
  m.def("residual_layer_norm_backward",
        [](handle grad_sum, handle grad_normed, handle branch, handle layer_scale,
           handle drop_path_scale, int64_t rows_per_scale, handle sum, handle mean, handle rstd,
           handle norm_weight, handle grad_h, handle grad_branch, handle grad_layer_scale,
           handle grad_norm_weight, handle grad_norm_bias, int threads) {
          ResidualLayerNormBackward p;
          p.sum = view_of("sum", sum, ANY, ANY);
          const int64_t rows = p.sum.rows, features = p.sum.cols;
          p.grad_sum = view_of("grad_sum", grad_sum, rows, features);
          p.grad_normed = view_of("grad_normed", grad_normed, rows, features);
          p.branch = view_of("branch", branch, rows, features);
          p.layer_scale = vector_of("layer_scale", layer_scale, features);
          p.drop_path_scale = scale_of(drop_path_scale, rows, rows_per_scale);
          p.rows_per_scale = rows_per_scale;
          p.mean = vector_of("mean", mean, rows);
          p.rstd = vector_of("rstd", rstd, rows);
          p.norm_weight = vector_of("norm_weight", norm_weight, features);
          p.grad_h = view_of("grad_h", grad_h, rows, features);
          p.grad_branch = view_of("grad_branch", grad_branch, rows, features);
          p.grad_layer_scale = vector_of("grad_layer_scale", grad_layer_scale, features);
          p.grad_norm_weight = vector_of("grad_norm_weight", grad_norm_weight, features);
          p.grad_norm_bias = vector_of("grad_norm_bias", grad_norm_bias, features);
          p.threads = threads;
          run_cpu(kernels().residual_layer_norm_backward, p);
        });
}

#ifdef SNK_WITH_CUDA
template <typename Params>
void run_cuda(int (*launch)(const Params&), const Params& params) {
  int error;
  {
    py::gil_scoped_release release;
    error = launch(params);
  }
  if (error != 0) throw std::runtime_error(snk::cuda::error_string(error));
}

void bind_cuda(py::module_& m) {
  using namespace snk::cuda;
  m.def("cuda_view", [](const char* name, handle tensor, int64_t rows, int64_t cols) {
    return view_of(name, tensor, rows, cols, false);
  }, "What the functions below are told of a tensor.");
  m.def("cuda_device_count", &device_count, "Devices that the driver shows; 0 without a driver.");
  // A stitch has the fields of snk::cuda::LowRank.
  m.def("cuda_merge", [](const std::vector<std::tuple<View, View, View, float>>& stitches,
                         View merged, int device, uintptr_t stream) {
    std::vector<LowRank> groups;
    for (const auto& stitch : stitches)
      std::apply([&](auto&... fields) { groups.push_back(LowRank{fields...}); }, stitch);
    run_cuda(merge, Merge{groups.data(), int(groups.size()), merged, device,
                          reinterpret_cast<void*>(stream)});
  });
  // `offsets` is a pointer, 0 for one group of all rows; a projection has the fields of
  // snk::cuda::Projection.
  m.def("cuda_stitch_layer_norm_sm90",
        [](View x, uintptr_t offsets, bool offsets_on_host,
           const std::vector<std::tuple<View, View, View, View>>& projections, float eps, View y,
           View normed, View mean, View rstd, int device, uintptr_t stream) {
          std::vector<Projection> groups;
          for (const auto& projection : projections)
            std::apply([&](auto&... fields) { groups.push_back(Projection{fields...}); },
                       projection);
          run_cuda(stitch_layer_norm_sm90,
                   StitchLayerNorm{x, reinterpret_cast<const int64_t*>(offsets), offsets_on_host,
                                   groups.data(), int(groups.size()), eps, y, normed, mean, rstd,
                                   device, reinterpret_cast<void*>(stream)});
        });
  m.def("cuda_sm90_kernel_for",
        [](int64_t in_features, int64_t out_features,
           bool grouped) -> std::optional<std::tuple<int, int, int, int>> {
          const auto kernel = sm90_kernel_for(in_features, out_features, grouped);
          if (!kernel) return std::nullopt;
          return std::tuple(kernel->width, kernel->slices, kernel->stages, kernel->shared);
        },
        "(columns of a CTA, CTAs of a cluster, stages, bytes of shared memory) of the kernel that "
        "would be launched; None if there is none.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of snkernels.";
  m.attr("compiler") = __VERSION__;
  m.attr("openmp") =
#ifdef _OPENMP
      true;
#else
      false;
#endif
  bind_cpu(m);
  snk::bind_plain(m);
#ifdef SNK_WITH_CUDA
  m.attr("cuda_version") = SNK_CUDA_VERSION;
  m.attr("cuda_archs") = SNK_CUDA_ARCHS;
  bind_cuda(m);
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif
}
