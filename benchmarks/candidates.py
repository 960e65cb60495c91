"""The GPU's new ways to run a step beside those that they would replace, prediction beside outcome.

``python -m benchmarks.gpu --stage candidates`` builds and compiles what it needs, then runs it; ``python -m
benchmarks.candidates`` runs it alone. `benchmarks.render` writes what it stored into NOTES.md.

A way is a forward and a backward of a backend, without autograd, on tensors, each replayed from a CUDA graph. The ways
of a question are timed in the same rounds, in random order, after their results were compared with the naive layer's.
Predictions are those of `benchmarks.roofline` for an H200, made of bytes and operations before anything runs.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import doctor, layer, roofline
from benchmarks.device.run import Part, Settings, Stage, attempts, run_stage
from benchmarks.layer import PHASES, Bench, Contestant
from benchmarks.measuring import methods, modes, timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import CandidateRow
from benchmarks.measuring.shapes import GOALS_RANKS, HEADLINE, OTHER_RANKS, Entry, Shape, has_bias
from benchmarks.rendering.candidates import candidates_table
from benchmarks.rendering.tables import show
from hydra_kernels.backend import effective, native
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import Operands, Saved, without_options
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.language import INTERPRETED

ADAPTERS = ("A_down", "A_up", "B_down", "B_up")
NEEDS = frozenset({"x", *ADAPTERS})
DTYPE, FILE = "bf16", "candidates"
# To time the ways of one question at one shape.
SECONDS = 2.0
# Of whole 16-byte lines, so that the tiles are those of aligned operands.
DRY_SHAPE = Shape(64, 64, 32)
# CUDA graphs leave no gaps between launches.
MODEL = roofline.Model(roofline.CARDS["h200"], l2_bytes=0, launch_us=0.0, gemm_efficiency=0.95)


class Question(NamedTuple):
    """``ways`` by what roofline calls them, the one of today first; the frozen layer is timed beside them."""

    name: str
    ways: tuple[str, ...]
    at: Callable[[Shape], bool] = lambda shape: True


QUESTIONS = (
    Question("A: one read of x", ("hybrid", "triton")),
    # The same launches as triton's where the rule takes x once; elsewhere those of hybrid.
    Question(
        f"A: hybrid with once_up_to={roofline.ONCE_UP_TO}",
        ("hybrid", "hybrid_once"),
        lambda shape: shape.N <= roofline.ONCE_UP_TO,
    ),
    Question("B: the effective form", ("hybrid", "effective")),
    # From sm_90 on.
    Question("D: early launches", ("hybrid", "hybrid_early")),
    Question("C: one sweep", ("native", "native_sweep")),
)
RANKS = (GOALS_RANKS, OTHER_RANKS[0])

Forward = Callable[[Tensor, Operands], tuple[Tensor, Operands, Saved]]
Backward = Callable[[Tensor, Operands, Saved], Mapping[str, Tensor]]


def ways(device: torch.device) -> dict[str, tuple[Forward, Backward]]:
    arch = steps.tiles_of(device)
    early = {"hybrid_early": _by_kernels(arch.with_early_launches(), False)} if arch.can_start_early else {}
    return early | {
        "frozen": (_frozen_forward, _frozen_backward),
        "hybrid": _by_kernels(arch, False),
        "hybrid_once": _by_kernels(arch._replace(half=arch.half._replace(once_up_to=roofline.ONCE_UP_TO)), False),
        "triton": _by_kernels(arch, True),
        "effective": (
            lambda x, op: effective.forward(x, op, NEEDS, arch),
            lambda G, op, saved: effective.backward(G, op, saved, NEEDS, arch),
        ),
        "native": _by_plan("composed"),
        "native_sweep": _by_plan("composed sweep"),
    }


def _by_kernels(arch: configs.Architecture, always_fused: bool) -> tuple[Forward, Backward]:
    return (
        lambda x, op: steps.forward(x, op, NEEDS, always_fused, arch),
        lambda G, op, saved: steps.backward(G, op, saved, NEEDS, always_fused, arch),
    )


def _by_plan(plan: str) -> tuple[Forward, Backward]:
    return (
        lambda x, op: native.forward(x, op, NEEDS, plan),
        lambda G, op, saved: native.backward(G, op, saved, NEEDS, plan),
    )


def _frozen_forward(x: Tensor, op: Operands) -> tuple[Tensor, Operands, Saved]:
    return F.linear(x, op.weight, op.bias), op, ()


def _frozen_backward(G: Tensor, op: Operands, saved: Saved) -> dict[str, Tensor]:
    return {"x": G @ op.weight}


class Step:
    """A way's forward and backward on one buffer, captured; like `passes.Replay`, but without a module."""

    def __init__(
        self, way: tuple[Forward, Backward], op: Operands, x: Tensor, G: Tensor, recorder: modes.Recorder
    ) -> None:
        self._way, self._op, self._x, self._G = way, op, x.detach(), G
        self.h: Tensor | None = None
        self.grads: Mapping[str, Tensor] = {}
        self._left: tuple[Operands, Saved] | None = None
        self.forward = recorder.capture(self._forward)
        self.backward = recorder.capture(self._backward)

    def _forward(self) -> None:
        self.h, *left = self._way[0](self._x, self._op)
        self._left = tuple(left)

    def _backward(self) -> None:
        self.grads = self._way[1](self._G, *self._left)

    def forget(self) -> None:
        """Nothing: the next replay writes to the same places."""

    def drop(self) -> None:
        """Lends the memory of what the capture made to the next capture."""
        self.h, self.grads, self._left = None, {}, None


