"""explain: what would run for a call, on this machine or on another one, why, and what would change it."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..backend import TABLE
from ..backend.interface import BY_TRITON, LOW_PRECISION, Choice
from ..backend.triton import too_old
from ..checks import check_dropout
from .choice import DATA, Machine, choose
from .machine import CPU, device_name, here, table

_LIBRARY_NAMES = {
    "aten": "ATen",
    "onednn": "oneDNN",
    "onednn-forward": "oneDNN in the forward, ATen in the backward",
    "own": "our own kernels for few rows",
}
Capability = tuple[int, int] | str | None


def explain(
    M: int,
    K: int,
    N: int,
    r_a: int | None = None,
    r_b: int | None = None,
    dtype: torch.dtype | None = None,
    capability: Capability = None,
    *,
    r: int | None = None,
    input_dropout: float = 0.0,
    bias: bool = True,
) -> Choice:
    """Prints what ``backend="auto"``, ``form="auto"`` run for x [M, K], weight [N, K], why, and what would change it.

    Args:
        M, K, N: sizes.
        r_a, r_b: ranks of the parallel and of the sequential branch, not both 0.
        dtype: of x and weight; None is float32 on a CPU and bfloat16 on a GPU.
        capability: a GPU's compute capability, as (9, 0) or "sm_90", the name of a card, as "h100", or "cpu"; None for
            this machine.
        r: LoRA's rank, in place of r_a and r_b: ``r_a=r, r_b=0``.
        input_dropout: that of the layer in training; not every backend and form has it.
        bias: whether the frozen layer has b0. In bfloat16 and float16 the effective form is exact enough only without
            it.

    Returns:
        The `Choice` that was explained.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if r is not None and (r_a is not None or r_b is not None):
        raise TypeError(f"r: expected either r, LoRA's rank, or r_a and r_b, got r={r}, r_a={r_a}, r_b={r_b}")
    ranks = (("r_a", r_a), ("r_b", r_b)) if r is None else (("r", r),)
    for name, value, least in (("M", M, 1), ("K", K, 1), ("N", N, 1), *((name, value, 0) for name, value in ranks)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    check_dropout("input_dropout", input_dropout)
    r_a, r_b = r if r is not None else r_a or 0, r_b or 0
    if r_a == r_b == 0:
        given = "r: expected 1 or more, got 0" if r is not None else "r_a, r_b: expected 1 or more, got 0 and 0"
        raise ValueError(f"{given}: only the frozen layer would run")
    machine = _machine(capability)
    if dtype is None:
        dtype = torch.float32 if machine.capability is None else torch.bfloat16
    if dtype not in (torch.float64, torch.float32, *LOW_PRECISION):
        raise TypeError(f"dtype: expected torch.float64, float32, float16 or bfloat16, got {dtype}")
    drops = input_dropout > 0 and r_a > 0
    choice = choose(M, K, N, r_a, r_b, dtype, machine, masked=drops, drops_input=drops, has_bias=bias)
    dropped = ("" if bias else ", no bias") + (f", input dropout {input_dropout}" if drops else "")
    print(f"x [{M}, {K}], weight [{N}, {K}], ranks {r_a}+{r_b}{dropped}, {dtype}, on {machine.name}")
    print(f"runs      {choice.backend}, {choice.form} form")
    print(f"backend   {choice.why_backend}")
    print(f"form      {choice.why_form}")
    if choice.why_library:
        print(f"products  by {_LIBRARY_NAMES[choice.library]}: {choice.why_library}")
    if choice.why_backward:
        print(f"backward  by {choice.backward}: {choice.why_backward}")
    print(f"numbers   {_whose_numbers(machine)}")
    print(f"to change run hk.tune([({M}, {K}, {N}, {r_a}, {r_b})], dtype={dtype}) there; it stores the fastest")
    return choice


def _machine(capability: Capability) -> Machine:
    """The machine that is asked for; another one counts as having the whole package built."""
    if capability is None:
        return here(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU)
    if capability == "cpu":
        reasons = {**here(CPU).reasons, **dict.fromkeys(BY_TRITON, "it needs an NVIDIA GPU")}
        return Machine(device_name(CPU), None, reasons, here(CPU).measured, here(CPU).cpu)
    card = _card(capability) if isinstance(capability, str) else None
    if card is not None:
        capability = tuple(DATA["cards"][card])
    elif isinstance(capability, str) and capability.removeprefix("sm_").isdecimal():
        digits = capability.removeprefix("sm_")
        capability = int(digits[:-1] or 0), int(digits[-1])
    if not isinstance(capability, tuple) or len(capability) != 2 or not all(isinstance(n, int) for n in capability):
        raise ValueError(
            f"capability: expected a compute capability such as (9, 0) or 'sm_90', a card such as 'h100' (known: "
            f"{', '.join(DATA['cards'])}), 'cpu', or None, got {capability!r}"
        )
    number = f"{capability[0]}.{capability[1]}"
    card = card or next((name for name, of in DATA["cards"].items() if tuple(of) == capability), None)
    name = f"compute capability {number}" + (f", as {card}" if card else "")
    reasons = {backend: too_old(capability) if backend in BY_TRITON else None for backend in TABLE}
    measured = table((row for row in DATA["measured"] if row["device"] == card), tf32=False)
    return Machine(name, capability, reasons, measured)


def _card(name: str) -> str | None:
    """The known card that has all words of name in its own, as "h100" or "RTX 4090"; None where not exactly one has."""
    words = set(_words(name))
    found = [card for card in DATA["cards"] if words and words <= set(_words(card))]
    return found[0] if len(found) == 1 else None


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def _whose_numbers(machine: Machine) -> str:
    """Where the thresholds and reasons of the choice were measured, beside the machine that is asked for."""
    source: Any = DATA["measured_on"]["cpu" if machine.capability is None else "gpu"]
    if machine.measured:
        return f"some shapes were measured on this device; for others the rules were measured on {source}"
    if source in machine.name:
        return f"the rules were measured on {source}, the same as this device"
    return f"the rules were measured on {source}; nothing was measured on this device"
