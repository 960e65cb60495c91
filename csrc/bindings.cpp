// The Python module hydra_kernels._native. It converts arguments and results; it has no arithmetic.
#include "autograd.h"
#include "check.h"
#include "cpu/amx.h"
#include "cpu/large.h"
#include "cpu/small.h"
#include "python.h"

namespace {

using namespace hydra::python;

bool is_tensor(PyObject* object) { return THPVariable_CheckExact(object) || is_parameter(object); }

// Whether a field of Python's has exactly an operand's type, and no subclass.
bool is_plain(PyObject* field, const at::Tensor&) { return field == Py_None || is_tensor(field); }
bool is_plain(PyObject* field, double) {
  if (!PyFloat_CheckExact(field) && !PyLong_CheckExact(field)) return false;
  if (PyFloat_AsDouble(field) != -1 || !PyErr_Occurred()) return true;
  PyErr_Clear();  // an integer that no double can hold
  return false;
}
bool is_plain(PyObject* field, const hydra::Scale& scale) { return is_tensor(field) || is_plain(field, scale.value); }

// (M, K, N, r_a, r_b), or None where Python must judge.
py::object sizes(py::handle x, const py::tuple& fields) {
  hydra::Operands op;
  bool plain = is_tensor(x.ptr());
  each_field([&](PyObject* field, auto& operand) {
    plain = plain && is_plain(field, operand);
    if (plain) unpack(field, operand);
  }, fields, op);
  hydra::Sizes found;
  if (!plain || !hydra::vouch_for(tensor(x.ptr()), op, &found)) return py::none();
  return py::make_tuple(found.M, found.K, found.N, found.r_a, found.r_b);
}

const char* kind(const at::Tensor&) { return "tensor"; }
const char* kind(const hydra::Scale&) { return "scale"; }
const char* kind(double) { return "number"; }

// The table of operands.h: (name, kind) of each.
py::list table() {
  py::list rows;
  hydra::Operands op;
  hydra::each_operand([&](hydra::Gradient i, const auto& operand) {
    rows.append(py::make_tuple(hydra::NAMES[i], kind(operand)));
  }, op);
  return rows;
}

py::object apply(py::handle x, const py::tuple& op, const std::string& plan) {
  const at::Tensor input = tensor(x.ptr());
  const hydra::Operands unpacked = operands(op);
  at::Tensor h;
  {
    py::gil_scoped_release released;
    h = hydra::apply(input, unpacked, plan_named(plan));
  }
  return py::reinterpret_steal<py::object>(wrapped(h));
}

py::tuple forward(py::handle x, const py::tuple& op, uint32_t needs, const std::string& plan) {
  const at::Tensor input = tensor(x.ptr());
  const hydra::Operands unpacked = operands(op);
  hydra::Forward made;
  {
    py::gil_scoped_release released;
    made = hydra::forward(input, unpacked, {needs}, plan_named(plan));
  }
  return wrapped(made);
}

py::dict backward(py::handle G, const py::tuple& op, const py::tuple& saved, uint32_t needs, const std::string& plan) {
  const at::Tensor input = tensor(G.ptr());
  const hydra::Operands unpacked = operands(op);
  const hydra::Saved left = saved_of(saved);
  hydra::Gradients grads;
  {
    py::gil_scoped_release released;
    grads = hydra::backward(input, unpacked, left, {needs}, plan_named(plan));
  }
  return wrapped(grads);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of hydra_kernels.";
  m.def("sizes", torch::wrap_pybind_function(sizes),
        "(x, Operands) -> (M, K, N, r_a, r_b), or None: Python must judge");
  m.def("apply", torch::wrap_pybind_function(apply),
        "(x, Operands, plan) -> h, differentiable, for a call that `sizes` vouched for");
  m.def("forward", torch::wrap_pybind_function(forward),
        "(x, Operands, bits of the wanted gradients, plan) -> (h, saved)");
  m.def("backward", torch::wrap_pybind_function(backward), "(G, Operands, saved, bits, plan) -> gradients by name");
  m.def("operands", torch::wrap_pybind_function(table),
        "[(name, \"tensor\", \"scale\" or \"number\")] in the order of Operands");
  m.def("onednn", &hydra::cpu::has_onednn, "Whether torch's oneDNN operators for the products with W0 can be called.");
  m.def("widened", [](bool fp16) { return hydra::cpu::is_widened(fp16 ? at::kHalf : at::kBFloat16); }, pybind11::arg("fp16"),
        "Whether products with W0 in bf16, or fp16, run in fp32, block by block.");
  m.def("matrix_units", &hydra::cpu::has_matrix_units, "Whether bf16 runs on matrix units (AMX, AVX512-BF16).");
  m.def("amx", [] { return hydra::cpu::has_matrix_units() && hydra::cpu::amx::available(); }, "Whether bf16 runs on AMX's tiles.");
  m.def("instructions", &hydra::cpu::instructions, "The instruction set of the CPU kernels.");
}