def prepared(bench: Bench, name: str, ranks: Ranks, op: Operands, recorder: modes.Recorder) -> Contestant:
    """A way, captured for each of the bench's inputs, its results proved."""
    way, device = ways(bench.device)[name], bench.device
    x, G = bench.inputs.buffers[0]

    def once() -> None:
        _, *left = way[0](x.detach(), op)
        way[1](G, *left)

    recorder.warm_up(once)
    made: list[Step] = []
    for x, G in reversed(bench.inputs.buffers):
        if made:
            made[-1].drop()
        made.append(Step(way, op, x, G, recorder))
    first = made[-1]
    first.forward()
    first.backward()
    timing.synchronize(device)
    contestant = Contestant(Entry(name, ranks, None), bench.linear, made[::-1])
    if name != "frozen":
        found = {"the output": first.h, **{f"the gradient of {of}": first.grads[of] for of in ("x", *ADAPTERS)}}
        worst, tensor = methods.worst_difference(
            name, "naive_hydra", found, bench.expected("naive_hydra", ranks), bench.allowed
        )
        contestant.parity = {"difference": worst, "tensor": tensor, "allowed": bench.allowed}
    fastest = min(sum(bench.sample(contestant.passes, 1)) for _ in range(3))
    contestant.calls = max(1, math.ceil(layer.SAMPLE_SECONDS / fastest))
    return contestant


def refuse_races(step: Step, early: Step) -> None:
    """RuntimeError where kernels that start early leave other bits: then they race."""
    found = {"h": (step.h, early.h), **{name: (step.grads[name], early.grads[name]) for name in step.grads}}
    differ = [name for name, (one, other) in found.items() if not torch.equal(one, other)]
    if differ:
        raise RuntimeError(f"kernels that start early race: other bits in {', '.join(differ)}")


