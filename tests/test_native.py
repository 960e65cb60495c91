"""The compiled part: its kernels in every instruction set, its threads, its checks, its boundary to autograd."""

from __future__ import annotations

import os
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk
from benchmarks.measuring import timing
from hydra_kernels import extension
from hydra_kernels.backend import TABLE, native
from hydra_kernels.backend.interface import LIBRARIES, Operands
from hydra_kernels.choose import machine

from .cases import PLAIN, ROUNDING, Case, operands
from .test_backends import BF16, EVERYTHING, F16, F32, F64, NAMES, call, compare, everything
from .test_bad_input import CALLS, NESTED, R_A, R_B, K, M, N, arguments

NATIVE = extension.load()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=f"no compiled part: {extension.why_not()}")
FORMS = ("composed", "effective", "kept")
# Several blocks of rows and threads; sums longer than a block of p; ranks beside the width of a vector; no rows.
LARGE = [
    Case((1030,), 61, 53, 5, 3),
    Case((70,), 1100, 37, 3, 2, adapter_bias=True),
    Case((37,), 41, 1100, 2, 9),
    Case((257,), 130, 67, 17, 16, x_layout="sliced", G_layout="sliced"),
    Case((300,), 90, 70, 0, 8, x_layout="transposed"),
    Case((300,), 70, 90, 8, 0, G_layout="transposed"),
    Case((0,), 300, 200, 8, 8),
]
FEW = Case((128,), 301, 530, 3, 2)  # so few rows that our own kernels multiply with W0


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(F32, 1), (F32, 2), (F32, 5), (F64, 2), *(pytest.param(F64, n, marks=pytest.mark.slow) for n in (1, 5))],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_kernels(case, form, threads, dtype, products_by_aten):
    """Of our kernels: `auto` may take oneDNN's products, which round otherwise than those of the naive layer."""
    torch.set_num_threads(threads)
    compare(case, "native", form, (dtype, dtype))


@pytest.fixture
def widened():
    """As on a processor for which torch has no oneDNN kernels in bf16 and fp16."""
    torch._C._set_mkldnn_enabled(False)
    machine.forget()
    try:
        assert (NATIVE.widened(fp16=False), NATIVE.widened(fp16=True), NATIVE.matrix_units()) == (True, True, False)
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)
        machine.forget()


@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_kernels_in_bfloat16(case, form, adapters):
    """With matrix units, where this processor has them."""
    compare(case, "native", form, (BF16, adapters))


