// How a CPU kernel is called from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <new>

#include "cpu/kernels.h"

namespace snk {

template <typename Params>
void run_cpu(Status (*kernel)(const Params&), const Params& params) {
  Status status;
  {
    pybind11::gil_scoped_release release;
    status = kernel(params);
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
}

}  // namespace snk
