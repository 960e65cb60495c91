"""Input dropout beyond the matrix: the mask to the bit, its statistics, dx and dA_down, torch's generator."""

import copy
import math
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import hydra_kernels as hk
from hydra_kernels.backend import TABLE, philox
from hydra_kernels.backend.interface import Operands
from hydra_kernels.kernels import configs, gemm, one_pass, skinny
from hydra_kernels.kernels import philox as kernels
from hydra_kernels.kernels.philox import NONE, InputDropout

from .cases import INPUT_P, PLAIN, Case, operands
from .emulated import EmulatedGraph
from .oracle import differentiate, hydra, input_mask, violations
from .oracle import philox as words
from .test_backends import BF16, F32, F64, FORMS, call, compare, finest, joined, slow_if, trainable
from .test_layers import trained

# Low and high half of each count, and the sign bit.
SEEDS = [0, 3, 2**31, 2**32 + 5, 2**63 - 2, -1]
DROPPING = [p for p in FORMS if TABLE[p.values[0]].refusal(p.values[1], F32, 2, 3, True, drops_input=True) is None]
# hybrid has triton's kernels, but for dx.
RARELY_HYBRID = [pytest.param(*p.values, marks=slow_if(p.values[0] == "hybrid")) for p in DROPPING]


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def kept(seed: int, p: float, M: int, K: int) -> Tensor:
    return input_mask(seed, p, M, K) != 0


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_tests_own_philox_gives_the_answers_of_its_authors(key, counter, expected):
    """Of the file of known answers that comes with Random123."""
    assert " ".join(f"{word:08x}" for word in words(key, counter)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_plain_torch_makes_the_mask_to_the_bit(seed, monkeypatch):
    for M, K, p in [(5, 1, 0.5), (3, 2, 0.3), (4, 3, 0.9), (7, 13, 0.05), (2, 64, 0.5), (0, 5, 0.5), (3, 0, 0.5)]:
        assert torch.equal(philox.kept(seed_of(seed), p, M, K), kept(seed, p, M, K))
    whole = kept(seed, 0.4, 6, 23)
    for first, K in [(4, 8), (5, 6), (3, 20), (22, 1)]:  # a rank's columns
        assert torch.equal(philox.kept(seed_of(seed), 0.4, 6, K, first), whole[:, first : first + K])
    monkeypatch.setattr(philox, "_BLOCK", 12)  # two rows at a time
    assert torch.equal(philox.kept(seed_of(seed), 0.4, 6, 23), whole)


def test_the_mask_of_a_known_seed():
    """Written out: what a checkpoint of today needs to be resumed bit for bit."""
    expected = "11001101 00110011 10111001 10111110"
    assert " ".join("".join(str(int(b)) for b in row) for row in philox.kept(seed_of(7), 0.25, 4, 8)) == expected


def test_a_word_at_the_threshold_stays_and_the_one_below_goes():
    word = words((9, 0), (0, 0, 0, 0))[0]
    ps = {word / 2**32: True, (word + 0.7) / 2**32: False, (word + 1) / 2**32: False, 1 - 2**-40: False, 2**-40: True}
    for p, expected in ps.items():
        assert philox.kept(seed_of(9), p, 1, 1).item() == expected
    assert philox.threshold(1 - 2**-40) == 2**32  # no word reaches it


@pytest.mark.parametrize("seed", [3, pytest.param(2**32 + 5, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("M", "K"), [(5, 13), (35, 38)])
@pytest.mark.parametrize("given", ["seed", "booleans", "values"])
def test_each_kernel_has_the_mask_to_the_bit(given, M, K, seed):
    """Over x = 1, or dZ = D = 1, what a kernel writes is the mask, once for each kernel that reads x or writes dx."""
    p, scale, tiles = 0.2, 1.25, configs.INTERPRETER.small
    mask = kept(seed, p, M, K)
    seeds, masks = (seed_of(seed), None) if given == "seed" else (None, mask.view(torch.uint8))
    drop = InputDropout(1, seeds, masks, philox.threshold(p), scale)
    if given == "values":
        drop = InputDropout(1, None, mask * scale, 0, 1.0)
    expected, one = mask * torch.tensor(scale), torch.ones(M, K)
    found = {name: torch.full((M, K), math.nan) for name in ("down", "one_pass", "sum_rows", "gemm", "dropped_product")}
    eye, dZ, D = torch.eye(K), torch.ones(M, 2), torch.tensor([[1.0], [100.0]]).expand(2, K).contiguous()
    skinny.down(one, eye, None, None, None, 1.0, found["down"], tiles.down, "ieee", drop._replace(r_dropped=K)).run()
    of_h = torch.zeros(3, K), torch.empty(M, 3)
    one_pass.forward(
        *(one, of_h[0], None, eye, eye, None, None, 1.0, torch.zeros(3, K), found["one_pass"], of_h[1]),
        *(tiles.gemm, 1, "ieee", drop._replace(r_dropped=K)),
    ).run()
    rows = found["sum_rows"].view(1, M, K)
    skinny.sum_rows(one, torch.eye(M), rows, tiles.sum_rows, "ieee", drop=drop._replace(r_dropped=M)).run()
    zero = torch.zeros(M, 3), torch.zeros(3, K)
    gemm.dx(*zero, dZ, D, found["gemm"], tiles.gemm, 1, "ieee", drop).run()
    kernels.dropped_product(dZ, D, found["dropped_product"], tiles.down, "ieee", drop).run()
    for name, got in found.items():
        second = 100 if name in ("gemm", "dropped_product") else 0  # of the rank that has no dropout
        assert torch.equal(got, expected + second), name
    plain = torch.empty(M, K)
    skinny.down(one, eye, None, None, None, 1.0, plain, tiles.down, "ieee", NONE).run()
    assert torch.equal(plain, one)


@triton.jit
def write_kept(seed_ptr, out_ptr, threshold, m, k, BLOCK: tl.constexpr):
    rows = tl.arange(0, 4)
    inside = kernels.kept(seed_ptr, threshold, tl.full((4,), m, tl.int64) + rows, tl.full((), k, tl.int64), BLOCK)
    tl.store(out_ptr + rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], inside.to(tl.int8))


@pytest.mark.parametrize("m", [0, 2**31 - 2, 2**32 - 5])
@pytest.mark.parametrize("p", [0.3, 0.7, 1 - 2**-40])
def test_rows_and_columns_far_out_have_counters_of_their_own(m, p):
    k, out = 2**24, torch.empty(4, 16, dtype=torch.int8)
    write_kept[(1,)](seed_of(11), out, philox.threshold(p), m, k, BLOCK=16)
    expected = [
        [word >= round(p * 2**32) for c in range(4) for word in words((11, 0), (k // 4 + c, m + row, 0, 0))]
        for row in range(4)
    ]
    assert out.bool().tolist() == expected


M, K = 400, 320


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_statistics(p):
    """Mean and variance of all, and of each row and column; no row, column, layer or step knows of another."""
    torch.manual_seed(0)
    first, second = (philox.kept(philox.draw_seed(torch.device("cpu")), p, M, K).double() for _ in range(2))
    sigma = math.sqrt(p * (1 - p))
    assert abs(first.mean() - (1 - p)) < 4 * sigma / math.sqrt(M * K)
    assert abs(first.var() - sigma**2) < 4 * abs(1 - 2 * p) * sigma / math.sqrt(M * K) + 1e-5
    assert ((first.mean(0) - (1 - p)).abs() < 5 * sigma / math.sqrt(M)).all()
    assert ((first.mean(1) - (1 - p)).abs() < 5 * sigma / math.sqrt(K)).all()
    x, other = (first - (1 - p)) / sigma, (second - (1 - p)) / sigma
    pairs = {"another seed": (x, other)}
    pairs |= {f"{d} columns on": (x[:, d:], x[:, :-d]) for d in (1, 2, 3, 4, 5, 8)}  # four share a counter
    pairs |= {f"{d} rows on": (x[d:], x[:-d]) for d in (1, 2, 4, 32)}
    pairs |= {"diagonal": (x[1:, 4:], x[:-1, :-4]), "transposed": (x[:K], x[:K, :K].t())}
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 4.5 / math.sqrt(a.numel()), name
    counts = Counter(x.sign().flatten().tolist())
    assert len(counts) == 2


def step(t, G, form, backend, wanted, seed=5, p=0.4, case=PLAIN, **options):
    def function(t):
        torch.manual_seed(seed)
        return call(hk.hydra_linear, t, case, input_dropout_p=p, form=form, backend=backend, **options)

    return differentiate(function, t, G, wanted)


BOTH = Case((6,), 9, 7, 3, 2, adapter_bias=True)


@pytest.mark.parametrize("name", ["x", "A_down"])
@pytest.mark.parametrize(("backend", "form"), RARELY_HYBRID)
def test_dx_and_dA_down_are_of_the_mask_that_h_saw(backend, form, name):
    """h is affine in either: each entry of the gradient is known from outputs alone, whatever autograd says."""
    dtype = finest(backend)
    case = BOTH if dtype == F64 else Case((2,), 5, 4, 2, 1)
    t, G = operands(case, dtype)
    got = step(t, G, form, backend, {name}, case=case)
    frozen = step(t, G, form, backend, {name}, p=0.0, case=case)
    base, expected = got["h"], torch.zeros_like(t[name])
    for place in product(*map(range, t[name].shape)):
        moved = t[name].clone()
        moved[place] += 1
        expected[place] = ((step({**t, name: moved}, G, form, backend, set(), case=case)["h"] - base) * G).sum()
    tolerance = 1e-11 if dtype == F64 else 1e-5
    torch.testing.assert_close(got[name], expected, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(got[name], frozen[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("backend", "form"), RARELY_HYBRID)
def test_what_is_dropped_acts_on_the_parallel_branch_alone(backend, form):
    """x = 1 and projections that tell the branches apart: y0 and its branch are whole, A's part is 0 or 1/(1-p)."""
    dtype, (rows, width), p = finest(backend), (200, 8), 0.2
    eye = torch.eye(width, dtype=dtype)
    x = torch.ones(rows, width, dtype=dtype, requires_grad=True)
    torch.manual_seed(2)
    h = hk.hydra_linear(x, eye, None, eye, 10 * eye, eye, 100 * eye, input_dropout_p=p, form=form, backend=backend)
    part = (h.detach() - 101) / 10
    assert ((part * (1 - p)).round() / (1 - p) - part).abs().max() < 1e-4
    dropped = part.abs() < 0.5
    assert abs(dropped.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / dropped.numel())
    (dx,) = torch.autograd.grad(h.sum(), x)
    torch.testing.assert_close(dx, h.detach(), rtol=1e-5, atol=1e-4)  # each element alone, and x = 1


SUBSETS = [{"x", "B_down", "scale_a"}, {"A_down"}, {"x"}, {"x", "A_down"}, {"A_up", "B_up"}, {"B_down", "bias"}]


@pytest.mark.parametrize(
    ("backend", "form", "wanted"),
    joined(DROPPING, SUBSETS, lambda i, backend, form, wanted: backend == "hybrid" or (backend == "triton" and i > 1)),
)
def test_any_subset_of_gradients(wanted, backend, form):
    case = Case((6,), 13, 11, 3, 5, adapter_bias=True, scales="learnable", dropout=True, input_dropout="seed")
    compare(case, backend, form, wanted=wanted)


@pytest.mark.parametrize(("backend", "form"), [p for p in DROPPING if p.values[0] == "aten"])
@pytest.mark.parametrize("given", ["seed", "mask"])
def test_gradcheck(backend, form, given):
    case = Case((4,), 6, 5, 3, 2, adapter_bias=True, scales="learnable", dropout=True, input_dropout=given)
    t, _ = operands(case, F64)
    names = sorted(trainable(t))

    def function(*values):
        return call(hk.hydra_linear, {**t, **dict(zip(names, values, strict=True))}, case, form=form, backend=backend)

    assert torch.autograd.gradcheck(function, [t[name].requires_grad_() for name in names])


def test_no_backend_shifts_the_generator():
    """One seed a call, whoever serves it: what is drawn afterwards, and the mask, are the same."""
    t, G = operands(PLAIN, F32)
    routes = [("reference", "auto"), ("auto", "auto"), *(p.values for p in DROPPING)]
    found = []
    for backend, form in routes:
        got = step(t, G, form, backend, {"x", "A_down"})
        found.append((torch.rand(()).item(), got))
    torch.manual_seed(5)
    torch.randint(2**63 - 1, ())
    after = torch.rand(()).item()
    for (backend, form), (drawn, got) in zip(routes, found, strict=True):
        assert drawn == after, backend
        for name, value in found[0][1].items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=f"{backend} {form} {name}")


def test_nothing_is_drawn_where_nothing_is_dropped():
    t, _ = operands(PLAIN, F32)
    lora, seqlora = ({k: v for k, v in t.items() if k[:2] != f"{side}_"} for side in "BA")
    mask = torch.ones(7, 13)
    for operand, options in [(t, {"training": False}), (seqlora, {}), (t, {"input_mask": mask})]:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        h = call(hk.hydra_linear, operand, PLAIN, input_dropout_p=0.5, **options)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(h, call(hk.hydra_linear, operand, PLAIN))
    torch.manual_seed(1)
    assert not torch.equal(call(hk.hydra_linear, lora, PLAIN, input_dropout_p=0.5), call(hk.hydra_linear, lora, PLAIN))


def test_the_scale_is_not_rounded_to_the_bases_dtype():
    """1/(1-0.05) in bfloat16 is off by 2e-3: for the whole branch, in every step."""
    size, x = 256, (0.5 + torch.rand(64, 256)).bfloat16()
    down, up = torch.ones(1, size, dtype=BF16) / size, torch.ones(8, 1, dtype=BF16)
    weight = torch.zeros(8, size, dtype=BF16)
    p, kept_share = 0.05, []
    for backend in ("reference", "aten", "triton"):
        torch.manual_seed(0)
        seed = philox.draw_seed(torch.device("cpu"))
        share = (philox.kept(seed, p, 64, size) * x.double()).mean(1, keepdim=True)
        torch.manual_seed(0)
        h = hk.hydra_linear(x, weight, None, down, up, None, None, input_dropout_p=p, backend=backend).double()
        kept_share.append((h / (share / (1 - p)) - 1).mean().item())
    assert max(map(abs, kept_share)) < 1e-3


def test_the_references_own_dropout_is_torchs():
    t, _ = operands(PLAIN, F64)
    torch.manual_seed(3)
    got = call(hk.reference.hydra_linear, t, PLAIN, input_dropout_p=0.4)
    torch.manual_seed(3)
    mask = nn.functional.dropout(torch.ones(7, 13, dtype=F64), 0.4)
    torch.testing.assert_close(got, hydra({**t, "input_mask": mask}), rtol=1e-12, atol=1e-12)
    assert torch.equal(
        call(hk.reference.hydra_linear, t, PLAIN, input_dropout_p=0.4, training=False),
        call(hk.reference.hydra_linear, t, PLAIN),
    )


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_autocast_is_the_naive_layers(dtype):
    """fp32 operands under autocast, and a mask given in fp32."""
    case = Case((16,), 24, 20, 3, 4, dropout=True, input_dropout="mask")
    t, G = operands(case, F32)
    G = G.to(BF16).float()

    def run(function):
        def under(t):
            with torch.autocast("cpu", BF16, enabled=dtype == BF16):
                return call(function, t, case).float()

        return differentiate(under, t, G, trainable(t))

    true = differentiate(hydra, {name: v.double() for name, v in t.items()}, G.double(), trainable(t))
    assert not violations(run(hk.hydra_linear), run(hk.reference.hydra_linear), true, dtype)


def stack(backend: str = "auto", form: str = "auto", p: float = 0.5) -> nn.Sequential:
    """Three adapted layers; the first two of one shape."""
    options = {"r_a": 3, "r_b": 2, "input_dropout": p, "backend": backend, "form": form}
    sizes = ((12, 12), (12, 12), (12, 5))
    return nn.Sequential(*(trained(hk.HydraLinear(K, N, **options), seed=i) for i, (K, N) in enumerate(sizes)))


class Seeds(TorchDispatchMode):
    """The seeds that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "randint":
            self.seen.append(made.item())
        return made


def test_each_layer_and_each_step_draws_its_own_seed_and_eval_none():
    model, x = stack(), torch.randn(9, 12)
    with Seeds() as seeds:
        outputs = [model(x) for _ in range(2)]
    assert len(set(seeds.seen)) == 6
    assert not torch.equal(*outputs)
    with Seeds() as seeds:
        torch.manual_seed(8)
        again = [model(x), (torch.manual_seed(8), model(x))[1]]
    assert torch.equal(*again)
    assert seeds.seen[:3] == seeds.seen[3:]
    model.eval()
    with Seeds() as seeds:
        assert torch.equal(model(x), model(x))
    assert seeds.seen == []


@pytest.mark.parametrize(
    ("backend", "form", "use_reentrant"),
    [
        *(("aten", form, use_reentrant) for form in ("composed", "kept") for use_reentrant in (False, True)),
        *(pytest.param("triton", "auto", mode, marks=pytest.mark.slow) for mode in (False, True)),
    ],
)
def test_checkpointing_recomputes_with_the_same_mask(backend, form, use_reentrant):
    model, x = stack(backend, form), torch.randn(6, 12, requires_grad=True)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def gradients(function):
        torch.manual_seed(1)
        model.zero_grad()
        x.grad = None
        function(x).square().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    plain = gradients(model)
    recomputed = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(plain, recomputed, strict=True))


def test_training_that_is_resumed_takes_the_same_bits():
    """With torch's generator restored, as the Trainer does."""

    def train(model, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for i in steps:
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 108).reshape(9, 12) + i).square().mean().backward()
            optimizer.step()

    whole = stack()
    half, resumed = copy.deepcopy(whole), stack()
    torch.manual_seed(4)
    train(whole, range(4))
    torch.manual_seed(4)
    train(half, range(2))
    state, generator = half.state_dict(), torch.get_rng_state()
    torch.rand(100)
    resumed.load_state_dict(state)
    torch.set_rng_state(generator)
    train(resumed, range(2, 4))
    for name, p in whole.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_a_replayed_graph_draws_new_masks():
    """A seed is made on the device and read there: a CUDA graph that draws it anew drops anew. Emulated on a CPU."""
    layer, x = stack("aten", "composed")[0], torch.randn(9, 12)
    with torch.no_grad(), EmulatedGraph() as graph:
        h = layer(x)
    first = h.clone()
    graph.replay()
    second = h.clone()
    assert not torch.equal(first, second)
    torch.manual_seed(6)
    graph.replay()
    torch.manual_seed(6)
    assert torch.equal(h, layer(x))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_is_told_how_to_draw(randomness):
    t, _ = operands(PLAIN, F64)
    xs = t["x"].expand(3, 7, 13)

    def run(x):
        return call(hk.hydra_linear, {**t, "x": x}, PLAIN, input_dropout_p=0.5)

    h = torch.vmap(run, randomness=randomness)(xs)
    assert torch.allclose(h[0], h[1]) == (randomness == "same")  # a library may sum each batch in an order of its own
    assert not torch.allclose(h[0], call(hk.hydra_linear, t, PLAIN))


def test_branches_sum_up_to_the_output():
    layer, x = trained(hk.HydraLinear(12, 8, input_dropout=0.5)), torch.randn(2000, 12)
    torch.manual_seed(0)
    parts = layer.branches(x)
    dropped = (parts.parallel - layer.eval().branches(x).parallel).abs().mean()
    assert dropped > 0.1
    torch.testing.assert_close(layer(x), sum(layer.branches(x)))
    assert torch.equal(parts.sequential, layer.branches(x).sequential)


needs_native = pytest.mark.skipif(hk.backends()["native"] is not None, reason="the compiled part is not built")


def test_native_has_it_on_a_cpu_alone():
    refusal = TABLE["native"].refusal
    assert refusal("composed", BF16, 8, 8, True, torch.device("cpu"), drops_input=True) is None
    gpu = torch.device("cuda")
    assert refusal("composed", BF16, 8, 8, True, gpu) is None
    assert refusal("composed", BF16, 8, 8, True, gpu, True) == "on a GPU its kernels do not support input dropout"


@needs_native
def test_native_has_no_effective_form_of_it():
    """W0 + U D is the same for every row, the mask is not."""
    t, _ = operands(PLAIN, F32)
    why = "the effective form does not support dropout"
    for options in ({"input_dropout_p": INPUT_P}, {"input_mask": torch.ones(7, 13)}):
        with pytest.raises(ValueError, match=f"backend: 'native' cannot serve this call: {why}"):
            call(hk.hydra_linear, t, PLAIN, form="effective", backend="native", **options)
        with pytest.raises(ValueError, match=f"cannot serve this call: {why}"):
            call(hk.hydra_linear, t, PLAIN, form="effective", **options)


@needs_native
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("given", ["seed", "booleans", "values"])
def test_native_has_the_mask_to_the_bit(given, form, dtype):
    """Over W0 = 0 and A_down = A_up = 1, h and dx are the mask: of several blocks of rows, K that 4 does not divide."""
    for seed, (M, K), p in [(0, (5, 13), 0.5), (-1, (131, 38), 0.2), (2**32 + 5, (70, 259), 0.75)]:
        scale, mask = 1 / (1 - p), kept(seed, p, M, K)
        eye, zeros = torch.eye(K, dtype=dtype), torch.zeros(K, K, dtype=dtype)
        masks = {
            "seed": (None, seed_of(seed), p),
            "booleans": (mask, None, p),
            "values": ((mask * scale).to(dtype), None, 0.0),
        }
        input_mask, input_seed, input_p = masks[given]
        one = torch.zeros(1, K, dtype=dtype), torch.zeros(K, 1, dtype=dtype)
        branch_b = one if form == "kept" else (None, None)  # without one, kept is composed
        op = Operands(zeros, None, eye, eye, *branch_b, input_mask=input_mask, input_seed=input_seed, input_p=input_p)
        names = frozenset({"x", "A_down"})
        x, backend = torch.ones(M, K, dtype=dtype), TABLE["native"]
        h, op, saved = backend.forward(x, op, names, form)
        grads = backend.backward(torch.ones(M, K, dtype=dtype), op, saved, names, form)
        expected = (mask * torch.tensor(scale, dtype=torch.float32 if dtype == BF16 else dtype)).to(dtype)
        assert torch.equal(h, expected)
        assert torch.equal(grads["x"], expected)
        sums = mask.sum(0) * scale
        got = grads["A_down"].double()
        torch.testing.assert_close(got, sums.expand(K, K).double(), rtol=torch.finfo(dtype).eps, atol=0)


@needs_native
@pytest.mark.parametrize("threads", [1, 5, 16])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("form", ["composed", "kept"])
def test_native_drops_in_every_block_and_thread(form, dtype, threads):
    """Also where 16 threads share their sums, and each makes the mask of its columns."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = Case((66,), 1001, 990, 33, 1) if threads == 16 else Case((150,), 61, 53, 5, 3)
        for given in ("seed", "mask"):
            compare(replace(case, input_dropout=given), "native", form, (dtype, dtype))
    finally:
        torch.set_num_threads(before)
