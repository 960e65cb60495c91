"""The CUDA kernels of csrc/cuda, compiled for the host and run there: every output of every launcher against float64.

The rule: an output may miss the float64 result by its type's rounding and 16 units of fp32's in the sum of the absolute
values of all terms, elementwise. So a term that is dropped, taken twice or rounded on the way fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import mmap
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROOT = Path(__file__).parent.parent
SOURCES, HOST = ROOT / "csrc" / "cuda", ROOT / "tests" / "cuda_on_host"
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-DCUDA_ON_HOST", "-Wno-unknown-pragmas")
TYPES = {F32: 0, F16: 1, BF16: 2}  # HydraType
FRAME = 256  # bytes of NaN around every buffer
MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it
ARCHITECTURES = (80, 90, 100, 120)
# Set by tests/sanitize.py, which runs these tests with the sanitizer's runtime loaded: address or thread.
SANITIZER = os.environ.get("CUDA_ON_HOST_SANITIZER")
BUILDS = {
    None: ("g++", "-O2"),
    "address": ("g++", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("g++", "-O1", "-fsanitize=thread"),
}
Tensors = dict[str, Tensor]

_log = logging.getLogger(__name__)


class Framed(NamedTuple):
    """A tensor and the bytes that it lies in, 0xff around it: NaN in every type."""

    t: Tensor
    buffer: Tensor
    start: int
    size: int


def framed(t: Tensor, stride: int | None = None, offset: int = 0) -> Framed:
    """A copy of t, `offset` elements after a line of 64 bytes, its rows `stride` elements apart."""
    rows, width, of = t.shape[0] if t.dim() == 2 else 1, t.shape[-1] if t.dim() else 1, t.element_size()
    strides = (stride or width, 1) if t.dim() == 2 else t.stride()
    size = ((rows - 1) * (stride or width) + width if t.dim() == 2 else t.numel()) * of if t.numel() else 0
    buffer = torch.full((2 * FRAME + size + 128,), 0xFF, dtype=torch.uint8)
    start = FRAME + -(buffer.data_ptr() + FRAME) % 64 + offset * of
    end = start + size
    made = buffer[start : end + -size % of].view(t.dtype).as_strided(t.shape, strides)
    made.copy_(t)
    return Framed(made, buffer, start, size)


def poisoned(*shape: int, dtype: torch.dtype = F32) -> Framed:
    return framed(torch.full(shape, torch.nan, dtype=dtype))


def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h: the toolkit's, or that of NVIDIA's packages from PyPI."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *(Path(p) / "nvidia" / "cu13" for p in sys.path)]
    return next((p / "include" for p in places if (p / "include" / "cuda_bf16.h").is_file()), None)


def compiled(compiler: str, headers: Path, flags: tuple[str, ...]) -> Path:
    """The library of all kernels for the host, in a temporary folder named by what went into it."""
    files = sorted([*SOURCES.iterdir(), *HOST.glob("*.h")])
    key = hashlib.sha256(repr((compiler, flags, [(f.name, f.read_bytes()) for f in files])).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"hydra_kernels-cuda_on_host-{key}"
    library = folder / "kernels.so"
    if not library.exists():
        _log.info("compiling the CUDA kernels for the host: %s", library)
        folder.mkdir(exist_ok=True)
        common = [compiler, *flags, "-isystem", str(headers), f"-I{HOST}"]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:

            def compile_one(source: Path) -> str:
                made = f"{scratch}/{source.stem}.o"
                subprocess.run([*common, "-x", "c++", "-c", str(source), "-o", made], check=True)
                return made

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"))))
            subprocess.run([*common, "-shared", *objects, "-o", f"{scratch}/kernels.so"], check=True)
            os.replace(f"{scratch}/kernels.so", library)
    return library


@cache
def library() -> ctypes.CDLL:
    compiler, *flags = BUILDS[SANITIZER]
    headers = cuda_headers()
    if shutil.which(compiler) is None or headers is None:
        pytest.skip("no cuda_bf16.h was found" if headers is None else f"no {compiler} was found")
    return ctypes.CDLL(str(compiled(compiler, headers, (*flags, *FLAGS))))


def count(name: str, *sizes: int) -> int:
    """One of kernels.h's numbers of parts."""
    function = getattr(library(), f"hydra_{name}")
    function.restype = ctypes.c_int64
    return function(*map(ctypes.c_int64, sizes))


