"""The one matrix: every backend passes it unchanged, in every dtype and form that it serves.

`triton` and `hybrid` run in Triton's interpreter, which is slow. They launch the same kernels but for the two GEMMs:
`make test` gives `triton` what exercises a kernel and `hybrid` what exercises its own products. The rest is slow.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels as hk
from hydra_kernels.backend import TABLE
from hydra_kernels.backend.interface import rounds_the_sum

from .cases import CASES, INPUT_DROPOUT, INPUT_P, INPUT_SEED, PLAIN, ROUNDING, TALL, WIDE, Case, operands
from .oracle import Tensors, differentiate, hydra, median_violations, out_of_bounds, violations

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CPU = torch.device("cpu")
# (base, adapters)
DTYPES = [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]
SERVED = [
    pytest.param(name, form, dtypes, id=f"{name}-{form}-{'-'.join(str(d)[6:] for d in dict.fromkeys(dtypes))}")
    for name, reason in hk.backends().items()
    for form in ("composed", "kept", "effective")
    for dtypes in DTYPES
    if name != "reference" and reason is None and TABLE[name].refusal(form, dtypes[0], 1, 1) is None
]
INTERPRETED = ("triton", "hybrid")
ALL_CASES = [*CASES, *INPUT_DROPOUT]
FORMS = [p for p in SERVED if p.values[2] == (F32, F32)]
FORMS = [pytest.param(*p.values[:2], id="-".join(p.values[:2])) for p in FORMS]
WITH_DROPOUT = [p for p in FORMS if p.values[1] != "effective"]


def slow_if(condition: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if condition else []


def joined(routes: list, cases: list, slow: Callable[..., bool]) -> list:
    """Every route with every case, slow where slow(place of the case, *route, case) says so."""
    made = []
    for route, (i, case) in product(routes, enumerate(cases)):
        words = "+".join(sorted(case)) if isinstance(case, set) else str(case)
        marks = slow_if(slow(i, *route.values, case))
        made.append(pytest.param(*route.values, case, id=f"{route.id}-{words}", marks=marks))
    return made


def finest(backend: str) -> torch.dtype:
    """The most exact dtype that a backend has kernels for."""
    return F32 if TABLE[backend].refusal("composed", F64, 1, 1) else F64


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN: whoever reads what nobody wrote, shows it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(function, t: Tensors, case: Case, **options):
    t = dict(t)
    if case.input_dropout == "seed" and function is hk.hydra_linear:
        del t["input_mask"]
        torch.manual_seed(INPUT_SEED)
        options["input_dropout_p"] = INPUT_P
    positional = [t.pop(name, None) for name in ("x", "weight", "bias", "A_down", "A_up", "B_down", "B_up")]
    return function(*positional, **t, **{k: v for k, v in case.constant_scales.items() if k not in t}, **options)


def trainable(t: Tensors) -> set[str]:
    return set(t) - {"weight", "mask", "input_mask"}


@functools.cache
def expected(case: Case, dtypes, wanted: frozenset[str] | None, seed: int):
    """The operands, G, and output and gradients of the oracle and of the naive layer, once for all backends."""
    t, G = operands(case, *dtypes, seed=seed)
    wanted = trainable(t) if wanted is None else set(wanted)
    true_operands = {name: v.double() for name, v in t.items()}
    true = differentiate(lambda t: hydra(t, **case.constant_scales), true_operands, G.double(), wanted)
    naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, wanted)
    return t, G, true, naive


def three_ways(case: Case, backend: str, form: str, dtypes, wanted: set[str] | None = None, seed: int = 0):
    """Output and gradients of the oracle, of the naive layer and of the backend for the same operands."""
    t, G, true, naive = expected(case, dtypes, None if wanted is None else frozenset(wanted), seed)
    ours = differentiate(
        lambda t: call(hk.hydra_linear, t, case, form=form, backend=backend), t, G, true.keys() - {"h"}
    )
    for name, value in ours.items():
        expected_dtype = t["x"].dtype if name == "h" else t[name].dtype
        assert value.dtype == expected_dtype, f"{name} is {value.dtype}, expected {expected_dtype}"
    return true, naive, ours


def compare(case: Case, backend: str, form: str, dtypes=None, wanted: set[str] | None = None, seed: int = 0):
    """Asserts the rule of tests/oracle.py, in the backend's finest dtype unless others are given."""
    dtypes = dtypes or (finest(backend),) * 2
    true, naive, ours = three_ways(case, backend, form, dtypes, wanted, seed)
    assert not violations(ours, naive, true, dtypes[0])


