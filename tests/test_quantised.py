"""Adapters over quantised bases: the one matrix, what is saved, and that W0 stays what it is."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("bitsandbytes")  # an optional extra, with torchao
pytest.importorskip("torchao")

import hydra_kernels as hk
from hydra_kernels import weights
from hydra_kernels.backend import TABLE
from hydra_kernels.layers import QuantisedBase

from .cases import INPUT_DROPOUT, LAYOUTS, OPTIONS, PLAIN, ROUNDING, SIZES, Case, operands
from .oracle import differentiate, errors, hydra, violations
from .quantised import KINDS, TARGETS, Net, bnb, quantised, randomised, weight_of
from .test_backends import INTERPRETED, call, slow_if, trainable

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LARGE = Case((64,), 96, 80, 8, 8)
ROUTES = [
    ("aten", "composed", F32),
    ("aten", "kept", F32),
    ("aten", "kept", BF16),
    ("native", "composed", F32),
    ("native", "kept", BF16),
    ("native", "effective", F32),
    ("native", "composed", BF16),
    ("triton", "composed", BF16),
    ("hybrid", "composed", F32),
]
# The packed tensors do not meet the options: each kind sees two sizes, the first all cases.
CASES = [PLAIN, LARGE, *(case for case in (*SIZES, *OPTIONS, *LAYOUTS, *INPUT_DROPOUT) if case not in (PLAIN, LARGE))]


def over(kind, t, compute_dtype=None):
    """A quantised layer made of t's weight, and t with the weight that the layer then has."""
    N, K = t["weight"].shape
    linear = nn.Linear(K, N, bias=False, dtype=F32 if kind != "int8" else t["weight"].dtype)
    linear.weight.data.copy_(t["weight"])
    layer = quantised(linear, kind, compute_dtype)
    return layer, {**t, "weight": weight_of(layer, t["weight"].dtype)}


def compare(case, kind, backend, form, dtype, adapter_dtype=None, t=None, G=None):
    if t is None:
        t, G = operands(case, dtype, adapter_dtype)
    layer, t = over(kind, t)
    packed = weights.packed(layer)
    wanted = trainable(t)
    double = {name: v.double() for name, v in t.items()}
    true = differentiate(lambda t: hydra(t, **case.constant_scales), double, G.double(), wanted)
    naive = differentiate(lambda t: call(hk.reference.hydra_linear, t, case), t, G, wanted)
    rest = {name: v for name, v in t.items() if name != "weight"}
    ours = differentiate(
        lambda t: call(hk.hydra_linear, {**t, "weight": packed}, case, form=form, backend=backend), rest, G, wanted
    )
    assert violations(ours, naive, true, dtype) == []


@pytest.mark.parametrize(
    ("kind", "backend", "form", "dtype", "case"),
    [
        pytest.param(
            kind, backend, form, dtype, case,
            id=f"{kind}-{backend}-{form}-{str(dtype)[6:]}-{case}",
            marks=slow_if(
                (i > 0 and kind != "nf4-twice") or (i > 1 and backend != "native") or (i > 9 and (j + i) % 3 > 0)
                or (backend in INTERPRETED and kind != "nf4-twice")
            ),
        )
        for kind in KINDS
        for j, (backend, form, dtype) in enumerate(ROUTES)
        for i, case in enumerate(CASES)
        if (i < 2 or kind == "nf4-twice") and not (kind == "nf4-in-bf16" and case.K * case.N % 4)
    ],
)  # fmt: skip
def test_output_and_every_gradient(kind, backend, form, dtype, case):
    masked = case.dropout or bool(case.input_dropout)
    reason = TABLE[backend].refusal(form, dtype, case.r_a, case.r_b, masked, drops_input=bool(case.input_dropout))
    if reason is None:
        compare(case, kind, backend, form, dtype)
    else:
        with pytest.raises(ValueError, match="cannot serve this call"):
            compare(case, kind, backend, form, dtype)


