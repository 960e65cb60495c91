"""Training on many processes: DDP, FSDP2, distributed checkpoints, against one process and the float64 oracle."""

from dataclasses import replace

import pytest
import torch

from .distributed import training
from .distributed.group import Groups
from .distributed.training import Spec
from .oracle import median_violations

WORLDS = [2, 4]
EVERY_OPTION = {"adapter_bias": True, "learnable_scale": True}


@pytest.fixture(scope="session")
def groups():
    groups = Groups()
    yield groups
    groups.close()


def check(groups, world: int, function, spec: Spec, seeds: int = 1) -> None:
    """Every rank's training against the oracle's on the whole batch, by the rule of tests/oracle.py.

    Over five seeds in low precision, and where a gradient is one number: the naive layer's error may be small by chance.
    """
    dtype = torch.bfloat16 if spec.mixed else spec.dtype
    draws = []
    for seed in range(seeds):
        drawn = replace(spec, seed=seed)
        true, naive = training.alone(drawn, "oracle"), training.alone(drawn, "naive")
        assert all(value.any() for value in true.values())
        answers = groups.run(world, function, drawn)
        for got in answers:
            assert got.keys() == true.keys()
            assert all(torch.equal(got[name], answers[0][name]) for name in true)
        draws.append((answers[0], naive, true))
    assert median_violations(draws, dtype) == []


def seeds_for(spec: Spec) -> int:
    return 5 if spec.dtype == torch.bfloat16 or spec.mixed or "learnable_scale" in spec.options else 1


DDP = [
    Spec(),
    Spec(options={"backend": "aten"}),
    Spec(options=EVERY_OPTION),
    Spec(options={"r_a": 2, "r_b": 3, "scale_a": 0.7, "scale_b": -1.3, "form": "composed"}),
    Spec("lora", {"r": 3, "adapter_bias": True}),
    Spec("lora", {"r": 3, "learnable_scale": True, "backend": "aten"}),
    Spec("seqlora", {"r": 3, "adapter_bias": True}),
    Spec("seqlora", {"r": 3, "learnable_scale": True, "backend": "aten"}),
    Spec(dtype=torch.float32),
    Spec(dtype=torch.bfloat16, options={"adapter_dtype": torch.float32}, steps=1),
    Spec(micro_batches=2),
    Spec(static_graph=True, options=EVERY_OPTION),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("spec", DDP, ids=str)
def test_ddp_trains_as_one_process(groups, spec, world):
    check(groups, world, training.ddp, spec, seeds_for(spec))


FSDP = [
    *(Spec(units=units, reshard=reshard) for units in ("layer", "block", "") for reshard in (True, False)),
    Spec(options={"adapter_bias": True}, units="layer"),
    Spec(options={"backend": "aten"}, units="block"),
    Spec(options={"form": "composed"}, units="block"),
    Spec("lora", {"r": 3, "adapter_bias": True}, units="block"),
    Spec("seqlora", {"r": 3, "adapter_bias": True}, units="block"),
    Spec(dtype=torch.float32, units="block"),
    Spec(dtype=torch.bfloat16, options={"adapter_dtype": torch.float32}, units="layer", steps=1),
    Spec(micro_batches=2, units="block"),
    Spec(checkpointing=True, units="block"),
    Spec(mixed=True, dtype=torch.float32, units="block", steps=1),
    Spec(mixed=True, dtype=torch.float32, units="layer", options={"adapter_bias": True}, steps=1),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("spec", FSDP, ids=str)
def test_fsdp_trains_as_one_process(groups, spec, world):
    check(groups, world, training.fsdp, spec, seeds_for(spec))


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        (training.ddp, Spec(options=EVERY_OPTION, compiler="aot_eager")),
        (training.fsdp, Spec(compiler="inductor", units="block", dtype=torch.float32)),
    ],
    ids=["ddp", "fsdp"],
)
def test_compiled_it_trains_as_one_process(groups, function, spec):
    check(groups, 2, function, spec)