@contextmanager
def only_these(*buffers: Framed) -> Iterator[None]:
    """AddressSanitizer reports what touches a frame."""
    if SANITIZER == "address":
        for _, buffer, start, size in buffers:
            for first, bytes_ in ((0, start), (start + size, buffer.numel() - start - size)):
                address = ctypes.c_void_p(buffer.data_ptr() + first)
                library().__asan_poison_memory_region(address, ctypes.c_size_t(bytes_))
    yield
    if SANITIZER == "address":
        for buffer in buffers:
            address = ctypes.c_void_p(buffer.buffer.data_ptr())
            library().__asan_unpoison_memory_region(address, ctypes.c_size_t(buffer.buffer.numel()))


@cache
def structure(name: str) -> type[ctypes.Structure]:
    """The struct of kernels.h."""
    body = re.search(rf"struct {name} {{(.*?)}};", (SOURCES / "kernels.h").read_text(), re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float, "HydraType": ctypes.c_int32}
    fields = re.findall(r"^ *(?:const )?(\w+)(\*?) (\w+);", body[1], re.MULTILINE)
    return type(
        name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_void_p if p else kinds[k]) for k, p, f in fields]}
    )


def call(
    kernel: str, inputs: dict[str, Framed], outputs: dict[str, Framed], status: int = 0, **values: float
) -> Tensors:
    """Runs a launcher. Inputs must come back unchanged, and so must what lies around outputs."""
    arguments = structure("Hydra" + "".join(map(str.title, kernel.split("_"))) + "Arguments")()
    pointers = {f"{name}_ptr": framed.t.data_ptr() for name, framed in {**inputs, **outputs}.items()}
    for name, value in {**pointers, **values}.items():
        if not hasattr(arguments, name):
            raise TypeError(f"{kernel} has no argument {name}")
        setattr(arguments, name, value)
    before = {name: framed.buffer.clone() for name, framed in inputs.items()}
    with only_these(*inputs.values(), *outputs.values()):
        got = getattr(library(), f"hydra_{kernel}")(ctypes.byref(arguments), None)
    assert got == status
    for name, framed in inputs.items():
        assert torch.equal(framed.buffer, before[name]), f"{name} was changed"
    for name, (_, buffer, start, size) in outputs.items():
        assert (torch.cat((buffer[:start], buffer[start + size :])) == 0xFF).all(), f"written beside {name}"
    return {name: framed.t for name, framed in outputs.items()}


def check(name: str, got: Tensor, want: Tensor, terms: Tensor, unit: float | None = None) -> None:
    """The rule of the first lines; unit is the relative error of rounding to got's type."""
    info = torch.finfo(got.dtype)
    unit = info.eps / 2 if unit is None else unit
    allowed = 1.001 * unit * want.abs() + 16 * 2**-24 * terms + info.smallest_normal * info.eps
    wrong = ~((got.double() - want).abs() <= allowed)  # NaN too
    assert got.shape == want.shape, name
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"
    )


@dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    r_a: int
    r_b: int
    offset: int = 0  # elements by which W0, x and G miss a line of 16 bytes
    padding: int = 0  # elements between their rows
    mask: str | None = "bytes"  # or of the type's values
    pointers: bool = True  # scales
    biases: bool = True
    bias: bool = True
    dtype: torch.dtype = F32
    adapter_dtype: torch.dtype = F32

    def __str__(self) -> str:
        types = f"{self.dtype}-{self.adapter_dtype}".replace("torch.", "")
        return f"{self.M}x{self.N}x{self.K}-{self.r_a}+{self.r_b}-{types}"

    @property
    def R(self) -> int:
        return self.r_a + self.r_b


