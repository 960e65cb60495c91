"""explain: what would run for a call on a machine, here or not, why, and how long a step is predicted to take.

The prediction knows bytes and operations alone: a kernel takes max(bytes / bandwidth, operations / rate) of the card's
figures in ``numbers.json``, a step the sum of its kernels and a gap a launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..backend import TABLE
from ..backend.interface import COMPOSED_ONLY, LOW_PRECISION, MAX_NATIVE_RANK, Choice
from ..backend.triton import too_old
from ..kernels import configs
from .choice import DATA, Machine, choose
from .machine import CPU, device_name, here, table

Capability = tuple[int, int] | str | None


class Call(NamedTuple):
    """x [M, K], weight [N, K]."""

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    dtype: torch.dtype


class Kernel(NamedTuple):
    name: str
    bytes: int
    operations: int


def explain(
    M: int, K: int, N: int, r_a: int, r_b: int, dtype: torch.dtype = torch.bfloat16, capability: Capability = None
) -> Choice:
    """Prints what ``backend="auto"``, ``form="auto"`` run for x [M, K] and weight [N, K], why, and the predicted time.

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
    machine, card = _machine(capability)
    call = Call(M, K, N, r_a, r_b, dtype)
    choice = choose(*call, machine)
    print("\n".join(_lines(call, machine, card, choice)))
    return choice


def _machine(capability: Capability) -> tuple[Machine, Mapping[str, Any] | None]:
    """The machine that is asked for, and its card's figures where they are known."""
    cards = DATA["cards"]
    if capability is None:
        on_gpu = torch.cuda.is_available()
        machine = here(torch.device("cuda", torch.cuda.current_device()) if on_gpu else CPU)
        return machine, cards.get(".".join(map(str, machine.capability or ())) if on_gpu else "cpu")
    if capability == "cpu":
        reasons = {**here(CPU).reasons, **dict.fromkeys(COMPOSED_ONLY, "it needs an NVIDIA GPU")}
        return Machine(device_name(CPU), None, reasons, here(CPU).measured), cards["cpu"]
    if isinstance(capability, str) and capability.removeprefix("sm_").isdecimal():
        digits = capability.removeprefix("sm_")
        capability = int(digits[:-1] or 0), int(digits[-1])
    if not isinstance(capability, tuple) or len(capability) != 2 or not all(isinstance(n, int) for n in capability):
        raise ValueError(f"capability: expected one such as (9, 0) or 'sm_90', 'cpu', or None, got {capability!r}")
    card = cards.get(".".join(map(str, capability)))
    reasons = {name: too_old(capability) if name in COMPOSED_ONLY else None for name in TABLE}
    name = f"compute capability {capability[0]}.{capability[1]}" + (f", as {card['name']}" if card else "")
    rows = [row for row in DATA["measured"] if card and row["device"] == card["name"]]
    return Machine(name, capability, reasons, table(rows, tf32=False)), card


def _lines(call: Call, machine: Machine, card: Mapping[str, Any] | None, choice: Choice) -> list[str]:
    M, K, N, r_a, r_b, dtype = call
    lines = [
        f"x [{M}, {K}], weight [{N}, {K}], ranks {r_a}+{r_b}, {dtype}, on {machine.name}",
        f"runs      {choice.backend}, {choice.form} form",
        f"backend   {choice.why_backend}",
        f"form      {choice.why_form}",
    ]
    predicted = {} if card is None else predict(call, machine, card)
    tune = f"hk.tune([({M}, {K}, {N}, {r_a}, {r_b})], dtype={dtype}) there measures every candidate"
    if "triton" in predicted and card is not None and predicted["triton"] != predicted["hybrid"]:
        tune += f"; triton is predicted to win where its GEMM reaches {_needed_efficiency(call, machine, card)}"
    lines.append(f"to change {tune}")
    if card is None:
        return [*lines, "predicted nothing: no figures of such a card are known"]
    rate = card["tflops"].get(_rate_name(dtype))
    lines.append(
        f"predicted a step with every gradient, from {rate:g} TFLOP/s and {card['gigabytes']:g} GB/s ({card['name']}: "
        f"{card['source']}), {card['launch_us']} us a launch"
    )
    runs = choice.backend if choice.backend in predicted else f"{choice.backend} {choice.form}"
    for name, us in predicted.items():
        over = us / predicted["frozen"]
        lines.append(f"  {name:14} {us:10.1f} us   {over:.3f} of frozen{'   <- runs' if name == runs else ''}")
    return lines


