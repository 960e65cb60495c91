"""What the doctors of `benchmarks.gpu` check: each kernel and each backend against float64 on this machine.

A group of checks runs in a process of its own, ``python -m benchmarks.doctor GROUP [CHECK ...]``, which prints a line
of JSON a check. The rule is `hydra_kernels.choose.accuracy`: at most twice the error of the naive layer, plus slack.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy
import torch
import triton

import hydra_kernels as hk
from benchmarks.device.compilation import tell_compilations
from benchmarks.device.doctor_backends import (
    Check,
    backend_check,
    compiled,
    cuda_graph,
    int64_offsets,
    no_synchronisation,
    quantised_base,
    same_bits,
    side_stream,
)
from benchmarks.device.doctor_kernels import (
    F32,
    FORMATS,
    KERNELS,
    Finding,
    Format,
    device,
)
from benchmarks.measuring.backwards import backward_by
from hydra_kernels.backend import TABLE
from hydra_kernels.backend.interface import FORMS, rounds_the_sum
from hydra_kernels.backend.native import no_sweep
from hydra_kernels.choose.choice import choose
from hydra_kernels.choose.machine import here
from hydra_kernels.kernels import configs
from tests.cases import PLAIN, ROUNDING, Case

# Exit status of a process in which nothing runs any more, as after an illegal address: what is left needs a new one.
START_OVER = 75

EVERYTHING = replace(PLAIN, lead=(23, 3), adapter_bias=True, scales="learnable", dropout=True)
SMALL = (PLAIN, Case((64,), 96, 80, 8, 8), EVERYTHING)
REAL = (Case((6400,), 3072, 768, 8, 8), Case((300,), 4096, 4096, 8, 8), Case((300,), 1024, 512, 32, 32))
DRY = (Case((40,), 48, 32, 8, 8), EVERYTHING)
QUICK, QUICK_FORMATS = (EVERYTHING, REAL[0]), ("bf16", "tf32")
MANY_RANKS = Case((300,), 1024, 512, 37, 33)
# Each way in which the sweep divides the columns; the last two, the second by clusters of 16 blocks, not in fp32.
SWEPT = (EVERYTHING, *REAL[:2], Case((700,), 4096, 1024, 8, 8), Case((300,), 4096, 4096, 16, 16))
SWEPT_WIDE = (Case((300,), 14336, 4096, 8, 8), Case((300,), 14336, 4096, 16, 16))
DRAWS = 5  # of a small case, where chance can break a single one


def versions() -> Finding:
    found = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    return Finding("pass", reason=f"{found}, Triton {triton.__version__}, numpy {numpy.__version__}")


def gpu() -> Finding:
    if device().type == "cpu":
        return Finding("skip", reason="dry run on the CPU")
    properties = torch.cuda.get_device_properties(0)
    tiles = configs.of((properties.major, properties.minor)).name
    sizes = f"{properties.total_memory >> 30} GiB, {properties.multi_processor_count} multiprocessors"
    return Finding(
        "pass", reason=f"{properties.name}, {properties.major}.{properties.minor}, {sizes}, tiles of {tiles}"
    )


def usable(backend: str) -> Finding:
    reason = hk.backends()[backend]
    return Finding("pass" if reason is None else "fail", reason=reason)


def serves(backend: str, form: Format) -> bool:
    """aten takes low precision in its kept form, the others whatever they take in the composed one."""
    return backend == "aten" or TABLE[backend].refusal("composed", form.base, 1, 1, device=device()) is None


def served(case: Case, backend: str, form: Format, way: str) -> Case:
    """The case, without dropout of a kind that a backend has not, and without a b0 that the form cannot bear."""
    if TABLE[backend].refusal(way, form.base, 1, 0, True, device()) is not None:
        case = replace(case, dropout=False)
    if TABLE[backend].refusal(way, form.base, 1, 0, True, device(), True) is not None:
        case = replace(case, input_dropout="")
    return replace(case, bias=False) if case.rounding and rounds_the_sum(way, form.base) else case


def tested() -> list[str]:
    """Where `native` cannot run, the machine's group fails."""
    return ["triton", "hybrid", "aten"] + (["native"] if TABLE["native"].unavailable(device()) is None else [])


