"""Tensor parallelism on many processes against one process and the float64 oracle."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.nn import functional as F

import hydra_kernels as hk
from hydra_kernels.reference import low_rank

from . import oracle
from .cases import ADAPTERS, Case, operands
from .distributed import tensor_parallel, training
from .distributed.tensor_parallel import Setting
from .distributed.training import Spec
from .test_distributed import check as check_training
from .test_distributed import seeds_for

pytestmark = pytest.mark.xdist_group("processes")
WORLDS = [2, 4]
# Four processes take twice the time of two. `make test` runs on four what two of them would not tell apart.
PAIRS_FIRST = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
PLAIN = Case((2, 4), 24, 16, 3, 5)


def naive_by_rows(u: oracle.Tensors, world: int) -> torch.Tensor:
    """Eq. 9-10 as torch's RowwiseParallel would have y0: a sum of products over parts of K, each rounded."""
    y0 = sum(F.linear(x, w) for x, w in zip(u["x"].chunk(world, -1), u["weight"].chunk(world, 1), strict=True))
    y0 = y0 + u["bias"]
    return y0 + low_rank(u["x"], u["A_down"], u["A_up"]) + low_rank(y0, u["B_down"], u["B_up"])


def expected(case: Case, setting: Setting, keys: set[str], world: int) -> tuple[oracle.Tensors, oracle.Tensors]:
    """What is true, and what the naive layer computes in one process."""
    t, G = operands(case, setting.dtype, setting.adapter_dtype, setting.seed)
    G = G.bfloat16() if setting.autocast else G
    torch.manual_seed(setting.seed)
    if setting.input_dropout:
        seed = torch.randint(2**63 - 1, ())
        t["input_mask"] = oracle.input_mask(int(seed), setting.input_dropout, case.M, case.K).to(setting.dtype)
    if setting.dropout:
        kept = torch.empty(case.M, case.r_a + case.r_b, dtype=torch.uint8).bernoulli_(1 - setting.dropout)
        t["mask"] = kept.to(setting.dtype) / (1 - setting.dropout)
    wanted = keys - {"h"}
    t64 = {name: v.double() for name, v in t.items()}
    true = oracle.differentiate(lambda u: oracle.hydra(u, **case.constant_scales), t64, G.double(), wanted)

    def naive(u):
        u = {**dict.fromkeys(("bias", *ADAPTERS)), "scale_a": 1.0, "scale_b": 1.0, "mask": None, **u}
        if setting.style == "rows" and setting.dtype == torch.bfloat16:
            return naive_by_rows(u, world)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting.autocast):
            return hk.reference.hydra_linear(**{**u, **case.constant_scales})

    return true, oracle.differentiate(naive, t, G, wanted)


def check(groups, world: int, case: Case, setting: Setting, seeds: int = 1) -> None:
    draws = []
    for seed in range(seeds):
        drawn = replace(setting, seed=seed)
        answers = groups.run(world, tensor_parallel.one_layer, case, drawn)
        true, naive = expected(case, drawn, set(answers[0]), world)
        for got in answers:
            assert all(torch.equal(got[name], answers[0][name]) for name in true)
        draws.append((answers[0], naive, true))
    assert oracle.median_violations(draws, torch.bfloat16 if setting.autocast else setting.dtype) == []


EVERY_OPTION = replace(PLAIN, adapter_bias=True, scales="learnable")
CASES = [
    PLAIN,
    replace(PLAIN, bias=False),
    replace(PLAIN, lead=(), adapter_bias=True),
    replace(PLAIN, lead=(32,), adapter_bias=True, scales=(0.7, -1.9)),
    replace(PLAIN, r_a=0, adapter_bias=True, scales="learnable"),
    replace(PLAIN, r_b=0, adapter_bias=True, scales="learnable"),
    replace(PLAIN, r_a=0, r_b=0),
    EVERY_OPTION,
    replace(PLAIN, bias=False, adapter_bias=True, scales="learnable"),
]


