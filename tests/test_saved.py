"""A backward computes what it is asked for, a forward saves what that reads, and FLOP counters see all of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hydra_kernels as hk
from hydra_kernels.backend import TABLE

from .cases import PLAIN, Case, operands
from .oracle import differentiate, hydra, violations
from .test_backends import BF16, EVERYTHING, F32, FORMS, call, finest, trainable


class ProductCounter(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.multiply_adds += left.shape[0] * left.shape[1] * right.shape[1]
        elif name in ("mv", "addmv", "bmm", "baddbmm", "addr", "addr_", "dot"):
            raise AssertionError(f"a product that is not counted: {name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["composed", "kept"])
def test_nothing_is_computed_for_what_needs_no_gradient(form):
    """Multiply-adds of the backward, counted: exactly the products that the wanted gradients need."""
    M, K, N, r_a, r_b = 64, 32, 48, 2, 3
    case = Case((M,), K, N, r_a, r_b, bias=False)
    composed = form == "composed"
    needed = {
        "A_up": M * N * r_a,
        "B_up": M * N * r_b,
        "A_down": M * N * r_a + M * K * r_a,
        "B_down": M * N * r_b + (M * K * r_b + r_b * K * N if composed else M * N * r_b),
        "x": M * N * (r_a + r_b)
        + M * N * K
        + M * K * (r_a + r_b if composed else r_a)
        + (0 if composed else M * N * r_b),
    }
    for name, expected in needed.items():
        t, G = operands(case, F32)
        t[name].requires_grad_()
        h = call(hk.hydra_linear, t, case, form=form, backend="aten")
        with ProductCounter() as counter:
            h.backward(G)
        assert counter.multiply_adds == expected, name


def saved_elements(case: Case, form: str, backend: str, wanted: set[str], autocast: bool = False, **options) -> int:
    """Elements kept for the backward, each storage once, the parameters' not counted."""
    t, _ = operands(case, F32)
    t = {name: v.requires_grad_(name in wanted) for name, v in t.items()}
    parameters = {v.data_ptr() for name, v in t.items() if name != "x"}
    saved: dict[int, int] = {}

    def pack(v):
        if v.data_ptr() not in parameters:
            saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes() // v.element_size()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v), torch.autocast("cpu", BF16, enabled=autocast):
        h = call(hk.hydra_linear, t, case, form=form, backend=backend, **options)
    total = sum(saved.values())
    del h
    return total


@pytest.mark.parametrize(("backend", "form"), FORMS)
@pytest.mark.parametrize("r_a", [2, 0])
def test_what_is_saved_is_what_the_wanted_gradients_read(backend, form, r_a):
    """Composed: x, Z and D (1 + R/K + R/M times x); kept: x where r_a > 0, Z and y0; effective: x, D, d."""
    M, K, N, r_b = 64, 32, 48, 3
    R = r_a + r_b
    case = Case((M,), K, N, r_a, r_b)
    downs = {"A_down", "B_down"} if r_a else {"B_down"}
    ups = {"A_up", "B_up"} if r_a else {"B_up"}
    if form == "composed":
        expected = {"all": M * K + M * R + R * K, "downs": M * K, "x": R * K}
    elif form == "kept":
        expected = {"all": (M * K if r_a else 0) + M * R + M * N, "downs": (M * K if r_a else 0) + M * N, "x": 0}
    else:
        expected = {"all": M * K + R * K + R, "downs": M * K, "x": R * K}
    assert saved_elements(case, form, backend, {"x"} | downs | ups) == expected["all"]
    assert saved_elements(case, form, backend, downs) == expected["downs"]
    of_ups = expected["all"] if form == "effective" else M * R
    assert saved_elements(case, form, backend, ups) == of_ups
    apart = form == "kept" and backend == "aten"  # elsewhere Z is one matrix
    assert saved_elements(case, form, backend, {"B_up"}) == (M * r_b if apart else of_ups)
    assert saved_elements(case, form, backend, {"x"}) == expected["x"]