EVERYTHING = Case((9, 3), 64, 48, 3, 5, adapter_bias=True, scales="learnable")
NAMES = sorted(trainable(operands(EVERYTHING, F32)[0]))
READS_W0 = {"x", "B_down"}  # in the composed form


@pytest.mark.parametrize(("backend", "form"), [("aten", "composed"), ("native", "composed"), ("aten", "kept")])
@pytest.mark.parametrize("left", [*NAMES, ""])
@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_gradient_alone_and_all_but_one(backend, form, left, alone):
    """The gradients are those of the whole backward, and W0 is saved where one of them reads it."""
    wanted = {left} - {""} if alone else set(NAMES) - {left}
    t, G = operands(EVERYTHING, F32)
    layer, t = over("nf4-twice", t)
    packed = weights.packed(layer)
    rest = {name: v for name, v in t.items() if name != "weight"}

    def ours(t):
        return call(hk.hydra_linear, {**t, "weight": packed}, EVERYTHING, form=form, backend=backend)

    whole = differentiate(ours, rest, G, set(NAMES))
    kept: dict[int, int] = {}

    def watched(t):
        h, found = saved_by(lambda: ours(t))
        kept.update(found)
        return h

    got = differentiate(watched, rest, G, wanted)
    for name, value in got.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-5)
    reads = not wanted.isdisjoint(READS_W0 if form == "composed" else {"x"})
    assert (layer.weight.untyped_storage().data_ptr() in kept) == reads


@pytest.mark.parametrize("adapters", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", ["nf4-twice", "int8"])
@pytest.mark.parametrize("case", ROUNDING, ids=str)
@pytest.mark.parametrize(("backend", "form"), [("aten", "kept"), ("native", "composed"), ("native", "kept")])
def test_cancelling_bias_and_huge_channels(case, kind, backend, form, adapters):
    t, G = operands(case, BF16, adapters)
    _, dense = over(kind, t)
    # b0 cancels what this W0 makes of x's mean.
    t["bias"] = -(dense["weight"].double() @ t["x"].double().mean(0)).to(BF16)
    compare(case, kind, backend, form, BF16, adapters, t, G)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_the_dense_weight_is_the_librarys(kind, dtype):
    """Bit for bit, also where a blocksize does not divide K."""
    for K, N in ((128, 96), (100, 36), (68, 4)):
        layer = quantised(nn.Linear(K, N, bias=False), kind)
        ours, theirs = weights.packed(layer).ready().dense(dtype), weight_of(layer, dtype)
        assert ours.dtype == dtype
        if kind == "8bit":  # read out of a product
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=2e-3 if dtype == F16 else 1e-7)
        else:
            assert torch.equal(ours, theirs)


def saved_by(call):
    """The storages that a call keeps for its backward: address -> bytes."""
    kept, held = {}, []

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        h = call()
    return h, kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "form"), [("aten", "composed"), ("native", "composed"), ("auto", "auto")])
def test_what_is_saved_is_x_the_bottleneck_and_the_packed_weight(kind, backend, form):
    M, K, N, R = 96, 256, 192, 5
    layer = hk.HydraLinear.from_linear(quantised(nn.Linear(K, N), kind), r_a=2, r_b=3, form=form, backend=backend)
    x = torch.randn(M, K, requires_grad=True)
    _, kept = saved_by(lambda: layer(x))
    own = {t.untyped_storage().data_ptr() for t in weights.packed(layer.base_layer).ready().tensors}
    own |= {p.untyped_storage().data_ptr() for p in layer.adapters().values()}
    assert weights.packed(layer.base_layer).ready().tensors[0].untyped_storage().data_ptr() in kept  # not a copy
    beside = sum(size for address, size in kept.items() if address not in own)
    y0 = M * N if form == "auto" else 0  # the kept form's
    assert beside <= 4 * (M * K + y0 + M * R + 2 * R * (K + N)) + 64


def test_nothing_of_w0_is_saved_where_no_gradient_reads_it():
    layer = hk.LoRALinear.from_linear(quantised(nn.Linear(64, 48), "nf4-twice"), r=2)
    _, kept = saved_by(lambda: layer(torch.randn(20, 64)))
    assert layer.base_layer.weight.untyped_storage().data_ptr() not in kept


