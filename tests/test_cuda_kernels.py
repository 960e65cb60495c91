"""The CUDA kernels of csrc/cuda, compiled for the host and run there: every output of every launcher against float64.

The rule: an output may miss the float64 result by its type's rounding and 16 units of fp32's in the sum of the absolute
values of all terms, elementwise. So a term that is dropped, taken twice or rounded on the way fails.
"""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .cuda_on_host.library import (  # noqa: F401 (test_native_gpu takes the build from here)
    BUILDS,
    FLAGS,
    HOST,
    ROOT,
    SOURCES,
    Framed,
    Tensors,
    call,
    compiled,
    count,
    cuda_headers,
    framed,
    library,
    poisoned,
)
from .cuda_on_host.passes import (
    BF16,
    CASES,
    F16,
    F32,
    Case,
    Truth,
    chosen,
    gradients,
    operands,
    run_compose,
    run_down,
    run_grad_w,
    run_grad_z,
    run_reduce,
    run_sm90_sweep,
    sweep_sizes,
    truths,
    values,
    with_partials,
)

MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it
OTHERS = (80, 100, 120)  # than sm_90
KERNELS = ("compose", "down", "grad_z", "grad_w", "reduce")
SWEEP = "sm90_sweep"


def check(name: str, got: Tensor, want: Tensor, terms: Tensor) -> None:
    """The rule of the first lines; terms is the sum of the absolute values of all terms."""
    info = torch.finfo(got.dtype)
    allowed = 1.001 * info.eps / 2 * want.abs() + 16 * 2**-24 * terms + info.smallest_normal * info.eps
    wrong = ~((got.double() - want).abs() <= allowed)  # NaN too
    assert got.shape == want.shape, name
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {wrong.nonzero()[0].tolist()}"
    )


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


def serves(case: Case, computes_Z: bool = False) -> bool:
    return count("sm90_sweep_blocks", *sweep_sizes(case, computes_Z)) > 0


# So wide that clusters have 16 blocks: with Z given, and with Z computed.
WIDE = [Case(33, 200, 1100, 8, 8, padding=3), Case(33, 200, 900, 8, 8, padding=3, dtype=BF16, adapter_dtype=BF16)]
SWEEPS = [
    pytest.param(case, computes_Z, id=f"{case}-{'Z computed' if computes_Z else 'Z given'}", marks=marks)
    for computes_Z in (False, True)
    for case in [*CASES, *WIDE]
    for marks in [pytest.mark.slow if case.adapter_dtype != case.dtype or (computes_Z and case.dtype == F16) else ()]
]


@pytest.mark.parametrize(("case", "computes_Z"), SWEEPS)
def test_sm90_sweep(case, computes_Z):
    made = operands(case)
    if not serves(case, computes_Z):
        assert case.R > 31 or (computes_Z and case.dtype == F32)
        sizes = values(case, "M", "N", "K", "r_a", "r_b", "type")
        call(SWEEP, {}, {}, status=1, **sizes, g_ptr=8, D_ptr=8 * computes_Z)
        return
    got = run_sm90_sweep(case, made, computes_Z)
    true, terms = truths(case, made, "grad_z")
    if computes_Z:
        down, of_down = truths(case, made, "down")
        check("Z", got["Z"], down["Z"], of_down["Z"])
        made |= {"Z": framed(got["Z"])}  # as rounded
        for of, absolute in ((true, False), (terms, True)):
            of |= {name: Truth(case, made, absolute).grad_z()[name] for name in ("dU", "scales")}
    check("dZ", got["dZ"], true["dZ"], terms["dZ"])
    for name in ("dU", "g", "scales"):
        check(name, got[name].double().sum(0).to(F32), true[name], terms[name])
    check("up_bias", got["up_bias"].double().sum((0, 1)).to(F32), true["up_bias"], terms["up_bias"])
    of_rounded = got["dZ"].double()
    check("z_sums", got["z_sums"].double().sum(0).to(F32), of_rounded.sum(0), of_rounded.abs().sum(0))
    x = made["x"].t.double()
    check("dD", got["dD"].double().sum(0).to(F32), of_rounded.t() @ x, of_rounded.abs().t() @ x.abs())


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


@pytest.mark.parametrize("case", [CASES[0], CASES[12]], ids=str)
@pytest.mark.parametrize("wanted", [(), ("dZ",), ("z_sums",), ("scales",), ("dZ", "z_sums", "scales")], ids=str)
def test_sm90_sweep_writes_what_is_wanted_with_the_same_bits(case, wanted):
    """g and up_bias take a rank more, which may divide the columns anew."""
    made = operands(case)
    everything, got = (run_sm90_sweep(case, made, wanted=w) for w in (("dZ", "z_sums", "scales"), wanted))
    assert got.keys() == {"dU", "dD", *wanted}
    assert all(torch.equal(t, everything[name]) for name, t in got.items())
    with_g = run_sm90_sweep(case, made, wanted=("g",))
    check("dU", with_g["dU"].double().sum(0).to(F32), *(of["dU"] for of in truths(case, made, "grad_z")))


