"""What a backend is given and what it owes.

A backend is a module, or an object, with the functions of `Backend`. Gradients are asked for and returned by name: "x",
or a field of `Operands`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

FORMS = ("auto", "composed", "kept", "effective")
LOW_PRECISION = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
BY_TRITON = ("hybrid", "triton")
MAX_NATIVE_RANK = 64  # of native's kernels on a GPU


def rounds_the_sum(form: str, dtype: torch.dtype) -> bool:
    """Whether a form rounds W0 + U D to a low precision: where b0 cancels W0 x it errs more than the naive layer.

    So `auto` takes it for no layer that has b0. Whoever fixes it, gets it.
    """
    return form == "effective" and dtype in LOW_PRECISION


# What computes `native`'s products with W0 on a CPU: ATen (MKL in fp32), oneDNN in the forward or in both passes, or
# our own kernels for few rows.
LIBRARIES = ("aten", "onednn-forward", "onednn", "own")
# How `native`'s backward reads x and G on a GPU: pass by pass, or both in one sweep, on compute capability 9.x alone.
BACKWARDS = ("passes", "sweep")
MAX_SWEEP_RANK = 32


class Choice(NamedTuple):
    """What runs, and why.

    ``backend`` is a key of ``hydra_kernels.backends()``, ``form`` one of FORMS but "auto", ``library`` one of
    LIBRARIES, ``backward`` one of BACKWARDS. ``why_library`` and ``why_backward`` are empty where there is nothing to
    choose.
    """

    backend: str
    form: str
    why_backend: str
    why_form: str
    library: str = "aten"
    why_library: str = ""
    backward: str = "passes"
    why_backward: str = ""

    @property
    def plan(self) -> str:
        """The form, and after a blank the library if it is not ATen, or "sweep": what a backend is told."""
        if self.backward == "sweep":
            return f"{self.form} sweep"
        return self.form if self.library == "aten" else f"{self.form} {self.library}"


def form_of(plan: str) -> str:
    return plan.partition(" ")[0]


class Operands(NamedTuple):
    """The one table of a call's operands but x; csrc/operands.h is the same table in C++.

    Tensors come first, then numbers, the only fields that have a default other than None: a new operand is one line
    here and one there. weight is [N, K] of x's dtype, adapters have that dtype or fp32, what is absent is None. In a
    backward, weight and bias are None where it does not read them. ``mask`` [M, R] is boolean with ``mask_scale``
    1/(1-p), or of x's dtype and already scaled with ``mask_scale`` 1. A scale is a number, or a 0-dimensional tensor.

    Input dropout is on x as the parallel branch reads it: ``input_seed``, a 0-dimensional int64 tensor that no host
    reads, of which `philox.kept` makes the mask; or ``input_mask`` [M, K], boolean. Both are scaled by
    1/(1 - ``input_p``). Or ``input_mask`` has x's dtype and is already scaled, with ``input_p`` 0.
    """

    weight: Tensor | None
    bias: Tensor | None
    A_down: Tensor | None
    A_up: Tensor | None
    B_down: Tensor | None
    B_up: Tensor | None
    A_down_bias: Tensor | None = None
    A_up_bias: Tensor | None = None
    B_down_bias: Tensor | None = None
    B_up_bias: Tensor | None = None
    mask: Tensor | None = None
    input_mask: Tensor | None = None
    input_seed: Tensor | None = None
    scale_a: float | Tensor = 1.0
    scale_b: float | Tensor = 1.0
    mask_scale: float = 1.0
    input_p: float = 0.0

    @property
    def r_a(self) -> int:
        return 0 if self.A_down is None else self.A_down.shape[0]

    @property
    def r_b(self) -> int:
        return 0 if self.B_down is None else self.B_down.shape[0]

    @property
    def drops_input(self) -> bool:
        return self.input_mask is not None or self.input_seed is not None


ARGUMENTS = ("x", *Operands._fields)  # gradients are named and ordered so
FIRST_OPTION = len(Operands._fields) - len(Operands._field_defaults)  # most calls leave all options at their defaults
FIRST_NUMBER = Operands._fields.index("scale_a")


def without_options(*six: Tensor | None) -> Operands:
    """Operands of weight, bias and the four projections, all options absent.

    Under dynamic tracing only literals are constants. The defaults of a NamedTuple become inputs of the graph, and two
    autograd functions cannot share one.
    """
    weight, bias, A_down, A_up, B_down, B_up = six
    options = None, None, None, None, None, None, None
    return Operands(weight, bias, A_down, A_up, B_down, B_up, *options, 1.0, 1.0, 1.0, 0.0)


def split(op: Operands) -> tuple[tuple[Tensor | None, ...], tuple[float, ...]]:
    """The tensors of all fields, None for a number; and the numbers, 1 in the place of a learnable scale."""
    scales: Any = op[FIRST_NUMBER:]
    tensors: Any = [*op[:FIRST_NUMBER], *(t if isinstance(t, Tensor) else None for t in scales)]
    return tuple(tensors), tuple([1.0 if isinstance(t, Tensor) else t for t in scales])


def joined(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> Operands:
    """The inverse of `split`."""
    scales = [s if t is None else t for t, s in zip(tensors[FIRST_NUMBER:], numbers, strict=True)]
    return Operands(*tensors[:FIRST_NUMBER], *scales)  # type: ignore[arg-type]


# The gradients that read Z, and those that need dZ = mask * (G U).
FROM_Z = ("A_up", "B_up", "scale_a", "scale_b")
FROM_DZ = ("x", "A_down", "B_down", "A_down_bias", "B_down_bias")


def read_backwards(op: Operands, needs: Set[str], form: str) -> Operands:
    """op without what no wanted gradient reads: autocast's copy of weight, a mask drawn for this call."""
    through_W0 = form != "kept" and "B_down" in needs
    if not through_W0:
        op = op._replace(weight=op.weight if "x" in needs else None, bias=None)
    if op.mask is not None and needs.isdisjoint(FROM_DZ) and not ("bias" in needs and op.r_b):
        op = op._replace(mask=None)
    if op.drops_input and needs.isdisjoint(("x", "A_down")):
        op = op._replace(input_mask=None, input_seed=None)
    return op


# What a forward leaves for its backward besides the operands; which tensors, each backend and form decides for itself.
Saved = tuple[Tensor | None, ...]


class Backend(Protocol):
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on a device, or None."""

    def refusal(
        self,
        form: str,
        dtype: torch.dtype,
        r_a: int,
        r_b: int,
        masked: bool = False,
        device: torch.device = CPU,
        drops_input: bool = False,
    ) -> str | None:
        """Why it cannot serve such a call on a device like that, where it runs.

        ``masked`` where it has dropout of either kind, ``drops_input`` where it has input dropout.
        """

    def forward(self, x: Tensor, op: Operands, needs: Set[str], plan: str) -> tuple[Tensor, Operands, Saved]:
        """h [M, N] for x [M, K]; what the backward will read again of op, and what it will read besides."""

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], plan: str) -> dict[str, Tensor]:
        """The gradients named in needs from G = dL/dh [M, N], each with the shape and dtype of its operand."""