@pytest.mark.parametrize(
    ("world", "case"),
    [
        *((2, case) for case in CASES),
        *(pytest.param(4, case, marks=[] if case == EVERY_OPTION else pytest.mark.slow) for case in CASES),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("style", ["columns", "rows"])
def test_every_result_of_a_layer(groups, world, style, form, case):
    check(groups, world, case, Setting(style, form=form), seeds=3)


INTERPRETED = ("hybrid", "triton")
DTYPES = [
    *(Setting(style, torch.float32, form=form) for style in ("columns", "rows") for form in ("composed", "kept")),
    *(Setting(style, torch.bfloat16) for style in ("columns", "rows")),
    *(Setting(style, torch.bfloat16, torch.float32) for style in ("columns", "rows")),
    Setting("columns", torch.bfloat16, backend="reference"),
    Setting("columns", torch.float32, autocast=True),
    *(Setting(style, torch.bfloat16, backend="hybrid") for style in ("columns", "rows")),
    Setting("columns", torch.bfloat16, torch.float32, backend="triton"),
]
RARE = [
    *product((4,), DTYPES, ("cancelling", "huge")),
    *product((2,), [setting for setting in DTYPES if setting.backend in INTERPRETED], ("huge",)),
]


@pytest.mark.parametrize(
    ("world", "setting", "rounding"),
    [
        pytest.param(*drawn, marks=pytest.mark.slow if drawn in RARE else [])
        for drawn in product(WORLDS, DTYPES, ("cancelling", "huge"))
        if drawn[0] == 2 or drawn[1].backend not in INTERPRETED
    ],
    ids=str,
)
def test_every_dtype_is_as_exact_as_the_naive_layer(groups, world, rounding, setting):
    interpreted = setting.backend in INTERPRETED
    case = Case((20,) if interpreted else (64,), 48 if interpreted else 96, 40 if interpreted else 80, 4, 6)
    check(groups, world, replace(case, rounding=rounding), setting, seeds=5)


LAYOUTS = [
    Setting("columns", input_layout=Replicate(), output_layout=Shard(-1)),
    Setting("columns", input_layout=Shard(-1), output_layout=Shard(1)),
    Setting("columns", input_layout=Shard(1), output_layout=Shard(-1), local=False),
    Setting("rows", input_layout=Shard(-1), output_layout=Replicate()),
    Setting("rows", input_layout=Shard(1), output_layout=Shard(1)),
    Setting("rows", input_layout=Shard(-1), output_layout=Shard(1), local=False),
]
OTHERS = [
    *(Setting(style, form=form, train_bias=True) for style in ("columns", "rows") for form in ("composed", "kept")),
    *(Setting(style, form=form, dropout=0.4) for style in ("columns", "rows") for form in ("composed", "kept")),
    # 1/(1-p) is exact in every dtype.
    Setting("columns", form="composed", dropout=0.4, input_dropout=0.2, backend="aten"),
    Setting("columns", form="kept", input_dropout=0.2, backend="aten"),
    Setting("rows", form="composed", dropout=0.4, input_dropout=0.2, backend="aten"),
]


@PAIRS_FIRST
@pytest.mark.parametrize("setting", LAYOUTS + OTHERS, ids=str)
def test_every_layout_and_option(groups, world, setting):
    check(groups, world, replace(PLAIN, adapter_bias=True, scales=(0.7, -1.9)), setting, seeds=3)


@PAIRS_FIRST
@pytest.mark.parametrize(
    ("style", "backend", "dtype"),
    [
        ("columns", "triton", torch.bfloat16),
        ("rows", "triton", torch.float32),
        pytest.param("columns", "reference", torch.float64, marks=pytest.mark.slow),
        pytest.param("rows", "reference", torch.float64, marks=pytest.mark.slow),
    ],
)
def test_lora_with_input_dropout(groups, world, style, backend, dtype):
    """By rows each rank's columns of x begin within a counter: 4 does not divide K/n = 6."""
    setting = Setting(style, dtype, backend=backend, input_dropout=0.2)
    check(groups, world, replace(PLAIN, K=12 if world == 2 else 24, r_b=0), setting, seeds=2)


NETWORKS = [
    Spec(),
    Spec(options={"adapter_bias": True, "learnable_scale": True, "form": "composed"}),
    Spec("lora", {"r": 3}),
    Spec("seqlora", {"r": 3, "form": "composed"}),
    Spec(dtype=torch.float32, micro_batches=2),
    Spec(checkpointing=True),
    Spec(compiler="aot_eager", options={"form": "composed"}),
]


@pytest.mark.parametrize(
    ("world", "spec"),
    [
        *(pytest.param(2, spec, marks=[] if spec in NETWORKS[1::2] else pytest.mark.slow) for spec in NETWORKS),
        *(pytest.param(4, spec, marks=pytest.mark.slow) for spec in NETWORKS if not spec.compiler),
    ],
    ids=str,
)
def test_a_network_trains_as_one_process(groups, world, spec):
    check_training(groups, world, tensor_parallel.network, spec, seeds_for(spec))


TWO_DIMENSIONS = [
    pytest.param(Spec(options={"adapter_bias": True, "form": "composed"}, units="layer"), marks=pytest.mark.slow),
    Spec(options={"adapter_bias": True, "learnable_scale": True}, units="block"),
]


@pytest.mark.parametrize("spec", TWO_DIMENSIONS, ids=str)
def test_with_fsdp_on_a_mesh_of_two_dimensions(groups, spec):
    check_training(groups, 4, tensor_parallel.network_with_fsdp, spec, seeds_for(spec))


@pytest.mark.parametrize("world", WORLDS)
def test_only_products_of_rank_R_cross(groups, world):
    """Bytes of float64 a rank gives to the collectives of a step of an MLP, beyond what torch's styles give."""
    K, N, r_a, r_b = 24, 16, 3, 5
    columns = r_b * (K + 1) + (r_b * (K + 1) + r_a * K)
    rows = K * r_a + r_b * K + K * r_b
    for M in (8, 64):
        options = {"r_a": r_a, "r_b": r_b, "form": "composed"}
        for found in groups.run(world, tensor_parallel.traffic, M, K, N, options):
            assert found["plain"] == {"all_reduce": 8 * 2 * M * K}
            assert found["ours"] == {"all_reduce": found["plain"]["all_reduce"], "allreduce": 8 * (columns + rows)}
    kept = {"r_a": r_a, "r_b": r_b, "form": "kept", "dropout": 0.5}
    for found in groups.run(world, tensor_parallel.traffic, 8, K, N, kept):
        products, masks = 8 * (2 * 8 * r_b + r_a * K + rows), 2 * 8 * (r_a + r_b)
        assert found["ours"]["allreduce"] == products + masks
    seeded = {"r_a": r_a, "r_b": r_b, "form": "composed", "input_dropout": 0.5}
    for found in groups.run(world, tensor_parallel.traffic, 8, K, N, seeded):
        assert found["ours"]["allreduce"] == 8 * (columns + rows) + 2 * 8  # a seed of each layer


def test_a_spread_layer_is_merged_switched_off_and_saved(groups, folder):
    spec = Spec(options={"adapter_bias": True})
    net, (x, _) = training.build(spec), training.data(spec)
    hk.save_adapters(net, folder / "one", include=["head"])
    adapted = training.with_oracle(net)(x)
    for block in net.blocks:
        block.fc1.disable_adapters()
        block.fc2.disable_adapters()
    frozen = net(x)
    for found in groups.run(4, tensor_parallel.whole_life, spec, str(folder / "four")):
        torch.testing.assert_close(found["merged"], adapted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["unmerged"], adapted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["loaded"], adapted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["frozen"], frozen, rtol=1e-12, atol=1e-12)
        assert (found["other"] - adapted).abs().max() > 0.1
    assert (folder / "four").read_bytes() == (folder / "one").read_bytes()


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_a_layer_waits_for_what_a_style_of_torch_hands_on(groups, backend):
    for h, waited in groups.run(2, tensor_parallel.after_an_unfinished_collective, backend):
        assert torch.equal(h, waited)


def test_refusals_name_the_argument(groups):
    elsewhere = (
        "the layer's parameters are sharded over processes; call save_adapters on every rank, "
        "load_adapters in an unsharded model, and"
    )
    for said in groups.run(4, tensor_parallel.refusals):
        assert said == {
            "plain": "ColwiseHydra: expected an adapted layer, got Linear; use one of torch's own styles for it",
            "merged": "RowwiseHydra: the layer is merged; call unmerge() first",
            "twice": "ColwiseHydra: the layer is already sharded; apply the style once, and before fully_shard",
            "uneven columns": "ColwiseHydra: expected out_features to be a multiple of the 4 ranks, got 6",
            "uneven rows": "RowwiseHydra: expected in_features to be a multiple of the 4 ranks, got 6",
            "mesh": "RowwiseHydra: expected a mesh of one dimension, got 2; pass one of them, mesh['name']",
            "low precision": "backend: 'aten' cannot serve this call: its composed form would round B_down W0 to "
            "torch.bfloat16, which is less exact than the naive layer",
            "to_linear": f"to_linear: {elsewhere} to_linear there",
            "merge": f"merge: {elsewhere} merge there",
        }