@pytest.mark.parametrize(("base", "adapters"), [(BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("case", [*LARGE, FEW], ids=str)
def test_kernels_that_widen(case, form, base, adapters, widened):
    torch.set_num_threads(3)
    compare(case, "native", form, (base, adapters))


@pytest.mark.parametrize(("form", "dtype"), [("composed", BF16), ("kept", F16)])
def test_widened_products_of_several_blocks(form, dtype, widened):
    """W0 and x have more elements than a block: several blocks of rows, two of W0's rows, and many of W0's columns."""
    compare(Case((130,), 65537, 70, 3, 2), "native", form, (dtype, dtype))


def test_products_are_widened_where_torch_has_no_onednn_for_them():
    assert NATIVE.widened(fp16=False) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert NATIVE.widened(fp16=True) != torch.ops.mkldnn._is_mkldnn_fp16_supported()
    expected = tuple(dtype for dtype, fp16 in ((F16, True), (BF16, False)) if NATIVE.widened(fp16=fp16))
    assert machine.cpu().widened == expected


@pytest.mark.parametrize("form", ["composed", "kept"])
def test_every_number_of_float16(form, widened):
    """Where W0 is zero, h is x A_up^T: every number of fp16 is read, and products of them are rounded to the nearest,
    ties to even, to subnormal numbers and to infinity."""
    x = torch.zeros(2**16, 8, dtype=F16)
    x[:, 0] = torch.arange(-(2**15), 2**15).to(torch.int16).view(F16)
    factors = torch.tensor([1, 3, 1.5 * 2**-10, 2**-14, -(2**-24), 60000, 1 + 2**-10], dtype=F16)
    A_up = torch.cat([factors, factors.flip(0), -factors[:1]])[:, None]  # 15: a vector of 8, and single numbers
    A_down = torch.zeros(1, 8, dtype=F16)
    A_down[0, 0] = 1
    h = hk.hydra_linear(x, torch.zeros(15, 8, dtype=F16), None, A_down, A_up, None, None, form=form, backend="native")
    finite = x[:, 0].isfinite()
    exact = (x[:, :1].float() @ A_up.float().t()).half()
    torch.testing.assert_close(h[finite], exact[finite], rtol=0, atol=0)
    assert finite.sum() == 2**16 - 2**11
    assert h[~finite].isnan().all()  # infinity times W0's zeros


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("case", [replace(case, lead=(200,)) for case in ROUNDING], ids=str)
def test_cancelling_bias_and_huge_channels_of_many_rows(case, form, dtype):
    """So many rows that dx goes through W0 + U D."""
    for seed in range(3):
        compare(case, "native", form, (dtype, dtype), seed=seed)


@pytest.mark.parametrize(
    ("form", "dtype"), [(f, d) for f in FORMS for d in (F32, F64, BF16) if (f, d) != ("effective", BF16)]
)
def test_sums_that_all_threads_share(form, dtype, products_by_aten):
    """32 threads for 70 rows: sums of each would take more memory than x and G, so there is one set of them."""
    torch.set_num_threads(32)
    case = Case((70,), 1100, 1030, 9, 8)
    compare(case, "native", form, (dtype, dtype))
    t, G = operands(case, dtype)
    leaves = {name: v.requires_grad_(name in NAMES) for name, v in t.items()}
    h = call(hk.hydra_linear, leaves, case, form=form, backend="native")
    peak = timing.peak_bytes(lambda: h.backward(G), torch.device("cpu"))
    sums = (9 + 8) * (1100 + 1030) * (8 if dtype == F64 else 4)  # of one thread
    weight = t["weight"].nbytes if form == "effective" else 0  # W0 + U D
    with torch.no_grad():  # dx, and what a product takes for itself: of bf16 a multiple of W0
        product = timing.peak_bytes(lambda: torch.mm(G, t["weight"]), torch.device("cpu"))
    if dtype == BF16 and NATIVE.widened(fp16=False):
        product = t["x"].nbytes + 2 * G.nbytes  # dx, and G in fp32
    assert sums < peak - weight - product < 32 * sums


@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_a_bfloat16_backward_gives_each_gradient_in_its_operands_dtype(form, adapters):
    """autograd would cast in silence; what torch.compile takes into its graph does not."""
    t, G = operands(EVERYTHING, BF16, adapters)
    x, backend, names = t.pop("x").flatten(0, -2), TABLE["native"], frozenset(NAMES)
    op = Operands(**{"mask_scale": 1.0, **t})
    h, op, saved = backend.forward(x, op, names, form)
    grads = backend.backward(G.reshape(h.shape).contiguous(), op, saved, names, form)
    expected = {name: BF16 if name == "x" else t[name].dtype for name in NAMES}
    assert {name: grad.dtype for name, grad in grads.items()} == expected


@pytest.mark.parametrize("units", [True, False], ids=["matrix_units", "widened"])
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_bfloat16_is_rounded_to_the_nearest(form, units):
    """Where W0 is zero, h is Z U^T rounded once: to the nearest, ties to even."""
    t, _ = operands(replace(PLAIN, lead=(64,), K=32, N=96, r_a=1, r_b=1, bias=False), BF16)
    t["weight"].zero_(), t["B_up"].zero_()
    t["A_down"].zero_()[0, 0] = 1
    t["x"][0, 0] = float("nan")
    torch._C._set_mkldnn_enabled(units)
    try:
        h = call(hk.hydra_linear, t, PLAIN, form=form, backend="native")
    finally:
        torch._C._set_mkldnn_enabled(True)
    exact = (t["x"][:, :1].float() @ t["A_up"].float().t()).bfloat16()
    torch.testing.assert_close(h[1:], exact[1:], rtol=0, atol=0)
    assert h[0].isnan().all()


BY_ATEN = ("aten::mm", "aten::addmm")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("form", FORMS)
def test_every_library(form, library, monkeypatch):
    """The same numbers, from the library that $HYDRA_KERNELS_PRODUCTS names: torch's profiler sees its operators."""
    monkeypatch.setenv("HYDRA_KERNELS_PRODUCTS", library)
    machine.forget()
    try:
        for case in (Case((30,), 61, 53, 5, 3), Case((64,), 96, 80, 8, 8, bias=False), Case((0,), 8, 8, 2, 2)):
            compare(case, "native", form, (F32, F32))
        t, G = operands(replace(PLAIN, lead=(30,)), F32)
        t["x"].requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(hk.hydra_linear, t, PLAIN, form=form, backend="native").backward(G)
        called = [event.name for event in profile.events()]
        by_onednn, by_aten = called.count("mkldnn::_linear_pointwise"), sum(map(called.count, BY_ATEN))
        assert by_onednn == {"aten": 0, "onednn-forward": 1, "onednn": 2, "own": 0}[library]
        assert by_aten == {"aten": 2, "onednn-forward": 1, "onednn": 0, "own": 0}[library]
    finally:
        monkeypatch.undo()
        machine.forget()


# Rows that go by dots, by one panel and by more, by one block of rows and by several; a last panel of every width.
@pytest.mark.parametrize("M", [1, 8, 9, 12, 24, 48, 131, 1030])
@pytest.mark.parametrize(("K", "N"), [(7, 5), (24, 530), (259, 97), (560, 61)])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_our_kernels_for_few_rows(form, dtype, K, N, M, products_by_own):
    torch.set_num_threads(3)
    compare(Case((M,), K, N, 8, 8), "native", form, (dtype, dtype))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_our_kernels_for_few_rows_read_any_layout(form, dtype, products_by_own):
    """x, G and W0 as some columns of every second row, as a transposed matrix, and negated lazily: the same numbers. A
    W0 whose rows do not lie in memory is ATen's, which may round otherwise."""
    t, G = operands(replace(PLAIN, lead=(20,)), dtype)
    expected = results(t, G, form)
    for name, plain in (("weight", t["weight"]), ("x", t["x"]), ("G", G)):
        wide = torch.full((2 * plain.shape[0], plain.shape[1] + 3), float("nan"), dtype=dtype)
        wide[::2, : plain.shape[1]] = plain
        for layout in (wide[::2, : plain.shape[1]], plain.t().contiguous().t(), torch._neg_view(-plain)):
            got = results(t, layout, form) if name == "G" else results({**t, name: layout}, G, form)
            for found, value in got.items():
                if name == "weight" and (layout.is_neg() or layout.stride(1) != 1):
                    torch.testing.assert_close(value, expected[found])
                else:
                    assert torch.equal(value, expected[found]), (name, layout.stride(), found)


@pytest.mark.parametrize("case", [Case((7,), 8192, 300, 3, 2), Case((120,), 8192, 70, 3, 2)], ids=str)
def test_our_kernels_for_few_rows_on_every_thread(case, products_by_own):
    """So large that every loop, also that which packs x, is shared by threads."""
    torch.set_num_threads(3)
    compare(case, "native", "kept", (F32, F32))


def test_no_library_copies_a_transposed_weight(products_by_own):
    t, G = operands(replace(PLAIN, lead=(20,)), F32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results({**t, "weight": t["weight"].t().contiguous().t()}, G, "kept")
    called = [event.name for event in profile.events()]
    assert sum(map(called.count, BY_ATEN)) == 2


@pytest.mark.parametrize(("rows", "by_aten"), [(128, 0), (129, 2)])
def test_few_rows_of_16_bits_are_our_kernels(rows, by_aten, widened):
    t, G = operands(replace(PLAIN, lead=(rows,)), BF16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(t, G, "kept")
    called = [event.name for event in profile.events()]
    assert sum(map(called.count, BY_ATEN)) == by_aten


def test_a_plan_that_sweeps_is_the_composed_form_on_a_cpu():
    t, G = operands(replace(PLAIN, lead=(30,)), F32)
    op, compiled = Operands(**{name: t.get(name) for name in Operands._fields[:6]}), extension.load()
    results = []
    for plan in ("composed", "composed sweep"):
        h, saved = compiled.forward(t["x"], op, native._bits(frozenset({"x", "A_up", "B_down"})), plan)
        grads = compiled.backward(G, op, saved, native._bits(frozenset({"x", "A_up", "B_down"})), plan)
        results.append([h, *saved, *grads.values()])
    assert len(results[0]) == len(results[1])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_library_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("HYDRA_KERNELS_PRODUCTS", "openblas")
    machine.forget()
    try:
        with pytest.raises(ValueError, match=r"HYDRA_KERNELS_PRODUCTS: expected one of auto, aten, .* got 'openblas'"):
            hk.explain(8, 8, 8, 2, 2, capability="cpu")
    finally:
        monkeypatch.undo()
        machine.forget()


@pytest.mark.parametrize(
    "capability", [*(pytest.param(c, marks=pytest.mark.slow) for c in ("default", "avx2")), "avx512"]
)
def test_every_instruction_set_that_this_processor_has(capability):
    """ATEN_CPU_CAPABILITY, which torch reads once, rules ours too."""
    if capability == "avx512" and not torch.cpu._is_avx512_supported():  # torch believes the variable
        pytest.skip("this processor has no AVX-512")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    code = "from hydra_kernels import extension; print(extension.load().instructions())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found = said.stdout.strip()
    assert found == {"default": "plain"}.get(capability, capability)
    if found == NATIVE.instructions():
        return  # the same tests run in this process
    names = ("kernels", "our_kernels_for_few_rows", "every_number_of_float16", "weights_of_any_layout")
    tests = [f"{__file__}::test_{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(NATIVE is None or not NATIVE.amx(), reason="this processor has no AMX")
@pytest.mark.slow
def test_matrix_units_without_amx():
    """As on a processor that has AVX512-BF16 alone: oneDNN then asks for no tiles, and ours must not use them."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    code = "from hydra_kernels.extension import load; print(load().matrix_units(), load().amx())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "False"]
    tests = [f"{__file__}::{name}" for name in ("test_kernels_in_bfloat16", "test_sums_that_all_threads_share")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_layout(form):
    case = replace(PLAIN, lead=(150,))
    t, G = operands(case, F64)
    expected = results(t, G, form)
    for weight in (t["weight"].t().contiguous().t(), torch.cat([t["weight"]] * 3, 1)[:, case.K : 2 * case.K]):
        for name, value in results({**t, "weight": weight}, G, form).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def results(t, G, form: str) -> dict[str, torch.Tensor]:
    leaves = {name: v.detach().requires_grad_(name in NAMES) for name, v in t.items()}
    h = call(hk.hydra_linear, leaves, PLAIN, form=form, backend="native")
    h.backward(G)
    return {"h": h.detach(), **{name: leaves[name].grad for name in NAMES if name in leaves}}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_in_every_run_and_from_many_threads(form):
    t, G = operands(replace(PLAIN, lead=(500,), K=130, N=110), F32)
    first = results(t, G, form)
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: results(t, G, form), range(12)):
            assert all(torch.equal(made[name], value) and value.any() for name, value in first.items())


def test_the_table_of_operands_is_pythons():
    """Name by name in the same order, and each of the same kind: a tensor, a number that may be learned, a number."""
    kinds = {torch.Tensor | None: "tensor", float | torch.Tensor: "scale", float: "number"}
    annotated = typing.get_type_hints(Operands)
    assert NATIVE.operands() == [(name, kinds[annotated[name]]) for name in Operands._fields]


def test_fields_too_few_or_too_many_are_refused():
    x, *op = RIGHT.values()
    for wrong in ((), tuple(op), (*Operands(*op), 1.0)):  # none, without mask_scale, one more
        for function, form in (NATIVE.sizes, ()), (NATIVE.apply, ("composed",)):
            with pytest.raises(TypeError, match="expected the 17 fields of Operands"):
                function(x, wrong, *form)


RIGHT = {**arguments(), "scale_a": 1.0, "scale_b": 1.0}


def sizes(**changed):
    op = {**RIGHT, **changed}
    return NATIVE.sizes(op.pop("x"), Operands(**op))


def test_a_right_call_takes_the_fast_path():
    assert sizes() == (M, K, N, R_A, R_B)
    assert sizes(x=torch.randn(2, 3, K), mask=torch.ones(6, R_A + R_B)) == (6, K, N, R_A, R_B)
    assert sizes(x=torch.randn(2, 3, K), input_mask=torch.ones(6, K)) == (6, K, N, R_A, R_B)
    assert sizes(x=torch.randn(K), scale_a=torch.tensor(2.0), scale_b=2) == (1, K, N, R_A, R_B)
    assert sizes(x=torch.randn(0, K), bias=None, A_down_bias=None) == (0, K, N, R_A, R_B)
    without_a = dict.fromkeys(("A_down", "A_up", "A_down_bias", "A_up_bias"))
    assert sizes(**without_a) == (M, K, N, 0, R_B)
    frozen = {name: arguments()[name].bfloat16() for name in ("x", "weight", "bias")}
    assert sizes(**frozen) == (M, K, N, R_A, R_B)


JUDGED = set(arguments()) | {"mask", "input_mask", "scale_a", "scale_b"}


@pytest.mark.parametrize("changed", [c[0] for c in CALLS if set(c[0]) <= JUDGED], ids=lambda c: " ".join(c))
def test_a_wrong_call_is_left_to_python(changed):
    assert sizes(**changed) is None


def test_special_tensors_and_modes_are_left_to_python():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    found, x = [], torch.randn(3, M, K)
    torch.func.vmap(lambda x: found.append(sizes(x=x)) or x)(x)
    torch.func.grad(lambda x: (found.append(sizes(x=x)), x.sum())[1])(x)
    with torch.autocast("cpu", torch.bfloat16):
        found.append(sizes())
    with Mode():
        found.append(sizes())
    with FakeTensorMode():
        found.append(sizes(x=torch.empty(M, K)))
    found.append(sizes(x=torch.randn(M, K).to_sparse()))
    found += [sizes(scale_a=10**400), sizes(scale_b=torch.ones(()).to(torch.float8_e4m3fn))]
    found.append(sizes(x=torch._neg_view(torch.randn(M, K))))
    found.append(sizes(x=torch._efficientzerotensor((M, K))))
    found.append(sizes(x=NESTED))
    assert found == [None] * 11
    assert sizes(x=x) == (3 * M, K, N, R_A, R_B)


@pytest.mark.parametrize("form", FORMS)
def test_saved_tensors_pass_through_hooks(form):
    """Each is packed and unpacked once, and the backward reads what unpacking gives."""
    case = everything(form)
    t, G = operands(case, F32)
    expected = results_of(t, G, case, form)
    packed, unpacked = [], []

    def pack(v):
        packed.append(v)
        return len(packed) - 1

    def unpack(i):
        unpacked.append(i)
        return packed[i].clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        got = results_of(t, G, case, form)
    assert sorted(unpacked) == list(range(len(packed)))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def results_of(t, G, case: Case, form: str) -> dict[str, torch.Tensor]:
    leaves = {name: v.detach().requires_grad_(name in NAMES) for name, v in t.items()}
    call(hk.hydra_linear, leaves, case, form=form, backend="native").backward(G)
    return {name: v.grad for name, v in leaves.items() if name in NAMES}


@pytest.mark.parametrize("form", FORMS)
def test_unpacked_tensors_may_lie_otherwise(form):
    case = everything(form)
    t, G = operands(case, F32)
    expected = results_of(t, G, case, form)

    def transposed(v):
        return v.t().contiguous().t() if v.dim() == 2 else v

    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, transposed):
        got = results_of(t, G, case, form)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "wanted",
    [{"A_down"}, {"A_up"}, {"B_down"}, {"B_up"}, {"x"}, {"A_down", "B_up"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_no_rows_give_gradients_of_zero(form, wanted):
    t, _ = operands(PLAIN, F32)
    leaves = {
        name: v.detach().requires_grad_(name in wanted) for name, v in {**t, "x": torch.empty(0, PLAIN.K)}.items()
    }
    call(hk.hydra_linear, leaves, PLAIN, form=form, backend="native").backward(torch.empty(0, PLAIN.N))
    for name in wanted:
        assert leaves[name].grad.shape == leaves[name].shape
        assert not leaves[name].grad.any()


def test_a_layer_without_outputs_does_not_crash():
    A_up = torch.empty(0, 2, requires_grad=True)
    h = hk.hydra_linear(
        torch.randn(5, 13), torch.empty(0, 13), None, torch.randn(2, 13), A_up, None, None, backend="native"
    )
    h.sum().backward()
    assert A_up.grad.shape == (0, 2)


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients_nothing_is_saved(form):
    """Nor is a second [M, N] allocated, as for a y0 that must outlive h."""
    t, _ = operands(replace(PLAIN, lead=(64,), K=32, N=4096), F32)
    t = {name: v.requires_grad_(name in NAMES) for name, v in t.items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context(), torch.profiler.profile(profile_memory=True) as profiler:
            h = call(hk.hydra_linear, t, PLAIN, form=form, backend="native")
        assert h.grad_fn is None
        large = [e for e in profiler.events() if e.self_cpu_memory_usage >= h.nbytes]
        assert len(large) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_recorded_trace_has_the_adapters_in_it():
    layer = hk.HydraLinear(13, 11, r_a=2, r_b=3).eval()
    torch.nn.init.normal_(layer.A_up)
    torch.nn.init.normal_(layer.B_up)
    x, other = torch.randn(5, 13), torch.randn(5, 13)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.parametrize("form", FORMS)
def test_negated_memory_and_scales_of_another_dtype(form):
    """x and G that torch negates when they are read; float64 scales over float32 adapters keep their dtype."""
    case = replace(PLAIN, scales="learnable")
    t, G = operands(case, F32)
    t |= {name: t[name].double() for name in ("scale_a", "scale_b")}
    expected = results_of(t, G, case, form)
    assert expected["scale_a"].dtype == F64
    got = results_of({**t, "x": torch._neg_view(-t["x"])}, torch._neg_view(-G), case, form)
    assert torch._neg_view(-G).is_neg()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("rows", [30, 140])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_negated_memory_of_16_bits(form, dtype, rows, widened):
    case = replace(PLAIN, lead=(rows,))
    t, G = operands(case, dtype)
    expected = results_of(t, G, case, form)
    negated = {name: torch._neg_view(-t[name]) for name in ("x", "weight", "bias")}
    assert negated["weight"].is_contiguous()
    for name, value in results_of({**t, **negated}, torch._neg_view(-G), case, form).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_without_elements_in_memory_is_zeros(form):
    t, G = operands(PLAIN, F32)
    for name, value in results_of(t, torch._efficientzerotensor(G.shape), PLAIN, form).items():
        assert name == "h" or (not value.any() and not value._is_zerotensor()), name


def test_subclasses_without_a_dispatch_of_their_own():
    class Subclass(torch.Tensor):
        pass

    t, _ = operands(PLAIN, F32)
    h = call(hk.hydra_linear, t, PLAIN, backend="native")
    torch.testing.assert_close(
        call(hk.hydra_linear, {**t, "x": t["x"].as_subclass(Subclass)}, PLAIN, backend="native").as_subclass(
            torch.Tensor
        ),
        h,
    )


def test_batched_gradients_are_refused():
    t, G = operands(PLAIN, F32)
    x = t["x"].requires_grad_()
    h = call(hk.hydra_linear, t, PLAIN, backend="native")
    with pytest.raises(RuntimeError, match="takes no batched gradients"):
        torch.autograd.grad(h, x, torch.stack([G, G]), is_grads_batched=True)


@pytest.mark.parametrize("form", FORMS)
def test_an_operand_changed_before_the_backward_raises(form):
    t, G = operands(PLAIN, F32)
    x = t["x"].requires_grad_() * 1
    h = call(hk.hydra_linear, {**t, "x": x, "A_down": t["A_down"].requires_grad_()}, PLAIN, form=form, backend="native")
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.backward(G)


def test_a_freed_graph_is_refused():
    t, G = operands(EVERYTHING, F32)
    h = call(hk.hydra_linear, {**t, "A_up": t["A_up"].requires_grad_()}, EVERYTHING, backend="native")
    h.backward(G)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        h.backward(G)


def test_what_python_must_judge_gives_the_same():
    """Through HydraFunction, here under a dispatch mode that changes nothing, and through the one in C++."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for form in FORMS:
        case = everything(form)
        t, G = operands(case, F32)
        expected = results_of(t, G, case, form)
        with Mode():
            got = results_of(t, G, case, form)
        assert all(torch.equal(got[name], value) and value.any() for name, value in expected.items())