def test_autocasts_copy_of_the_weight_is_kept_only_where_it_is_read():
    M, K, N = 64, 32, 48
    case = Case((M,), K, N, 2, 3)
    adapters = {"A_down", "A_up", "B_down", "B_up"}
    without_dx = M * K + M * 5 + M * N
    assert saved_elements(case, "auto", "auto", adapters, autocast=True) == without_dx
    assert saved_elements(case, "auto", "auto", adapters | {"x"}, autocast=True) == without_dx + N * K


@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_a_frozen_operand_that_no_gradient_reads_may_change_before_the_backward(backend, form):
    """As after nn.Linear, whose backward does not read its bias, nor its weight where x needs no gradient."""
    case = replace(PLAIN, r_b=0)
    dtype = finest(backend)
    t, G = operands(case, dtype)
    t["A_down"].requires_grad_()
    h = call(hk.hydra_linear, t, case, form=form, backend=backend)
    t["weight"].zero_()
    t["bias"].zero_()
    h.backward(G)
    torch.testing.assert_close(
        t["A_down"].grad, (G @ t["A_up"]).t() @ t["x"], rtol=64 * torch.finfo(dtype).eps, atol=1e-6
    )


@pytest.mark.parametrize("case", [EVERYTHING, replace(EVERYTHING, r_a=0), replace(EVERYTHING, r_b=0)], ids=str)
@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_each_gradient_may_be_asked_for_alone(backend, form, case):
    """torch.autograd.grad(h, [one]) of a layer whose operands all train; of leaves, and of what was computed."""
    if form == "effective":
        case = replace(case, dropout=False)
    dtype = finest(backend)
    t, G = operands(case, dtype)
    names = sorted(trainable(t))
    true = differentiate(lambda t: hydra(t), {n: v.double() for n, v in t.items()}, G.double(), set(names))
    naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, set(names))
    for computed in (False, True):
        leaves = {name: v.detach().requires_grad_(name in names) for name, v in t.items()}
        used = {name: v.clone() if computed and name in names else v for name, v in leaves.items()}
        h = call(hk.hydra_linear, used, case, form=form, backend=backend)
        for name in names:
            (got,) = torch.autograd.grad(h, [leaves[name]], G, retain_graph=True)
            assert not violations({name: got}, {name: naive[name]}, {name: true[name]}, dtype)


@pytest.mark.parametrize("backend", [b for b in ("aten", "triton", "hybrid") if hk.backends()[b] is None])
def test_a_backward_is_asked_for_no_more_than_autograd_wants(backend, monkeypatch):
    asked, true = [], TABLE[backend]

    class Recorder:
        def __getattr__(self, name):
            return getattr(true, name)

        def backward(self, G, op, saved, needs, form):
            asked.append(set(needs))
            return true.backward(G, op, saved, needs, form)

    monkeypatch.setitem(TABLE, backend, Recorder())
    t, G = operands(PLAIN, F32)
    names = sorted(trainable(t))
    t = {name: v.requires_grad_(name in names) for name, v in t.items()}
    h = call(hk.hydra_linear, t, PLAIN, backend=backend)
    for wanted in ({"A_up"}, {"x", "B_down"}, set(names)):
        torch.autograd.grad(h, [t[name] for name in sorted(wanted)], G, retain_graph=True)
        assert asked.pop() == wanted
    torch.autograd.backward(h, G, inputs=[t["B_up"]], retain_graph=True)
    assert asked.pop() == {"B_up"}
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    torch.autograd.grad(h, [t["A_up"]], G)
    assert asked.pop() == set(names)


@pytest.mark.skipif(hk.backends()["native"] is not None, reason="the compiled part is not built")
@pytest.mark.parametrize("form", ["composed", "kept", "effective"])
def test_native_multiplies_by_the_weight_for_dx_alone(form):
    """Its backward is asked by C++, so the library's products are counted."""
    case = Case((64,), 32, 48, 2, 3)
    t, G = operands(case, F32)
    t = {name: v.requires_grad_(name in trainable(t)) for name, v in t.items()}
    h = call(hk.hydra_linear, t, case, form=form, backend="native")

    def products(name: str) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            torch.autograd.grad(h, [t[name]], G, retain_graph=True)
        return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profiler.events())

    assert {name: products(name) for name in ("x", "A_down", "A_up", "B_up")} == {
        "x": 1,
        "A_down": 0,
        "A_up": 0,
        "B_up": 0,
    }


