// Whole ops by one call (one_call.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace snk {

void bind_one_call(pybind11::module_& m);

}  // namespace snk
