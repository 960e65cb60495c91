"""The names of torch that torch does not promise to keep: looked up here alone, once, when the package is imported.

A torch that has dropped or moved one is refused at once, with the words that help, and not in the middle of a training.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

TESTED = "2.11 to 2.14"


def _found(module: str, path: str) -> Any:
    """What ``module`` holds under a dotted path."""
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


_found("torch._C", "_current_graph_task_id")

# At the end of the backward that is running, calls a function without arguments.
at_the_end_of_the_backward = _found("torch.autograd", "Variable._execution_engine.queue_callback")


def in_a_backward() -> bool:
    """Whether a backward runs on this thread."""
    return torch._C._current_graph_task_id() != -1
