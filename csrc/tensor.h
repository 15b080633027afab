// Tensors as Python sees them: facts are read by attribute, so no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "view.h"

namespace snk {

// A strong reference to something that lives as long as the process.
inline PyObject* forever(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return object;
}

constexpr int64_t ANY = -1;  // rows or columns

// What a kernel is told of a tensor: a matrix, or a vector as a matrix of one row; nothing of None.
// Throws unless it is what a kernel can read. Every tensor of every call comes through here, so it
// is written for speed: in Python it takes three times as long, and longer than a small kernel.
inline View view_of(const char* name, pybind11::handle tensor, int64_t rows, int64_t cols,
                    bool on_cpu = true) {
  using pybind11::reinterpret_steal, pybind11::object, pybind11::error_already_set;
  static const auto interned = [](const char* text) {
    return forever(PyUnicode_InternFromString(text));
  };
  static PyObject* const dtype_name = interned("dtype");
  static PyObject* const shape_name = interned("shape");
  static PyObject* const stride_name = interned("stride");
  static PyObject* const data_ptr_name = interned("data_ptr");
  static PyObject* const device_name = interned("device");
  static PyObject* const is_cpu_name = interned("is_cpu");
  static PyObject* const is_cuda_name = interned("is_cuda");
  static PyObject* const torch = forever(PyImport_ImportModule("torch"));
  static PyObject* const dtypes[] = {forever(PyObject_GetAttrString(torch, "float32")),
                                     forever(PyObject_GetAttrString(torch, "float16")),
                                     forever(PyObject_GetAttrString(torch, "bfloat16"))};
  if (tensor.is_none()) return {};
  const auto known = [](PyObject* result) {
    if (result == nullptr) throw error_already_set();
    return reinterpret_steal<object>(result);
  };
  const auto get = [&](PyObject* attribute) {
    return known(PyObject_GetAttr(tensor.ptr(), attribute));
  };
  const auto call = [&](PyObject* method) {
    return known(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  };

  const auto dtype = get(dtype_name);
  int code = 0;
  while (code < 3 && dtypes[code] != dtype.ptr()) ++code;
  if (code == 3 || get(on_cpu ? is_cpu_name : is_cuda_name).ptr() != Py_True) {
    PyErr_Format(PyExc_TypeError,
                 "%s must be float32, float16 or bfloat16 on %s, but it is %S on %S", name,
                 on_cpu ? "cpu" : "cuda", dtype.ptr(), get(device_name).ptr());
    throw error_already_set();
  }

  const auto shape = get(shape_name), stride = call(stride_name), pointer = call(data_ptr_name);
  const auto at = [](const object& tuple, Py_ssize_t i) {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
  };
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims == 1 || dims == 2) {
    const View view{PyLong_AsVoidPtr(pointer.ptr()), DType(code), dims == 2 ? at(shape, 0) : 1,
                    at(shape, dims - 1), at(stride, 0), at(stride, dims - 1)};
    if ((rows == ANY || rows == view.rows) && (cols == ANY || cols == view.cols)) return view;
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
