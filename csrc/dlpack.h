// How torch lets C code look at a tensor: the table of functions that DLPack 1.x (dmlc.github.io/dlpack)
// defines for that, which newer releases of torch offer. Here is what of it is used.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace snk::dlpack {

enum Device : int32_t { cpu = 1, cuda = 2, cpu_pinned = 3 };
enum Code : uint8_t { floating = 2, bfloat = 4 };

struct Tensor {
  void* data;
  int32_t device, device_index;
  int32_t dims;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

// Fills in what a tensor is, and leaves it where it was. Returns 0, or −1 with a Python error.
using Look = int (*)(void* tensor, Tensor* out);

struct Table {
  uint32_t major, minor;
  void* older;
  void *allocate, *from_python, *to_python;
  Look look;
  void* stream;
};

// Null where torch has no such table.
inline Look look_of(PyObject* tensor_type) {
  PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  void* table = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);  // the table itself lives as long as the process
  PyErr_Clear();
  const auto* known = static_cast<const Table*>(table);
  return known != nullptr && known->major == 1 ? known->look : nullptr;
}

}  // namespace snk::dlpack