@pytest.mark.parametrize("kind", ["nf4-twice", "8bit", "int8"])
def test_one_dense_weight_at_a_time(kind):
    """Of four layers in a forward and backward; each dense weight is larger than all else together."""
    M, K = 8, 512
    layers = [hk.HydraLinear.from_linear(quantised(nn.Linear(K, K), kind), r_a=1, r_b=1) for _ in range(4)]
    model = randomised(nn.Sequential(*layers))
    x = torch.randn(M, K, requires_grad=True)
    model(x).sum().backward()
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x).sum().backward()
    memory = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    dense = 4 * K * K
    assert dense <= peak < 1.9 * dense, peak / dense


# --- W0 stays what it is ----------------------------------------------------------------------------------------------


def step(model, x):
    model.zero_grad()
    h = model(x)
    h.float().square().mean().backward()
    return {"h": h.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def of_ours(kind, compute_dtype=None, seed=0, **options):
    model = Net(kind, compute_dtype, seed)
    hk.inject(model, TARGETS, **{"r_a": 2, "r_b": 3, **options})
    hk.mark_only_adapters_trainable(model, keep=["head"])
    return randomised(model)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_before_and_after_generation(kind):
    """An eval forward of bitsandbytes on a CPU with AVX512-BF16 repacks its weight for good, which ours undoes."""
    model, x = of_ours(kind), torch.randn(2, 20, 64)
    before = step(model, x)
    model.eval()
    with torch.no_grad():
        few, many = model(x[:, :3]), model(x)
    assert errors(few, many[:, :3].double())[0] < 2e-2  # its kernel there computes in bfloat16
    same(step(model.train(), x), before)
    with torch.no_grad():
        torch.testing.assert_close(model(x), many)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x[:, :3]), few)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_between_a_forward_and_its_backward(kind):
    model, x = of_ours(kind), torch.randn(2, 20, 64)
    expected = step(model, x)
    model.zero_grad()
    h = model(x)
    model.eval()
    with torch.no_grad():
        model(x[:, :3])
    h.square().mean().backward()
    same({"h": h.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}, expected)


def test_a_base_layer_that_ran_in_eval_itself_trains():
    model, x = of_ours("nf4-twice"), torch.randn(2, 20, 64)
    before = step(model, x)
    base = model.one.base_layer.eval()
    with torch.no_grad():
        base(torch.randn(1, 64))
    after = step(model.train(), x)
    assert all(errors(after[name], value.double())[1] < 2e-2 for name, value in before.items())


def test_the_compute_dtype_is_xs_unless_it_is_set():
    layer = hk.HydraLinear.from_linear(quantised(nn.Linear(64, 48), "nf4"), r_a=2, r_b=2)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert layer.eval()(x.to(BF16)).dtype == BF16  # bitsandbytes would compute in bfloat16 from now on
        dense = weight_of(copy.deepcopy(layer.base_layer.train()))
    x = torch.randn(40, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, layer.bias))
    fixed = hk.HydraLinear.from_linear(quantised(nn.Linear(64, 48), "nf4", BF16), r_a=2, r_b=2)
    h = fixed(x)
    assert h.dtype == F32
    assert torch.equal(h, fixed(x.to(BF16)).float())


def test_a_trained_bias_keeps_its_dtype():
    """bitsandbytes' forward casts it in place."""
    layer = hk.HydraLinear.from_linear(quantised(nn.Linear(64, 48), "nf4", BF16), r_a=2, r_b=2)
    layer.bias.requires_grad_()
    before = layer.bias.detach().clone()
    with torch.no_grad():
        layer.eval()(torch.randn(3, 64))
        layer.disable_adapters()
        layer(torch.randn(3, 64))
    layer.enable_adapters()
    layer(torch.randn(40, 64)).sum().backward()
    assert torch.equal(layer.bias, before)
    assert layer.bias.dtype == layer.bias.grad.dtype == F32


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_checkpointing_accumulation_and_copies(kind):
    model, x = of_ours(kind), torch.randn(2, 20, 64, requires_grad=True)
    expected = step(model, x)
    same(step(lambda_of(model, lambda x: checkpoint(model, x, use_reentrant=False)), x), expected)
    same(step(copy.deepcopy(model), x), expected)
    if kind != "int8":  # torchao's layers cannot be pickled
        same(step(pickle.loads(pickle.dumps(model)), x), expected)
    model.zero_grad()
    for _ in range(2):
        model(x).square().mean().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * expected[name])
    with torch.autocast("cpu", BF16):
        low = step(model, x)
    assert all(errors(low[name], value.double())[1] < 3e-2 for name, value in expected.items())


