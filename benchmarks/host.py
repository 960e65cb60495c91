"""How long the host is busy with one eager step of a layer, forward and backward. ``python -m benchmarks.host``

The layers are so small that on a CPU the time of a step is that of Python, autograd and dispatch. On a GPU the clock
stops when everything is enqueued: few enough steps follow one another that its queue of launches never fills, and the
host never waits. Every round takes one sample of every method in a new random order; ratios are medians of paired
rounds. Before anything is timed, ours is compared with the naive layer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import hydra_kernels as hk
from benchmarks.measuring import methods, modes, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import HostRow
from benchmarks.measuring.shapes import Shape
from benchmarks.rendering import goals
from benchmarks.rendering.host import host_table
from benchmarks.rendering.tables import environment_note, show

SHAPES = (Shape(8, 32, 32), Shape(16, 64, 64))
RANKS = {"hydra": Ranks(4, 4), "lora": Ranks(8, 0)}
# Steps of a sample: a naive step launches some 25 kernels, and a GPU's queue holds 1,024.
CALLS = 20
UNCOUNTED_ROUNDS = 2


class Contestant(NamedTuple):
    method: str
    ranks: Ranks
    backend: str | None
    layer: nn.Module


def contestants_of(shape: Shape, device: torch.device, dtype: str, backends: Sequence[str]) -> dict[str, Contestant]:
    """The rivals by method and our Hydra by backend, all over one frozen layer."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.K, shape.N, device=device, dtype=modes.DTYPES[dtype])
    made = {}
    for method in methods.BASELINES:
        ranks = RANKS.get(method.partition("_")[2], Ranks(0, 0))
        made[method] = Contestant(method, ranks, None, methods.build_layer(linear, method, ranks, seed=0))
    for backend in backends:
        ours = methods.build_layer(linear, "ours_hydra", RANKS["hydra"], seed=0, backend=backend)
        made[f"ours_hydra, {backend}"] = Contestant("ours_hydra", RANKS["hydra"], backend, ours)
    return made


def prove(contestants: Sequence[Contestant], x: Tensor, G: Tensor) -> None:
    """Raises ParityError where ours gives another output or gradient than the naive layer."""
    steps = {made: methods.layer_step(made.layer, x, G) for made in contestants}
    expected = next(step for made, step in steps.items() if made.method == "naive_hydra")
    for made, step in steps.items():
        if made.backend is not None:
            allowed = methods.LAYER_TOLERANCES[x.dtype]
            methods.worst_difference(f"ours_hydra, {made.backend}", "naive_hydra", step, expected, allowed)


def sample(module: nn.Module, x: Tensor, G: Tensor, calls: int) -> float:
    """Mean seconds of a step until it is enqueued, each with gradients of its own."""
    timing.synchronize(x.device)
    taken = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        h = module(x)
        h.backward(G)
        taken += time.perf_counter() - start
        methods.forget(module, x)
    return taken / calls


def measure(device: torch.device, backends: Sequence[str], rounds: int, dry: bool) -> list[HostRow]:
    """A row for every rival and every backend at every shape; fp32 on a CPU, bf16 on a GPU."""
    shapes, calls = (SHAPES[:1], 1) if dry else (SHAPES, CALLS)
    dtype = "bf16" if device.type == "cuda" else "fp32"
    rows = []
    for shape in shapes:
        contestants = contestants_of(shape, device, dtype, backends)
        x = torch.randn(shape.M, shape.K, device=device, dtype=modes.DTYPES[dtype], requires_grad=True)
        G = torch.randn(shape.M, shape.N, device=device, dtype=modes.DTYPES[dtype])
        prove(list(contestants.values()), x, G)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for order in timing.shuffled_rounds(list(contestants), UNCOUNTED_ROUNDS + rounds, seed=0):
            for name in order:
                seconds[name].append(sample(contestants[name].layer, x, G, calls))
        counted = {name: taken[UNCOUNTED_ROUNDS:] for name, taken in seconds.items()}
        rows += [
            row_of(shape, made, counted[name], counted, device, dtype, calls, dry) for name, made in contestants.items()
        ]
    return rows


def row_of(
    shape: Shape,
    made: Contestant,
    seconds: list[float],
    counted: dict[str, list[float]],
    device: torch.device,
    dtype: str,
    calls: int,
    dry: bool,
) -> HostRow:
    q1, median, q3 = (round(taken * 1e6, 3) for taken in timing.quartiles(seconds))
    return HostRow(
        **shape._asdict(),
        **made.ranks._asdict(),
        dtype=dtype,
        device=device.type,
        method=made.method,
        backend=made.backend,
        host_us=median,
        q1_us=q1,
        q3_us=q3,
        over={
            rival: [round(ratio, 4) for ratio in timing.paired_ratios(seconds, counted[rival])]
            for rival in methods.BASELINES
        },
        runs=len(seconds),
        calls=calls,
        dry=dry,
    )


def usable_backends(names: Sequence[str] | None) -> list[str]:
    """The backends asked for, or all that run on this machine; ValueError names one that does not."""
    reasons = hk.backends()
    for name in names or ():
        if name not in reasons or reasons[name]:
            reason = reasons.get(name) or f"expected some of {', '.join(reasons)}"
            raise ValueError(f"backend is {name!r}: {reason}")
    return list(names or (name for name, reason in reasons.items() if reason is None and name != "reference"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", metavar="NAME", help="of ours, may be repeated; all that run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="200, in a dry run 3")
    parser.add_argument("--dry", action="store_true", help="a few single steps, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    options = parser.parse_args(arguments)
    rounds = options.rounds if options.rounds is not None else 3 if options.dry else 200
    try:
        if rounds < 1:
            raise ValueError(f"rounds is {rounds}, expected 1 or more")
        device = modes.device_option(options.device)
        rows = measure(device, usable_backends(options.backend), rounds, options.dry)
    except (ValueError, methods.ParityError) as error:
        print(f"host: {error}", file=sys.stderr)
        return 1
    path = options.out / f"host-{'dry-' if options.dry else ''}{device.type}.json"
    environment = timing.environment(device)
    timing.write_result(path, environment, rows, HostRow)
    wanted = goals.goal_tables(goals.host_goals(rows))
    show(140, [host_table(rows), *wanted, environment_note(environment), f"Stored: {path}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
