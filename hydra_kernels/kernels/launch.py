"""A kernel with its grid and arguments. The backend runs it; the compile report, the roofline and tests collect it."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import Gemm, Reduce, Skinny

# s_a and s_b: a number, or a tensor that the kernel loads, so that the host never reads it.
Scales = tuple[float | Tensor, float | Tensor]

_log = logging.getLogger("hydra_kernels")
_announced: set[tuple[Any, ...]] = set()


class Launch(NamedTuple):
    """``kernel`` over ``grid`` programs; ``arguments`` by the kernel's names, ``options`` for its compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @classmethod
    def of(cls, kernel: Any, grid: tuple[int, ...], config: Gemm | Skinny | Reduce, **arguments: Any) -> Launch:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers is not None:
            options["maxnreg"] = config.max_registers
        return cls(kernel, grid, arguments, options)

    def early(self) -> Launch:
        """The same under programmatic dependent launch: it may start before the kernel before it has ended."""
        return self._replace(
            arguments=self.arguments | {"DEPENDENT": True}, options=self.options | {"launch_pdl": True}
        )  # fmt: skip

    def run(self) -> None:
        """Enqueues the kernel on the current stream of its tensors' device; an empty grid runs nothing."""
        if 0 in self.grid:
            return
        device = next(v.device for v in self.arguments.values() if isinstance(v, Tensor))
        if _log.isEnabledFor(logging.INFO):
            self._announce()
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.kernel[self.grid](**self.arguments, **self.options)
        else:
            self.kernel[self.grid](**self.arguments, **self.options)

    def _announce(self) -> None:
        """Logs a first compilation, which takes seconds unless an earlier run left it in Triton's cache."""
        dtypes = [v.dtype for v in self.arguments.values() if isinstance(v, Tensor)]
        constants = [v for name, v in self.arguments.items() if name.isupper() and len(name) > 1]
        key = (self.kernel.__name__, *dtypes, *constants, *self.options.values())
        if key not in _announced:
            _announced.add(key)
            _log.info("compiling %s for %s", self.kernel.__name__, ", ".join(map(str, dict.fromkeys(dtypes))))