def rarely(i: int, backend: str, form: str, dtypes, case: Case) -> bool:
    """Of triton every case in bfloat16, every other in one more dtype; of hybrid each in one; of both no large K."""
    others = [d for d in DTYPES if d not in ((F64, F64), (BF16, BF16))]
    turn = {"triton": [(BF16, BF16), *([others[i // 2 % 4]] if i % 2 else [])], "hybrid": [DTYPES[1 + i % 5]]}
    if form == "effective" and (case.dropout or case.input_dropout) and i % 2:
        return True  # it is refused
    return backend in INTERPRETED and (case == WIDE or dtypes not in turn[backend])


@pytest.mark.parametrize(
    ("backend", "form", "dtypes", "case"),
    [p for p in joined(SERVED, [*ALL_CASES, TALL], rarely) if p.values[0] in INTERPRETED or p.values[3] != TALL],
)
def test_output_and_every_gradient(case, backend, form, dtypes):
    drops_input = bool(case.input_dropout)
    masked = case.dropout or drops_input
    reason = TABLE[backend].refusal(form, dtypes[0], case.r_a, case.r_b, masked, drops_input=drops_input)
    if reason is None:
        compare(case, backend, form, dtypes)
    else:
        with pytest.raises(ValueError, match=re.escape(reason)):
            compare(case, backend, form, dtypes)


LOW = [p for p in SERVED if p.values[2][0] in (F16, BF16)]
# Where a form rounds W0 + U D to low precision, the rule holds without b0 alone: tests/test_effective.py has the rest.
ROUNDED = [
    pytest.param(
        *(*p.values, case, seed),
        id=f"{p.id}-{case}-{seed}",
        marks=slow_if(p.values[0] in INTERPRETED and (seed > 0 or p.values[2] not in ((BF16, BF16), (F16, F32)))),
    )
    for p, case, seed in product(LOW, [*ROUNDING, *(replace(case, r_b=0) for case in ROUNDING)], range(3))
    for case in [replace(case, bias=not rounds_the_sum(p.values[1], p.values[2][0]))]
]


@pytest.mark.parametrize(("backend", "form", "dtypes", "case", "seed"), ROUNDED)
def test_cancelling_bias_and_huge_channels(backend, form, dtypes, case, seed):
    compare(case, backend, form, dtypes, seed=seed)


@pytest.mark.parametrize(
    ("backend", "form", "case"),
    joined(FORMS, ROUNDING, lambda i, backend, form, case: backend == "hybrid" or (backend == "triton" and i > 0)),
)
def test_cancelling_bias_and_huge_channels_in_fp32(case, backend, form):
    """The rule holds for the median of many draws: in fp32 the composed form errs up to 1.6 times as much as the naive
    layer where b0 cancels, so that a single draw says little."""
    seeds = range(31 if backend == "aten" else 9)  # the interpreter is slow
    draws = [three_ways(case, backend, form, (F32, F32), seed=seed) for seed in seeds]
    assert median_violations(((ours, naive, true) for true, naive, ours in draws), F32) == []


@pytest.mark.parametrize("case", ROUNDING, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_rounding_cases_are_strong_enough(case, dtype):
    """Rounding any one of C = B_down W0, B_down b0, T = dZ_b^T x and sum_m dZ_b to the base dtype breaks the rule."""
    t, G = operands(case, dtype)
    wanted = trainable(t)
    d = {name: v.double() for name, v in t.items()}
    true = differentiate(hydra, d, G.double(), wanted)
    naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, wanted)

    def rounded(v):
        return v.to(dtype).double()

    C, c, dZ_b = d["B_down"] @ d["weight"], d["B_down"] @ d["bias"], G.double() @ d["B_up"]

    def h(C, c):
        Z_b = rounded(d["x"] @ C.t() + c)
        return rounded(
            d["x"] @ d["weight"].t()
            + d["bias"]
            + rounded(d["x"] @ d["A_down"].t()) @ d["A_up"].t()
            + Z_b @ d["B_up"].t()
        )

    def dB_down(T, sums):
        return rounded(T @ d["weight"].t() + torch.outer(sums, d["bias"]))

    T, sums = dZ_b.t() @ d["x"], dZ_b.sum(0)
    exact = {"h": h(C, c), "B_down": dB_down(T, sums)}
    expected = {name: true[name] for name in exact}
    assert not violations(exact, naive, expected, dtype)
    defects = {
        "C": {"h": h(rounded(C), c)},
        "c": {"h": h(C, rounded(c))},
        "T": {"B_down": dB_down(rounded(T), sums)},
        "sum_m dZ_b": {"B_down": dB_down(T, rounded(sums))},
    }
    assert [name for name, wrong in defects.items() if not violations({**exact, **wrong}, naive, expected, dtype)] == []


EVERYTHING = replace(PLAIN, lead=(6, 5), adapter_bias=True, scales="learnable", dropout=True)


def everything(form: str) -> Case:
    """All options that a form serves."""
    return replace(EVERYTHING, dropout=form != "effective")


NAMES = sorted(trainable(operands(EVERYTHING, F64)[0]))
SUBSETS = [{name} for name in NAMES] + [set(NAMES) - {name} for name in NAMES]
SUBSETS += [set(random.Random(seed).sample(NAMES, len(NAMES) // 2)) for seed in range(20)]


# dx is the only gradient that hybrid computes itself.
HYBRIDS = [{"x"}, set(NAMES) - {"x"}, {"A_up"}]


@pytest.mark.parametrize(
    ("backend", "form", "wanted"),
    joined(FORMS, SUBSETS, lambda i, backend, form, wanted: backend == "hybrid" and wanted not in HYBRIDS),
)
def test_any_subset_of_gradients(wanted, backend, form):
    compare(everything(form), backend, form, wanted=wanted)


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_no_two_gradients_share_memory(backend, form):
    """A hook may change one in place."""
    case = replace(PLAIN, adapter_bias=True)
    t, G = operands(case, F32)
    leaves = {name: t[name].requires_grad_() for name in sorted(trainable(t))}
    h = call(hk.hydra_linear, t, case, form=form, backend=backend)
    held: dict[int, str] = {}
    for name, grad in zip(leaves, torch.autograd.grad(h, list(leaves.values()), G), strict=True):
        places = torch.tensor([grad.data_ptr()])
        for size, stride in zip(grad.shape, grad.stride(), strict=True):
            places = (places[:, None] + 4 * stride * torch.arange(size)).flatten()
        for place in places.tolist():
            assert held.setdefault(place, name) == name


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision:UserWarning")
@pytest.mark.parametrize(
    ("backend", "form", "sizes"),
    # In the interpreter it takes minutes, for gradients that the matrix compares with the oracle's.
    joined(FORMS, list(product((5, 0), (3, 0), (True, False))), lambda i, backend, form, sizes: backend in INTERPRETED),
)
def test_gradcheck(backend, form, sizes):
    r_b, r_a, bias = sizes
    if r_a + r_b == 0:
        r_a = 1
    dtype = finest(backend)
    lead, K, N = ((4,), 6, 5) if dtype == F64 else ((2,), 3, 4)
    case = replace(everything(form), lead=lead, K=K, N=N, r_a=r_a, r_b=r_b, bias=bias)
    t, _ = operands(case, dtype)
    names = sorted(trainable(t))

    def function(*values):
        return call(hk.hydra_linear, {**t, **dict(zip(names, values, strict=True))}, case, form=form, backend=backend)

    # h is affine in each operand, so that a long step is exact but for rounding.
    limits = {} if dtype == F64 else {"eps": 0.5, "atol": 1e-4, "rtol": 1e-4}
    assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in names], **limits)


@settings(max_examples=125, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 40), max_size=3),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    ranks=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    options=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    route=st.sampled_from([("auto", "auto"), *(p.values for p in FORMS if p.values[0] in ("aten", "native"))]),
    dtype=st.sampled_from([F64, F32]),
)
def test_any_size_and_rank(lead, sizes, ranks, options, route, dtype):
    backend, form = route
    bias, adapter_bias, dropout = options
    if sum(ranks) == 0:
        ranks = (1, 0)
    case = Case(
        tuple(lead), *sizes, *ranks, bias=bias, adapter_bias=adapter_bias, dropout=dropout and form != "effective"
    )
    t, G = operands(case, dtype)
    wanted = trainable(t)
    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), wanted)
    ours = differentiate(lambda t: call(hk.hydra_linear, t, case, form=form, backend=backend), t, G, wanted)
    assert out_of_bounds(ours, t, G, true, dtype) == []


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_backward_twice_gives_the_same_bits(backend, form):
    case = everything(form)
    t, G = operands(case, F32)
    leaves = {name: v.requires_grad_(name in NAMES) for name, v in t.items()}
    h = call(hk.hydra_linear, leaves, case, form=form, backend=backend)
    inputs = [leaves[name] for name in NAMES]
    first = torch.autograd.grad(h, inputs, G, retain_graph=True)
    second = torch.autograd.grad(h, inputs, G)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.abs().sum() > 0 for a in first)


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_double_backward_is_refused(backend, form):
    t, _ = operands(PLAIN, finest(backend))
    x = t["x"].requires_grad_()
    h = call(hk.hydra_linear, t, PLAIN, form=form, backend=backend)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*backend='reference'"):
        torch.autograd.grad(h.square().sum(), x, create_graph=True)


def test_reference_backend_is_differentiable_twice():
    case = replace(PLAIN, lead=(3,), K=4, N=5, r_a=1, r_b=2)
    t, _ = operands(case, F64)
    assert torch.autograd.gradgradcheck(
        lambda x, A_up: call(hk.hydra_linear, {**t, "x": x, "A_up": A_up}, case, backend="reference"),
        [t["x"].requires_grad_(), t["A_up"].requires_grad_()],
    )


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, lead=(2, 3))], ids=str)
@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_output_may_be_changed_in_place(case, backend, form):
    """As after nn.Linear: neither y0 nor h may alias what the backward reads."""
    dtype = finest(backend)
    t, G = operands(case, dtype)

    def squared(function, t, **options):
        h = call(function, t, case, **options)
        h.mul_(h.detach().clone()).relu_()
        return h

    wanted = trainable(t)
    true_operands = {name: v.double() for name, v in t.items()}
    true = differentiate(lambda t: squared(hk.reference.hydra_linear, t), true_operands, G.double(), wanted)
    naive = differentiate(lambda t: squared(hk.reference.hydra_linear, t), t, G, wanted)
    got = differentiate(lambda t: squared(hk.hydra_linear, t, form=form, backend=backend), t, G, wanted)
    assert not violations(got, naive, true, dtype)


