"""Decides, here alone, which backend and which form serve a call: a pure function of the call and the machine.

Its numbers, and the winners measured for known cards, are in ``numbers.json``. `machine.here` describes a device and
adds the user's own measurements (`tune`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backend.interface import BY_TRITON, LOW_PRECISION, MAX_NATIVE_RANK, MAX_SWEEP_RANK, Choice

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "numbers.json").read_text(encoding="utf-8"))
_COMPOSED_FROM: float = DATA["composed_from_M_over_K"]
_EFFECTIVE_FROM: float = DATA["effective_from_M_over_N"]
_COMPOSED_FROM_WORK: int = DATA["composed_from_multiply_adds"]
_FEW_ROWS: float = DATA["on_a_gpu"]["kept_below_M_over_K"]
_LARGE_WEIGHT: int = DATA["on_a_gpu"]["kept_from_weight_elements"]
_SMALL_WORK: int = DATA["on_a_gpu"]["native_below_multiply_adds"]
_PLAIN_ROWS: int = DATA["on_a_cpu"]["compiled_plain_up_to_rows"]
_ONEDNN_ROWS: list[int] = DATA["on_a_cpu"]["onednn_forward_for_rows"]
_ONEDNN_WEIGHT: int = DATA["on_a_cpu"]["onednn_from_weight_elements"]
_LARGE_WEIGHT_AMD: int = DATA["on_a_cpu"]["large_weight_on_amd_from_elements"]
_OWN_ROWS: list[int] = DATA["on_a_cpu"]["own_on_amd_for_rows"]
_OWN_ROWS_LARGE: int = DATA["on_a_cpu"]["own_on_amd_up_to_rows_of_a_large_weight"]
_WHY_SMALL = (
    "the host would take longer to launch Triton kernels than the GPU to run them (measured on an H200); in a CUDA "
    "graph only the GPU's time counts: there try backend='hybrid'"
)
_WHY_PLAIN = (
    f"torch.compile fuses plain operators, which are then faster than ours up to {_PLAIN_ROWS} rows if the weight is "
    "not large (measured on an Intel Xeon and on an AMD Zen 3)"
)
# Made once: a choice is made in every call.
_ROWS = f"{_ONEDNN_ROWS[0]} to {_ONEDNN_ROWS[1]} rows"
_WHY_AMD_AVX512 = "on AMD MKL, which ATen calls, takes twice as long as oneDNN (measured on a Zen 5)"
_WHY_OWN = (
    f"for {_OWN_ROWS[0]} to {_OWN_ROWS[1]} rows, and up to {_OWN_ROWS_LARGE} of a larger W0, they take as little as a "
    "third of the libraries' time, which pack all of W0 first (measured on a Zen 3)"
)
_WHY_AMD_ROWS = f"on AMD without AVX-512 oneDNN is faster up to {_ONEDNN_ROWS[1]} rows (measured on a Zen 3)"
_WHY_AMD_FORWARD = f"{_WHY_AMD_ROWS}, but not for G W0 unless K is a power of two"
_WHY_AMD_MKL = (
    "without AVX-512 MKL is more exact on AMD too, and about as fast for one row, for many, and for a small W0 "
    "(measured on a Zen 3)"
)
_WHY_BLOCKS = "MKL multiplies blocks of W0 in float32; up to 128 rows our own kernels read W0 as it is"
_WHY_WIDENED = (
    "torch has no oneDNN kernels for this dtype on this processor, or they are switched off; ours multiply with W0 in "
    "float32, block by block, which takes a small part of the time (measured on a Zen 3)"
)
_WHY_ONEDNN_ROWS = f"oneDNN computes x W0^T faster for {_ROWS} and a large W0 (measured on an Intel Xeon)"
_WHY_MKL = f"MKL is as fast or more exact, except for {_ROWS} and a large W0 (measured on an Intel Xeon)"
_WHY_LORA = "there is no sequential branch, so nothing reads y0"
_WHY_EFFECTIVE = f"M is at least {_EFFECTIVE_FROM} N, so building W0 + U D costs less than passes over x [M, K]"
_WHY_MEASURED = "the effective form runs only where it was measured to be faster"
_WHY_KEPT = f"the composed form reads W0 twice more, which costs too much below M = {_COMPOSED_FROM} K"
_WHY_COMPOSED = f"M is at least {_COMPOSED_FROM} K, so avoiding passes over y0 [M, N] saves the most"


class Measured(NamedTuple):
    """The winner at M rows on one device; it counts for half to twice as many rows.

    ``without_bias`` is the backend and form that won for layers without b0, where that is another one.
    """

    M: int
    backend: str
    form: str
    library: str = "aten"
    without_bias: tuple[str, str] | None = None


# K, N, r_a, r_b, dtype.
Key = tuple[int, int, int, int, torch.dtype]


class Cpu(NamedTuple):
    """What the compiled part says of a processor, and what the user set."""

    vendor: str  # "AMD", "Intel" or ""
    matrix_units: bool  # for bf16
    onednn: bool  # whether torch's operators for oneDNN can be called
    library: str  # one of LIBRARIES that the user set, or "auto"
    widened: tuple[torch.dtype, ...] = ()  # torch has no oneDNN for them: `native` multiplies with W0 in fp32
    instructions: str = "avx2"  # that `native` uses: "avx512", "avx2" or "plain"


class Machine(NamedTuple):
    """A device as far as the choice depends on it."""

    name: str
    capability: tuple[int, int] | None  # None where it is no NVIDIA GPU
    reasons: Mapping[str, str | None]  # why a backend cannot run on it, None where it can
    measured: Sequence[tuple[Key, Sequence[Measured]]]  # in rising M; torch.compile cannot trace look-ups in a mapping
    cpu: Cpu | None = None  # None for a GPU, and without the compiled part
    backward: str = "auto"  # of `native` on a GPU: one of BACKWARDS that the user set, or "auto"
    no_sweep: str | None = None  # why its sweep cannot run here; None where it can


def choose(
    M: int | None,
    K: int,
    N: int,
    r_a: int,
    r_b: int,
    dtype: torch.dtype,
    machine: Machine,
    form: str = "auto",
    backend: str = "auto",
    masked: bool = False,
    saves_x: bool = True,
    compiling: bool = False,
    drops_input: bool = False,
    has_bias: bool = True,
) -> Choice:
    """The backend and form for x [M, K], weight [N, K], ranks r_a and r_b.

    There is dropout of either kind where ``masked``, input dropout where ``drops_input``.

    M is None where torch.compile keeps it open (a dynamic shape): one choice then serves every M, since a comparison
    with M would compile each layer again for either result. ``saves_x`` is False where an up projection trains and no
    down projection does: the effective form alone would then save x. ``compiling`` is True under torch.compile.
    ``has_bias`` is False without b0. A form or backend other than "auto" is what the user chose, and stays.
    """
    why_backend = why_form = "you chose it"
    winner = _winner(machine, (K, N, r_a, r_b, dtype), M) if machine.measured else None
    if winner is not None and winner.without_bias is not None and not has_bias and not masked:
        winner = winner._replace(backend=winner.without_bias[0], form=winner.without_bias[1])
    if r_b == 0 and form == "kept":
        form, why_form = "composed", _WHY_LORA
    if backend == "auto":
        native_serves = not drops_input or machine.capability is None
        if winner is not None and (
            (winner.form == "effective" and masked) or (winner.backend == "native" and not native_serves)
        ):
            winner = None
        if winner is not None and machine.reasons[winner.backend] is None and form in ("auto", winner.form):
            why = "it was the fastest when measured on this device"
            library = _library((M, K, N), dtype, machine, winner.backend, winner)
            swept = _backward(machine, winner.backend, r_a + r_b)
            return Choice(winner.backend, winner.form, why, why, *library, *swept)
        if compiling and form == "auto" and not masked and _inductor_is_best(M, K, N, dtype, machine):
            return Choice("reference", "kept", _WHY_PLAIN, "plain operators have only one")
        # The composed form reads W0 twice more. For a smaller W0 that takes less time than the kept form's launches.
        few_rows = form == "auto" and r_b > 0 and K * N >= _LARGE_WEIGHT and M is not None and M < _FEW_ROWS * K
        small = M is not None and M * K * N < _SMALL_WORK and r_a + r_b <= MAX_NATIVE_RANK
        backend, why_backend = _backend(dtype, machine, form, few_rows, small, native_serves)
    native_on_gpu = backend == "native" and machine.capability is not None
    if form == "auto" and (backend in BY_TRITON or native_on_gpu):
        form, why_form = "composed", _WHY_MEASURED if backend == "hybrid" else "it is the only form of this backend"
    elif form == "auto":
        form, why_form = _form(M, K, N, r_a, r_b, dtype, backend, saves_x and not masked)
    library = _library((M, K, N), dtype, machine, backend, winner)
    return Choice(backend, form, why_backend, why_form, *library, *_backward(machine, backend, r_a + r_b))


def _winner(machine: Machine, key: Key, M: int | None) -> Measured | None:
    """The measurement whose M is nearest in ratio, if that is at most 2; for an open M the one that won at every M."""
    rows = [row for measured, found in machine.measured if measured == key for row in found]
    if not rows:
        return None
    if M is None:
        return rows[0] if all(row[1:] == rows[0][1:] for row in rows) else None
    best = rows[0]
    for row in rows:
        if M * M >= best.M * row.M:
            best = row
    return best if best.M <= 2 * M and M <= 2 * best.M else None


def _backend(
    dtype: torch.dtype, machine: Machine, form: str, few_rows: bool, small: bool, native_serves: bool
) -> tuple[str, str]:
    if machine.capability is None:
        return _off_gpu(dtype, machine, form)
    if dtype == torch.float64:
        return "aten", "the kernels do not support float64"
    if form == "kept":
        return "aten", "only aten has the kept form"
    if form == "effective":
        return "hybrid", "on a GPU only hybrid has the effective form"
    if machine.reasons["hybrid"] is not None:
        return "aten", "the Triton kernels cannot run on this device"
    if few_rows:
        return (
            "aten",
            f"M is below {_FEW_ROWS} K: the composed form reads a large W0 twice more, and only aten has the kept form",
        )
    if dtype == torch.float32:
        return "aten", "in fp32 ATen's own products are faster than the Triton kernels (measured on an H200)"
    if small and native_serves and machine.reasons["native"] is None:
        return "native", _WHY_SMALL
    return "hybrid", "its kernels take the GPU the least time (measured on an H200); each GEMM is its own or cuBLAS's"


def _inductor_is_best(M: int | None, K: int, N: int, dtype: torch.dtype, machine: Machine) -> bool:
    if machine.capability is not None or dtype != torch.float32 or M is None or M > _PLAIN_ROWS:
        return False
    cpu = machine.cpu
    own = cpu is not None and cpu.library in ("auto", "own") and _own_is_best(M, K, N, cpu)
    large = _LARGE_WEIGHT_AMD if own else _ONEDNN_WEIGHT
    return large > K * N


def _off_gpu(dtype: torch.dtype, machine: Machine, form: str) -> tuple[str, str]:
    if machine.reasons["native"] is not None:
        return "aten", "the compiled part is not built, or the device is neither a CPU nor an NVIDIA GPU"
    if machine.cpu and dtype in machine.cpu.widened:
        return "native", _WHY_WIDENED
    if dtype == torch.float16:
        return "aten", "torch has oneDNN kernels for float16 on this processor, and ours were not measured beside them"
    if dtype == torch.bfloat16 and not (machine.cpu and machine.cpu.matrix_units):
        return "aten", "this processor has no matrix units for bfloat16 (AMX, AVX512-BF16) that torch would use"
    return "native", "the compiled part is faster than ATen calls from Python (measured on an Intel Xeon)"


def _library(
    sizes: tuple[int | None, int, int], dtype: torch.dtype, machine: Machine, backend: str, winner: Measured | None
) -> tuple[str, str]:
    """What computes `native`'s products with W0 on a CPU, and why.

    In fp32 oneDNN adds up to a thousand products one after the other: its errors are over twice MKL's, so it runs only
    where it is faster.
    """
    (M, K, N), cpu = sizes, machine.cpu
    if backend != "native" or cpu is None or dtype == torch.float64:
        return "aten", ""
    if cpu.library != "auto" and (cpu.onednn or "onednn" not in cpu.library):
        return cpu.library, "$HYDRA_KERNELS_PRODUCTS sets it"
    if dtype == torch.float32 and cpu.library == "auto":
        timed = winner.library if winner is not None and winner.backend == "native" else None
        if timed is not None and (cpu.onednn or "onednn" not in timed):
            return timed, "it was the fastest when measured on this device"
        if _own_is_best(M, K, N, cpu):
            return "own", _WHY_OWN
    if not cpu.onednn:
        return "aten", "this torch has no oneDNN operators, or they are switched off"
    if dtype in cpu.widened:
        return ("onednn", _WHY_AMD_AVX512) if cpu.vendor == "AMD" and cpu.matrix_units else ("aten", _WHY_BLOCKS)
    if dtype in LOW_PRECISION:
        return "aten", "in this dtype ATen calls oneDNN itself"
    few_rows = M is not None and _ONEDNN_ROWS[0] <= M <= _ONEDNN_ROWS[1]
    if cpu.vendor == "AMD":
        return _library_on_amd(few_rows, K, N, cpu)
    if few_rows and K * N >= _ONEDNN_WEIGHT:
        return "onednn-forward", _WHY_ONEDNN_ROWS
    return "aten", _WHY_MKL


def _library_on_amd(few_rows: bool, K: int, N: int, cpu: Cpu) -> tuple[str, str]:
    if cpu.matrix_units:  # Zen 4 and later
        return "onednn", _WHY_AMD_AVX512
    if K * N >= _LARGE_WEIGHT_AMD and few_rows:
        return ("onednn", _WHY_AMD_ROWS) if K & (K - 1) == 0 else ("onednn-forward", _WHY_AMD_FORWARD)
    return "aten", _WHY_AMD_MKL


def _own_is_best(M: int | None, K: int, N: int, cpu: Cpu) -> bool:
    """Our kernels for few rows were measured on AMD in AVX2 alone."""
    if M is None or cpu.vendor != "AMD" or cpu.instructions != "avx2":
        return False
    least, most = _OWN_ROWS
    return least <= M <= (_OWN_ROWS_LARGE if K * N >= _LARGE_WEIGHT_AMD else most)


def _backward(machine: Machine, backend: str, ranks: int) -> tuple[str, str]:
    """How `native` reads x and G in its backward on a GPU, and why: by the sweep where the user asks for it alone."""
    if machine.backward != "sweep" or backend != "native" or machine.capability is None:
        return "passes", ""
    if machine.no_sweep is not None:
        return "passes", machine.no_sweep
    if ranks > MAX_SWEEP_RANK:
        return "passes", f"the sweep supports ranks up to {MAX_SWEEP_RANK}, and r_a + r_b is {ranks}"
    return "sweep", "$HYDRA_KERNELS_BACKWARD sets it; calls that the sweep does not support run pass by pass"


def _form(
    M: int | None, K: int, N: int, r_a: int, r_b: int, dtype: torch.dtype, backend: str, may_be_effective: bool
) -> tuple[str, str]:
    effective = (
        may_be_effective
        and backend == "native"
        and dtype not in LOW_PRECISION
        and M is not None
        and M >= _EFFECTIVE_FROM * N
        and M * K * N >= _COMPOSED_FROM_WORK
    )
    if r_b == 0:
        return ("effective", _WHY_EFFECTIVE) if effective else ("composed", _WHY_LORA)
    if dtype in LOW_PRECISION and backend == "aten":
        return "kept", "in the composed form ATen rounds B_down W0 to the base dtype: less exact than the naive layer"
    if r_a == 0 and N < K:
        return "kept", "it saves y0, which is smaller than x, and x need not be saved"
    if M is None:
        return "composed", "torch.compile leaves M open, and this form is the fastest for most M"
    if effective:
        return "effective", _WHY_EFFECTIVE
    if M < _COMPOSED_FROM * K:
        return "kept", _WHY_KEPT
    if M * K * N < _COMPOSED_FROM_WORK:
        return "kept", "the layer is so small that the number of calls decides, and this form makes fewer"
    return "composed", _WHY_COMPOSED
