// Arguments that are plainly right are looked at here, and ops that need nothing else are one call.
// Calls come between GEMMs, which leave nothing of the interpreter in the caches: each line of Python
// then waits for memory, and checks that take 5 µs in a loop take 50.
//
// What is not plainly right, or when torch does more with calls than to compute them, is neither
// refused nor computed: the answer says so, and the caller, who has all the checks and knows all the
// cases, looks closer.
#include "plain.h"

#include <cmath>

#include "run_cpu.h"
#include "tensor.h"
#include "watchers.h"

namespace py = pybind11;

namespace snk {
namespace {

using py::handle;

// Whether a method of a tensor, asked for a property, says that it does not have it.
bool says_no(handle tensor, PyObject* method) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), method));
  if (!answer) throw py::error_already_set();
  return answer.is(py::bool_(false));
}

// Whether a tensor is what it seems and not empty: fp32 in CPU memory, with no negation pending, and
// no zeros that torch has not written anywhere.
bool is_plain(handle tensor, dlpack::Tensor& t) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  static PyObject* const is_zeros = PyUnicode_InternFromString("_is_zerotensor");
  if (!describe(tensor, t) || (t.device != dlpack::cpu && t.device != dlpack::cpu_pinned) ||
      t.code != dlpack::floating || t.bits != 32 || t.lanes != 1 || t.dims < 1)
    return false;
  for (int d = 0; d < t.dims; ++d)
    if (t.shape[d] == 0) return false;
  return says_no(tensor, is_neg) && says_no(tensor, is_zeros);
}

// Tokens (…, width) as a matrix; false where rows are not equally far apart.
bool rows_of_tokens(const dlpack::Tensor& t, View& rows) {
  const int64_t width = t.shape[t.dims - 1];
  rows = {static_cast<char*>(t.data) + t.byte_offset, DType::f32, 1, width, width,
          t.strides[t.dims - 1]};
  for (int d = t.dims - 2; d >= 0; --d) {
    if (t.shape[d] == 1) continue;
    if (rows.rows == 1)
      rows.row_stride = t.strides[d];
    else if (t.strides[d] != rows.rows * rows.row_stride)
      return false;
    rows.rows *= t.shape[d];
  }
  return true;
}

// A matrix, or a vector of `size` or None, as a view.
bool look_at_matrix(handle tensor, View& matrix) {
  dlpack::Tensor t;
  return is_plain(tensor, t) && t.dims == 2 && rows_of_tokens(t, matrix);
}
bool look_at_vector(handle tensor, int64_t size, View& vector) {
  dlpack::Tensor t;
  if (tensor.is_none()) return true;
  return is_plain(tensor, t) && t.dims == 1 && t.shape[0] == size && rows_of_tokens(t, vector);
}

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  bool same = a.dims == b.dims;
  for (int d = 0; same && d < a.dims; ++d) same = a.shape[d] == b.shape[d];
  return same;
}

// Room for an output, and what a kernel is told of it. With strides torch has less to do than in
// `new_empty`, and a call has to wait for less of its code.
py::object new_tensor(handle like, const py::tuple& shape, View& view) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty_strided");
  py::tuple strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= shape[d].cast<int64_t>()) strides[d] = stride;
  auto made = py::reinterpret_steal<py::object>(
      PyObject_CallMethodObjArgs(like.ptr(), name, shape.ptr(), strides.ptr(), nullptr));
  if (!made) throw py::error_already_set();
  dlpack::Tensor described;
  if (!describe(made, described) || !rows_of_tokens(described, view))
    throw py::type_error("new_empty_strided must return a tensor, but it did not");
  return made;
}

// The same for tokens of so many features, in the shape of others.
py::object new_tokens(handle like, const dlpack::Tensor& t, int64_t width, View& rows) {
  py::tuple shape(t.dims);
  for (int d = 0; d < t.dims; ++d) shape[d] = d < t.dims - 1 ? t.shape[d] : width;
  return new_tensor(like, shape, rows);
}

// Reads tokens of so many rows and features, or nothing of None.
bool look_at_tokens(handle tensor, int64_t rows, int64_t features, View& tokens) {
  dlpack::Tensor t;
  if (tensor.is_none()) return true;
  return is_plain(tensor, t) && rows_of_tokens(t, tokens) && tokens.rows == rows &&
         tokens.cols == features;
}

