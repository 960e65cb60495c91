"""tune: measures which backend and form is the fastest for a shape on this device, among those that are right.

It times what users call, so it alone in this folder imports `functional` and `layers`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import extension, reference
from ..autograd import computed_in
from ..backend import TABLE
from ..backend.interface import LIBRARIES, Choice, Operands, rounds_the_sum
from ..functional import hydra_linear
from ..layers import HydraLinear, QuantisedBase
from ..weights import dtype_of
from . import accuracy, machine

Shape = tuple[int, int, int, int, int]
CANDIDATES = (
    *(("hybrid", "composed"), ("hybrid", "effective"), ("triton", "composed"), ("aten", "composed"), ("aten", "kept")),
    *(("native", "composed"), ("native", "kept"), ("native", "effective")),
)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COLD_BYTES = 64 << 20  # overwritten before each step on a CPU; on a GPU twice its L2
_STEPS_IN_A_ROW = 4  # the last of them is timed: by then the host is ahead of the GPU, if it can be


class Tuned(NamedTuple):
    """One shape: medians of a step in microseconds by candidate, the winner, and why the others failed.

    ``library`` computes `native`'s products with W0 on a CPU; ``library_us`` are its form's medians with each.
    ``without_bias`` names the candidate that is faster than the winner, but right only in layers without b0; or "".
    """

    M: int
    K: int
    N: int
    r_a: int
    r_b: int
    dtype: str
    device: str
    backend: str
    form: str
    library: str
    us: dict[str, float]
    library_us: dict[str, float]
    failed: dict[str, str]
    without_bias: str
    versions: dict[str, str | None]
    date: str


def tune(
    model_or_shapes: nn.Module | Iterable[Shape],
    *,
    rows: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rounds: int = 20,
    report: Callable[[str], object] = print,
) -> list[Tuned]:
    """Measures every candidate for the shapes, and stores the winner, which ``backend="auto"`` then runs.

    A candidate counts only if its output and every gradient are right: at most twice the error of the naive layer in
    the same dtype, against float64. A step (forward and backward with every gradient) is timed in shuffled rounds, with
    a cold L2. On a GPU the longer of the GPU's and the host's time counts: eager steps in a row take that long. This
    process runs the winner from its next call on; a function that is compiled already keeps its choice.

    Args:
        model_or_shapes: a model, whose Hydra, LoRA and SeqLoRA layers are tuned on their own device, or shapes
            (M, K, N, r_a, r_b): x [M, K], weight [N, K].
        rows: M for a model: how many rows x has (batch times tokens), one number or several.
        dtype: of the products. None means bfloat16 for shapes, and for a model the dtype of its weights, or autocast's
            if you call this under autocast.
        device: for shapes; None for the GPU where there is one, else the CPU.
        rounds: samples of each candidate.
        report: gets one line for each shape, with the winner and what failed.

    Returns:
        What was measured. It is also stored, a file for each shape, in ``$HYDRA_KERNELS_CACHE`` (else the user's
        cache folder), and counts for half to twice as many rows, on the same device and versions.

    Raises:
        ValueError, TypeError: naming the argument. RuntimeError where no candidate is right.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected 1 or more, got {rounds}")
    jobs = _jobs(model_or_shapes, rows, dtype, device)
    found = []
    try:
        for shape, of, where in jobs:
            found.append(_measure(shape, of, where, rounds))
            _store(found[-1])
            report(line_of(found[-1]))
    finally:
        machine.forget()
    return found


def _dtype(layer: HydraLinear) -> torch.dtype:
    return dtype_of(layer.base_layer) if isinstance(layer, QuantisedBase) else computed_in(layer.weight)


def line_of(tuned: Tuned) -> str:
    times = ", ".join(f"{name} {us:.1f} us" for name, us in sorted(tuned.us.items(), key=lambda item: item[1]))
    failed = "".join(f"; {name} FAILED: {why}" for name, why in tuned.failed.items())
    shape = f"M={tuned.M} K={tuned.K} N={tuned.N} {tuned.r_a}+{tuned.r_b} {tuned.dtype}"
    plan = Choice(tuned.backend, tuned.form, "", "", tuned.library).plan
    without = f", without a bias {tuned.without_bias}" if tuned.without_bias else ""
    return f"{shape}: {tuned.backend} {plan}{without} ({times}{failed})"