def test_sm90_sweep_without_what_is_optional():
    case = replace(CASES[2], biases=False, bias=False, mask=None, pointers=False)
    made = {name: v for name, v in operands(case).items() if name not in ("d", "rest")}
    true, terms = truths(case, made, "down")
    check("Z", run_sm90_sweep(case, made, True, ("dZ",))["Z"], true["Z"], terms["Z"])


def test_sm90_sweep_divides_the_columns_in_every_way():
    """By clusters of 8 and of 16, by 64, 32 and 16 rows at once, and not at all: the cases' sizes take each way."""
    found = set()
    for case in [*CASES, *WIDE]:
        sizes = sweep_sizes(case, False)
        blocks = count("sm90_sweep_blocks", *sizes)
        rows = next((M for M in (16, 32, 64) if blocks and count("sm90_sweep_partials", M + 1, *sizes) > 1), None)
        found.add((blocks, rows))
    assert found == {(8, 64), (8, 32), (8, 16), (16, 16), (0, None)}
    assert count("sm90_sweep_blocks", 10**6, 8, 8, False, 2) == count("sm90_sweep_blocks", 8, 8, 33, False, 2) == 0
    assert count("sm90_sweep_partials", 0, 8, 8, 8, False, 2) == 0
    for M in (1, 16, 17, 64, 257, 6400, 10**6):
        assert 1 <= count("sm90_sweep_partials", M, 8, 8, 8, False, 2) <= min(4, -(-M // 16))


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
    runs = [run_compose, run_down, run_grad_z, run_grad_w, run_reduce]
    runs += [run_sm90_sweep] if serves(case) else []
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


@pytest.mark.parametrize("kernel", [*KERNELS, SWEEP])
def test_what_no_kernel_serves_is_refused(kernel):
    ranks = {"R": 65} if kernel in ("down", "grad_w") else {"r_a": 40, "r_b": 25}
    if kernel == SWEEP:
        call(kernel, {}, {}, status=1, r_a=20, r_b=13)
        call(kernel, {}, {}, status=1, r_a=2, r_b=2, N=10**6, type=2)
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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc was found")
@pytest.mark.slow
def test_the_sweep_compiled_for_every_architecture(tmp_path):
    """Only sm_90 has more of it than a trap: barriers of clusters, and copies past the registers."""
    said, sass = nvcc_report(SOURCES / f"{SWEEP}.cu", (80, 90), tmp_path)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert memory == [("0",) * 3] * 12
    bodies = re.findall(r"Function : (\S+)(.*?)(?=Function :|$)", sass, re.DOTALL)
    swept = [(kernel, code) for kernel, code in bodies if "LDGSTS.E" in code]
    assert len(swept) == 6
    for kernel, code in swept:
        assert all(name in code for name in ("UCGABAR_ARV", "UCGABAR_WAIT")), f"{kernel}: barriers of clusters"
        assert ("HMMA" in code) == ("LDSM" in code) == ("sweep_kernelIf" not in kernel), f"{kernel}: tensor cores"
    others = [code for kernel, code in bodies if "LDGSTS.E" not in code]
    assert all("BPT.TRAP" in code for code in others)
    assert len(others) == 6


def nvcc_report(source: Path, architectures: tuple[int, ...], folder: Path) -> tuple[str, str]:
    """What ptxas says of a file's kernels, and their instructions."""
    triton = pytest.importorskip("triton")
    made = folder / "kernels.fatbin"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    command = ["nvcc", "--threads=2", "-std=c++20", "-O3", "-fatbin", *targets, "-Xptxas=-v", source, "-o", made]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    sass = [triton.knobs.nvidia.cuobjdump.path, "-sass", made]
    return said, subprocess.run(sass, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc was found")
@pytest.mark.parametrize(
    ("name", "architectures"),
    [
        *(pytest.param(name, (90,), marks=pytest.mark.slow, id=f"{name}-90") for name in KERNELS),
        *(pytest.param(name, OTHERS, marks=pytest.mark.slow, id=f"{name}-others") for name in KERNELS),
    ],
)
def test_compiled_for_every_architecture(name, architectures, tmp_path):
    said, sass = nvcc_report(SOURCES / f"{name}.cu", architectures, tmp_path)
    kernels = len(re.findall("Compiling entry function", said))
    assert kernels == len(re.findall("Function :", sass)) >= 9 * len(architectures)
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert memory == [("0",) * 3] * kernels
    for kernel, code in re.findall(r"Function : (\S+)(.*?)(?=Function :|$)", sass, re.DOTALL):
        if ("through_weight" if name == "reduce" else name) + "_kernel" not in kernel:
            continue
        assert "LDG.E.128" in code, f"{kernel} loads no lines of 16 bytes"
        products = name in ("down", "grad_z", "grad_w") and "IfLi" not in kernel  # of 16-bit types
        assert ("HMMA" in code) == products, f"{kernel}: tensor cores"