def lambda_of(model, function):
    """model, called as function."""

    class Called:
        zero_grad, named_parameters = model.zero_grad, model.named_parameters
        __call__ = staticmethod(function)

    return Called()


def test_each_layer_reads_its_own_state():
    """Layers of one shape, run forwards and backwards in another order."""
    layers = [hk.LoRALinear.from_linear(quantised(nn.Linear(64, 64), "nf4-twice"), r=2) for _ in range(3)]
    xs = [torch.randn(30, 64, requires_grad=True) for _ in layers]
    hs = [layer(x) for layer, x in zip(layers, xs, strict=True)]
    for h in reversed(hs):
        h.sum().backward()
    for layer, x, h in zip(layers, xs, hs, strict=True):
        dense = weight_of(layer.base_layer)
        torch.testing.assert_close(h, nn.functional.linear(x, dense, layer.bias))
        torch.testing.assert_close(x.grad, dense.sum(0).expand_as(x))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(ValueError, match=r"Linear4bit is not quantised yet; move it to a device"):
        hk.HydraLinear.from_linear(bnb.nn.Linear4bit(8, 8))
    with pytest.raises(ValueError, match=r"Linear8bitLt is not quantised yet"):
        hk.HydraLinear.from_linear(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False))
    with pytest.raises(TypeError, match="with has_fp16_weights=False, a frozen weight, got True"):
        hk.HydraLinear.from_linear(bnb.nn.Linear8bitLt(8, 8))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Linear(64, 64)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TypeError, match="quantises the activations too"):
        hk.HydraLinear.from_linear(layer)

    class Other(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match=r"to add a format, see hydra_kernels/weights.py"):
        hk.HydraLinear.from_linear(Other(8, 8))

    class GPTQLinear(nn.Module):
        pass

    with pytest.raises(TypeError, match=r"expected an nn.Linear, got .*GPTQLinear; supported quantised layers: "):
        hk.HydraLinear.from_linear(GPTQLinear())

    class Own(hk.HydraLinear):
        pass

    with pytest.raises(TypeError, match="Own does not support a quantised layer, got Linear4bit"):
        Own.from_linear(quantised(nn.Linear(8, 8), "nf4"))
    layer = hk.HydraLinear.from_linear(quantised(nn.Linear(64, 48), "nf4"), r_a=1, r_b=1)
    with pytest.raises(ValueError, match=r"x: expected shape \[\*, 64\]"):
        layer(torch.randn(3, 65))
    with pytest.raises(TypeError, match="x: expected one of"):
        layer(torch.ones(3, 64, dtype=torch.int64))
    assert isinstance(layer, QuantisedBase)


@pytest.mark.parametrize(("share", "least", "most"), [(0.004, -0.03, 0.05), (0.02, -0.03, 0.1), (0.1, 0.7, 0.95)])
def test_rounding_to_four_bits_again_loses_an_update(share, least, most):
    """Why nothing is merged back into 4 bits: how much of U D is left, along U D."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 512, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    W0 = weight_of(quantised(linear, "nf4-twice"))
    update = torch.randn(512, 16) @ torch.randn(16, 512)
    update *= share * W0.std() / update.std()
    linear.weight.data.copy_(W0 + update)
    left = weight_of(quantised(linear, "nf4-twice")) - W0
    assert least < (left * update).sum() / update.square().sum() < most
