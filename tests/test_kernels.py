"""The Triton kernels beyond the matrix: what is launched, and what a serial interpreter in its own memory hides."""

from __future__ import annotations

import ctypes
import inspect
import logging
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Callable, Set
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

import hydra_kernels as hk
from hydra_kernels.backend import effective
from hydra_kernels.backend import triton as steps
from hydra_kernels.backend.interface import Operands
from hydra_kernels.kernels import configs, gemm, language, one_pass, reduce
from hydra_kernels.kernels import launch as launch_module
from hydra_kernels.kernels.launch import Launch

from .cases import PLAIN, Case, operands
from .oracle import Tensors, differentiate, errors, hydra, violations

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EVERYTHING = replace(PLAIN, lead=(37,), K=41, N=43, adapter_bias=True, scales="learnable", dropout=True)
ALIGNED = replace(EVERYTHING, lead=(48,), K=96, N=80, r_a=8, r_b=8)
FOUR = (EVERYTHING, ALIGNED, replace(EVERYTHING, r_b=0), replace(EVERYTHING, r_a=0, bias=False))
MAP_NORESERVE = 0x4000  # Linux's; Python's mmap has no name for it
ALL = frozenset(("x", *reduce.GRADIENTS))

# The arguments that each kernel writes; all others it only reads.
WRITTEN = {
    "effective_kernel": {"D_ptr", "d_ptr", "b_ptr", "out_ptr"},
    "rebuild_kernel": {"out_ptr"},
    "compose_kernel": {"D_ptr", "rest_ptr", "stack_ptr", "d_ptr", "U_ptr", "u_ptr"},
    "one_pass_kernel": {"h", "Z_ptr"},
    "gemm_kernel": {"out"},
    "down_kernel": {"Z_ptr"},
    "grad_z_kernel": {"dZ_ptr", "g_ptr", "z_sums_ptr", "scales_ptr"},
    "sum_rows_kernel": {"out_ptr", "v_sums_ptr"},
    "reduce_kernel": {f"d{name}_ptr" for name in reduce.GRADIENTS if name != "B_down"}
    | {"T_ptr", "z_ptr", "ended_ptr"},
    "through_weight_kernel": {"partials_ptr", "dB_down_ptr"},  # and ended_ptr, which it reads first
}
FORWARD = ["sum_rows", "compose", "one_pass"]
# hybrid with our GEMM for every output: `triton` has neither `down` nor the GEMM's forward.
BY_GEMM = configs.INTERPRETER._replace(
    **{kind: getattr(configs.INTERPRETER, kind)._replace(fused_from=1) for kind in ("half", "tf32", "small")}
)


def step(
    t: Tensors,
    G: Tensor,
    run: Callable[[Launch], None] = Launch.run,
    needs: Set[str] = ALL,
    fused: bool = True,
    arch: configs.Architecture = configs.INTERPRETER,
    form: str = "composed",
) -> Tensors:
    """h and the wanted gradients for a case's operands, each launch carried out by run."""
    scales = {f"scale_{side}": t.get(f"scale_{side}", 1.0) for side in "ab"}
    op = Operands(**{name: t.get(name) for name in Operands._fields} | scales | {"mask_scale": 1.0, "input_p": 0.0})
    x, needs = t["x"], needs & set(t)
    if form == "effective":
        h, op, saved = effective.forward(x, op, needs, arch, run)
        return {"h": h, **effective.backward(G, op, saved, needs, arch, run)}
    h, op, saved = steps.forward(x, op, needs, fused, arch, run)
    return {"h": h, **steps.backward(G, op, saved, needs, fused, arch, run)}


def launched(needs: Set[str], fused: bool = True, case: Case = EVERYTHING, form: str = "composed") -> list[Launch]:
    """The launches of a step on the meta device: nothing runs."""
    t, G = operands(case, BF16)
    launches: list[Launch] = []
    step({name: v.to("meta") for name, v in t.items()}, G.to("meta"), launches.append, needs, fused, configs.SM90, form)
    return launches


def name_of(launch: Launch) -> str:
    return launch.kernel.__name__.removesuffix("_kernel")


def names(launches: list[Launch]) -> list[str]:
    return [name_of(launch) for launch in launches]