def _jobs(
    model_or_shapes: nn.Module | Iterable[Shape],
    rows: int | Sequence[int] | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> list[tuple[Shape, torch.dtype, torch.device]]:
    if isinstance(model_or_shapes, nn.Module):
        if rows is None:
            raise ValueError("rows: expected the number of rows of the model's inputs, got None; pass batch * tokens")
        layers = [layer for layer in model_or_shapes.modules() if isinstance(layer, HydraLinear)]
        if not layers:
            raise ValueError("model_or_shapes: the model has no Hydra, LoRA or SeqLoRA layer; call inject first")
        jobs = [
            (
                (M, layer.in_features, layer.out_features, layer.r_a, layer.r_b),
                dtype or _dtype(layer),
                layer.weight.device,
            )
            for layer in layers
            if layer.r_a + layer.r_b
            for M in ([rows] if isinstance(rows, int) else rows)
        ]
    else:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        jobs = [(shape, dtype or torch.bfloat16, where) for shape in model_or_shapes]
    for shape, of, _ in jobs:
        if (
            not isinstance(shape, tuple)
            or len(shape) != 5
            or not all(isinstance(n, int) for n in shape)
            or min(shape) < 0
            or min(shape[:3]) < 1
        ):
            raise ValueError(f"model_or_shapes: expected (M, K, N, r_a, r_b) of positive integers, got {shape}")
        if shape[3] + shape[4] == 0:
            raise ValueError(f"model_or_shapes: expected r_a or r_b to be 1 or more, got {shape}")
        if of not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {of}")
    return list(dict.fromkeys(jobs))


def _measure(shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> Tuned:
    r_a, r_b = shape[3:]
    tf32 = dtype == torch.float32 and device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    slack = accuracy.slack_of(dtype, tf32)
    t, G = _operands(shape, dtype, device)
    exact = _step(reference.hydra_linear, {k: v if v is None else v.double() for k, v in t.items()}, G.double())
    naive = list(map(accuracy.errors, _step(reference.hydra_linear, t, G), exact))
    steps: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for backend, form in CANDIDATES:
        name = f"{backend} {form}"
        reason = TABLE[backend].unavailable(device) or TABLE[backend].refusal(form, dtype, r_a, r_b, device=device)
        if reason is not None or (form == "kept" and not r_b):
            continue

        def run(x: Tensor, *tensors: Tensor | None, form: str = form, backend: str = backend) -> Tensor:
            return hydra_linear(x, *tensors, form=form, backend=backend)  # type: ignore[arg-type]

        try:
            wrong = _wrong(_step(run, t, G), exact, naive, slack)
        except Exception as error:  # a compiler's or a driver's: the other candidates are measured all the same
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if wrong is not None:
            failed[name] = wrong
        else:
            steps[name] = lambda run=run: _step(run, t, G)  # type: ignore[misc]
    del exact
    if all(rounds_the_sum(name.split()[1], dtype) for name in steps):
        raise RuntimeError(f"tune: no candidate is exact enough for {shape} in {dtype} on {device}: {failed}")
    us = _times(steps, device, rounds)
    fastest = min(us, key=lambda name: us[name])
    right = [name for name in us if not rounds_the_sum(name.split()[1], dtype)]
    winner = min(right, key=lambda name: us[name])
    backend, form = winner.split()
    library, library_us, native = "aten", {}, extension.load()
    if backend == "native" and device.type == "cpu" and dtype == torch.float32 and native:
        libraries = [name for name in LIBRARIES if native.onednn() or "onednn" not in name]
        library_us = _times({name: _by(name, native.apply, form, t, G) for name in libraries}, device, rounds)
        library = min(library_us, key=lambda name: library_us[name])
    return Tuned(
        *shape,
        dtype="tf32" if tf32 else str(dtype).removeprefix("torch."),
        device=machine.device_name(device),
        backend=backend,
        form=form,
        library=library,
        us={name: round(v, 3) for name, v in us.items()},
        library_us={name: round(v, 3) for name, v in library_us.items()},
        failed=failed,
        without_bias="" if fastest == winner else fastest,
        versions=machine.versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Tensor | None], Tensor]:
    """Random x, weight, bias and adapters in the order of `hydra_linear`; all but weight and bias take gradients."""
    M, K, N, r_a, r_b = shape
    sizes = {"x": (M, K), "weight": (N, K), "bias": (N,), "A_down": (r_a, K), "A_up": (N, r_a)}
    sizes |= {"B_down": (r_b, N), "B_up": (N, r_b)}
    draw = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device=device, dtype=torch.float32)

    def scaled(name: str, size: tuple[int, ...]) -> Tensor | None:
        if 0 in size:
            return None
        t = normal(*size) * (size[-1] ** -0.5 if len(size) == 2 and name != "x" else 1)
        return t.to(dtype).requires_grad_(name not in ("weight", "bias"))

    return {name: scaled(name, size) for name, size in sizes.items()}, normal(M, N).to(dtype)