@pytest.mark.parametrize(("backend", "form"), WITH_DROPOUT)
def test_dropout_is_the_generators(backend, form):
    """The drawn mask drops p of the bottleneck and scales the rest by 1/(1-p), in dx as in h; seeds reproduce it."""
    dtype, K = finest(backend), 32
    N = R = K
    p, M = 0.3, 500
    x = torch.ones(M, K, dtype=dtype, requires_grad=True)
    A_down = torch.eye(R, K, dtype=dtype)
    B_down = torch.eye(R, N, dtype=dtype)
    # y0 is zero but for b0 = 1, so that Z is the mask itself and h adds up each branch's part in its own columns.
    weight, bias = torch.zeros(N, K, dtype=dtype), torch.ones(N, dtype=dtype)
    A_up, B_up = torch.eye(N, R, dtype=dtype), 10 * torch.eye(N, R, dtype=dtype)

    def run(seed, **options):
        torch.manual_seed(seed)
        return hk.hydra_linear(
            x, weight, bias, A_down, A_up, B_down, B_up, dropout_p=p, form=form, backend=backend, **options
        )

    h = run(1)
    levels = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=dtype) / (1 - p) + 1
    assert ((h[..., None] - levels).abs().min(-1).values < 100 * torch.finfo(dtype).eps).all()
    kept_a = ((h - 1) * (1 - p)).round() % 10 == 1
    share = kept_a.double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / kept_a.numel()) ** 0.5
    (dx,) = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(dx, kept_a.to(dtype) / (1 - p), rtol=1e-6, atol=1e-6)
    assert torch.equal(run(1), h)
    assert not torch.equal(run(2), h)
    assert torch.equal(run(3, training=False), torch.full_like(h, 12.0))


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_a_strided_gradient_that_blas_takes_is_not_copied(form, layout):
    t, G = operands(PLAIN, F64)
    wide = torch.cat([G, G], 1)[:, : G.shape[1]] if layout == "rows" else G.t().contiguous().t()
    t["x"].requires_grad_()
    h = call(hk.hydra_linear, t, PLAIN, form=form, backend="aten")
    with CopyCounter() as counter:
        h.backward(wide)
    assert counter.copies == 0


