// hydra::gpu for CPU tensors, over the kernels that were compiled for the host: a module for tests/test_native_gpu.py.
#include "host.h"
#include "python.h"

using namespace hydra::python;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("forward", [](py::handle x, const py::tuple& op, uint32_t needs) {
    return wrapped(hydra::gpu::forward(tensor(x.ptr()), operands(op), {needs}));
  });
  m.def("backward", [](py::handle G, const py::tuple& op, const py::tuple& saved, uint32_t needs, bool sweep) {
    return wrapped(hydra::gpu::backward(tensor(G.ptr()), operands(op), saved_of(saved), {needs}, sweep));
  });
}
