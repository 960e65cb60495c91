"""`native` as it runs on a GPU, on the host: csrc/gpu.cpp over the kernels compiled for the host passes the one matrix.

Its frozen products are ATen's, so only the CUDA runtime, cuBLAS and the card itself are left unproved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sysconfig
import tempfile
from dataclasses import replace
from functools import cache, partial
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

import hydra_kernels as hk
from hydra_kernels import extension
from hydra_kernels.backend import native
from hydra_kernels.backend.interface import Operands
from hydra_kernels.backend.native import _bits

from .cases import CASES, PLAIN, ROUNDING, Case, operands
from .cuda_on_host import library as kernels
from .oracle import Tensors, differentiate, hydra, median_violations, violations
from .test_backends import BF16, F16, F32, NAMES, SUBSETS, call, everything, trainable

DTYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
CSRC = kernels.ROOT / "csrc"


@cache
def on_host() -> ModuleType:
    """gpu.cpp, linked to the kernels' library for the host and kept beside it."""
    kernels.library()  # or it skips, and says why
    compiler, *flags = kernels.BUILDS[None]
    library = kernels.compiled(compiler, kernels.cuda_headers(), (*flags, *kernels.FLAGS))
    sources = [CSRC / "gpu.cpp", kernels.HOST / "gpu_on_host.cpp"]
    inputs = [*sources, *CSRC.glob("*.h"), CSRC / "cuda" / "kernels.h"]
    key = hashlib.sha256(b"\0".join([torch.__version__.encode(), *(f.read_bytes() for f in inputs)])).hexdigest()[:16]
    made = library.parent / f"gpu_on_host-{key}.so"
    if not made.exists():
        logging.getLogger(__name__).info("compiling gpu.cpp for the host: %s", made)
        includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
        flags = ["-O1", "-std=c++20", "-fPIC", "-DHYDRA_WITH_CUDA", "-DTORCH_EXTENSION_NAME=gpu_on_host", f"-I{CSRC}"]
        torch_libraries = cpp_extension.library_paths()[0]
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            objects = [f"{scratch}/{source.stem}.o" for source in sources]
            running = [
                subprocess.Popen(["g++", *flags, *(f"-isystem{i}" for i in includes), "-c", source, "-o", target])
                for source, target in zip(sources, objects, strict=True)
            ]
            assert [process.wait() for process in running] == [0, 0]
            link = ["g++", "-shared", *objects, library, f"-Wl,-rpath,{library.parent}", f"-L{torch_libraries}"]
            part = f"{scratch}/gpu_on_host.so"
            subprocess.run([*link, "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-o", part], check=True)
            os.replace(part, made)  # other processes build it too
    spec = importlib.util.spec_from_file_location("gpu_on_host", made)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class OnHost(torch.autograd.Function):
    """(names of the operands, constant scales, whether to sweep, *operands) -> h, as HydraFunction calls a backend."""

    @staticmethod
    def forward(ctx, names, scales, sweep, *tensors):
        t = {**scales, **dict(zip(names, tensors, strict=True))}
        x = t.pop("x")
        op = Operands(**dict.fromkeys(Operands._fields[:6]) | t)
        needs = frozenset(name for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True) if needed)
        flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
        h, saved = on_host().forward(flat, op, _bits(needs))
        through_W0 = "B_down" in needs
        op = op._replace(weight=op.weight if through_W0 or "x" in needs else None, bias=op.bias if through_W0 else None)
        ctx.call, ctx.names, ctx.shape = (op, saved, _bits(needs), sweep), names, x.shape
        return h.reshape(*x.shape[:-1], h.shape[-1])

    @staticmethod
    def backward(ctx, G):
        grads = on_host().backward(G.reshape(-1, G.shape[-1]) if G.dim() != 2 else G, *ctx.call)
        if "x" in grads:
            grads["x"] = grads["x"].reshape(ctx.shape)
        return None, None, None, *(grads.get(name) for name in ctx.names)


def ours(t: Tensors, case: Case, sweep: bool = False) -> torch.Tensor:
    scales = case.constant_scales if "scale_a" not in t and "scale_b" not in t else {}
    return OnHost.apply(tuple(t), scales, sweep, *t.values())


def three_ways(case: Case, dtypes, wanted: set[str] | None = None, seed: int = 0, sweep: bool = False):
    t, G = operands(case, *dtypes, seed=seed)
    wanted = trainable(t) if wanted is None else wanted
    doubles = {name: v.double() for name, v in t.items()}
    true = differentiate(lambda t: hydra(t, **case.constant_scales), doubles, G.double(), wanted)
    naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, wanted)
    got = differentiate(lambda t: ours(t, case, sweep), t, G, wanted)
    assert {name: v.dtype for name, v in got.items()} == {name: v.dtype for name, v in naive.items()}
    return true, naive, got


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def words(pair: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(d)[6:] for d in dict.fromkeys(pair))


# Every case in bfloat16, and in one more dtype in turn.
OTHERS = [pair for pair in DTYPES if pair != (torch.bfloat16, torch.bfloat16)]
SERVED = [case for case in CASES if case.r_a + case.r_b <= 64]
DRAWN = [
    pytest.param(
        *(case, dtypes),
        id=f"{case}-{words(dtypes)}",
        marks=[] if dtypes not in OTHERS or dtypes == OTHERS[i % len(OTHERS)] else [pytest.mark.slow],
    )
    for i, case in enumerate(SERVED)
    for dtypes in DTYPES
]