def multiply_adds(case: Case, form: str, backward: bool) -> int:
    """Of all products of a pass without biases, counted by hand (DESIGN's formulas), every gradient wanted."""
    M, K, N, r_a, r_b = case.M, case.K, case.N, case.r_a, case.r_b
    R = r_a + r_b
    if not backward:
        return (
            M * K * N
            + {
                "composed": r_b * N * K + M * R * K + M * R * N,  # C, Z, Z U^T
                "kept": M * r_a * K + M * r_b * N + M * R * N,  # Z_a, Z_b, Z U^T
                "effective": r_b * N * K + N * R * K,  # C, U D
            }[form]
        )
    return (
        M * N * K
        + 2 * M * R * N
        + {  # G W0, then dZ and dU
            "composed": 2 * M * R * K + r_b * K * N,  # dZ D, dD, T W0^T
            "kept": 2 * (M * r_a * K + M * r_b * N),
            "effective": N * R * K + 2 * M * R * K + r_b * K * N,  # W0 + U D, Z, dD, T W0^T
        }[form]
    )


@pytest.mark.parametrize(("r_a", "r_b"), [(2, 3), (4, 0), (0, 4)])
@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_flop_counters_see_every_product(backend, form, r_a, r_b, products_by_own):
    """Whatever multiplies with W0: of our own kernels, and of oneDNN's operator, torch has no formula."""
    if r_b == 0 and form == "kept":
        form = "composed"  # what a LoRA runs instead
    case = Case((16,), 48, 80, r_a, r_b, bias=False)
    t, G = operands(case, F32)
    t = {name: v.requires_grad_(name in trainable(t)) for name, v in t.items()}
    with FlopCounterMode(display=False) as forward:
        h = call(hk.hydra_linear, t, case, form=form, backend=backend)
    with FlopCounterMode(display=False) as backward:
        h.backward(G)
    for counter, expected in ((forward, multiply_adds(case, form, False)), (backward, multiply_adds(case, form, True))):
        assert counter.get_total_flops() == pytest.approx(2 * expected, rel=0.05)


@pytest.mark.parametrize(
    "backend", ["auto", *(b for b in TABLE if b in ("native", "aten") and hk.backends()[b] is None)]
)
def test_up_projections_that_train_alone_keep_the_bottleneck_alone(backend):
    """As LoRA-FA has it, at sizes where a LoRA whose down projection trains takes the effective form."""
    M, K, N, r = 512, 512, 64, 4
    case = Case((M,), K, N, r, 0)
    assert saved_elements(case, "auto", backend, {"A_up"}) == M * r
    assert saved_elements(case, "auto", backend, {"x", "A_up"}) <= M * r + r * K
    assert saved_elements(case, "auto", backend, {"A_up", "A_down"}) <= M * K + M * r


@pytest.mark.parametrize(("backend", "form"), [p for p in FORMS if p.values[1] != "effective"])
def test_a_mask_is_kept_only_where_it_is_read(backend, form):
    """dU = G^T Z reads Z, which is masked already; dZ = mask * (G U) reads the mask."""
    M, K, R = 64, 32, 5
    case = Case((M,), K, 48, 2, 3)
    ups = saved_elements(case, form, backend, {"A_up", "B_up"}, dropout_p=0.3)
    assert ups == M * R
    assert saved_elements(case, form, backend, {"A_up", "B_up", "A_down"}, dropout_p=0.3) == ups + M * R + M * K


@pytest.mark.parametrize(
    ("backend", "form"), [p for p in FORMS if p.values[0] != "native" and p.values[1] != "effective"]
)
def test_of_input_dropout_a_seed_is_kept_or_booleans_and_only_where_they_are_read(backend, form):
    """dx and dA_down read the mask, the others not. `aten` keeps it, a byte an element; the kernels make it again."""
    M, K = 64, 32
    case = Case((M,), K, 48, 2, 3)
    mask = M * K if backend == "aten" else 1
    for wanted, read in [({"A_up", "B_up"}, 0), ({"B_down"}, 0), ({"A_down"}, mask), ({"x"}, mask)]:
        plain = saved_elements(case, form, backend, wanted)
        assert saved_elements(case, form, backend, wanted, input_dropout_p=0.3) == plain + read, wanted