def sweeps() -> bool:
    """Whether `native`'s backward can run by its one sweep; a dry run goes through the checks by the CPU's backward."""
    if TABLE["native"].unavailable(device()) is not None:
        return False
    return device().type == "cpu" or no_sweep(torch.cuda.get_device_capability()) is None


def by_sweep(check: Check, form: Format, case: Case) -> Finding:
    """A check of `native` whose backward is csrc/cuda/sm90_sweep.cu's: a choice of anything else fails."""
    with backward_by("sweep"):
        choice = choose(case.M, case.K, case.N, case.r_a, case.r_b, form.base, here(device()), backend="native")
        if device().type == "cuda" and choice.backward != "sweep":
            return Finding("fail", reason=f"it ran by {choice.backward}: {choice.why_backward}")
        return check()


def swept(formats: Sequence[str], dry: bool) -> dict[str, Check]:
    """`native` with its backward by one sweep, and twice the same bits."""
    found: dict[str, Check] = {}
    for name in formats:
        form = FORMATS[name]
        if not serves("native", form):
            continue
        cases = DRY if dry else SWEPT if form.base == F32 else (*SWEPT, *SWEPT_WIDE, *ROUNDING)
        for case in cases:
            draws = DRAWS if case.M < 100 and not dry else 1
            check = partial(backend_check, "native", form, case, draws)
            found[f"sweep {name} {case}"] = partial(by_sweep, check, form, case)
        same = partial(same_bits, "native", form, cases[1])
        found[f"sweep {name}, same bits"] = partial(by_sweep, same, form, cases[1])
    return found


def machine() -> dict[str, Check]:
    return {"versions": versions, "GPU": gpu, **{name: partial(usable, name) for name in TABLE}}


def quick_cases(form: Format, dry: bool) -> tuple[Case, ...]:
    """Two sizes, and where rounding shows the cases that expose it, and the device's mask of input dropout."""
    first, second = DRY if dry else QUICK
    if form.base == F32:
        return first, second
    return first, second, replace(first, input_dropout="seed"), *ROUNDING


def draws_of(case: Case, dry: bool) -> int:
    return DRAWS if case.M < 100 and not dry else 1


def quick(dry: bool) -> dict[str, dict[str, Check]]:
    """What comes first where time is short: every backend and form, each backend and format in a process."""
    found: dict[str, dict[str, Check]] = {"machine": machine()}
    for backend, name in itertools.product(tested(), QUICK_FORMATS):
        form = FORMATS[name]
        checks: dict[str, Check] = {}
        for way, case in itertools.product(FORMS[1:], quick_cases(form, dry)):
            case = served(case, backend, form, way)
            refusal = partial(TABLE[backend].refusal, way, form.base, masked=case.dropout, device=device())
            # What no Hydra may run in, a LoRA may.
            ranks = next((r for r in ((case.r_a, case.r_b), (case.r_a, 0)) if refusal(*r) is None), None)
            if ranks is None or (way == "kept" and not ranks[1]):
                continue
            case = replace(case, r_a=ranks[0], r_b=ranks[1])
            checks[f"{name} {way} {case}"] = partial(backend_check, backend, form, case, draws_of(case, dry), way)
        if checks:
            found[f"{backend} {name}"] = checks
    if sweeps():
        found["native by sweep"] = swept(("bf16", "fp32"), dry)
    return found


