"""The private names of torch that the package uses. Each is looked up here, when the package is imported.

So a torch without one of them gives a clear error at the import, and not one in the middle of a training.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

TESTED = "2.11 to 2.14"


def found(module: str, path: str) -> Any:
    """What ``module`` has under a dotted path; ImportError where it has nothing there."""
    try:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            value = getattr(value, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"hydra_kernels needs {module}.{path}, which torch {torch.__version__} does not have. hydra_kernels was "
            f"tested with torch {TESTED}: install one of these, or a newer hydra_kernels"
        ) from error
    return value


FakeTensor = found("torch._subclasses.fake_tensor", "FakeTensor")
a_transform_is_on = found("torch._C", "_are_functorch_transforms_active")
is_batched_for_vectorize = found("torch._C", "_functorch.is_legacy_batchedtensor")
dispatch_modes = found("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack")
count_dispatch_modes = found("torch._C", "_len_torch_dispatch_stack")
at_the_end_of_the_backward = found("torch.autograd", "Variable._execution_engine.queue_callback")
_backward_number = found("torch._C", "_current_graph_task_id")

# What is read, or written, where torch keeps it.
found("torch.compiler", "_is_exporting_flag")
found("torch.autograd.forward_ad", "_current_level")
found("torch.nn", "Module._load_from_state_dict")
_MODULE = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
for _name in (*_MODULE, *_HOOKS):
    if _name not in vars(nn.Module()):
        found("torch.nn", f"Module.{_name}")


def is_exporting() -> bool:
    """Whether torch.export traces; torch.compiler.is_exporting() is True under torch.compile too, in torch 2.11."""
    return torch.compiler._is_exporting_flag


def in_a_dual_level() -> bool:
    """Whether forward-mode differentiation is on."""
    return forward_ad._current_level >= 0


def in_a_backward() -> bool:
    """Whether a backward runs on this thread."""
    return bool(_backward_number() != -1)


def asks_the_engine() -> Any:
    """The function that says whether the running backward executes a node; None where torch does not have it."""
    return getattr(torch._C, "_will_engine_execute_node", None)
