// What torch does with calls at present besides computing them, and what it has set for them.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "tensor.h"

namespace snk {

// What snkernels.kernels.watchers lists, kept as long as the process lives.
struct Watchers {
  struct Variable {
    PyObject *module, *name, *calm;
  };
  std::vector<PyObject*> questions;
  std::vector<Variable> variables;

  static Watchers& known() {
    static auto& watchers = *new Watchers;
    return watchers;
  }
};

inline void watch_for(const pybind11::tuple& questions, const pybind11::tuple& variables) {
  Watchers& known = Watchers::known() = {};
  for (const auto question : questions) known.questions.push_back(question.inc_ref().ptr());
  for (const auto variable : variables) {
    const auto members = variable.inc_ref().cast<pybind11::tuple>();
    known.variables.push_back({PyModule_GetDict(members[0].ptr()), members[1].ptr(),
                               members[2].ptr()});
  }
}

inline pybind11::object answer_of(PyObject* question) {
  auto answer = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(question));
  if (!answer) throw pybind11::error_already_set();
  return answer;
}

// Whether torch only computes: nobody watches calls, changes them or casts.
inline bool unwatched() {
  const Watchers& known = Watchers::known();
  for (PyObject* const question : known.questions)
    if (answer_of(question).cast<bool>()) return false;
  for (const auto& variable : known.variables)
    if (PyDict_GetItemWithError(variable.module, variable.name) != variable.calm) return false;
  return !known.questions.empty();
}

// Whether autograd must see a call with these tensors, or None in the place of some.
inline bool needs_grad(std::initializer_list<pybind11::handle> tensors) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  if (answer_of(of_torch().is_grad_enabled).ptr() != Py_True) return false;
  for (const auto tensor : tensors)
    if (!tensor.is_none() && getattr(tensor, requires_grad).ptr() == Py_True) return true;
  return false;
}

inline int num_threads() { return answer_of(of_torch().get_num_threads).cast<int>(); }

}  // namespace snk