def predict(call: Call, machine: Machine, card: Mapping[str, Any], efficiency: float | None = None) -> dict[str, float]:
    """Microseconds of a step of the frozen layer and of everything that could serve the call."""
    names = ["frozen", *(name for name in COMPOSED_ONLY if machine.reasons[name] is None)]
    if call.dtype == torch.float64:
        names = ["frozen"]
    if "triton" in names and call.r_a + call.r_b > configs.MAX_RANK_BLOCK:
        names.remove("triton")
    names += ["aten composed"] if call.dtype not in LOW_PRECISION or call.r_b == 0 else []
    names += ["aten kept"] if call.r_b else []
    if machine.capability is None and machine.reasons["native"] is None and call.dtype not in LOW_PRECISION:
        names += ["native composed", "native effective", *(["native kept"] if call.r_b else [])]
    on_gpu = machine.capability is not None and call.dtype != torch.float64
    if on_gpu and machine.reasons["native"] is None and call.r_a + call.r_b <= MAX_NATIVE_RANK:
        names += ["native composed"]
    bandwidth, rate = card["gigabytes"] * 1e3, card["tflops"][_rate_name(call.dtype)] * 1e6
    found = {}
    for name in names:
        share = efficiency or DATA["gemm_over_cublas"]
        kernels = kernels_of(name, call, machine.capability)
        times = [
            max(k.bytes / bandwidth, k.operations / (rate * (share if k.name.startswith("fused") else 1)))
            for k in kernels
        ]
        found[name] = sum(times) + card["launch_us"] * len(kernels)
    return found


def kernels_of(name: str, call: Call, capability: tuple[int, int] | None) -> list[Kernel]:
    """The launches of a step: what each reads and writes, and its operations. One of each tensor's bytes a pass."""
    M, K, N, r_a, r_b, dtype = call
    R, size, low = r_a + r_b, dtype.itemsize, dtype in LOW_PRECISION
    x, h, W, Z, D, U = (size * n for n in (M * K, M * N, N * K, M * R, R * K, N * R))
    gemm, over_K, over_N, small = 2 * M * K * N, 2 * M * K * R, 2 * M * N * R, 2 * N * K * r_b
    arch = configs.of(capability or (8, 6))
    tiles = arch.half if low else arch.small
    C, dU, dD = (4 * n * arch.splits(tiles, m, k) for n, m, k in ((r_b * K, N, K), (N * R, M, N), (R * K, M, K)))
    products = 4 * r_b * N * arch.splits_of_columns(tiles, N, K)
    parts = 2 if low and r_b else 1
    before = [Kernel("C", W + C, small)] if r_b else []
    before += [Kernel("compose", C + parts * D + U, 0), Kernel("Z", x + Z + parts * D, parts * over_K)]
    over_G = [Kernel("[A_up, B_up]", 2 * U, 0), Kernel("dZ", h + Z + U, over_N), Kernel("dU", h + Z + dU, over_N)]
    over_x, after = Kernel("dD", x + Z + dD, over_K), [Kernel("reduce", dU + dD + 4 * r_b * K + D + U, 0)]
    if r_b:
        after += [Kernel("T W0^T", W + 4 * r_b * K + products, 2 * small if low else small)]
        after += [Kernel("finish", products, 0)]
    if name == "frozen":
        return [Kernel("h", x + W + h, gemm), Kernel("dx", h + W + x, gemm)]
    h_fused = Kernel("fused h", x + W + h + Z + U, gemm + over_N)
    dx_fused = Kernel("fused dx", h + W + x + Z + D, gemm + over_K)
    if name == "triton":
        return [*before, h_fused, *over_G, dx_fused, over_x, *after]
    h_frozen, h_more = Kernel("h", x + W + h, gemm), Kernel("h += Z U^T", 2 * h + Z + U, over_N)
    dx_less, dx_frozen = Kernel("dx = dZ D", x + Z + D, over_K), Kernel("dx", h + W + 2 * x, gemm)
    if name == "hybrid":
        h_all = [h_fused] if arch.fuses(tiles, N, R) else [h_frozen, h_more]
        dx_all = [dx_fused] if arch.fuses(tiles, K, R) else [dx_less, dx_frozen]
        return [*before, *h_all, *over_G, *dx_all, over_x, *after]
    dU_alone, dZ_alone = Kernel("dU", h + Z + U, over_N), Kernel("dZ", h + Z + U, over_N)
    if name == "aten composed":
        T = [Kernel("T W0^T", W, small)] if r_b else []
        Z_alone, more = Kernel("Z", x + Z + D, over_K), Kernel("h = Z U^T", h + Z + U, over_N)
        accumulated = Kernel("h", x + W + 2 * h, gemm)
        backward = [dU_alone, dZ_alone, dx_less, dx_frozen, Kernel("dD", x + Z + D, over_K), *T]
        C_alone = [Kernel("C", W + D, small)] if r_b else []
        return [*C_alone, Z_alone, more, accumulated, *backward]
    if name == "native composed" and capability is not None:
        return [*before, h_frozen, h_more, *over_G, dx_less, dx_frozen, over_x, *after]
    if name.startswith("native"):
        return _native_on_a_cpu(name.removeprefix("native "), call, x, h, W, D, gemm)
    forward_b = [Kernel("Z_b", h + Z, 2 * M * N * r_b), Kernel("h = y0 + Z_b U_b^T", 2 * h + Z, 2 * M * N * r_b)]
    backward_b = [Kernel("dU_b", h, 0), Kernel("dZ_b", h, 0), Kernel("dy0", 2 * h, 0), Kernel("dB_down", h, 0)]
    if not r_a:
        return [h_frozen, *forward_b, *backward_b, Kernel("dx", h + W + x, gemm)]
    forward_a = [Kernel("Z_a", x + Z, 2 * M * K * r_a), Kernel("h += Z_a U_a^T", 2 * h, 2 * M * N * r_a)]
    backward_a = [Kernel("dU_a", h, 0), Kernel("dZ_a", h, 0), Kernel("dx_a", x, 0), Kernel("dA_down", x, 0)]
    return [h_frozen, *forward_b, *forward_a, *backward_b, *backward_a, dx_frozen]