@pytest.mark.parametrize(("case", "dtypes"), DRAWN)
def test_output_and_every_gradient(case, dtypes):
    true, naive, got = three_ways(case, dtypes)
    assert not violations(got, naive, true, dtypes[0])


@pytest.mark.parametrize("case", [*ROUNDING, *(replace(case, r_b=0) for case in ROUNDING)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_cancelling_bias_and_huge_channels(case, dtypes):
    for seed in range(3):
        true, naive, got = three_ways(case, dtypes, seed=seed)
        assert not violations(got, naive, true, dtypes[0])


@pytest.mark.parametrize("case", ROUNDING, ids=str)
def test_cancelling_bias_and_huge_channels_in_fp32(case):
    draws = [three_ways(case, (F32, F32), seed=seed) for seed in range(31)]
    assert median_violations(((got, naive, true) for true, naive, got in draws), F32) == []


@pytest.mark.parametrize(("case", "dtypes"), DRAWN)
def test_the_sweep_gives_every_gradient(case, dtypes):
    true, naive, got = three_ways(case, dtypes, sweep=True)
    assert not violations(got, naive, true, dtypes[0])


@pytest.mark.parametrize("case", ROUNDING, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES[1:3], ids=str)
def test_the_sweep_where_a_bias_cancels_or_channels_are_huge(case, dtypes):
    true, naive, got = three_ways(case, dtypes, sweep=True)
    assert not violations(got, naive, true, dtypes[0])


@pytest.mark.parametrize("wanted", SUBSETS[::3], ids=lambda wanted: "+".join(sorted(wanted)) or "nothing")
def test_the_sweep_gives_any_subset_of_gradients(wanted):
    case = everything("composed")
    true, naive, got = three_ways(case, (F32, F32), wanted, sweep=True)
    assert not violations(got, naive, true, F32)


def test_the_sweep_runs_where_it_is_asked_for_and_serves():
    """Its sums have another order than the passes': other bits. More ranks than it takes give the passes' own."""
    for case, other in ((replace(PLAIN, lead=(300,)), True), (replace(PLAIN, lead=(300,), r_a=20, r_b=20), False)):
        t, G = operands(case, F32, F32)
        by_sweep, by_passes = (
            differentiate(partial(ours, case=case, sweep=sweep), t, G, trainable(t)) for sweep in (True, False)
        )
        names = ("A_down", "A_up", "B_down", "B_up")
        assert all(torch.equal(by_sweep[name], by_passes[name]) != other for name in names)


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda wanted: "+".join(sorted(wanted)) or "nothing")
def test_any_subset_of_gradients(wanted):
    case = everything("composed")
    true, naive, got = three_ways(case, (F32, F32), wanted)
    assert not violations(got, naive, true, F32)


def test_the_weight_may_lie_anywhere():
    """Columns of a wider matrix, whose rows are no lines of 16 bytes, and the transposed."""
    t, G = operands(PLAIN, BF16)
    expected = differentiate(lambda t: ours(t, PLAIN), t, G, set(NAMES) & set(t))
    wide = torch.cat([t["weight"]] * 3, 1)[:, PLAIN.K : 2 * PLAIN.K]
    for weight in (wide, t["weight"].t().contiguous().t()):
        got = differentiate(lambda t: ours(t, PLAIN), {**t, "weight": weight}, G, set(NAMES) & set(t))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=2**-7, atol=2**-7 * value.abs().max().item())


def test_two_backwards_of_the_same_forward_give_the_same_bits():
    case = replace(everything("composed"), lead=(23, 3))
    t, G = operands(case, BF16, F32)
    leaves = {name: v.requires_grad_(name in NAMES) for name, v in t.items()}
    h = ours(leaves, case)
    first, second = (torch.autograd.grad(h, [leaves[n] for n in NAMES], G, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_branches_and_scales_may_differ_in_dtype():
    """As under autocast, or where only one branch is fp32: each gradient has its operand's dtype and the same worth."""
    case = replace(PLAIN, adapter_bias=True, scales="learnable")
    for fp32 in ("A_", "B_", "scale_"):
        t, G = operands(case, BF16)
        t = {name: v.float() if name.startswith(fp32) else v for name, v in t.items()}
        wanted = trainable(t)
        true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
        naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, wanted)
        got = differentiate(lambda t: ours(t, case), t, G, wanted)
        assert {name: v.dtype for name, v in got.items()} == {name: v.dtype for name, v in naive.items()}
        assert not violations(got, naive, true, BF16), fp32


def test_a_layer_without_features_is_refused():
    x, up = torch.randn(5, 0), torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="no layer without features"):
        on_host().forward(x, Operands(torch.randn(3, 0), None, torch.randn(2, 0), up, None, None), 0)


def test_a_card_that_the_compiled_code_is_not_for_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(extension, "why_not", lambda mode="cpp": None)
    monkeypatch.setattr(extension, "record", lambda: {"architectures": ["sm_90", "compute_90"]})
    for capability, said in {
        (7, 5): "this GPU has 7.5",
        (8, 6): "were built for sm_90, compute_90, and this GPU has compute capability 8.6",
        (9, 0): None,
        (12, 0): None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = native.unavailable(torch.device("cuda"))
        assert reason is None if said is None else said in reason