def test_a_step_takes_three_and_six_launches():
    backward = ["grad_z", "sum_rows", "gemm", "sum_rows", "reduce", "through_weight"]
    assert names(launched(ALL)) == [*FORWARD, *backward]
    by_cublas = ["sum_rows", "compose", "down", *(name for name in backward if name != "gemm")]  # and 4 of cuBLAS's
    assert names(launched(ALL, False)) == by_cublas


@pytest.mark.parametrize("case", [*FOUR, replace(ALIGNED, lead=(150,), N=264)], ids=str)
def test_the_forward_of_triton_reads_x_once(case):
    """One launch takes x, and no later one; on every architecture, with every tile, under dropout of either kind."""
    t, G = operands(replace(case, input_dropout="mask" if case.r_a else ""), BF16)
    t = {name: v.to("meta") for name, v in t.items()}
    for arch in (*SHIPPED.values(), *configs.SM90.with_each_gemm()):
        launches: list[Launch] = []
        step(t, G.to("meta"), launches.append, arch=arch)
        readers = [name_of(launch) for launch in launches if reads(launch, t["x"])]
        assert readers == ["one_pass", "sum_rows"]  # the second is dD, in the backward
        launches.clear()
        step(t, G.to("meta"), launches.append, fused=False, arch=arch)
        assert next(name_of(launch) for launch in launches if reads(launch, t["x"])) == "down"


def reads(launch: Launch, t: Tensor) -> bool:
    """Whether a launch takes t, itself or by a descriptor."""
    found = [v.base if isinstance(v, TensorDescriptor) else v for v in launch.arguments.values()]
    return any(v is t for v in found)


@pytest.mark.parametrize(("columns", "taken"), [(None, False), (79, False), (80, True)])
def test_hybrid_reads_x_once_only_where_a_configuration_says_so(columns, taken):
    """No architecture that ships does: it was not measured to be faster."""
    arch = configs.INTERPRETER._replace(half=configs.INTERPRETER.half._replace(once_up_to=columns))
    t, G = operands(ALIGNED, BF16)
    launches: list[Launch] = []
    step({name: v.to("meta") for name, v in t.items()}, G.to("meta"), launches.append, fused=False, arch=arch)
    assert [name for name in names(launches) if name in ("down", "one_pass")] == ["one_pass" if taken else "down"]
    if taken:
        by_triton, ours = (step(t, G, needs={"A_up"}, fused=fused, arch=arch) for fused in (True, False))
        assert all(torch.equal(ours[name], by_triton[name]) for name in ("h", "A_up"))
    assert all(tiles.once_up_to is None for a in SHIPPED.values() for tiles in (a.half, a.tf32, a.small))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
def test_infinity_stays_in_its_row_and_makes_no_nan_of_its_own():
    """The columns that pad Z are x's products with zeros."""
    t, G = operands(replace(ALIGNED, r_b=0, dropout=False, adapter_bias=False), BF16)
    t = {name: v.abs() for name, v in t.items()}
    t["x"][5, 7] = torch.inf
    h = step(t, G)["h"]
    assert h[5].isinf().all()
    assert h[[m for m in range(48) if m != 5]].isfinite().all()


@pytest.mark.parametrize(
    ("K", "N", "by_gemm"), [(1024, 1008, ["dx"]), (1008, 1024, ["h"]), (1024, 1024, ["h", "dx"]), (1040, 1041, [])]
)
def test_hybrid_takes_its_gemm_for_wide_outputs_alone(K, N, by_gemm):
    """From 1024 columns on, where all rows are aligned: measured on an H200."""
    launches = launched(ALL, False, replace(ALIGNED, lead=(1,), K=K, N=N))
    found = [launch.arguments["FORWARD"] for launch in launches if launch.kernel.__name__ == "gemm_kernel"]
    assert found == [product == "h" for product in by_gemm]


def test_more_ranks_than_a_program_holds_are_left_to_cublas():
    wide = replace(ALIGNED, lead=(1,), K=1024, N=1024)
    assert names(launched({"x"}, False, replace(wide, r_a=32, r_b=32))).count("gemm") == 2
    assert names(launched({"x"}, False, replace(wide, r_a=32, r_b=33))).count("gemm") == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("K", "N", "dtype"), [(96, 80, BF16), (80, 96, BF16), (96, 96, BF16), (41, 43, F32)])
