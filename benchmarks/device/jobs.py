"""What the stages of a run on a GPU compile before their clocks start, by what decides each binary."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.device.compilation import Job, Rival, Step, planned
from benchmarks.measuring import models
from benchmarks.measuring.bases import QUANTISED_RANKS
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.shapes import (
    GOALS_RANKS,
    HEADLINE,
    OTHER_RANKS,
    OTHER_SHAPES,
    PAPERS_FC2,
    Shape,
    equal_rank,
    has_bias,
)  # fmt: skip
from hydra_kernels.backend import triton as steps
from hydra_kernels.kernels import configs
from tests.cases import Case

LLAMA = models.MODELS["llama"]
PAPERS = models.MODELS["vit-b/32"]


def jobs_of(steps_: Iterable[Step], early: bool = False) -> Mapping[str, Job]:
    """The kernels of the steps on this GPU; without one those of an H100 and an H200. None ``early`` before sm_90."""
    arch, capability = configs.SM90, 90
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch, capability = steps.tiles_of(torch.device("cuda", 0)), 10 * major + minor
    if early and not arch.can_start_early:
        return {}
    return planned(steps_, arch.with_early_launches() if early else arch, capability)


def table4_jobs() -> Mapping[str, Job]:
    M, K, N = PAPERS_FC2
    cases = [Case((M,), K, N, *ranks, adapter_bias=True) for ranks in PAPERS.ranks.values()]
    return jobs_of(Step(case, "bf16", fused=False) for case in cases)


def llama_jobs() -> Mapping[str, Job]:
    config, rows = LLAMA.gpu.config, LLAMA.gpu.batch * LLAMA.gpu.length
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    few = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    sizes = ((hidden, hidden), (hidden, few), (hidden, wide), (wide, hidden))
    pairs = (*LLAMA.ranks.values(), *QUANTISED_RANKS.values())
    cases = [Case((rows,), K, N, *ranks, bias=False) for K, N in sizes for ranks in pairs]
    return jobs_of(Step(case, "bf16", fused=False) for case in cases)


def headline_jobs() -> Mapping[str, Job]:
    """The compiled rivals take longest."""
    rivals = [
        Rival(f"compiled_{kind}", shape, ranks, has_bias(shape))
        for shape in HEADLINE
        for kind, ranks in equal_rank(GOALS_RANKS).items()
    ]
    return {repr(rival): rival for rival in rivals} | layer_jobs(HEADLINE, GOALS_RANKS)


def layer_jobs(shapes: Sequence[Shape], hydra: Ranks) -> Mapping[str, Job]:
    return jobs_of(
        Step(Case((M,), K, N, *ranks, bias=has_bias(Shape(M, K, N))), "bf16", fused=False)
        for (M, K, N), ranks in itertools.product(shapes, equal_rank(hydra).values())
    )


def other_jobs() -> Mapping[str, Job]:
    fused = (Step(Case((M,), K, N, *GOALS_RANKS, bias=has_bias(Shape(M, K, N))), "bf16", True) for M, K, N in HEADLINE)
    ranks = [layer_jobs(HEADLINE, pair) for pair in OTHER_RANKS]
    found: dict[str, Job] = {}
    for jobs in (*ranks, layer_jobs(OTHER_SHAPES, GOALS_RANKS), jobs_of(fused)):
        found |= jobs
    return found


def candidate_jobs() -> Mapping[str, Job]:
    """What `hybrid` launches where it reads x once, `triton` launches too."""
    ways = ((True, "composed"), (False, "composed"), (False, "effective"))
    cases = [
        Case((M,), K, N, *ranks, bias=has_bias(Shape(M, K, N)))
        for ranks, (M, K, N) in itertools.product((GOALS_RANKS, OTHER_RANKS[0]), HEADLINE)
    ]
    found = jobs_of(Step(case, "bf16", fused, form=form) for case, (fused, form) in itertools.product(cases, ways))
    return {**found, **jobs_of((Step(case, "bf16", False) for case in cases), early=True)}


def tune_jobs() -> Mapping[str, Job]:
    wanted = [(shape, GOALS_RANKS, "bf16") for shape in (*HEADLINE, *OTHER_SHAPES)]
    wanted += [(PAPERS_FC2, ranks, dtype) for dtype in ("bf16", "fp32") for ranks in PAPERS.ranks.values()]
    ways = ((True, "composed"), (False, "composed"), (False, "effective"))
    return jobs_of(
        Step(Case((M,), K, N, *ranks), dtype, fused, form=form)
        for ((M, K, N), ranks, dtype), (fused, form) in itertools.product(wanted, ways)
    )
