// Tensors as C code sees them without a header of torch: by DLPack, or by attribute as Python does.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "dlpack.h"
#include "view.h"

namespace snk {

// What of torch is used, looked up once and kept as long as the process lives.
struct Torch {
  PyObject *tensor, *parameter, *dtypes[3];  // the dtypes in the order of DType
  PyObject *is_grad_enabled, *get_num_threads;
  dlpack::Look look;
};

inline const Torch& of_torch() {
  static const Torch known = [] {
    const auto of = [](const char* module, const char* name) {
      return pybind11::object(pybind11::module_::import(module).attr(name)).release().ptr();
    };
    PyObject* tensor = of("torch", "Tensor");
    return Torch{tensor,
                 of("torch.nn", "Parameter"),
                 {of("torch", "float32"), of("torch", "float16"), of("torch", "bfloat16")},
                 of("torch", "is_grad_enabled"),
                 of("torch", "get_num_threads"),
                 dlpack::look_of(tensor)};
  }();
  return known;
}

constexpr int64_t ANY = -1;  // rows or columns

inline bool fits(const View& view, int64_t rows, int64_t cols) {
  return (rows == ANY || rows == view.rows) && (cols == ANY || cols == view.cols);
}

// One call into torch; false where torch has no such call, or where the tensor is of a subclass, which
// may see itself otherwise than torch does.
inline bool describe(pybind11::handle tensor, dlpack::Tensor& described) {
  const Torch& known = of_torch();
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  if (known.look == nullptr || (type != known.tensor && type != known.parameter)) return false;
  if (known.look(tensor.ptr(), &described) == 0) return true;
  PyErr_Clear();
  return false;
}

// Fills `view` in that way; false where anything is not just so.
inline bool look_at(pybind11::handle tensor, bool on_cpu, View& view) {
  dlpack::Tensor t;
  if (!describe(tensor, t)) return false;
  const bool here = on_cpu ? t.device == dlpack::cpu || t.device == dlpack::cpu_pinned
                           : t.device == dlpack::cuda;
  if (!here || (t.dims != 1 && t.dims != 2) || t.lanes != 1) return false;
  if (t.code == dlpack::floating && t.bits == 32)
    view.dtype = DType::f32;
  else if (t.code == dlpack::floating && t.bits == 16)
    view.dtype = DType::f16;
  else if (t.code == dlpack::bfloat && t.bits == 16)
    view.dtype = DType::bf16;
  else
    return false;
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.rows = t.dims == 2 ? t.shape[0] : 1;
  view.cols = t.shape[t.dims - 1];
  view.row_stride = t.strides[0];
  view.col_stride = t.strides[t.dims - 1];
  return true;
}

// What a kernel is told of a tensor: a matrix, or a vector as a matrix of one row; nothing of None.
// Throws unless it is what a kernel can read. Every tensor of every call comes through here, so it
// is written for speed; what is not plainly right is looked at by attribute, for words to say so.
inline View view_of(const char* name, pybind11::handle tensor, int64_t rows, int64_t cols,
                    bool on_cpu = true) {
  using pybind11::reinterpret_steal, pybind11::object, pybind11::error_already_set;
  if (tensor.is_none()) return {};
  if (View view; look_at(tensor, on_cpu, view) && fits(view, rows, cols)) return view;

  const auto known = [](PyObject* result) {
    if (result == nullptr) throw error_already_set();
    return reinterpret_steal<object>(result);
  };
  const auto get = [&](const char* attribute) {
    return known(PyObject_GetAttrString(tensor.ptr(), attribute));
  };
  const auto call = [&](const char* method) {
    return known(PyObject_CallMethod(tensor.ptr(), method, nullptr));
  };

  const auto dtype = get("dtype");
  int code = 0;
  while (code < 3 && of_torch().dtypes[code] != dtype.ptr()) ++code;
  if (code == 3 || get(on_cpu ? "is_cpu" : "is_cuda").ptr() != Py_True) {
    PyErr_Format(PyExc_TypeError,
                 "%s must be float32, float16 or bfloat16 on %s, but it is %S on %S", name,
                 on_cpu ? "cpu" : "cuda", dtype.ptr(), get("device").ptr());
    throw error_already_set();
  }

  const auto shape = get("shape"), stride = call("stride"), pointer = call("data_ptr");
  const auto at = [](const object& tuple, Py_ssize_t i) {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  };
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims == 1 || dims == 2) {
    const View view{PyLong_AsVoidPtr(pointer.ptr()), DType(code), dims == 2 ? at(shape, 0) : 1,
                    at(shape, dims - 1), at(stride, 0), at(stride, dims - 1)};
    if (fits(view, rows, cols)) return view;
  }
  const auto wanted = [](int64_t size) { return size == ANY ? "any" : std::to_string(size); };
  const auto plain = known(PySequence_Tuple(shape.ptr()));  // not "torch.Size([…])"
  throw pybind11::value_error(std::string(name) + " must have shape (" + wanted(rows) + ", " +
                              wanted(cols) + "), but it has " +
                              std::string(pybind11::repr(plain)));
}

inline View vector_of(const char* name, pybind11::handle tensor, int64_t size,
                      bool on_cpu = true) {
  return view_of(name, tensor, 1, size, on_cpu);
}

}  // namespace snk
