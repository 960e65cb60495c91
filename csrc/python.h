// Tensors, operands and gradients between Python and C++.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "operands.h"

namespace hydra::python {

inline at::Tensor tensor(PyObject* object) {
  return object == Py_None ? at::Tensor() : THPVariable_Unpack(object);
}

// Whether an object is a torch.nn.Parameter and no subclass of it.
inline bool is_parameter(PyObject* object) {
  static PyObject* const parameter = py::object(py::module_::import("torch.nn").attr("Parameter")).release().ptr();
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(parameter);
}

inline PyObject* wrapped(const at::Tensor& t) { return t.defined() ? THPVariable_Wrap(t) : Py_NewRef(Py_None); }

inline py::tuple wrapped(const Forward& made) {
  py::tuple saved(made.saved.size()), both(2);
  for (size_t i = 0; i < made.saved.size(); ++i) PyTuple_SET_ITEM(saved.ptr(), i, wrapped(made.saved[i]));
  PyTuple_SET_ITEM(both.ptr(), 0, wrapped(made.h));
  PyTuple_SET_ITEM(both.ptr(), 1, saved.release().ptr());
  return both;
}

inline Saved saved_of(const py::tuple& tensors) {
  Saved saved;
  for (py::handle t : tensors) saved.push_back(tensor(t.ptr()));
  return saved;
}

inline Scale scale(PyObject* object) {
  if (THPVariable_Check(object)) return {1, THPVariable_Unpack(object)};
  return {PyFloat_AsDouble(object), {}};
}

// From a backend.interface.Operands.
inline Operands operands(const py::tuple& fields) {
  const auto at = [&](int i) { return PyTuple_GET_ITEM(fields.ptr(), i); };
  return {tensor(at(0)), tensor(at(1)), tensor(at(2)), tensor(at(3)), tensor(at(4)), tensor(at(5)), tensor(at(6)),
          tensor(at(7)), tensor(at(8)), tensor(at(9)), tensor(at(10)), scale(at(11)), scale(at(12)),
          PyFloat_AsDouble(at(13))};
}

// The keys of every backward, made once.
inline const std::array<py::str, GRADIENTS>& gradient_names() {
  static const auto* names = new std::array<py::str, GRADIENTS>{
      "x", "weight", "bias", "A_down", "A_up", "B_down", "B_up", "A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias",
      "mask", "scale_a", "scale_b"};
  return *names;
}

inline Form form_named(const std::string& name) {
  if (name == "composed") return Form::composed;
  if (name == "effective") return Form::effective;
  return Form::kept;
}

inline py::dict wrapped(const Gradients& grads) {
  py::dict found;
  for (int i = 0; i < GRADIENTS; ++i)
    if (grads[i].defined()) {
      const auto grad = py::reinterpret_steal<py::object>(wrapped(grads[i]));
      PyDict_SetItem(found.ptr(), gradient_names()[i].ptr(), grad.ptr());
    }
  return found;
}

}  // namespace hydra::python