def _by(
    library: str, apply: Callable[..., Tensor], form: str, t: dict[str, Tensor | None], G: Tensor
) -> Callable[[], object]:
    """A step of `native` by one library."""
    plan = Choice("native", form, "", "", library).plan
    return lambda: _step(lambda x, *tensors: apply(x, Operands(*tensors), plan), t, G)


def _step(function: Callable[..., Tensor], t: dict[str, Tensor | None], G: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [v for name, v in t.items() if v is not None and name not in ("weight", "bias")]
    with torch.enable_grad(), torch.autocast(G.device.type, enabled=False):
        h = function(*t.values())
        return [h.detach(), *torch.autograd.grad(h, leaves, G)]


def _wrong(
    got: Sequence[Tensor], exact: Sequence[Tensor], naive: Sequence[tuple[float, float]], slack: float
) -> str | None:
    """What errs more than the rule of `accuracy` allows for the naive layer's errors, or None."""
    for place, (value, true, least) in enumerate(zip(got, exact, naive, strict=True)):
        for error, naive_error in zip(accuracy.errors(value, true), least, strict=True):
            limit = accuracy.allowed(naive_error, slack)
            if not error / limit <= 1:  # what is not finite fails too
                what = "the output" if place == 0 else f"gradient {place}"
                return f"the error of {what} is {error:.2e}, allowed {limit:.2e}"
    return None


def _times(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Medians of a step in microseconds: each round in a new random order, the L2 overwritten before each step."""
    cuda, draw = device.type == "cuda", random.Random(0)
    cold = 2 * torch.cuda.get_device_properties(device).L2_cache_size if cuda else _COLD_BYTES
    flush = torch.empty(cold, dtype=torch.uint8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in draw.sample(list(steps), len(steps)):
            if cuda:
                with torch.cuda.device(device):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    for _ in range(_STEPS_IN_A_ROW):
                        flush.zero_()
                        start.record()
                        began = time.perf_counter()
                        steps[name]()
                        host = time.perf_counter() - began  # the events miss it where the flush still ran
                        end.record()
                end.synchronize()
                samples[name].append(max(start.elapsed_time(end) * 1e3, host * 1e6))
            else:
                flush.zero_()
                began = time.perf_counter()
                steps[name]()
                samples[name].append((time.perf_counter() - began) * 1e6)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _store(tuned: Tuned) -> Path:
    """One file for each shape, replaced as a whole: processes that tune at once lose none of each other's files."""
    text = json.dumps(tuned._asdict(), indent=1)
    words = [*(tuned.device, tuned.dtype), *map(str, tuned[:5])]
    name = "".join(c if c.isalnum() else "-" for c in "_".join(words).replace(" ", "-"))
    path = machine.cache_folder() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path
