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

// Sets an operand, of whichever type, from Python's.
inline void unpack(PyObject* object, at::Tensor& operand) { operand = tensor(object); }
inline void unpack(PyObject* object, Scale& operand) {
  if (THPVariable_Check(object)) operand.tensor = THPVariable_Unpack(object);
  else operand.value = PyFloat_AsDouble(object);
}
inline void unpack(PyObject* object, double& operand) { operand = PyFloat_AsDouble(object); }

// Calls visit(field, operand) for each field of a backend.interface.Operands.
template <class Visit>
void each_field(const Visit& visit, const py::tuple& fields, Operands& op) {
  if (fields.size() != OPERANDS) throw py::type_error("expected the " + std::to_string(OPERANDS) + " fields of Operands");
  Py_ssize_t i = 0;
  each_operand([&](Gradient, auto& operand) { visit(PyTuple_GET_ITEM(fields.ptr(), i++), operand); }, op);
}

inline Operands operands(const py::tuple& fields) {
  Operands op;
  each_field([](PyObject* field, auto& operand) { unpack(field, operand); }, fields, op);
  return op;
}

// The keys of every backward, made once.
inline const std::array<py::str, GRADIENTS>& gradient_names() {
  static const auto* names = [] {
    auto* made = new std::array<py::str, GRADIENTS>;
    for (int i = 0; i < GRADIENTS; ++i) (*made)[i] = NAMES[i];
    return made;
  }();
  return *names;
}

// A form's name, and after a blank the library's where it is not ATen, or "sweep": "composed", "kept onednn",
// "kept onednn-forward", "kept own", "composed sweep".
inline Plan plan_named(const std::string& name) {
  const std::string form = name.substr(0, name.find(' '));
  return {form == "composed" ? Form::composed : form == "effective" ? Form::effective : Form::kept,
          name == form + " onednn"           ? Library::onednn
          : name == form + " onednn-forward" ? Library::onednn_forward
          : name == form + " own"            ? Library::own
                                             : Library::aten,
          name == form + " sweep"};
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