def test_hybrid_with_each_gemm_of_either_kind(K, N, dtype, bias):
    """The last by pointers, which no configuration that ships gives the forward."""
    arch = BY_GEMM._replace(half=BY_GEMM.half._replace(fused_from=96))
    t, G = operands(replace(ALIGNED, K=K, N=N, bias=bias), dtype)
    wanted = set(t) - {"weight", "mask"}
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
    naive = differentiate(lambda t: hk.reference.hydra_linear(**complete(t)), t, G, wanted)
    assert not violations(step(t, G, fused=False, arch=arch), naive, true, dtype)


def test_an_expanded_gradient_is_copied_once():
    """That of a sum: three passes over it would load single elements."""
    t, G = operands(replace(ALIGNED, lead=(16,), K=32, N=32), BF16)
    launches: list[Launch] = []
    for expanded in (G[:1].expand(16, 32), G[:1, :1].expand(16, 32)):
        launches.clear()
        got = step(t, expanded, lambda launch: (launches.append(launch), launch.run()))
        expected = step(t, expanded.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(got[name], v) for name, v in expected.items())
        (dx,) = (launch for launch in launches if name_of(launch) == "gemm")
        assert dx.arguments["DESCRIPTORS"]
        read = [v for launch in launches for v in launch.arguments.values() if isinstance(v, Tensor)]
        assert not any(v.data_ptr() == expanded.data_ptr() for v in read)


def test_tiles_know_how_many_multiprocessors_the_card_has(monkeypatch):
    """A persistent GEMM has a program on each: 114 on an H100 PCIe, 132 on an H200."""
    card = SimpleNamespace(major=9, minor=0, multi_processor_count=114)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(language, "INTERPRETED", SimpleNamespace(value=False))
    arch = steps.tiles_of.__wrapped__(torch.device("cuda", 0))
    assert arch == configs.SM90._replace(multiprocessors=114)
    assert arch.gemm(arch.half, 128 * 114, 256) is arch.half.gemm
    assert configs.SM90.gemm(configs.SM90.half, 128 * 114, 256) is configs.SM90.half.gemm_few


@pytest.mark.parametrize(
    ("wanted", "backward", "written"),
    [
        ("x", ["grad_z", "gemm"], {"dZ_ptr"}),
        ("A_up", ["sum_rows", "reduce"], set()),
        ("B_up", ["sum_rows", "reduce"], set()),
        ("A_down", ["grad_z", "sum_rows", "reduce"], {"dZ_ptr"}),
        ("B_down", ["grad_z", "sum_rows", "reduce", "through_weight"], {"dZ_ptr", "z_sums_ptr"}),
        ("A_down_bias", ["grad_z", "reduce"], {"dZ_ptr", "z_sums_ptr"}),
        ("B_up_bias", ["grad_z", "reduce"], {"g_ptr"}),
        ("bias", ["grad_z", "reduce"], {"dZ_ptr", "g_ptr", "z_sums_ptr"}),
        ("scale_b", ["grad_z", "reduce"], {"scales_ptr"}),
    ],
)
def test_nothing_is_launched_or_written_for_what_needs_no_gradient(wanted, backward, written):
    launches = launched({wanted})
    assert names(launches) == [*FORWARD, *backward]
    assert (launches[2].arguments["Z_ptr"] is not None) == (wanted in ("A_up", "B_up", "scale_b"))
    if "grad_z" in backward:
        grad_z = launches[len(FORWARD)].arguments
        assert {name for name in WRITTEN["grad_z_kernel"] if grad_z[name] is not None} == written
    if "reduce" in backward:
        arguments = launches[len(FORWARD) + backward.index("reduce")].arguments
        filled = {name for name in WRITTEN["reduce_kernel"] if arguments[name] is not None}
        assert filled == ({"T_ptr", "z_ptr", "ended_ptr"} if wanted == "B_down" else {f"d{wanted}_ptr"})


