"""Predicted time of a training step, from bytes and operations alone. ``python -m benchmarks.roofline``

A kernel takes max(bytes / bandwidth, operations / rate), a step the sum of its kernels and a gap a launch. Nothing here
is measured but the card's two figures. What is launched is recorded, not written down: the naive layers run under
autograd on tensors without data and every ATen operation counts as a kernel; ours hand over their launches. Only those
of `native` are written down, in measuring/native_kernels.py, since csrc makes them itself.

Bytes: each tensor that a kernel reads or writes counts once, and once more for each further block of 64 ranks; programs
that share a tile are assumed to find it in L2. Nothing stays in L2 from one kernel to the next, unless --l2 says so.
Operations: those of the matrix products over whole tiles, as the programs run them; in ATen's of the plain sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk
from benchmarks.measuring import native_kernels, timing
from benchmarks.measuring.launches import Kernel, of_launch, size
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import RooflineRow
from benchmarks.measuring.shapes import CUDA_SHAPES, Shape, ranks_option, shape_option
from benchmarks.rendering.tables import Table, show
from hydra_kernels.backend import effective
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import MAX_NATIVE_RANK, MAX_SWEEP_RANK, Operands
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.launch import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# In the effective form, by the passes that there are, and by one sweep over x and G in their place.
EFFECTIVE = ("effective", "effective_sweep")
# hybrid_once: hybrid, where outputs of at most so many columns come from the forward that reads x once.
ONCE_UP_TO = 1024
OURS = ("hybrid", "hybrid_once", "triton", *EFFECTIVE, "native", "native_sweep")
METHODS = ("frozen", "naive_lora", "naive_seqlora", "naive_hydra", *OURS, "floor")
# Where a method ends.
MOST_RANKS = {
    **dict.fromkeys(("triton", *EFFECTIVE), configs.MAX_RANK_BLOCK),
    "native": MAX_NATIVE_RANK,
    "native_sweep": MAX_SWEEP_RANK,
}
ADAPTERS = frozenset({"A_down", "A_up", "B_down", "B_up"})
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Card(NamedTuple):
    """What large GEMMs of cuBLAS and large copies reach, measured."""

    tflops: float
    gigabytes: float


CARDS = {"h200": Card(790, 4300), "h100": Card(798, 3000)}


class Model(NamedTuple):
    card: Card
    l2_bytes: int
    launch_us: float
    gemm_efficiency: float  # of our GEMM kernel over cuBLAS


class Recorder(TorchDispatchMode):
    """The kernels that eager PyTorch launches, in order: every ATen operation but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func.overloadpacket.__name__, func._schema.returns
        is_view = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and name not in ALLOCATIONS:
            reads = [(t, 1) for t in args if isinstance(t, Tensor)]
            outputs = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
            self.kernels.append(Kernel(name, tuple(reads), tuple(outputs), _product_operations(name, args)))
        return out

    def launch(self, launch: Launch) -> None:
        """Instead of running a Triton kernel."""
        self.kernels.append(of_launch(launch))


