// Arguments that are plainly right, and ops that take no others (plain.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace snk {

void bind_plain(pybind11::module_& m);

}  // namespace snk
