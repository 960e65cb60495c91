// The Python module hydra_kernels._native: no arithmetic.
#include "autograd.h"
#include "check.h"
#include "cpu/products.h"
#include "python.h"

namespace {

using namespace hydra::python;

// (M, K, N, r_a, r_b), or None where Python must judge.
py::object sizes(const py::args& arguments) {
  if (arguments.size() != 14) throw py::type_error("sizes: expected x, 11 operands and 2 scales");
  const auto at = [&](int i) { return PyTuple_GET_ITEM(arguments.ptr(), i); };
  for (int i = 0; i < 14; ++i) {
    bool number = i >= 12 && (PyFloat_CheckExact(at(i)) || PyLong_CheckExact(at(i)));
    if (number && PyFloat_AsDouble(at(i)) == -1 && PyErr_Occurred()) PyErr_Clear(), number = false;  // an endless integer
    if (!number && !THPVariable_CheckExact(at(i)) && !is_parameter(at(i)) && (i >= 12 || at(i) != Py_None)) return py::none();
  }
  const hydra::Operands op{tensor(at(1)), tensor(at(2)), tensor(at(3)), tensor(at(4)), tensor(at(5)), tensor(at(6)),
                           tensor(at(7)), tensor(at(8)), tensor(at(9)), tensor(at(10)), tensor(at(11)), scale(at(12)),
                           scale(at(13)), 1};
  hydra::Sizes found;
  if (!hydra::vouch_for(tensor(at(0)), op, &found)) return py::none();
  return py::make_tuple(found.M, found.K, found.N, found.r_a, found.r_b);
}

py::object apply(py::handle x, const py::tuple& op, const std::string& form) {
  const at::Tensor input = tensor(x.ptr());
  const hydra::Operands unpacked = operands(op);
  at::Tensor h;
  {
    py::gil_scoped_release released;
    h = hydra::apply(input, unpacked, form_named(form));
  }
  return py::reinterpret_steal<py::object>(wrapped(h));
}

py::tuple forward(py::handle x, const py::tuple& op, uint32_t needs, const std::string& form) {
  const at::Tensor input = tensor(x.ptr());
  const hydra::Operands unpacked = operands(op);
  hydra::Forward made;
  {
    py::gil_scoped_release released;
    made = hydra::forward(input, unpacked, {needs}, form_named(form));
  }
  return wrapped(made);
}

py::dict backward(py::handle G, const py::tuple& op, const py::tuple& saved, uint32_t needs, const std::string& form) {
  const at::Tensor input = tensor(G.ptr());
  const hydra::Operands unpacked = operands(op);
  const hydra::Saved left = saved_of(saved);
  hydra::Gradients grads;
  {
    py::gil_scoped_release released;
    grads = hydra::backward(input, unpacked, left, {needs}, form_named(form));
  }
  return wrapped(grads);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled part of hydra_kernels.";
  m.def("sizes", torch::wrap_pybind_function(sizes), "(x, weight, ..., B_up_bias, mask, scale_a, scale_b) -> (M, K, N, r_a, r_b), or None: unjudged");
  m.def("apply", torch::wrap_pybind_function(apply), "(x, Operands, form) -> h, differentiable, for a call whose sizes it told");
  m.def("forward", torch::wrap_pybind_function(forward), "(x, Operands, bits of the wanted gradients, form) -> (h, saved)");
  m.def("backward", torch::wrap_pybind_function(backward), "(G, Operands, saved, bits, form) -> gradients by name");
  m.def("instructions", &hydra::cpu::instructions, "The instruction set of the CPU kernels.");
}