@pytest.mark.parametrize(
    ("r_a", "r_b", "adapters"),
    [(8, 4, F32), (8, 4, BF16), (0, 8, BF16), (6, 5, BF16)]
    + [pytest.param(*few, marks=pytest.mark.slow) for few in ((8, 0, BF16), (0, 8, F32), (40, 36, BF16), (6, 5, F32))],
)
def test_adapters_are_read_where_they_lie(r_a, r_b, adapters):
    """B_down by C's pass, A_up and B_up by dZ's; but those are copied once where their rows are no pieces of 8 bytes,
    or do not start at a multiple of 16. The bits are the same."""
    case = replace(EVERYTHING, lead=(33,), r_a=r_a, r_b=r_b)
    t, G = operands(case, BF16, adapters)
    ups = [t[name] for name in ("A_up", "B_up") if name in t]
    odd = dict(t)
    for name in ("A_up", "B_up"):
        if name in t:
            odd[name] = torch.cat([t[name].new_zeros(1), t[name].flatten()])[1:].view(t[name].shape)
    found = {}
    for way, given in (("as they are", t), ("odd", odd)):
        launches: list[Launch] = []
        found[way] = step(given, G, lambda launch, to=launches: (to.append(launch), launch.run()), fused=False)
        (grad_z,) = (launch.arguments for launch in launches if name_of(launch) == "grad_z")
        read = [grad_z[name] for name in ("A_up_ptr", "B_up_ptr") if grad_z[name] is not None]
        in_place = way == "as they are" and (r_a, r_b) != (6, 5)
        assert [v.data_ptr() for v in read] == [v.data_ptr() for v in ups] if in_place else len(read) == 1
        if r_b:
            assert launches[0].arguments["y_ptr"].data_ptr() == t["B_down"].data_ptr()
    assert all(torch.equal(value, found["odd"][name]) for name, value in found["as they are"].items())
    wanted = set(t) - {"weight", "mask"}
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
    naive = differentiate(lambda t: hk.reference.hydra_linear(**complete(t)), t, G, wanted)
    assert not violations(found["as they are"], naive, true, BF16)


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "expanded"])
def test_strided_inputs_are_read_where_they_are(layout):
    # An expanded G is copied (below).
    G_layout = "sliced" if layout == "expanded" else layout
    t, G = operands(replace(EVERYTHING, lead=(6, 5), x_layout=layout, G_layout=G_layout), F32)
    x, G = (v.flatten(0, -2) if layout != "transposed" else v[:, 0] for v in (t["x"], G))
    t["mask"] = t["mask"][: len(x)]
    launches: list[Launch] = []
    step({**t, "x": x}, G, lambda launch: (launches.append(launch), launch.run()))
    read = [[v.data_ptr() for v in launch.arguments.values() if isinstance(v, Tensor)] for launch in launches]
    assert [place for place, pointers in enumerate(read) if x.data_ptr() in pointers] == [2, 6]  # one_pass, dD
    assert [place for place, pointers in enumerate(read) if G.data_ptr() in pointers] == [3, 4, 5]  # dZ, dU, dx


# With our GEMM hybrid launches the same kernels but in the forward.
ROUTES = {"triton": {"fused": True}, "hybrid": {"fused": False, "arch": BY_GEMM}}
BOTH = pytest.mark.parametrize("route", list(ROUTES.values()), ids=list(ROUTES))
ROUTES["effective"] = {"fused": False, "form": "effective"}


@BOTH
@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_programs_run_in_any_order(order, route, monkeypatch):
    """A program that leans on what an earlier one wrote would give other bits."""
    t, G = operands(ALIGNED, BF16)
    expected = step(t, G, **route)
    in_order = interpreter_builder.set_grid_idx

    def set_grid_idx(*index):
        dims = interpreter_builder.grid_dim
        programs = list(range(dims[0] * dims[1] * dims[2]))
        if order == "reversed":
            programs.reverse()
        else:
            random.Random(0).shuffle(programs)
        x, rest = divmod(programs[(index[0] * dims[1] + index[1]) * dims[2] + index[2]], dims[1] * dims[2])
        in_order(x, *divmod(rest, dims[2]))

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    got = step(t, G, **route)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """t's values in pages of their own, flush with a protected page after them, or before them."""
    size = t.numel() * t.element_size()
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    buffer = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for start in (address, address + page + room):
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    first = page + (room - size if at_end else 0)
    copy = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=first).view(t.shape)
    return copy.copy_(t)