def groups(dry: bool) -> dict[str, dict[str, Check]]:
    """Every check by the name of its group, and its own: a process a group, the longest first.

    A dry run has no compiler to wait for, so that processes would cost more than they save: it has a few large groups.
    """
    found: dict[str, dict[str, Check]] = {"machine": machine()}
    for backend in tested():
        formats = {name: form for name, form in FORMATS.items() if serves(backend, form)}
        for name, form in formats.items():
            cases = DRY if dry else (*SMALL, *REAL, *([MANY_RANKS] if backend == "hybrid" else []))
            if form.base != F32:
                cases += () if dry else tuple(ROUNDING)
            checks = {
                f"{name} {case}": partial(backend_check, backend, form, case, draws_of(case, dry)) for case in cases
            }
            if backend == "hybrid":
                of_form = (served(case, backend, form, "effective") for case in cases if case.r_a + case.r_b <= 64)
                checks |= {
                    f"{name} effective {case}": partial(
                        backend_check, backend, form, case, draws_of(case, dry), "effective"
                    )
                    for case in of_form
                }
            found.setdefault(backend if dry or backend == "aten" else f"{backend} {name}", {}).update(checks)
        case = replace(DRY[0] if dry else Case((512,), 1024, 768, 8, 8), adapter_bias=True, dropout=True)
        use = found.setdefault(backend if dry else f"{backend} in use", {})
        checks = {"same bits": same_bits, "stream": side_stream, "CUDA graph": cuda_graph}
        checks |= {"no synchronisation": no_synchronisation, "torch.compile": compiled}
        for name, check in checks.items():
            use |= {f"{name} {f}": partial(check, backend, FORMATS[f], case) for f in ("bf16", "fp32") if f in formats}
        if backend != "aten" and "bf16" in formats:
            wide, elements = (64, 2**12) if dry else (4096, 2**31)
            for name, K, N in (("x", wide, 32), ("h", 32, wide)):
                use[f"int64 offsets in {name}"] = partial(int64_offsets, backend, FORMATS["bf16"], K, N, elements)
    # In groups that are there: a process more would cost more than these.
    if sweeps():
        found["native" if dry else "native in use"] |= swept(tuple(FORMATS), dry)
    base_case = DRY[0] if dry else Case((512,), 1024, 768, 8, 8)
    over_4_bits = {f"4-bit base {f}": partial(quantised_base, "nf4", FORMATS[f], base_case) for f in ("bf16", "fp32")}
    found["aten" if dry else "aten in use"] |= over_4_bits
    kernel_formats = ("bf16", "fp32") if dry else ("bf16", "fp16", "fp32", "tf32")
    for kernel, check in KERNELS.items():
        ranks = REAL[-1] if kernel.startswith(("gemm", "one_pass")) else MANY_RANKS
        cases = (PLAIN, DRY[0]) if dry else (SMALL[1], PLAIN, REAL[0], ranks)
        group = found.setdefault("kernels" if dry else f"kernel {kernel}", {})
        group |= {f"{kernel} {f} {c}": partial(check, FORMATS[f], c) for f in kernel_formats for c in cases}
    return found


def findings(checks: Mapping[str, Check]) -> Iterator[tuple[str, Finding, float]]:
    """The result of each check, and its seconds."""
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            finding = check()
        except Exception as error:  # whatever a compiler or a driver raises is this check's result, not the run's end
            finding = Finding("fail", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        yield name, finding, time.perf_counter() - start


def still_runs() -> bool:
    """Whether the GPU takes work from this process: after an illegal address it takes none."""
    try:
        if device().type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("group")
    parser.add_argument("checks", nargs="*", help="all of the group's, where none is named")
    parser.add_argument("--dry", action="store_true", help="fewer and smaller checks")
    parser.add_argument("--quick", action="store_true", help="the groups that come first where time is short")
    parser.add_argument("--log", type=Path, metavar="FILE", help="gets a line for each kernel that Triton compiles")
    options = parser.parse_args(arguments)
    # Without it torch refuses cuBLAS to `use_deterministic_algorithms`.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if options.log is not None:
        tell_compilations(options.log)
    checks = (quick if options.quick else groups)(options.dry)[options.group]
    lines = sys.stdout
    with redirect_stdout(sys.stderr):
        for name, finding, seconds in findings({name: checks[name] for name in options.checks or checks}):
            print(json.dumps({"check": name, **asdict(finding), "seconds": seconds}), file=lines, flush=True)
            if finding.status == "fail" and not still_runs():
                return START_OVER
    return 0


if __name__ == "__main__":
    sys.exit(main())