SHAPES = [
    Case(67, 129, 131, 3, 5, offset=1),
    Case(1, 1, 1, 1, 1, mask=None),
    Case(64, 128, 192, 8, 8),
    Case(300, 328, 200, 16, 0, mask="values", padding=8),
    Case(65, 71, 137, 0, 7, pointers=False, padding=1),
    Case(130, 257, 40, 20, 13, biases=False, bias=False),
    Case(31, 200, 264, 2, 1, mask="values", offset=8, padding=16, pointers=False),
    Case(271, 80, 97, 40, 24, padding=3),
    Case(197, 136, 328, 11, 21, bias=False, mask=None),
    Case(0, 40, 72, 3, 2),
]
PAIRS = [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32)]
CASES = [replace(case, dtype=dtype, adapter_dtype=adapter) for case in SHAPES for dtype, adapter in PAIRS]


def draw(generator: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def operands(case: Case) -> dict[str, Framed]:
    """W0, x, G, b0, the adapters, what the forward leaves, the mask and the scales, each in a frame."""
    generator = torch.Generator().manual_seed(1000 * case.M + case.K)
    M, N, K, R = case.M, case.N, case.K, case.R
    shapes = {"D": (R, K), "rest": (case.r_b, K), "Z": (M, R), "dZ": (M, R), "bias": (N,)}
    made = {name: framed(draw(generator, *shape, dtype=case.dtype)) for name, shape in shapes.items()}
    for name, shape in {"w": (N, K), "x": (M, K), "G": (M, N)}.items():
        t = draw(generator, *shape, dtype=case.dtype)
        made[name] = framed(t, shape[1] + case.padding, case.offset)
    for side, r in (("A", case.r_a), ("B", case.r_b)):
        shapes = {"down": (r, K if side == "A" else N), "up": (N, r), "down_bias": (r,), "up_bias": (N,)}
        for name, shape in shapes.items():
            if r > 0 and (case.biases or "bias" not in name):
                made[f"{side}_{name}"] = framed(draw(generator, *shape, dtype=case.adapter_dtype))
    made["d"] = framed(draw(generator, R))
    if case.mask == "bytes":
        made["mask"] = framed((torch.rand(M, R, generator=generator) < 0.7).to(torch.uint8))
    elif case.mask == "values":
        made["mask"] = framed(draw(generator, M, R, dtype=case.dtype))
    if case.pointers:
        made |= {f"scale_{s}": framed(draw(generator, dtype=case.adapter_dtype)) for s in "ab"}
    if not case.bias:
        del made["bias"]
    if case.dtype == F32 or case.r_b == 0:
        del made["rest"]
    return made


def values(case: Case, *names: str) -> dict[str, float]:
    """The arguments of these names that are no pointers."""
    known = {name: getattr(case, name) for name in ("M", "N", "K", "R", "r_a", "r_b")}
    known |= {
        "stride_wn": case.K + case.padding,
        "stride_xm": case.K + case.padding,
        "stride_gm": case.N + case.padding,
    }
    known |= {"mask_bytes": int(case.mask == "bytes"), "mask_scale": 1.0 if case.mask == "values" else 1.375}
    known |= {"scale_a": 0.75, "scale_b": -1.5, "type": TYPES[case.dtype], "adapter_type": TYPES[case.adapter_dtype]}
    return {name: known[name] for name in names}


def chosen(made: dict[str, Framed], *names: str) -> dict[str, Framed]:
    return {name: made[name] for name in names if name in made}


class Truth:
    """The formulas in float64, over operands or over their absolute values: the sums of all terms' absolute values."""

    def __init__(self, case: Case, made: dict[str, Framed], absolute: bool):
        given = {name: v.t.double().abs() if absolute else v.t.double() for name, v in made.items()}
        self.t, self.case = given, case
        scales = {f"scale_{s}": torch.tensor(v).double() for s, v in (("a", 0.75), ("b", -1.5))}
        for name, v in scales.items():
            given.setdefault(name, v.abs() if absolute else v)
        zeros = {"A_down": (case.r_a, case.K), "B_down": (case.r_b, case.N), "d": (case.R,), "bias": (case.N,)}
        zeros |= {"A_up": (case.N, case.r_a), "B_up": (case.N, case.r_b), "rest": (case.r_b, case.K)}
        zeros |= {
            "A_down_bias": (case.r_a,),
            "B_down_bias": (case.r_b,),
            "A_up_bias": (case.N,),
            "B_up_bias": (case.N,),
        }
        for name, shape in zeros.items():
            given.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        mask = given.get("mask", torch.ones(1, 1, dtype=torch.float64)).expand(case.M, case.R)
        self.mask = mask * (values(case, "mask_scale")["mask_scale"] if "mask" in given else 1.0)
        self.B_down = given["B_down"].to(case.dtype).double()
        self.up = torch.cat((given["A_up"], given["B_up"]), 1)
        self.scale = torch.cat((given["scale_a"].expand(case.r_a), given["scale_b"].expand(case.r_b)))

    def compose(self) -> Tensors:
        t = self.t
        D = torch.cat((t["A_down"], self.B_down @ t["w"]))
        d = torch.cat((t["A_down_bias"], self.B_down @ t["bias"] + t["B_down_bias"]))
        u = t["scale_a"] * t["A_up_bias"] + t["scale_b"] * t["B_up_bias"]
        return {"D": D, "d": d, "U": self.up * self.scale, "u": u}

    def down(self) -> Tensors:
        t, rest = self.t, torch.zeros_like(self.t["D"])
        rest[self.case.r_a :] = t["rest"]
        return {"Z": self.mask * (t["x"] @ (t["D"] + rest).t() + t["d"])}

    def grad_z(self) -> Tensors:
        t, up = self.t, self.up.to(self.case.dtype).double()
        sums = {"dU": t["G"].t() @ t["Z"], "g": t["G"].sum(0), "scales": (t["G"] @ up * t["Z"]).sum(0)}
        up_bias = torch.stack((sums["g"] @ t["A_up_bias"], sums["g"] @ t["B_up_bias"]))
        return {"dZ": self.mask * (t["G"] @ up) * self.scale, **sums, "up_bias": up_bias}

    def grad_w(self) -> Tensors:
        return {"dD": self.t["dZ"].t() @ self.t["x"]}

    def reduce(self) -> Tensors:
        t, r_a = self.t, self.case.r_a
        dU, g, z, dD = (t[name].sum(0) for name in ("dU", "g", "z_sums", "dD"))
        scales, (of_a, of_b) = t["scales"].sum(0), t["up_bias"].sum((0, 1))
        return {
            **{"dA_down": dD[:r_a], "dA_up": t["scale_a"] * dU[:, :r_a], "dB_up": t["scale_b"] * dU[:, r_a:]},
            **{"dB_down": dD[r_a:] @ t["w"].t() + z[r_a:, None] * t["bias"]},
            **{"dA_down_bias": z[:r_a], "dB_down_bias": z[r_a:]},
            **{"dA_up_bias": t["scale_a"] * g, "dB_up_bias": t["scale_b"] * g},
            **{"dscale_a": scales[:r_a].sum() + of_a, "dscale_b": scales[r_a:].sum() + of_b},
            **{"dbias": g + z[r_a:] @ t["B_down"]},
        }


def truths(case: Case, made: dict[str, Framed], kernel: str) -> tuple[Tensors, Tensors]:
    return tuple(getattr(Truth(case, made, absolute), kernel)() for absolute in (False, True))


def run_compose(case: Case, made: dict[str, Framed]) -> Tensors:
    R, low = case.R, case.dtype != F32 and case.r_b > 0
    outputs = {"D": poisoned(R, case.K, dtype=case.dtype), "U": poisoned(case.N, R, dtype=case.dtype)}
    if low:
        outputs["rest"] = poisoned(case.r_b, case.K, dtype=case.dtype)
    if case.bias or case.biases:
        outputs["d"] = poisoned(R)
    if case.biases:
        outputs["u"] = poisoned(case.N, dtype=case.dtype)
    if case.r_b > 0:
        outputs["C"] = poisoned(count("compose_splits", case.N, case.K), case.r_b, case.K)
    names = [f"{side}_{name}" for side in "AB" for name in ("down", "up", "down_bias", "up_bias")]
    numbers = values(case, "N", "K", "stride_wn", "r_a", "r_b", "scale_a", "scale_b", "type", "adapter_type")
    return call("compose", chosen(made, "w", "bias", "scale_a", "scale_b", *names), outputs, **numbers)


def run_down(case: Case, made: dict[str, Framed]) -> Tensors:
    outputs = {"Z": poisoned(case.M, case.R, dtype=case.dtype)}
    outputs["z"] = poisoned(count("down_splits", case.M, case.K), case.M, case.R)
    numbers = values(case, "M", "K", "stride_xm", "R", "r_a", "mask_bytes", "mask_scale", "type")
    return call("down", chosen(made, "x", "D", "rest", "d", "mask"), outputs, **numbers)


def parts(case: Case) -> dict[str, int]:
    """The numbers of partial sums that grad_z leaves."""
    of = TYPES[case.dtype]
    return {
        **{"P": count("grad_z_partials", case.M, case.R, of), "P_z": count("grad_z_sums", case.M)},
        **{"Q": count("grad_z_splits", case.M, case.N, case.R, of)},
    }


def partials(case: Case) -> dict[str, tuple[int, ...]]:
    p, N, R = parts(case), case.N, case.R
    of_ranks = {"z_sums": (p["P_z"], R), "scales": (p["P_z"], R)}
    return {"dU": (p["P"], N, R), "g": (p["P"], N), **of_ranks, "up_bias": (p["P"], p["Q"], 2)}


def partials_of_dD(case: Case) -> tuple[int, int, int]:
    return count("grad_w_splits", case.M, case.K), case.R, case.K


GRAD_Z = ("dZ", "dU", "g", "z_sums", "scales", "up_bias")


def run_grad_z(case: Case, made: dict[str, Framed], wanted: tuple[str, ...] = GRAD_Z) -> Tensors:
    shapes = {name: shape for name, shape in partials(case).items() if name in wanted}
    outputs = {name: poisoned(*shape) for name, shape in shapes.items()}
    if "dZ" in wanted:
        outputs["dZ"] = poisoned(case.M, case.R, dtype=case.dtype)
    if "dZ" in wanted or "scales" in wanted:
        outputs["dz"] = poisoned(parts(case)["Q"], case.M, case.R)
    names = ["G", "A_up", "B_up", "scale_a", "scale_b", "mask"]
    names += ["A_up_bias", "B_up_bias"] if "scales" in wanted else []
    names += ["Z"] if "dU" in wanted or "scales" in wanted else []
    numbers = values(case, "M", "N", "stride_gm", "r_a", "r_b", "mask_bytes", "mask_scale")
    numbers |= values(case, "scale_a", "scale_b", "type", "adapter_type")
    return call("grad_z", chosen(made, *names), outputs, **numbers)


def run_grad_w(case: Case, made: dict[str, Framed]) -> Tensors:
    outputs = {"dD": poisoned(*partials_of_dD(case))}
    return call("grad_w", chosen(made, "x", "dZ"), outputs, **values(case, "M", "K", "stride_xm", "R", "type"))


# What each gradient is computed from, but scales.
SOURCES_OF = {
    **{"dA_down": ("dD",), "dA_up": ("dU",), "dB_up": ("dU",), "dB_down": ("dD", "w", "bias", "z_sums")},
    **{"dA_down_bias": ("z_sums",), "dB_down_bias": ("z_sums",), "dA_up_bias": ("g",), "dB_up_bias": ("g",)},
    **{"dscale_a": ("scales", "up_bias"), "dscale_b": ("scales", "up_bias"), "dbias": ("g", "z_sums", "B_down")},
}


def gradients(case: Case) -> list[str]:
    """Those that a case has."""
    present = {"dA": case.r_a > 0, "dB": case.r_b > 0, "ds": True, "db": True}
    return [name for name in SOURCES_OF if present[name[:2]] and not (name == "dscale_a" and case.r_a == 0)]


def run_reduce(case: Case, made: dict[str, Framed], wanted: tuple[str, ...] | None = None) -> Tensors:
    shapes = {"dA_down": (case.r_a, case.K), "dB_down": (case.r_b, case.N), "dscale_a": (), "dscale_b": ()}
    shapes |= {"dA_up": (case.N, case.r_a), "dB_up": (case.N, case.r_b), "dA_down_bias": (case.r_a,)}
    shapes |= {"dB_down_bias": (case.r_b,), "dA_up_bias": (case.N,), "dB_up_bias": (case.N,), "dbias": (case.N,)}
    wanted = gradients(case) if wanted is None else wanted
    outputs = {
        name: poisoned(*shapes[name], dtype=case.dtype if name == "dbias" else case.adapter_dtype) for name in wanted
    }
    if "dB_down" in wanted:
        outputs["dB"] = poisoned(count("reduce_splits", case.N, case.K), case.N, case.r_b)
    names = {source for name in wanted for source in SOURCES_OF[name]} | {"scale_a", "scale_b"}
    numbers = values(case, "N", "K", "stride_wn", "r_a", "r_b", "scale_a", "scale_b", "type", "adapter_type")
    return call("reduce", chosen(made, *names), outputs, S=made["dD"].t.shape[0], **numbers, **parts(case))


def with_partials(case: Case, made: dict[str, Framed]) -> dict[str, Framed]:
    generator = torch.Generator().manual_seed(1)
    shapes = partials(case) | {"dD": partials_of_dD(case)}
    return made | {name: framed(draw(generator, *shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compose(case):
    made = operands(case)
    got = run_compose(case, made)
    true, terms = truths(case, made, "compose")
    for name in got.keys() - {"C", "rest"}:
        check(name, got[name], true[name], terms[name])
    if "rest" in got:
        C = got["D"][case.r_a :].double() + got["rest"].double()
        eps = torch.finfo(case.dtype).eps
        error = (C - true["D"][case.r_a :]).abs()
        tiny = torch.finfo(case.dtype).smallest_normal * eps
        assert (error <= eps**2 / 4 * C.abs() + 16 * 2**-24 * terms["D"][case.r_a :] + tiny).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_down(case):
    made = operands(case)
    true, terms = truths(case, made, "down")
    check("Z", run_down(case, made)["Z"], true["Z"], terms["Z"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_z(case):
    made = operands(case)
    got = run_grad_z(case, made)
    true, terms = truths(case, made, "grad_z")
    check("dZ", got["dZ"], true["dZ"], terms["dZ"])
    for name in ("dU", "g", "scales"):
        check(name, got[name].double().sum(0).to(F32), true[name], terms[name])
    check("up_bias", got["up_bias"].double().sum((0, 1)).to(F32), true["up_bias"], terms["up_bias"])
    of_rounded = got["dZ"].double()
    check("z_sums", got["z_sums"].double().sum(0).to(F32), of_rounded.sum(0), of_rounded.abs().sum(0))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_grad_w(case):
    made = operands(case)
    true, terms = truths(case, made, "grad_w")
    check("dD", run_grad_w(case, made)["dD"].double().sum(0).to(F32), true["dD"], terms["dD"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce(case):
    made = with_partials(case, operands(case))
    got = run_reduce(case, made)
    true, terms = truths(case, made, "reduce")
    for name in gradients(case):
        check(name, got[name], true[name], terms[name])


@pytest.mark.parametrize("case", CASES[:4], ids=str)
@pytest.mark.parametrize("wanted", [("dZ",), ("dU",), ("g",), ("dZ", "z_sums"), ("scales", "up_bias"), ("dZ", "dU")])
def test_grad_z_writes_what_is_wanted_with_the_same_bits(case, wanted):
    made = operands(case)
    everything, got = run_grad_z(case, made), run_grad_z(case, made, wanted)
    assert all(torch.equal(got[name], everything[name]) for name in wanted)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_reduce_reads_what_a_gradient_needs(case):
    made = with_partials(case, operands(case))
    everything = run_reduce(case, made)
    for name in gradients(case):
        assert torch.equal(run_reduce(case, made, (name,))[name], everything[name]), name


def test_optional_operands_of_the_forward_may_be_absent():
    case = replace(CASES[3], biases=False, bias=False, mask=None, pointers=False)
    made = operands(case)
    for name in ("d", "rest"):
        del made[name]
    true, terms = truths(case, made, "down")
    check("Z", run_down(case, made)["Z"], true["Z"], terms["Z"])
    numbers = values(case, "N", "K", "stride_wn", "r_a", "r_b", "scale_a", "scale_b", "type", "adapter_type")
    outputs = {"D": poisoned(case.R, case.K, dtype=case.dtype)}
    outputs["C"] = poisoned(count("compose_splits", case.N, case.K), case.r_b, case.K)
    got = call("compose", chosen(made, "w", "A_down", "A_up", "B_down", "B_up"), outputs, **numbers)
    true, terms = truths(case, made, "compose")
    check("D", got["D"], true["D"], terms["D"])


def run_all(case: Case, made: dict[str, Framed]) -> Tensors:
    """Every output of every kernel."""
    made = with_partials(case, made)
    runs = (run_compose, run_down, run_grad_z, run_grad_w, run_reduce)
    return {f"{run.__name__} {name}": t for run in runs for name, t in run(case, made).items()}


@pytest.mark.parametrize("case", [CASES[2], CASES[15], CASES[37], CASES[41]], ids=str)
def test_threads_and_blocks_in_any_order_give_the_same_bits(case, monkeypatch):
    made = operands(case)
    expected = run_all(case, made)
    for order in ("1", "2", "3"):
        monkeypatch.setenv("CUDA_ON_HOST_ORDER", order)
        got = run_all(case, made)
        assert [name for name, t in expected.items() if not torch.equal(got[name], t)] == [], order


def test_offsets_past_2_to_the_31():
    """x, G and W0 with rows 2^29 elements apart in sparse mappings give the bits of the compact ones."""
    case = Case(9, 9, 9, 3, 5, dtype=F16, adapter_dtype=F16)
    far, nothing = 2**29, torch.empty(0, dtype=torch.uint8)
    made = operands(case)
    expected = run_all(case, made)
    for name in ("x", "G", "w"):
        buffer = mmap.mmap(-1, 9 * far * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        t = torch.frombuffer(buffer, dtype=F16, count=9 * far).view(9, far)[:, :9]
        t.copy_(made[name].t)
        made[name] = Framed(t, nothing, 0, 0)
    got = run_all(replace(case, padding=far - 9), made)
    assert all(torch.equal(got[name], t) for name, t in expected.items())


@pytest.mark.parametrize("kernel", ["compose", "down", "grad_z", "grad_w", "reduce"])
def test_what_no_kernel_serves_is_refused(kernel):
    ranks = {"R": 65} if kernel in ("down", "grad_w") else {"r_a": 40, "r_b": 25}
    call(kernel, {}, {}, status=1, **ranks)
    call(kernel, {}, {}, status=1, type=3, **dict.fromkeys(ranks, 2))


def test_results_are_independent_of_the_card():
    """The numbers of parts are those of the sources, whatever runs: each part at least one tile, none empty."""
    for M in (1, 63, 64, 65, 257, 6400, 10**6):
        for N in (1, 64, 65, 768, 14336):
            tiles, blocks = -(-N // 64), -(-M // 64)
            for splits in (count("down_splits", M, N), count("reduce_splits", M, N)):
                assert 1 <= splits <= tiles
                assert (splits - 1) * -(-tiles // splits) < tiles
            assert 1 <= count("grad_w_splits", M, N) <= blocks
        assert 1 <= count("grad_z_sums", M) <= 8


def nvcc_report(source: Path, folder: Path) -> tuple[str, str]:
    """What ptxas says of a file's kernels, and their instructions."""
    triton = pytest.importorskip("triton")
    made = folder / "kernels.fatbin"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [
        "nvcc",
        "--threads=2",
        "-std=c++20",
        "-O3",
        "-fatbin",
        *targets,
        "-Xptxas=-v",
        str(source),
        "-o",
        str(made),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    sass = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(made)]
    return said, subprocess.run(sass, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc was found")
@pytest.mark.parametrize("name", ["compose", "down", "grad_z", "grad_w", "reduce"])
def test_compiled_for_every_architecture(name, tmp_path):
    said, sass = nvcc_report(SOURCES / f"{name}.cu", tmp_path)
    kernels = len(re.findall("Compiling entry function", said))
    assert kernels == len(re.findall("Function :", sass)) >= 9 * len(ARCHITECTURES)
    assert (
        re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
        == [("0",) * 3] * kernels
    )
    for kernel, code in re.findall(r"Function : (\S+)(.*?)(?=Function :|$)", sass, re.DOTALL):
        if f"{name}_kernel" not in kernel:
            continue
        assert "LDG.E.128" in code, f"{kernel} loads no lines of 16 bytes"
        products = name in ("down", "grad_z", "grad_w") and "IfLi" not in kernel  # of 16-bit types
        assert ("HMMA" in code) == products, f"{kernel}: tensor cores"