class CopyCounter(TorchDispatchMode):
    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.copies += func.overloadpacket.__name__ in ("clone", "contiguous", "copy_", "_to_copy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("backend", "form", "dtypes", "M"),
    # A sum stalls at 256 in bfloat16, at 2048 in float16.
    joined(
        [p for p in LOW if p.values[2][1] == F32],
        [1_000, 4_000],
        lambda i, backend, form, dtypes, M: (
            backend in INTERPRETED and (backend, dtypes[0], M) != ("triton", BF16, 1_000)
        ),
    ),
)
def test_sums_over_rows_are_fp32(backend, form, dtypes, M):
    """Of many rows a sum in the base dtype would lose most digits; each is exact here up to its own rounding."""
    base = dtypes[0]
    case = Case((M,), 4, 6, 2, 3, adapter_bias=True)
    # A backend may cast fp32 adapters or not: these are the same numbers in both dtypes.
    t = {name: v.to(base).to(v.dtype) for name, v in operands(case, base, F32)[0].items()}
    for name in ("A_up_bias", "B_up_bias", "A_down_bias", "B_down_bias"):
        t[name].requires_grad_()
    G = (1 + torch.arange(6) / 8).to(base).expand(M, 6)
    call(hk.hydra_linear, t, case, form=form, backend=backend).backward(G)
    expected = M * (1 + torch.arange(6, dtype=F64) / 8)
    for side in ("A", "B"):
        torch.testing.assert_close(t[f"{side}_up_bias"].grad.double(), expected, rtol=1e-6, atol=0)
        up = t[f"{side}_up"].to(base).double()
        dz = (G[:1].double() @ up).to(base).double()[0]
        torch.testing.assert_close(t[f"{side}_down_bias"].grad.double(), M * dz, rtol=torch.finfo(base).eps, atol=0)