def run_guarded(at_end: bool, cases: tuple[Case, ...], route: dict) -> None:
    """Steps in which every argument of every kernel lies beside a protected page: a stray access ends the process."""

    def run(launch: Launch) -> None:
        arguments, written = dict(launch.arguments), WRITTEN[launch.kernel.__name__]
        for name, v in launch.arguments.items():
            if isinstance(v, TensorDescriptor):
                base = v.base.fill_(torch.nan) if name in written else v.base
                arguments[name] = replace(v, base=guarded(base, at_end))
            elif isinstance(v, Tensor) and v.numel() and v.is_contiguous():
                poison = torch.nan if v.is_floating_point() else -1
                arguments[name] = guarded(v.fill_(poison) if name in written else v, at_end)
        launch._replace(arguments=arguments).run()
        for name in written & launch.arguments.keys():
            described = isinstance(launch.arguments[name], TensorDescriptor)
            old, new = ((v.base if described else v) for v in (launch.arguments[name], arguments[name]))
            if isinstance(old, Tensor) and old.numel():
                if new.isnan().any():
                    raise AssertionError(f"{launch.kernel.__name__} left part of {name} unwritten")
                old.copy_(new)

    for case in cases:
        t, G = operands(case, F16)
        expected, got = step(t, G, **route), step(t, G, run, **route)
        for name, value in expected.items():
            if not torch.equal(got[name], value):
                raise AssertionError(f"{name} differs")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    root = Path(__file__).parent.parent
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True)


@pytest.mark.parametrize("route", ["triton", "hybrid", pytest.param("effective", marks=pytest.mark.slow)])
def test_no_kernel_strays_over_the_edge_of_an_argument(route):
    code = """
from tests.test_kernels import *
four = tuple(replace(case, dropout=False) for case in FOUR)
# The effective form: not aligned with the adapters' biases, aligned, one branch alone.
cases = {"triton": FOUR, "hybrid": FOUR[:2], "effective": four}[route]
run_guarded(True, cases, ROUTES[route])
run_guarded(False, cases[:1], ROUTES[route])
"""
    run = python(f"route = {route!r}" + code, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stderr


def test_a_stray_access_would_be_seen():
    code = (
        "import torch; from tests.test_kernels import guarded; t = guarded(torch.ones(5), True); import ctypes; "
        "ctypes.c_float.from_address(t.data_ptr() + {}).value"
    )
    assert python(code.format(16), TRITON_INTERPRET="1").returncode == 0
    assert python(code.format(20), TRITON_INTERPRET="1").returncode < 0


@BOTH
def test_offsets_past_2_to_the_31(route):
    """x and G with rows 2^29 elements apart in a sparse mapping give the bits of the compact ones."""
    rows, far = 9, 2**29
    t, G = operands(replace(EVERYTHING, lead=(rows,)), F16)
    expected = step(t, G, **route)
    sparse = {}
    for v in (t["x"], G):
        buffer = mmap.mmap(-1, rows * far * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        for m, row in enumerate(v):
            torch.frombuffer(buffer, dtype=F16, count=len(row), offset=m * far * 2).copy_(row)
        # Its storage is the first row: the interpreter copies whole storages.
        sparse[v.data_ptr()] = torch.frombuffer(buffer, dtype=F16, count=v.shape[1])

    def run(launch: Launch) -> None:
        arguments = dict(launch.arguments)
        for name, stride in (("x", "stride_xm"), ("x_ptr", "stride_xm"), ("G_ptr", "stride_gm")):
            if name in arguments and arguments[name].data_ptr() in sparse:
                arguments |= {name: sparse[arguments[name].data_ptr()], stride: far}
        launch._replace(arguments=arguments).run()

    got = step(t, G, run, **route)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("case", "route"),
    [
        *(pytest.param(EVERYTHING, name, id=f"pointers-{name}") for name in ("triton", "hybrid")),
        *(pytest.param(ALIGNED, name, id=f"descriptors-{name}") for name in ("triton", "hybrid")),
        pytest.param(replace(ALIGNED, dropout=False), "effective", id="effective"),
    ],
)
def test_no_block_of_offsets_is_multiplied_in_32_bits(monkeypatch, route, case):
    """Such a product is right at every size that a test can hold in memory.

    But for the rows of one tile: times R they never pass 2^31, and where they do times N, the launcher says so.
    """
    R = case.r_a + case.r_b
    found, multiply = set(), interpreter_builder.create_mul

    def create_mul(left, right):
        if left.data.dtype == np.int32 and right.data.size > 1 and set(np.unique(right.data)) != {R}:
            kernel = next(frame for frame in inspect.stack() if "/kernels/" in frame.filename)
            found.add(f"{Path(kernel.filename).name}:{kernel.lineno}")
        return multiply(left, right)

    monkeypatch.setattr(interpreter_builder, "create_mul", create_mul)
    t, G = operands(case, F16)

    def run(launch: Launch) -> None:
        launch._replace(arguments=launch.arguments | ({"WIDE": True} if "WIDE" in launch.arguments else {})).run()

    step(t, G, run, **ROUTES[route])
    assert found == set()


def test_a_gemm_is_told_where_the_rows_of_a_tile_span_2_to_the_31():
    for N, wide in ((2**24 - 1, False), (2**24, True)):
        x, out = (torch.empty(1, columns, dtype=F16, device="meta") for columns in (16, N))
        weight, Z = torch.empty(N, 16, dtype=F16, device="meta"), torch.empty(1, 8, dtype=F16, device="meta")
        U, D = (torch.empty(rows, columns, dtype=F16, device="meta") for rows, columns in ((N, 8), (8, 16)))
        config = configs.SM80.half.gemm
        for launch in (
            gemm.forward(x, weight, None, Z, U, out, config, 1, "ieee"),
            one_pass.forward(x, weight, None, D, D, None, None, 1.0, U, Z, out, config, 1, "ieee"),
        ):
            assert launch.arguments["WIDE"] == wide


SHIPPED = {arch.name: arch for arch in configs.BY_CAPABILITY.values()}


TILED = replace(ALIGNED, lead=(150,), K=136, N=264)
DISTINCT = [(TILED, "sm_90", BF16)]  # by descriptors; all other tests load by pointers


@pytest.mark.parametrize(
    ("case", "arch", "dtype"),
    [
        pytest.param(*drawn, marks=[] if drawn in DISTINCT else pytest.mark.slow)
        for drawn in product((TILED, replace(EVERYTHING, K=141)), SHIPPED, (BF16, F32))
    ],
    ids=str,
)
def test_shipped_tiles_compute_the_same(case, arch, dtype):
    """The tiles of every architecture, descriptors too, over shapes that end within a tile."""
    t, G = operands(case, dtype)
    wanted = set(t) - {"weight", "mask"}
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
    naive = differentiate(lambda t: hk.reference.hydra_linear(**complete(t)), t, G, wanted)
    for each in SHIPPED[arch].with_each_gemm():
        assert not violations(step(t, G, arch=each), naive, true, dtype)


def complete(t: Tensors) -> dict[str, Tensor | None]:
    return {name: t.get(name) for name in ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")} | t


def test_descriptors_are_what_aligned_operands_are_loaded_through():
    t, G = operands(ALIGNED, BF16)
    for v, by_gemm, once in (
        (t["x"], True, True),
        (t["x"].clone()[:, :95], True, False),  # nor are the rows of D then
        (t["x"].repeat(1, 2)[:, 1:97], False, False),
    ):
        weight = torch.cat([t["weight"]] * 2, 1)[:, : v.shape[1]]
        downs = {name: t[name][:, : v.shape[1]] for name in ("A_down",)}
        for route, kernel, expected in (("hybrid", "gemm", by_gemm), ("triton", "one_pass", once)):
            found: list[Launch] = []
            run = lambda launch, to=found: (to.append(launch), launch.run())  # noqa: E731
            step({**t, "x": v, "weight": weight, **downs}, G, run, **ROUTES[route])
            assert next(launch for launch in found if name_of(launch) == kernel).arguments["DESCRIPTORS"] is expected


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "hybrid"])
@pytest.mark.parametrize("shape", [(0, 96, 80), (0, 96, 43)], ids=str)
def test_empty_operands_take_no_descriptor(shape, fused):
    M, K, N = shape
    t, G = operands(replace(ALIGNED, lead=(M,), K=K, N=N), BF16)
    got = step(t, G, fused=fused)
    assert got["h"].shape == (M, N)
    assert not any(got[name].any() for name in reduce.GRADIENTS if not name.startswith("scale"))