// Statistics of so many rows: a kernel reads them as the forward wrote them, one after another.
bool look_at_statistics(handle mean, handle rstd, int64_t rows, View& mean_of, View& rstd_of) {
  return look_at_vector(mean, rows, mean_of) && look_at_vector(rstd, rows, rstd_of) && mean_of &&
         rstd_of && mean_of.col_stride == 1 && rstd_of.col_stride == 1;
}

// Room for the gradients of the tensors that need one, None for the others and for those that nobody
// writes; None in all unless `needs` says True or False of each.
template <int count>
py::object new_gradients(const handle (&tensors)[count], handle needs, View* const (&grads)[count]) {
  if (!PyList_Check(needs.ptr()) || PyList_GET_SIZE(needs.ptr()) != count) return py::none();
  py::list made(count);
  for (int i = 0; i < count; ++i) {
    PyObject* const needed = PyList_GET_ITEM(needs.ptr(), i);
    if (!PyBool_Check(needed)) return py::none();
    made[i] = py::none();
    if (needed != Py_True || tensors[i].is_none() || grads[i] == nullptr) continue;
    dlpack::Tensor like;
    describe(tensors[i], like);
    made[i] = new_tokens(tensors[i], like, like.shape[like.dims - 1], *grads[i]);
  }
  return made;
}

// Runs a forward that also normalises: what it makes and, where autograd will need them, the
// statistics of `rows` rows.
template <typename Forward>
py::object with_norm(Status (*forward)(const Forward&), Forward& p, handle like, int64_t rows,
                     bool training, const py::object& made, const py::object& normed) {
  if (!training) {
    run_cpu(forward, p);
    return py::make_tuple(made, normed);
  }
  const py::tuple shape = py::make_tuple(rows);
  py::object mean = new_tensor(like, shape, p.mean), rstd = new_tensor(like, shape, p.rstd);
  run_cpu(forward, p);
  return py::make_tuple(made, normed, mean, rstd);
}

bool read_eps(handle number, float& eps) {
  if (!PyFloat_CheckExact(number.ptr())) return false;
  const double value = PyFloat_AS_DOUBLE(number.ptr());
  eps = float(value);
  return std::isfinite(value) && value >= 0;
}

// Reads the arguments of residual_layer_norm; `t` is what h is.
bool read_residual(handle h, handle branch, handle layer_scale, handle norm_weight,
                   handle norm_bias, handle eps, dlpack::Tensor& t,
                   cpu::ResidualLayerNormForward& p) {
  dlpack::Tensor other;
  if (!read_eps(eps, p.eps) || !is_plain(h, t) || !rows_of_tokens(t, p.h) ||
      !is_plain(branch, other) || !same_shape(t, other) || !rows_of_tokens(other, p.branch) ||
      !look_at_vector(layer_scale, p.h.cols, p.layer_scale) ||
      !look_at_vector(norm_weight, p.h.cols, p.norm_weight) ||
      !look_at_vector(norm_bias, p.h.cols, p.norm_bias))
    return false;
  p.rows_per_scale = p.h.rows;
  return true;
}

py::object residual_layer_norm(handle h, handle branch, handle layer_scale, handle norm_weight,
                               handle norm_bias, handle eps) {
  dlpack::Tensor t;
  cpu::ResidualLayerNormForward p{};
  if (!unwatched() || !read_residual(h, branch, layer_scale, norm_weight, norm_bias, eps, t, p))
    return py::none();
  p.threads = num_threads();
  py::object sum = new_tokens(h, t, p.h.cols, p.sum), normed = new_tokens(h, t, p.h.cols, p.normed);
  const bool training = needs_grad({h, branch, layer_scale, norm_weight, norm_bias});
  return with_norm(cpu::kernels().residual_layer_norm_forward, p, h, p.h.rows, training, sum, normed);
}

