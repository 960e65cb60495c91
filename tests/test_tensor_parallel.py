"""Tensor parallelism on many processes against one process and the float64 oracle."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import hydra_kernels as hk
from hydra_kernels.reference import low_rank

from . import oracle
from .cases import ADAPTERS, Case, operands
from .distributed import tensor_parallel
from .distributed.tensor_parallel import Setting

WORLDS = [2, 4]
PLAIN = Case((2, 4), 24, 16, 3, 5)


def naive_by_rows(u: oracle.Tensors, world: int) -> torch.Tensor:
    """Eq. 9-10 as torch's RowwiseParallel would have y0: a sum of products over parts of K, each rounded."""
    y0 = sum(F.linear(x, w) for x, w in zip(u["x"].chunk(world, -1), u["weight"].chunk(world, 1), strict=True))
    y0 = y0 + u["bias"]
    return y0 + low_rank(u["x"], u["A_down"], u["A_up"]) + low_rank(y0, u["B_down"], u["B_up"])


def expected(case: Case, setting: Setting, keys: set[str], world: int) -> tuple[oracle.Tensors, oracle.Tensors]:
    """What is true, and what the naive layer computes in one process."""
    t, G = operands(case, setting.dtype, setting.adapter_dtype, setting.seed)
    if setting.dropout:
        torch.manual_seed(setting.seed)
        kept = torch.empty(case.M, case.r_a + case.r_b, dtype=torch.uint8).bernoulli_(1 - setting.dropout)
        t["mask"] = (kept / (1 - setting.dropout)).to(setting.dtype)
    wanted = keys - {"h"}
    t64 = {name: v.double() for name, v in t.items()}
    true = oracle.differentiate(lambda u: oracle.hydra(u, **case.constant_scales), t64, G.double(), wanted)

    def naive(u):
        u = {**dict.fromkeys(("bias", *ADAPTERS)), "scale_a": 1.0, "scale_b": 1.0, "mask": None, **u}
        if setting.style == "rows" and setting.dtype == torch.bfloat16:
            return naive_by_rows(u, world)
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
    assert oracle.median_violations(draws, setting.dtype) == []


CASES = [
    PLAIN,
    replace(PLAIN, bias=False),
    replace(PLAIN, lead=(), adapter_bias=True),
    replace(PLAIN, lead=(32,), adapter_bias=True, scales=(0.7, -1.9)),
    replace(PLAIN, r_a=0, adapter_bias=True, scales="learnable"),
    replace(PLAIN, r_b=0, adapter_bias=True, scales="learnable"),
    replace(PLAIN, adapter_bias=True, scales="learnable"),
    replace(PLAIN, bias=False, adapter_bias=True, scales="learnable"),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("form", ["composed", "kept"])
@pytest.mark.parametrize("style", ["columns", "rows"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_of_a_layer(groups, world, style, form, case):
    check(groups, world, case, Setting(style, form=form), seeds=3)


INTERPRETED = ("hybrid", "triton")
DTYPES = [
    *(Setting(style, torch.float32, form=form) for style in ("columns", "rows") for form in ("composed", "kept")),
    *(Setting(style, torch.bfloat16) for style in ("columns", "rows")),
    *(Setting(style, torch.bfloat16, torch.float32) for style in ("columns", "rows")),
    Setting("columns", torch.bfloat16, backend="reference"),
    *(Setting(style, torch.bfloat16, backend="hybrid") for style in ("columns", "rows")),
    Setting("columns", torch.bfloat16, torch.float32, backend="triton"),
]


@pytest.mark.parametrize("rounding", ["cancelling", "huge"])
@pytest.mark.parametrize("setting", DTYPES, ids=str)
def test_every_dtype_is_as_exact_as_the_naive_layer(groups, rounding, setting):
    interpreted = setting.backend in INTERPRETED
    case = Case((20,) if interpreted else (64,), 48 if interpreted else 96, 40 if interpreted else 80, 4, 6)
    case = replace(case, rounding=rounding)
    for world in WORLDS[:1] if interpreted else WORLDS:
        check(groups, world, case, setting, seeds=5)
