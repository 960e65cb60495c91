"""What a step will compile, known before it runs; compiling it in other processes; telling what was compiled after all.

``python -m benchmarks.device.compilation FILE GROUP JOB...`` is such a process: it compiles jobs of a pickled plan, and
prints a line of JSON for each.
"""

from __future__ import annotations

import importlib
import json
import math
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.device.isolated import CheckRow, Isolated
from benchmarks.measuring import methods
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.passes import Pass
from benchmarks.measuring.shapes import Shape
from hydra_kernels.backend import effective
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import Operands
from hydra_kernels.kernels.configs import Architecture
from hydra_kernels.kernels.launch import Launch
from tests.cases import ADAPTERS, INPUT_P, Case

# The data type, and what torch's setting for fp32 products must say.
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}
# Seconds that a process takes to import torch and to find its GPU, while every core starts one.
START = 10.0
# Seconds of a core: for a kernel, the large GEMMs taking longest; for a rival whose forward and backward are compiled.
KERNEL_SECONDS, RIVAL_SECONDS = 3.0, 18.0
# A job that takes longer has hung.
JOB_LIMIT = 60.0
# Processes at most: each rival's has the GPU's memory for its tensors.
MOST = 16


class Compilation(NamedTuple):
    """All that decides a binary, as plain data that another process takes."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, int]
    arch: int

    def run(self) -> None:
        assembled(self)

    def __str__(self) -> str:
        return self.kernel.removesuffix("_kernel")


class Rival(NamedTuple):
    """A naive layer under torch.compile: a step of it fills inductor's cache on disk."""

    method: str
    shape: Shape
    ranks: Ranks
    bias: bool

    def run(self) -> None:
        new = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        linear = nn.Linear(self.shape.K, self.shape.N, self.bias, device="cuda", dtype=torch.bfloat16)
        layer = methods.build_layer(linear, self.method, self.ranks, seed=0)
        x, G = new(self.shape.M, self.shape.K).requires_grad_(), new(self.shape.M, self.shape.N)
        Pass(layer, x, G).step()

    def __str__(self) -> str:
        return self.method


Job = Compilation | Rival


class Step(NamedTuple):
    """A forward and a backward of one of the Triton backends; ``fused``: of `triton`, else of `hybrid` in a form."""

    case: Case
    dtype: str
    fused: bool
    # float32 over a low-precision weight, where that differs.
    adapters: torch.dtype | None = None
    trainable_bias: bool = False
    form: str = "composed"


@contextmanager
def products_of_fp32(precision: str) -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def launches_of(step: Step, arch: Architecture) -> list[Launch]:
    """What the step launches, recorded over tensors without data; every gradient is wanted but the weight's."""
    case, (dtype, precision) = step.case, DTYPES[step.dtype]
    new = partial(torch.empty, dtype=step.adapters or dtype, device="meta")
    t: dict[str, Any] = dict.fromkeys(Operands._fields) | case.constant_scales | {"mask_scale": 1.0, "input_p": 0.0}
    t |= {"weight": new(case.N, case.K, dtype=dtype), "bias": new(case.N, dtype=dtype) if case.bias else None}
    for side, fan_in, r in (("A", case.K, case.r_a), ("B", case.N, case.r_b)):
        if case.scales == "learnable":
            t[f"scale_{side.lower()}"] = new(()) if r else 1.0
        if r:
            t |= {f"{side}_down": new(r, fan_in), f"{side}_up": new(case.N, r)}
        if r and case.adapter_bias:
            t |= {f"{side}_down_bias": new(r), f"{side}_up_bias": new(case.N)}
    if case.dropout:
        t["mask"] = new(case.M, case.r_a + case.r_b, dtype=dtype)
    if case.input_dropout:
        t |= {"input_seed": new((), dtype=torch.int64), "input_p": INPUT_P}
    needs = {"x"} | {name for name in ADAPTERS if isinstance(t[name], Tensor)}
    needs |= {"bias"} if step.trainable_bias and case.bias else set()
    x, G = new(case.M, case.K, dtype=dtype), new(case.M, case.N, dtype=dtype)
    found = step_launches(x, G, Operands(**t), needs, step.fused, step.form, arch, precision)
    return [launch for launch in found if 0 not in launch.grid]