py::object residual_gradients(handle grad_sum, handle grad_normed, handle h, handle branch,
                              handle layer_scale, handle norm_weight, handle norm_bias, handle sum,
                              handle mean, handle rstd, handle needs) {
  dlpack::Tensor t, other;
  cpu::ResidualLayerNormBackward p{};
  View norm_bias_of;
  if (!unwatched() || !is_plain(sum, t) || !rows_of_tokens(t, p.sum)) return py::none();
  const int64_t M = p.sum.rows, N = p.sum.cols;
  if (!is_plain(h, other) || !same_shape(t, other) || !is_plain(branch, other) ||
      !same_shape(t, other) || !rows_of_tokens(other, p.branch) ||
      !look_at_vector(layer_scale, N, p.layer_scale) ||
      !look_at_vector(norm_weight, N, p.norm_weight) ||
      !look_at_vector(norm_bias, N, norm_bias_of) ||
      !look_at_tokens(grad_sum, M, N, p.grad_sum) ||
      !look_at_tokens(grad_normed, M, N, p.grad_normed) || (!p.grad_sum && !p.grad_normed) ||
      !look_at_statistics(mean, rstd, M, p.mean, p.rstd))
    return py::none();
  p.rows_per_scale = M;
  p.threads = num_threads();
  const bool normed = bool(p.grad_normed);
  py::object made = new_gradients(
      {h, branch, layer_scale, norm_weight, norm_bias}, needs,
      {&p.grad_h, &p.grad_branch, &p.grad_layer_scale, normed ? &p.grad_norm_weight : nullptr,
       normed ? &p.grad_norm_bias : nullptr});
  if (!made.is_none()) run_cpu(cpu::kernels().residual_layer_norm_backward, p);
  return made;
}

// Reads the parameters of a stitch (weight, bias, lora_A, lora_B, norm_weight, norm_bias, scaling) for
// tokens of K features; false unless they fit.
bool read_stitch(handle parameters, int64_t K, cpu::StitchGroup& group) {
  if (!PyTuple_Check(parameters.ptr()) || PyTuple_GET_SIZE(parameters.ptr()) != 7) return false;
  const auto at = [&](Py_ssize_t i) { return handle(PyTuple_GET_ITEM(parameters.ptr(), i)); };
  if (!look_at_matrix(at(0), group.weight) || group.weight.cols != K) return false;
  const int64_t N = group.weight.rows;
  View &A = group.lora_A, &B = group.lora_B;
  if (at(2).is_none() != at(3).is_none()) return false;
  if (!at(2).is_none() && (!look_at_matrix(at(2), A) || A.cols != K || !look_at_matrix(at(3), B) ||
                           B.rows != N || B.cols != A.rows))
    return false;
  if (!look_at_vector(at(1), N, group.bias) || !look_at_vector(at(4), N, group.norm_weight) ||
      !look_at_vector(at(5), N, group.norm_bias) || !PyFloat_CheckExact(at(6).ptr()))
    return false;
  group.scaling = float(PyFloat_AS_DOUBLE(at(6).ptr()));
  return std::isfinite(PyFloat_AS_DOUBLE(at(6).ptr()));
}

int64_t width_of_stitches(handle x, handle groups) {
  dlpack::Tensor t;
  if (!unwatched() || !is_plain(x, t) || !PyList_Check(groups.ptr())) return 0;
  const int64_t K = t.shape[t.dims - 1];
  int64_t width = 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(groups.ptr()); ++i) {
    cpu::StitchGroup group{};
    if (!read_stitch(PyList_GET_ITEM(groups.ptr(), i), K, group)) return 0;
    if (i > 0 && group.weight.rows != width) return 0;
    width = group.weight.rows;
  }
  return width;
}

// A kernel of stitches, told of one that all rows of tokens x go through.
template <typename Params>
struct OneStitch {
  dlpack::Tensor tokens;
  Params p{};
  cpu::StitchGroup group{};

  OneStitch() = default;
  OneStitch(const OneStitch&) = delete;  // p points at the group

  bool read(handle x) {
    if (!unwatched() || !is_plain(x, tokens) || !rows_of_tokens(tokens, p.x)) return false;
    group.last = p.x.rows;
    p.groups = &group;
    p.count = 1;
    p.threads = num_threads();
    return true;
  }
  bool read(handle x, handle parameters) {
    return read(x) && read_stitch(parameters, p.x.cols, group);
  }
  py::object room(handle x, View& rows) const {
    return new_tokens(x, tokens, group.weight.rows, rows);
  }
};

