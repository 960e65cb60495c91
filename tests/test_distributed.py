"""Training on many processes: DDP, FSDP2, distributed checkpoints, against one process and the float64 oracle."""

from dataclasses import replace

import pytest
import torch

import hydra_kernels as hk
from hydra_kernels.parallel import keep_scales_whole

from .distributed import checkpoints, training
from .distributed.training import Spec
from .oracle import median_violations

pytestmark = pytest.mark.xdist_group("processes")
EVERY_OPTION = {"adapter_bias": True, "learnable_scale": True}


def on_groups(specs: list[Spec], on_four: list[Spec]):
    """Every other spec on two processes, some on four; the rest is slow."""

    def params(world: int, chosen: list[Spec]) -> list:
        return [pytest.param(world, spec, marks=[] if spec in chosen else pytest.mark.slow) for spec in specs]

    on_two = [spec for i, spec in enumerate(specs) if i % 2 == 0 or "learnable_scale" in spec.options]
    return pytest.mark.parametrize(("world", "spec"), [*params(2, on_two), *params(4, on_four)], ids=str)


def check(groups, world: int, function, spec: Spec, seeds: int = 1) -> None:
    """Every rank's training against the oracle's on the whole batch, by the rule of tests/oracle.py.

    Over several seeds where the naive layer's error may be small by chance (`seeds_for`).
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
    """Below float64, and where a gradient is one number."""
    if spec.dtype == torch.bfloat16 or spec.mixed:
        return 5
    return 3 if spec.dtype == torch.float32 or "learnable_scale" in spec.options else 1


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


@on_groups(DDP, [Spec(options=EVERY_OPTION)])
def test_ddp_trains_as_one_process(groups, spec, world):
    check(groups, world, training.ddp, spec, seeds_for(spec))


FSDP = [
    *(Spec(units=units, reshard=reshard) for units in ("layer", "block", "") for reshard in (True, False)),
    Spec(options={"adapter_bias": True}, units="layer"),
    Spec(options=EVERY_OPTION, units="block", micro_batches=2),
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


@on_groups(FSDP, [Spec(options={"adapter_bias": True}, units="layer")])
def test_fsdp_trains_as_one_process(groups, spec, world):
    check(groups, world, training.fsdp, spec, seeds_for(spec))


@pytest.mark.slow
def test_fsdp_trains_a_model_of_peft_with_learnable_scales_as_one_process(groups):
    pytest.importorskip("peft")  # an optional extra
    spec = Spec(options=EVERY_OPTION)
    check(groups, 2, training.fsdp_of_peft, spec, seeds_for(spec))


@pytest.mark.parametrize(
    "left_out",
    [{1: (0,)}, {0: (1,), 1: (0,)}, {1: (0, 1)}, {0: (1,), 1: (1,)}],
    ids=["one layer on one rank", "another on each", "all on one rank", "one on every rank"],
)
def test_a_rank_may_leave_out_layers_whose_scales_are_kept_whole(groups, left_out):
    """Its gradient counts as zero there; nobody waits for it."""
    spec = Spec(options=EVERY_OPTION, micro_batches=2)
    net = training.with_oracle(training.build(spec))
    scales = {name: p for name, p in net.named_parameters() if name.endswith(("scale_a", "scale_b"))}
    true = {}
    for rank in range(2):
        for _ in range(spec.micro_batches):
            h = training.data(spec)[0].double().chunk(2)[rank]
            for i, block in enumerate(net.blocks):
                h = h if i in left_out.get(rank, ()) else block(h)
            loss = net.head(h).square().mean()
            used = [name for name in scales if int(name.split(".")[1]) not in left_out.get(rank, ())]
            if used:
                for name, grad in zip(used, torch.autograd.grad(loss, [scales[n] for n in used]), strict=True):
                    true[name] = true.get(name, 0) + grad / 2
    for got in groups.run(2, training.scales_with_a_layer_left_out, spec, left_out, within=30):
        assert got.keys() == true.keys()
        for name, value in true.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-14)


def test_without_adapters_there_are_no_scales_to_keep():
    with pytest.raises(ValueError, match="model: it has no adapters"):
        keep_scales_whole(torch.nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("function", "spec"),
    [
        pytest.param(training.ddp, Spec(options=EVERY_OPTION, compiler="aot_eager"), marks=pytest.mark.slow),
        pytest.param(training.fsdp, Spec(compiler="inductor", units="block"), marks=pytest.mark.slow),
        pytest.param(
            training.fsdp, Spec(options=EVERY_OPTION, compiler="aot_eager", units="block"), marks=pytest.mark.slow
        ),
    ],
    ids=["ddp", "fsdp", "fsdp with scales"],
)
def test_compiled_it_trains_as_one_process(groups, function, spec):
    check(groups, 2, function, spec)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads without a group
@pytest.mark.parametrize("units", [pytest.param("layer", marks=pytest.mark.slow), "", "tensor parallel"])
def test_a_checkpoint_of_two_processes_is_read_by_four_two_and_one(groups, folder, units):
    spec = Spec(options={"adapter_bias": True, "r_a": 3, "r_b": 3}, units=units)
    written = groups.run(2, checkpoints.train_and_write, spec, str(folder))[0]
    assert any(name.endswith("exp_avg_sq") for name in written)
    everyone = [
        *groups.run(4, checkpoints.read, spec, str(folder)),
        *groups.run(2, checkpoints.read, spec, str(folder)),
    ]
    for read in (*everyone, checkpoints.read_alone(spec, str(folder))):
        assert read.keys() == written.keys()
        for name, value in written.items():
            assert value.any(), name
            assert torch.equal(read[name], value), name


UNITS = [("layer", False), ("", True), ("two dimensions", False)]
SHARDED = [Spec(options={"adapter_bias": True}, units=units, checkpointing=again) for units, again in UNITS]


@pytest.mark.parametrize("spec", SHARDED, ids=str)
def test_an_adapter_file_of_a_sharded_model_is_that_of_an_unsharded_one(groups, folder, spec):
    hk.save_adapters(training.build(spec), folder / "one", include=["head"])
    groups.run(4, checkpoints.save_adapters, spec, str(folder / "four"))
    assert (folder / "four").read_bytes() == (folder / "one").read_bytes()
    saved = {name: p for name, p in training.build(spec).named_parameters() if p.requires_grad}
    readers = [r for world in (2, 4) for r in groups.run(world, checkpoints.load_adapters, spec, str(folder / "four"))]
    for loaded in readers:
        assert {training.plain(name) for name in loaded} == saved.keys()
        assert all(torch.equal(value, saved[training.plain(name)]) for name, value in loaded.items())


def test_a_sharded_layer_says_where_to_merge_instead(groups):
    for said in groups.run(2, checkpoints.refusals, Spec(units="block")):
        for name in ("merge", "to_linear"):
            assert said[name].startswith(
                f"{name}: the layer's parameters are sharded over processes; call save_adapters"
            )
        assert "unsharded model" in said["merge_and_unload"]
        assert said["branches"].startswith(
            "weight: expected a plain tensor, got a DTensor; under FSDP2 call the module"
        )


def test_fsdp1_is_refused(groups):
    for said in groups.run(2, checkpoints.under_fsdp1, Spec()):
        assert said.startswith("weight: it requires grad, but W0 is frozen")
        assert "it is computed from a parameter that trains, as in FSDP1: use FSDP2 (fully_shard)" in said