def step_launches(
    x: Tensor, G: Tensor, op: Operands, needs: Set[str], fused: bool, form: str, arch: Architecture, precision: str
) -> list[Launch]:
    """What a forward and a backward launch on tensors without data, fp32 products in that precision."""
    found: list[Launch] = []
    with products_of_fp32(precision):
        if form == "effective":
            _, kept, saved = effective.forward(x, op._replace(mask=None), needs, arch, found.append)
            effective.backward(G, kept, saved, needs, arch, found.append)
        else:
            _, kept, saved = steps.forward(x, op, needs, fused, arch, found.append)
            steps.backward(G, kept, saved, needs, fused, arch, found.append)
    return found


def compilation(launch: Launch, arch: int) -> Compilation:
    """A launch as Triton's own launcher would specialize and compile it on that architecture."""
    kernel, backend = launch.kernel, make_backend(_target(arch))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(**launch.arguments, **launch.options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, arguments, specialization, options)
    return Compilation(kernel.__module__, kernel.__name__, signature, constants, attributes, options, arch)


def assembled(job: Compilation) -> Any:
    """Triton's compiled kernel, which is then in its cache on disk; raises what the compiler's passes raise."""
    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    return triton.compile(source, target=_target(job.arch), options=job.options)


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def planned(steps_: Iterable[Step], arch: Architecture, capability: int) -> dict[str, Compilation]:
    """Every binary of the steps, once, by what decides it."""
    launches = (launch for step in steps_ for launch in launches_of(step, arch))
    return {repr(job): job for job in (compilation(launch, capability) for launch in launches)}


def seconds_for(jobs: Iterable[Job], cores: int) -> float:
    """How long the jobs may take in processes on so many cores, their start included."""
    processes, number = min(MOST, cores), Counter(isinstance(job, Rival) for job in jobs)
    if not number:
        return 0.0
    return (
        START
        + math.ceil(number[False] / processes) * KERNEL_SECONDS
        + math.ceil(number[True] / processes) * (RIVAL_SECONDS)
    )


def count_of(jobs: Iterable[Job]) -> str:
    """How many there are of each kernel and rival."""
    return ", ".join(f"{number} {name}" for name, number in sorted(Counter(map(str, jobs)).items())) or "nothing"


def compile_all(jobs: Mapping[str, Job], cores: int, deadline: float, environment: Mapping[str, str]) -> list[CheckRow]:
    """Compiles the jobs in parallel processes until the deadline, in time.monotonic(): a row for each."""
    if not jobs:
        return []
    processes = min(MOST, cores, len(jobs))
    # Rivals take longest: first, and one to a process as far as they go.
    by_length = sorted(jobs, key=lambda name: not isinstance(jobs[name], Rival))
    names = {f"{place} {jobs[name]}": name for place, name in enumerate(by_length)}
    shares = {f"compiler {first}": list(names)[first::processes] for first in range(processes)}
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan"
        plan.write_bytes(pickle.dumps({short: jobs[name] for short, name in names.items()}))

        def command(group: str, left: Sequence[str]) -> list[str]:
            return [sys.executable, "-m", "benchmarks.device.compilation", str(plan), group, *left]

        # Inductor would start as many workers in each process as there are cores, and these outlive it.
        alone = {**environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        isolated = Isolated(command, alone, JOB_LIMIT, processes, deadline, False, start_over=-1)
        return isolated.run(shares, lambda row: None)


def tell_compilations(log: Path) -> None:
    """From now on each kernel that Triton compiles in this process, and does not find in its cache, adds a line."""

    def listener(*, src: Any, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{src.name}\n")

    triton.knobs.compilation.listener = listener


def told(log: Path) -> list[str]:
    """The kernels that were compiled, by name."""
    return log.read_text(encoding="utf-8").split() if log.exists() else []


def main(arguments: Sequence[str]) -> int:
    plan, _, *names = arguments
    jobs: dict[str, Job] = pickle.loads(Path(plan).read_bytes())
    lines = sys.stdout
    with redirect_stdout(sys.stderr):
        for name in names:
            status, reason, start = _outcome(jobs[name].run)
            row = {"check": name, "status": status, "reason": reason, "seconds": time.perf_counter() - start}
            print(json.dumps(row | dict.fromkeys(("error", "allowed", "what"))), file=lines, flush=True)
    return 0


def _outcome(run: Callable[[], None]) -> tuple[str, str | None, float]:
    start = time.perf_counter()
    try:
        run()
    except Exception as error:  # a compiler's passes raise what they like: the part that needs the kernel will meet it
        return "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", start
    return "pass", None, start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