@pytest.mark.parametrize("zeroed", NAMES)
def test_an_all_zeros_gradient_is_a_violation(zeroed):
    true, naive, ours = three_ways(EVERYTHING, "auto", "auto", (F32, F32))
    ours[zeroed] = torch.zeros_like(ours[zeroed])
    assert any(zeroed in line for line in violations(ours, naive, true, F32))


@pytest.mark.parametrize("scale", [0.95, 0.999])
@pytest.mark.parametrize("name", ["h", *NAMES])
def test_a_scaled_result_is_a_violation(name, scale):
    true, naive, ours = three_ways(EVERYTHING, "auto", "auto", (F32, F32))
    ours[name] = ours[name] * scale
    assert any(name in line for line in violations(ours, naive, true, F32))


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept", "effective"])
@pytest.mark.parametrize("backend", [name for name in TABLE if hk.backends()[name] is None])
def test_refused_combinations_raise_and_name_the_reason(backend, form, dtype):
    reason = TABLE[backend].refusal(form, dtype, 3, 5)
    t, _ = operands(PLAIN, dtype)
    if reason is not None:
        with pytest.raises(ValueError, match=f"backend: '{backend}' cannot serve this call: {re.escape(reason)}"):
            call(hk.hydra_linear, t, PLAIN, form=form, backend=backend)
    refused = {
        "aten": form == "effective" or (form == "composed" and dtype in (F16, BF16)),
        "native": dtype in (F16, BF16) and form == "effective",
        "hybrid": form == "kept" or dtype == F64,
        "triton": form != "composed" or dtype == F64,
    }
    assert (reason is not None) == refused[backend]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, replace(EVERYTHING, r_a=0), replace(EVERYTHING, r_b=0)], ids=str)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_the_naive_layers(dtype, case, backward_inside):
    """fp32 operands: the output in autocast's dtype, gradients in the parameters', both as good as the naive ones."""
    t, G = operands(case, F32)
    G = G.to(dtype).float()
    wanted = trainable(t)

    def under_autocast(function):
        def run(t):
            with torch.autocast("cpu", dtype):
                h = call(function, t, case)
            assert h.dtype == dtype
            return h.float()

        if not backward_inside:
            return differentiate(run, t, G, wanted)
        with torch.autocast("cpu", dtype):
            return differentiate(run, t, G, wanted)

    true = differentiate(
        lambda t: hydra(t, **case.constant_scales), {n: v.double() for n, v in t.items()}, G.double(), wanted
    )
    ours, naive = under_autocast(hk.hydra_linear), under_autocast(hk.reference.hydra_linear)
    assert {name: v.dtype for name, v in ours.items()} == {name: v.dtype for name, v in naive.items()}
    assert not violations(ours, naive, true, dtype)


def test_the_scale_of_an_absent_branch_gets_no_gradient():
    case = replace(PLAIN, r_b=0)
    t, G = operands(case, F64)
    scale_b = torch.tensor(2.0, dtype=F64, requires_grad=True)
    t["x"].requires_grad_()
    call(hk.hydra_linear, {**t, "scale_b": scale_b}, case).backward(G)
    assert scale_b.grad is None
    assert t["x"].grad.any()


def test_autocast_leaves_float64_alone():
    t, _ = operands(PLAIN, F64)
    with torch.autocast("cpu", BF16):
        assert call(hk.hydra_linear, t, PLAIN).dtype == F64
