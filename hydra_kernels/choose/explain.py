"""explain: what would run for a call, on this machine or on another one, why, and what would change it."""

from __future__ import annotations

import torch

from ..backend import TABLE
from ..backend.interface import COMPOSED_ONLY, LOW_PRECISION, Choice
from ..backend.triton import too_old
from .choice import DATA, Machine, choose
from .machine import CPU, device_name, here, table

Capability = tuple[int, int] | str | None


def explain(
    M: int, K: int, N: int, r_a: int, r_b: int, dtype: torch.dtype = torch.bfloat16, capability: Capability = None
) -> Choice:
    """Prints what ``backend="auto"``, ``form="auto"`` run for x [M, K], weight [N, K], why, and what would change it.

    Args:
        M, K, N, r_a, r_b: sizes and ranks, the ranks not both 0.
        dtype: of x and weight.
        capability: a GPU's compute capability, as (9, 0) or "sm_90", or "cpu"; None for this machine.

    Returns:
        The `Choice` that was explained.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, value, least in (("M", M, 1), ("K", K, 1), ("N", N, 1), ("r_a", r_a, 0), ("r_b", r_b, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer >= {least}, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    if r_a == r_b == 0:
        raise ValueError("r_a, r_b: both are 0, so nothing but the frozen layer would run")
    if dtype not in (torch.float64, torch.float32, *LOW_PRECISION):
        raise TypeError(f"dtype: expected torch.float64, float32, float16 or bfloat16, got {dtype}")
    machine = _machine(capability)
    choice = choose(M, K, N, r_a, r_b, dtype, machine)
    print(f"x [{M}, {K}], weight [{N}, {K}], ranks {r_a}+{r_b}, {dtype}, on {machine.name}")
    print(f"runs      {choice.backend}, {choice.form} form")
    print(f"backend   {choice.why_backend}")
    print(f"form      {choice.why_form}")
    print(f"to change hk.tune([({M}, {K}, {N}, {r_a}, {r_b})], dtype={dtype}) there measures every candidate")
    return choice


def _machine(capability: Capability) -> Machine:
    """The machine that is asked for; another one counts as having the whole package built."""
    if capability is None:
        return here(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU)
    if capability == "cpu":
        reasons = {**here(CPU).reasons, **dict.fromkeys(COMPOSED_ONLY, "it needs an NVIDIA GPU")}
        return Machine(device_name(CPU), None, reasons, here(CPU).measured)
    if isinstance(capability, str) and capability.removeprefix("sm_").isdecimal():
        digits = capability.removeprefix("sm_")
        capability = int(digits[:-1] or 0), int(digits[-1])
    if not isinstance(capability, tuple) or len(capability) != 2 or not all(isinstance(n, int) for n in capability):
        raise ValueError(f"capability: expected one such as (9, 0) or 'sm_90', 'cpu', or None, got {capability!r}")
    number = f"{capability[0]}.{capability[1]}"
    card = DATA["cards"].get(number)
    name = f"compute capability {number}" + (f", as {card}" if card else "")
    reasons = {backend: too_old(capability) if backend in COMPOSED_ONLY else None for backend in TABLE}
    measured = table((row for row in DATA["measured"] if row["device"] == card), tf32=False)
    return Machine(name, capability, reasons, measured)