py::object linear(handle x, handle weight, handle bias, int64_t least_work, int64_t least_rows) {
  OneStitch<cpu::StitchForward> one;
  View &own = one.group.weight, &tokens = one.p.x;
  if (!one.read(x) || !look_at_matrix(weight, own) || own.cols != tokens.cols ||
      !look_at_vector(bias, own.rows, one.group.bias))
    return py::none();
  if (tokens.rows < least_rows || tokens.rows * tokens.cols * own.rows < least_work)
    return py::none();
  one.group.scaling = 1;
  py::object y = one.room(x, one.p.y);
  run_cpu(cpu::kernels().stitch_forward, one.p);
  return y;
}

py::object stitch(handle x, handle parameters) {
  OneStitch<cpu::StitchForward> one;
  if (!one.read(x, parameters)) return py::none();
  py::object y = one.room(x, one.p.y);
  run_cpu(cpu::kernels().stitch_forward, one.p);
  return y;
}

py::object stitch_layer_norm(handle x, handle parameters, handle eps) {
  OneStitch<cpu::StitchForward> one;
  if (!one.read(x, parameters) || !read_eps(eps, one.p.eps)) return py::none();
  const auto at = [&](Py_ssize_t i) { return handle(PyTuple_GET_ITEM(parameters.ptr(), i)); };
  const bool training = needs_grad({x, at(0), at(1), at(2), at(3), at(4), at(5)});
  py::object y = one.room(x, one.p.y), normed = one.room(x, one.p.normed);
  return with_norm(cpu::kernels().stitch_forward, one.p, x, one.p.x.rows, training, y, normed);
}

py::object stitch_gradients(handle grad_y, handle grad_normed, handle x, handle parameters, handle y,
                            handle mean, handle rstd, handle needs) {
  OneStitch<cpu::StitchBackward> one;
  auto& [tokens, p, group] = one;
  if (!one.read(x, parameters)) return py::none();
  const int64_t M = p.x.rows, N = group.weight.rows;
  if (!look_at_tokens(grad_y, M, N, p.grad_y) || !look_at_tokens(grad_normed, M, N, p.grad_normed) ||
      !look_at_tokens(y, M, N, p.y) || (!p.grad_y && !p.grad_normed))
    return py::none();
  const bool normed = bool(p.grad_normed);
  if (normed && !(p.y && look_at_statistics(mean, rstd, M, p.mean, p.rstd))) return py::none();
  const auto at = [&](Py_ssize_t i) { return handle(PyTuple_GET_ITEM(parameters.ptr(), i)); };
  py::object made = new_gradients(
      {x, at(0), at(1), at(2), at(3), at(4), at(5)}, needs,
      {&p.grad_x, &group.grad_weight, &group.grad_bias, &group.grad_lora_A, &group.grad_lora_B,
       normed ? &group.grad_norm_weight : nullptr, normed ? &group.grad_norm_bias : nullptr});
  if (!made.is_none()) run_cpu(cpu::kernels().stitch_backward, p);
  return made;
}

}  // namespace

void bind_plain(py::module_& m) {
  m.def("watch_for", &watch_for, "What the functions below look at before they compute anything.");
  m.def("linear", &linear, "y = x Wᵀ + b if it has so many multiply-adds and rows, or None.");
  m.def("residual_layer_norm", &residual_layer_norm,
        "h + γ · branch, LN of that and, for autograd, its statistics; or None.");
  m.def("residual_gradients", &residual_gradients,
        "The gradients of h, branch, layer_scale and the norm, those that are needed; or None.");
  m.def("stitch", &stitch, "y of a stitch; or None.");
  m.def("stitch_layer_norm", &stitch_layer_norm,
        "y of a stitch, LN(y) and, for autograd, its statistics; or None.");
  m.def("stitch_gradients", &stitch_gradients,
        "The gradients of x and of the parameters of a stitch, those that are needed; or None.");
  m.def("width_of_stitches", &width_of_stitches,
        "The output width of a list of stitches that are plainly right for x, or 0.");
}

}  // namespace snk