def _product_operations(name: str, args: Sequence[Any]) -> int:
    if name not in ("mm", "addmm", "addmm_"):
        return 0
    left, right = args[-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def operands_of(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """x, W0, b0 and the adapters, without data; all but W0 and b0 are trained."""
    M, K, N = shape
    sizes = {"x": (M, K), "A_down": (ranks.r_a, K), "A_up": (N, ranks.r_a), "B_down": (ranks.r_b, N)}
    sizes |= {"B_up": (N, ranks.r_b), "weight": (N, K), "bias": (N,)}
    found: dict[str, Tensor | None] = {}
    for name, s in sizes.items():
        trained = name not in ("weight", "bias")
        found[name] = torch.empty(s, dtype=dtype, device="meta", requires_grad=trained) if 0 not in s else None
    return found


def eager_step(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> list[Kernel]:
    """The frozen layer, or a naive one, forward and backward under autograd."""
    t = operands_of(shape, ranks, dtype)
    G = torch.empty(shape.M, shape.N, dtype=dtype, device="meta")
    with Recorder() as recorder:
        frozen = ranks == Ranks(0, 0)
        h = F.linear(t["x"], t["weight"], t["bias"]) if frozen else hk.reference.hydra_linear(**t)
        torch.autograd.grad(h, [v for v in t.values() if v is not None and v.requires_grad], G)
    return recorder.kernels


def our_step(
    shape: Shape, ranks: Ranks, dtype: torch.dtype, fused: bool, form: str = "composed", once_up_to: int | None = None
) -> list[Kernel]:
    """A backend's forward and backward on Hopper."""
    arch = configs.SM90._replace(half=configs.SM90.half._replace(once_up_to=once_up_to))
    t = {name: None if v is None else v.detach() for name, v in operands_of(shape, ranks, dtype).items()}
    x, absent = t.pop("x"), dict.fromkeys(("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias", "mask"))
    op = Operands(**t, **absent, scale_a=1.0, scale_b=1.0, mask_scale=1.0)
    needs = {"x"} | {name for name in ADAPTERS if t[name] is not None}
    G = torch.empty(shape.M, shape.N, dtype=dtype, device="meta")
    with Recorder() as recorder:
        if form == "effective":
            _, op, saved = effective.forward(x, op, needs, arch, recorder.launch)
            effective.backward(G, op, saved, needs, arch, recorder.launch)
        else:
            _, op, saved = steps.forward(x, op, needs, fused, arch, recorder.launch)
            steps.backward(G, op, saved, needs, fused, arch, recorder.launch)
    return recorder.kernels


def sweep_step(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> list[Kernel]:
    """The effective form's step with one kernel for Z, dZ, dU and dD: x and G are read once, Z and dZ never stored."""
    kernels = our_step(shape, ranks, dtype, fused=False, form="effective")
    swept = ("down", "grad_z", "sum_rows")
    passes = [kernel for kernel in kernels if kernel.name in swept]

    def key(t: Tensor) -> tuple[int, int, torch.Size]:
        return t.untyped_storage()._cdata, t.storage_offset(), t.shape

    written = {key(t): t for kernel in passes for t in kernel.writes}
    read = {key(t): (t, count) for kernel in passes for t, count in kernel.reads if key(t) not in written}
    inside = {key(t) for kernel in passes for t, _ in kernel.reads} & written.keys()
    writes = tuple(t for name, t in written.items() if name not in inside)
    sweep = Kernel("sweep", tuple(read.values()), writes, sum(kernel.operations for kernel in passes))
    last = max(place for place, kernel in enumerate(kernels) if kernel.name in swept)
    return [*(kernel for kernel in kernels[:last] if kernel.name not in swept), sweep, *kernels[last + 1 :]]


def native_step(shape: Shape, ranks: Ranks, dtype: torch.dtype, sweep: bool) -> list[Kernel]:
    t = operands_of(shape, ranks, dtype)
    return [Kernel(*listed) for listed in native_kernels.native_step(shape, ranks, dtype, t, sweep)]


def floor_step(shape: Shape, ranks: Ranks, dtype: torch.dtype) -> list[Kernel]:
    """What no composed step can avoid: the frozen layer's own kernels with all of the arithmetic, every further read of
    x and G hidden behind them, and two passes over W0 with nothing to hide behind: C is wanted before the forward, and
    T W0^T after the last of dD. dZ is wanted before dx, so five launches.
    """
    M, K, N = shape
    R = sum(ranks)
    forward, dx = eager_step(shape, Ranks(0, 0), dtype)
    W0 = ((operands_of(shape, ranks, dtype)["weight"], 1),) if ranks.r_b else ()
    return [
        Kernel("compose", W0, (), 0),
        forward._replace(operations=forward.operations + 2 * M * R * (K + N)),
        Kernel("grad_z", (), (), 2 * M * R * 2 * N),
        dx._replace(operations=dx.operations + 2 * M * R * 2 * K),
        Kernel("through_weight", W0, (), 0),
    ]


STEPS: dict[str, Callable[[Shape, Ranks, torch.dtype], list[Kernel]]] = {
    "frozen": lambda shape, ranks, dtype: eager_step(shape, Ranks(0, 0), dtype),
    "naive_lora": lambda shape, ranks, dtype: eager_step(shape, Ranks(sum(ranks), 0), dtype),
    "naive_seqlora": lambda shape, ranks, dtype: eager_step(shape, Ranks(0, sum(ranks)), dtype),
    "naive_hydra": eager_step,
    "hybrid": partial(our_step, fused=False),
    "hybrid_once": partial(our_step, fused=False, once_up_to=ONCE_UP_TO),
    "triton": partial(our_step, fused=True),
    "effective": partial(our_step, fused=False, form="effective"),
    "effective_sweep": sweep_step,
    "native": partial(native_step, sweep=False),
    "native_sweep": partial(native_step, sweep=True),
    "floor": floor_step,
}


class L2:
    """Which tensors are still in a cache of so many bytes, the one used longest ago evicted first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self._held = capacity, OrderedDict[int, int]()

    def missed(self, kernel: Kernel) -> int:
        """Bytes that a kernel moves to and from memory."""
        total = 0
        for t, passes in kernel.reads:
            total += 0 if self._use(t) else size(t) * passes
        for t in kernel.writes:
            self._use(t)
            total += size(t)
        return total

    def _use(self, t: Tensor) -> bool:
        key = t.untyped_storage()._cdata
        found = self._held.pop(key, None) is not None
        if size(t) <= self.capacity:
            self._held[key] = size(t)
            while sum(self._held.values()) > self.capacity:
                self._held.popitem(last=False)
        return found


def microseconds(kernels: Iterable[Kernel], model: Model, ours: bool) -> list[float]:
    """Of each kernel, without gaps."""
    cache, found = L2(model.l2_bytes), []
    for kernel in kernels:
        efficiency = model.gemm_efficiency if ours and kernel.name.startswith(("gemm", "one_pass")) else 1.0
        memory = cache.missed(kernel) / (model.card.gigabytes * 1e3)
        found.append(max(memory, kernel.operations / (model.card.tflops * 1e6 * efficiency)))
    return found


def floor_us(shape: Shape, ranks: Ranks, dtype: str, tflops: float, gigabytes: float) -> float:
    """The least that a composed step takes, on a card with these ceilings; ranks 0 and 0: the frozen layer's step."""
    model = Model(Card(tflops, gigabytes), l2_bytes=0, launch_us=0.0, gemm_efficiency=1.0)
    return sum(microseconds(floor_step(shape, ranks, {**DTYPES, "fp32": torch.float32}[dtype]), model, ours=False))


def predict(shape: Shape, ranks: Ranks, dtype: str, model: Model) -> list[RooflineRow]:
    """A row a method; the fused kernels and the effective form only where they take the ranks."""
    rows: list[RooflineRow] = []
    for method in METHODS:
        if sum(ranks) > MOST_RANKS.get(method, sum(ranks)):
            continue
        kernels = STEPS[method](shape, ranks, DTYPES[dtype])
        times = microseconds(kernels, model, ours=method in OURS)
        total = sum(times) + model.launch_us * len(kernels)
        rows.append(
            RooflineRow(
                **shape._asdict(),
                **ranks._asdict(),
                dtype=dtype,
                method=method,
                tflops=model.card.tflops,
                gigabytes_per_second=model.card.gigabytes,
                l2_megabytes=model.l2_bytes / 1e6,
                launch_us=model.launch_us,
                gemm_efficiency=model.gemm_efficiency,
                bytes=sum(kernel.bytes for kernel in kernels),
                operations=sum(kernel.operations for kernel in kernels),
                launches=len(kernels),
                predicted_us=round(total, 3),
                over_frozen=round(total / rows[0]["predicted_us"], 4) if rows else 1.0,
                kernels=[[k.name, k.bytes, k.operations, round(us, 3)] for k, us in zip(kernels, times, strict=True)],
            )
        )
    return rows


def step_table(rows: Sequence[RooflineRow]) -> Table:
    """Every method at every shape, for one pair of ranks."""
    headings = ["Predicted: M x K x N", "method", "MB", "GFLOP", "launches", "us", "over frozen"]
    cells = []
    for row in rows:
        cell = [f"{row['M']} x {row['K']} x {row['N']}" if row["method"] == "frozen" else "", row["method"]]
        cell += [f"{row['bytes'] / 1e6:.1f}", f"{row['operations'] / 1e9:.1f}", str(row["launches"])]
        cells.append([*cell, f"{row['predicted_us']:.1f}", f"{row['over_frozen']:.3f}"])
    first = rows[0]
    title = f"Predicted, not measured: a training step, Hydra {first['r_a']}+{first['r_b']}, {first['dtype']}"
    return Table(title, headings, cells, [cell[1] in OURS for cell in cells])


def kernel_table(rows: Sequence[RooflineRow]) -> Table:
    """Every launch of every method at one shape."""
    headings = ["Predicted: method", "kernel", "MB", "GFLOP", "us"]
    cells = [
        [row["method"], name, f"{moved / 1e6:.2f}", f"{operations / 1e9:.2f}", f"{us:.2f}"]
        for row in rows
        for name, moved, operations, us in row["kernels"]
    ]
    first = rows[0]
    title = f"Predicted, not measured: the kernels at {first['M']} x {first['K']} x {first['N']}"
    return Table(title, headings, cells)


def number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=CARDS, default="h200", help="measured rates, where none are given")
    parser.add_argument("--bandwidth", type=number, metavar="GB/s")
    parser.add_argument("--tflops", type=number, metavar="T", help="of cuBLAS's large products")
    parser.add_argument("--l2", type=float, default=0.0, metavar="MB", help="L2 that keeps tensors between kernels")
    parser.add_argument("--launch-us", type=float, default=2.0, help="gap a launch; 0 for a CUDA graph")
    parser.add_argument("--gemm-efficiency", type=number, default=0.95, help="of the fused kernel, over cuBLAS")
    parser.add_argument("--ranks", action="append", metavar="A+B", help="may be repeated; 8+8")
    parser.add_argument("--shape", action="append", metavar="M,K,N", help="may be repeated; its kernels are shown too")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    try:
        shapes = [shape_option(text) for text in options.shape or []]
        ranks = [ranks_option(text) for text in options.ranks or ["8+8"]]
    except ValueError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    measured = CARDS[options.card]
    card = Card(options.tflops or measured.tflops, options.bandwidth or measured.gigabytes)
    model = Model(card, int(options.l2 * 1e6), options.launch_us, options.gemm_efficiency)
    stored: list[RooflineRow] = []
    for pair in ranks:
        by_shape = [predict(shape, pair, options.dtype, model) for shape in shapes or CUDA_SHAPES]
        stored += [row for rows in by_shape for row in rows]
        show(140, [step_table([row for rows in by_shape for row in rows])])
        show(140, [kernel_table(rows) for rows in by_shape if shapes])
    note = f"Predicted from {card.tflops:g} TFLOP/s, {card.gigabytes:g} GB/s, {model.launch_us:g} us a launch, "
    show(140, [f"{note}our GEMM at {model.gemm_efficiency:g} of cuBLAS. Nothing here was measured."])
    if options.json:
        timing.write_result(options.json, timing.environment(torch.device("cpu")), stored, RooflineRow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