@pytest.mark.parametrize("backend", ["triton", "hybrid"])
def test_a_sum_over_rows_past_the_range_of_float16(backend):
    """T = dZ_b^T x passes 65504 in a channel that W0 hardly reads: dB_down is finite, as the naive layer's."""
    t, G = operands(Case((512,), 64, 64, 0, 5), F16)
    t["x"][:, 3], t["weight"][:, 3], G = 2000, 2**-12, G.abs() / 2
    t["B_up"] = t["B_up"].abs()
    assert (G.double() @ t["B_up"].double()).sum(0).max() * 2000 > 65504
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), {"B_down"})
    naive = differentiate(lambda t: hk.reference.hydra_linear(**complete(t)), t, G, {"B_down"})
    ours = differentiate(lambda t: hk.hydra_linear(**complete(t), backend=backend), t, G, {"B_down"})
    assert not violations(ours, naive, true, F16)


@BOTH
def test_tf32_keeps_what_its_products_would_round(route):
    """The interpreter multiplies in full fp32: with C and T in two parts nothing may change but their split."""
    t, G = operands(ALIGNED, F32)
    launches: list[Launch] = []
    setting = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        got = step(t, G, lambda launch: (launches.append(launch), launch.run()), **route)
    finally:
        torch.backends.cuda.matmul.fp32_precision = setting
    assert {launch.arguments["PRECISION"] for launch in launches if "PRECISION" in launch.arguments} == {"tf32"}
    written = launches[1].arguments
    D, rest = written["D_ptr"], written["rest_ptr"]
    if route["fused"]:
        stack = written["stack_ptr"]
        assert torch.equal(stack[:16], D)
        assert not stack[16:24].any()
        rest = stack[24:]
    assert not (D[8:].view(torch.int32) & 0x1FFF).any()
    C = t["B_down"].double() @ t["weight"].double()
    torch.testing.assert_close(D[8:].double() + rest.double(), C, rtol=1e-6, atol=1e-6)
    wanted = set(t) - {"weight", "mask"}
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
    naive = differentiate(lambda t: hk.reference.hydra_linear(**complete(t)), t, G, wanted)
    # dx takes D without C's rest, so it alone sees tf32's rounding.
    assert errors(got.pop("x"), true.pop("x"))[0] < 2**-11
    assert not violations(got, naive, true, F32)