def measure(
    question: Question, shape: Shape, ranks: Ranks, device: torch.device, seconds: float, dry: bool
) -> list[CandidateRow]:
    """Rows of every way of a question at one shape: forward, backward and step."""
    arguments = ["--device", device.type, "--dtype", DTYPE, "--mode", "graph", "--shape", ",".join(map(str, shape))]
    arguments += ["--ranks", f"{ranks.r_a}+{ranks.r_b}", *([] if has_bias(shape) else ["--no-bias"])]
    settings, _ = layer.settings_of([*arguments, *(["--dry"] if dry else [])])
    bench, recorder = Bench(shape, settings), modes.Recorder(device)
    weights, adapters = bench.linear, bench.build("naive_hydra", ranks)
    op = without_options(weights.weight, weights.bias, *(getattr(adapters, name).detach() for name in ADAPTERS))
    made = {name: prepared(bench, name, ranks, op, recorder) for name in ("frozen", *question.ways)}
    if "hybrid_early" in made:
        refuse_races(made["hybrid"].passes[0], made["hybrid_early"].passes[0])
    layer.play(bench, made, time.perf_counter() + seconds)
    predicted = {row["method"]: row["predicted_us"] for row in roofline.predict(shape, ranks, DTYPE, MODEL)}
    return [row_of(question, shape, ranks, name, phase, made, predicted, settings) for name in made for phase in PHASES]


def row_of(
    question: Question,
    shape: Shape,
    ranks: Ranks,
    name: str,
    phase: str,
    made: Mapping[str, Contestant],
    predicted: Mapping[str, float],
    settings: layer.Settings,
) -> CandidateRow:
    seconds, others = made[name].seconds(phase), ("frozen", question.ways[0])
    micro = timing.quartiles([taken * 1e6 for taken in seconds])
    of_step = phase == "step" and name in predicted
    return CandidateRow(
        **shape._asdict(),
        **ranks._asdict(),
        question=question.name,
        way=name,
        instead_of=question.ways[0],
        dtype=DTYPE,
        bias=settings.bias,
        phase=phase,
        median_us=round(micro.median, 3),
        q1_us=round(micro.q1, 3),
        q3_us=round(micro.q3, 3),
        over={
            other: [round(ratio, 4) for ratio in timing.paired_ratios(seconds, made[other].seconds(phase))]
            for other in others
        },
        predicted_us=round(predicted[name], 3) if of_step else None,
        predicted_over={other: round(predicted[name] / predicted[other], 4) for other in others} if of_step else None,
        parity=made[name].parity,
        runs=len(seconds),
        calls=made[name].calls,
        dry=settings.dry,
    )


def parts(settings: Settings) -> Iterator[Part]:
    """The goals' rank at every shape, then the commonest; last the sweep, which may hang or break the process."""
    sweeps, early = doctor.sweeps(), "hybrid_early" in ways(settings.device)
    if not sweeps:
        print("C is left out: `native` has no sweep here", flush=True)
    if not early:
        print("D is left out: kernels start early from compute capability 9.0 on", flush=True)

    def measured(question: Question, shape: Shape, ranks: Ranks) -> list[CandidateRow]:
        with modes.isolated(settings.device):
            rows = measure(question, shape, ranks, settings.device, SECONDS, settings.dry)
        show(200, [candidates_table(rows)])
        return rows

    shapes, all_ranks = ((DRY_SHAPE,), RANKS[:1]) if settings.dry else (HEADLINE, RANKS)
    of_sweep = [question for question in QUESTIONS if "native_sweep" in question.ways]
    others = [
        question
        for question in QUESTIONS
        if question not in of_sweep and (early or "hybrid_early" not in question.ways)
    ]
    tasks = [
        (f"{question.name}, {shape}, {ranks.r_a}+{ranks.r_b}", partial(measured, question, shape, ranks))
        for group in (others, of_sweep if sweeps else ())
        for ranks in all_ranks
        for question in group
        for shape in shapes
        if question.at(shape)
    ]
    yield from attempts(settings, FILE, tasks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything; the last comparisons go without")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    parser.add_argument("--dry", action="store_true", help="a tiny shape on the CPU, with TRITON_INTERPRET=1")
    options = parser.parse_args(arguments)
    if not (INTERPRETED.value if options.dry else torch.cuda.is_available()):
        print("candidates: it needs a GPU, or --dry with TRITON_INTERPRET=1 in the environment", file=sys.stderr)
        return 2
    settings = Settings(options.dry, time.monotonic() + 60 * options.minutes, options.out)
    return int(run_stage(Stage("candidates", parts, {FILE: CandidateRow}, dict, 0.0), settings) > 0)


if __name__ == "__main__":
    sys.exit(main())