def _native_on_a_cpu(form: str, call: Call, x: int, h: int, W: int, D: int, gemm: int) -> list[Kernel]:
    """The passes of csrc/cpu: what has a side of R reads x, G and y0 together, block by block."""
    M, K, N, r_a, r_b, _ = call
    R, over, small = r_a + r_b, 2 * M * (K + N) * (r_a + r_b), 2 * N * K * r_b
    through_W0 = [Kernel("C", W + D, small)] if r_b and form != "kept" else []
    after = [Kernel("T W0^T", W, small)] if through_W0 else []
    h_frozen, dx_frozen = Kernel("h", x + W + h, gemm), Kernel("dx", h + W + x, gemm)
    if form == "effective":
        W_eff = Kernel("W0 + U D", 2 * W, 2 * N * K * R)
        return [*through_W0, W_eff, h_frozen, Kernel("sweep", x + h, 2 * over), W_eff, dx_frozen, *after]
    onto_dx = Kernel("dx", h + W + 2 * x, gemm)
    if form == "composed":
        forward = [Kernel("Z, Z U^T", x + h, over), Kernel("h", x + W + 2 * h, gemm)]
        return [*through_W0, *forward, Kernel("sweep", 2 * x + h, 3 * M * K * R + over), onto_dx, *after]
    low = Kernel("Z, h = y0 + Z U^T", (x if r_a else 0) + 2 * h, over)
    sweep = Kernel("sweep", (2 * x if r_a else 0) + 3 * h, 2 * over)
    return [h_frozen, low, sweep, onto_dx if r_a else dx_frozen]


def _needed_efficiency(call: Call, machine: Machine, card: Mapping[str, Any]) -> str:
    """The least share of cuBLAS's speed, in hundredths, at which triton is as fast as hybrid."""
    for hundredths in range(50, 111):
        predicted = predict(call, machine, card, hundredths / 100)
        if predicted["triton"] <= predicted["hybrid"]:
            return f"{hundredths / 100:.2f} of cuBLAS's"
    return "more than 1.1 of cuBLAS's"


def _rate_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