def composed(t: Tensors, G: Tensor) -> Launch:
    """A step's `compose`, run; the other kernels are not."""
    launches: list[Launch] = []
    step(t, G, launches.append)
    (compose,) = (launch for launch in launches if launch.kernel.__name__ == "compose_kernel")
    compose.run()
    return compose


@pytest.mark.parametrize(
    "case", [ALIGNED, pytest.param(replace(ALIGNED, lead=(80,), K=80, N=112), marks=pytest.mark.slow)], ids=str
)
def test_a_few_programs_walk_over_all_tiles(case):
    """The GEMM's bits are those of a program a tile."""
    t, G = operands(case, BF16)
    launches: list[Launch] = []

    def run(launch: Launch) -> None:
        launches.append(launch)
        launch.run()

    expected = step(t, G, run, arch=configs.INTERPRETER._replace(multiprocessors=100))
    tiles = {launch.grid[0] for launch in launches if name_of(launch) in ("gemm", "one_pass")}
    assert 3 < max(tiles) < 100
    for programs in (1, 3):
        launches.clear()
        got = step(t, G, run, arch=configs.INTERPRETER._replace(multiprocessors=programs))
        assert {launch.grid[0] for launch in launches if name_of(launch) in ("gemm", "one_pass")} == {programs}
        assert all(torch.equal(got[name], expected[name]) for name in ("h", "x"))


