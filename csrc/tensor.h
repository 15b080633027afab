// Tensors as Python sees them: facts are read by attribute, so no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace snk {

// A strong reference to something that lives as long as the process.
inline PyObject* forever(PyObject* object) {
  if (object == nullptr) throw pybind11::error_already_set();
  return object;
}

inline PyObject* name(const char* text) { return forever(PyUnicode_InternFromString(text)); }

// view(name, tensor, rows, cols, device): (pointer, dtype, rows, cols, strides) of a matrix, or of
// a vector as a matrix of one row; None for None. Raises unless the tensor is what a kernel can read.
// Every tensor of every call comes through here, so it is written for speed: in Python it takes
// three times as long, and longer than a small kernel.
inline PyObject* tensor_view(PyObject*, PyObject* const* args, Py_ssize_t count) {
  using pybind11::reinterpret_steal, pybind11::object;
  static PyObject* const dtype_name = name("dtype");
  static PyObject* const shape_name = name("shape");
  static PyObject* const stride_name = name("stride");
  static PyObject* const data_ptr_name = name("data_ptr");
  static PyObject* const device_name = name("device");
  static PyObject* const is_cpu_name = name("is_cpu");
  static PyObject* const is_cuda_name = name("is_cuda");
  static PyObject* const torch = forever(PyImport_ImportModule("torch"));
  static PyObject* const dtypes[] = {forever(PyObject_GetAttrString(torch, "float32")),
                                     forever(PyObject_GetAttrString(torch, "float16")),
                                     forever(PyObject_GetAttrString(torch, "bfloat16"))};
  if (count != 5) {
    PyErr_SetString(PyExc_TypeError, "view takes name, tensor, rows, cols and device");
    return nullptr;
  }
  PyObject* const tensor = args[1];
  if (tensor == Py_None) Py_RETURN_NONE;
  const int64_t rows = PyLong_AsLongLong(args[2]), cols = PyLong_AsLongLong(args[3]);
  if (PyErr_Occurred()) return nullptr;
  const bool cpu = PyUnicode_CompareWithASCIIString(args[4], "cpu") == 0;

  const auto dtype = reinterpret_steal<object>(PyObject_GetAttr(tensor, dtype_name));
  const auto here =
      reinterpret_steal<object>(PyObject_GetAttr(tensor, cpu ? is_cpu_name : is_cuda_name));
  if (!dtype || !here) return nullptr;
  int code = 0;
  while (code < 3 && dtypes[code] != dtype.ptr()) ++code;
  if (code == 3 || here.ptr() != Py_True) {
    const auto device = reinterpret_steal<object>(PyObject_GetAttr(tensor, device_name));
    if (!device) return nullptr;
    return PyErr_Format(PyExc_TypeError,
                        "%U must be float32, float16 or bfloat16 on %U, but it is %S on %S",
                        args[0], args[4], dtype.ptr(), device.ptr());
  }

  const auto shape = reinterpret_steal<object>(PyObject_GetAttr(tensor, shape_name));
  const auto stride = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor, stride_name));
  const auto pointer = reinterpret_steal<object>(PyObject_CallMethodNoArgs(tensor, data_ptr_name));
  if (!shape || !stride || !pointer) return nullptr;
  const auto at = [](const object& tuple, Py_ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); };
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  const bool fits = (dims == 2 && PyLong_AsLongLong(at(shape, 0)) == rows &&
                     PyLong_AsLongLong(at(shape, 1)) == cols) ||
                    (dims == 1 && rows == 1 && PyLong_AsLongLong(at(shape, 0)) == cols);
  if (!fits) {
    const auto plain = reinterpret_steal<object>(PySequence_Tuple(shape.ptr()));
    if (!plain) return nullptr;
    return PyErr_Format(PyExc_ValueError, "%U must have shape (%S, %S), but it has %S", args[0],
                        args[2], args[3],
                        reinterpret_steal<object>(PyObject_Repr(plain.ptr())).ptr());
  }
  const auto code_object = reinterpret_steal<object>(PyLong_FromLong(code));
  return PyTuple_Pack(6, pointer.ptr(), code_object.ptr(), args[2], args[3], at(stride, 0),
                      at(stride, dims - 1));
}

}  // namespace snk
