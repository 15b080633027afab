// snkernels._C: the compiled kernels, called with integers for pointers. Shapes, number formats and
// devices are checked where a tensor becomes a View (tensor.h); nothing is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "tensor.h"
#ifdef SNK_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace pybind11::detail {
// A View is (pointer, dtype, rows, cols, row_stride, col_stride), or None.
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
};

// A StitchGroup is a tuple of its members in order; the gradients at its end may be left out.
template <>
struct type_caster<snk::cpu::StitchGroup> {
  PYBIND11_TYPE_CASTER(snk::cpu::StitchGroup, const_name("tuple"));

  bool load(handle source, bool convert) {
    snk::View* const views[] = {
        &value.weight,      &value.bias,        &value.lora_A,      &value.lora_B,
        &value.norm_weight, &value.norm_bias,   &value.grad_weight, &value.grad_bias,
        &value.grad_lora_A, &value.grad_lora_B, &value.grad_norm_weight, &value.grad_norm_bias};
    const auto members = reinterpret_borrow<tuple>(source);
    if (members.size() != 9 && members.size() != 15) return false;
    value.first = members[0].cast<int64_t>();
    value.last = members[1].cast<int64_t>();
    value.scaling = members[2].cast<float>();
    for (size_t i = 3; i < members.size(); ++i) {
      type_caster<snk::View> view;
      if (!view.load(members[i], convert)) return false;
      *views[i - 3] = view;
    }
    return true;
  }
};
}  // namespace pybind11::detail

namespace {

using snk::View;

template <typename Params>
void run_cpu(snk::Status (*kernel)(const Params&), const Params& params) {
  snk::Status status;
  {
    py::gil_scoped_release release;
    status = kernel(params);
  }
  if (status == snk::Status::out_of_memory) throw std::bad_alloc();
}

void bind_cpu(py::module_& m) {
  using namespace snk::cpu;
  m.def("cpu_isa", &isa, "Name of the instruction set in use.");
  m.def("cpu_isas", [] {
    py::list names;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) names.append(*name);
    return names;
  }, "Instruction sets that this machine runs, best first.");
  m.def("cpu_use_isa", [](const std::string& name) {
    if (!use_isa(name.c_str())) throw py::value_error("this machine cannot run " + name);
  }, "Makes the CPU kernels use another instruction set.");

  m.def("stitch_forward", [](View x, const std::vector<StitchGroup>& groups, float eps, View y,
                             View normed, View mean, View rstd, int threads) {
    run_cpu(kernels().stitch_forward, StitchForward{x, groups.data(), int64_t(groups.size()), eps,
                                                    y, normed, mean, rstd, threads});
  });
  m.def("stitch_backward", [](View grad_y, View grad_normed, View x,
                              const std::vector<StitchGroup>& groups, View y, View mean, View rstd,
                              View grad_x, int threads) {
    run_cpu(kernels().stitch_backward,
            StitchBackward{grad_y, grad_normed, x, groups.data(), int64_t(groups.size()), y, mean,
                           rstd, grad_x, threads});
  });
  m.def("residual_layer_norm_forward",
        [](View h, View branch, View layer_scale, View drop_path_scale, int64_t rows_per_scale,
           View norm_weight, View norm_bias, float eps, View sum, View normed, View mean, View rstd,
           int threads) {
          run_cpu(kernels().residual_layer_norm_forward,
                  ResidualLayerNormForward{h, branch, layer_scale, drop_path_scale, rows_per_scale,
                                           norm_weight, norm_bias, eps, sum, normed, mean, rstd,
                                           threads});
        });
  m.def("residual_layer_norm_backward",
        [](View grad_sum, View grad_normed, View branch, View layer_scale, View drop_path_scale,
           int64_t rows_per_scale, View sum, View mean, View rstd, View norm_weight, View grad_h,
           View grad_branch, View grad_layer_scale, View grad_norm_weight, View grad_norm_bias,
           int threads) {
          run_cpu(kernels().residual_layer_norm_backward,
                  ResidualLayerNormBackward{grad_sum, grad_normed, branch, layer_scale,
                                            drop_path_scale, rows_per_scale, sum, mean, rstd,
                                            norm_weight, grad_h, grad_branch, grad_layer_scale,
                                            grad_norm_weight, grad_norm_bias, threads});
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
  m.def("cuda_device_count", &device_count, "Devices that the driver shows; 0 without a driver.");
  m.def("cuda_bias_layer_norm",
        [](View gemm, View bias, View norm_weight, View norm_bias, float eps, View y, View normed,
           View mean, View rstd, int device, uintptr_t stream) {
          run_cuda(bias_layer_norm,
                   BiasLayerNorm{gemm, bias, norm_weight, norm_bias, eps, y, normed, mean, rstd,
                                 device, reinterpret_cast<void*>(stream)});
        });
  // `offsets` is a pointer, 0 for one group of all rows; a stitch has the fields of
  // snk::cuda::Stitch.
  m.def("cuda_stitch_layer_norm_sm90",
        [](View x, uintptr_t offsets, bool offsets_on_host,
           const std::vector<std::tuple<View, View, View, View, float, View, View>>& stitches,
           float eps, View y, View normed, View mean, View rstd, int device, uintptr_t stream) {
          std::vector<Stitch> groups;
          for (const auto& stitch : stitches)
            std::apply([&](auto&... fields) { groups.push_back(Stitch{fields...}); }, stitch);
          run_cuda(stitch_layer_norm_sm90,
                   StitchLayerNorm{x, reinterpret_cast<const int64_t*>(offsets), offsets_on_host,
                                   groups.data(), int(groups.size()), eps, y, normed, mean, rstd,
                                   device, reinterpret_cast<void*>(stream)});
        });
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
  static PyMethodDef view = {"view", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(
                                         snk::tensor_view)),
                             METH_FASTCALL, "What kernels are told of a tensor."};
  m.attr("view") = py::reinterpret_steal<py::object>(PyCFunction_New(&view, nullptr));
  bind_cpu(m);
#ifdef SNK_WITH_CUDA
  m.attr("cuda_version") = SNK_CUDA_VERSION;
  m.attr("cuda_archs") = SNK_CUDA_ARCHS;
  bind_cuda(m);
#else
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif
}