def test_bfloat16_is_rounded_to_nearest_even():
    """What `compose` casts is what torch casts: halfway cases, the largest values, infinity and NaN."""
    t, G = operands(replace(PLAIN, K=16, r_b=0), BF16, F32)
    special = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.39e38, 1e-30, 0.0]
    special += [torch.inf, -torch.inf, torch.nan]
    t["A_down"][0, : len(special)] = torch.tensor(special)
    compose = composed(t, G)
    expected, D = t["A_down"].to(BF16), compose.arguments["D_ptr"]
    assert torch.equal(D.isnan(), expected.isnan())
    assert torch.equal(D.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(("N", "descriptors"), [(80, True), (72, False)])
def test_the_rows_of_h_decide_too(N, descriptors):
    assert launched(ALL, case=replace(ALIGNED, N=N))[2].arguments["DESCRIPTORS"] is descriptors


def test_a_number_of_rows_compiles_nothing_anew():
    """Asked of a process that compiles: interpreted kernels have no parameters to specialize."""
    code = """
from hydra_kernels.kernels import gemm, one_pass, reduce, skinny
kernels = (gemm.gemm_kernel, one_pass.one_pass_kernel, skinny.down_kernel, skinny.grad_z_kernel)
kernels += (skinny.sum_rows_kernel, reduce.reduce_kernel)
for kernel in kernels:
    print(*(p.name for p in kernel.params if p.name in ("M", "P", "Q", "S") and not p.do_not_specialize), end="")
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_tiles_of_a_capability():
    assert configs.of((9, 0)).name == "sm_90"
    assert configs.of((8, 9)).name == "sm_86"
    assert configs.of((10, 3)) is configs.SM100
    assert configs.of((13, 7)) == configs.SM86  # the smallest shared memory, plain loads
    assert configs.of(None) is configs.INTERPRETER
    assert [configs.rank_block(R) for R in (1, 16, 17, 33, 64, 65, 300)] == [16, 16, 32, 64, 64, 64, 64]


def test_tiles_follow_from_the_operands():
    x = torch.empty(64, 96, dtype=BF16)
    assert configs.SM90.tiles(BF16, "ieee", [x, x]) is configs.SM90.half
    assert configs.SM90.tiles(BF16, "ieee", [x, x[:, 1:]]) is configs.SM90.small
    assert configs.SM90.tiles(BF16, "ieee", [x, x.t()]) is configs.SM90.small
    eights = torch.empty(4, 24, dtype=BF16)  # rows of 48 bytes: whole lines, but no 16 elements
    assert configs.SM90.tiles(BF16, "ieee", [x, eights]) is configs.SM90.small
    assert configs.SM90.tiles(F32, "tf32", [x.float()]) is configs.SM90.tf32
    assert configs.SM90.tiles(F32, "ieee", [x.float()]) is configs.SM90.small
    half, sizes = configs.SM90.half, ((8192, 4096), (8192, 768), (100, 64), (0, 64))
    assert [configs.SM90.splits(half, M, K) for M, K in sizes] == [5, 22, 1, 1]
    # 150, 591 and 1024 tiles of 128 x 256 over 132 multiprocessors; other tiles have no choice.
    assert configs.SM90.gemm(half, 6400, 768) is configs.SM90.gemm(half, 25216, 768) is half.gemm_few
    assert configs.SM90.gemm(half, 8192, 4096) is half.gemm
    assert configs.SM80.gemm(configs.SM80.half, 6400, 768) is configs.SM80.half.gemm
    assert [configs.SM90.splits_of_columns(half, N, K) for N, K in ((4096, 4096), (768, 3072), (64, 100))] == [5, 22, 2]


def test_tiles_of_the_one_pass_follow_from_the_output_and_the_ranks():
    """Those of sm_90 hold every rank; before it the sums of 64 ranks take the room of half the rows."""
    half, once = configs.SM90.half, configs.SM90.half.one_pass
    found = [configs.SM90.one_pass(half, M, N, R, False) for M, N, R in ((6400, 768, 16), (8192, 4096, 64))]
    assert found == [once.few, once.plain]
    assert configs.SM90.one_pass(half, 8192, 4096, 64, True) is once.dropping
    half, once = configs.SM80.half, configs.SM80.half.one_pass
    found = [
        configs.SM80.one_pass(half, 8192, 4096, *rest) for rest in ((32, False), (33, False), (32, True), (33, True))
    ]
    assert found == [once.plain, once.many, once.plain, once.dropping_many]
    small = configs.SM80.small
    found = [configs.SM80.one_pass(small, 64, 64, *rest) for rest in ((32, True), (33, True), (33, False))]
    assert found == [small.one_pass.plain, small.one_pass.many, small.one_pass.many]


@pytest.mark.parametrize("backend", ["triton", "hybrid"])
def test_without_gpu_and_interpreter_the_forward_says_why(backend):
    code = f"import torch, hydra_kernels as hk; hk.HydraLinear(8, 8, backend={backend!r})(torch.randn(2, 8))"
    run = python(code)
    assert run.returncode == 1
    reason = "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment for Triton's interpreter on the CPU"
    assert f"ValueError: backend: '{backend}' cannot serve this call: {reason}" in run.stderr


def test_importing_the_package_imports_no_triton():
    assert python("import sys, hydra_kernels; sys.exit('triton' in sys.modules)").returncode == 0


def test_a_first_compilation_is_announced_once(caplog, monkeypatch):
    monkeypatch.setattr(launch_module, "_announced", set())
    t, G = operands(replace(PLAIN, K=17), F16)
    with caplog.at_level(logging.INFO, "hydra_kernels"):
        step(t, G, needs={"x"})
        first = [record.getMessage() for record in caplog.records]
        step(t, G, needs={"x"})
    kernels = [message.split()[1] for message in first]
    assert kernels == [f"{name}_kernel" for name in (*FORWARD, "grad_z", "gemm")]
    assert all("torch.float16" in message for message in first)
    assert len(caplog.records) == len(first)
