"""What adapters cannot serve is refused or said: layers read past their forward, wrapped, offloaded, bare experts."""

import types

import pytest
import torch
from torch import nn

import hydra_kernels as hk
from hydra_kernels.refusals import READS_WEIGHTS_IF, READS_WEIGHTS_OF

from .test_layers import trained


def class_of(path: str, **attributes) -> type[nn.Module]:
    """A stand-in for a class of another package, which need not be installed; a layer under each name that it reads."""
    module, _, name = path.rpartition(".")

    def init(self):
        nn.Module.__init__(self)
        for layer in (*READS_WEIGHTS_OF[path], "other"):
            setattr(self, layer, nn.Linear(4, 4))
        for key, value in attributes.items():
            setattr(self, key, value)

    return type(name, (nn.Module,), {"__module__": module, "__qualname__": name, "__init__": init})


def is_taken(model: nn.Module, layer: str) -> bool:
    said = ""
    try:
        hk.inject(nn.Sequential(model), [layer])
    except TypeError as error:
        said = str(error)
    taken = isinstance(getattr(model, layer), hk.HydraLinear)
    matches = f"'0.{layer}' matches, but {type(model).__name__}"
    assert taken or f"{matches} reads the layer's weight without calling the layer" in said
    return taken


def test_layers_that_other_packages_read_are_refused_by_the_path_of_the_class():
    paths = [path for path in READS_WEIGHTS_OF if path not in READS_WEIGHTS_IF]
    assert "torchvision.models.swin_transformer.ShiftedWindowAttention" in paths
    for path in paths:
        assert not any(is_taken(class_of(path)(), layer) for layer in READS_WEIGHTS_OF[path]), path
        assert is_taken(class_of(path)(), "other"), path
    swin = class_of("torchvision.models.swin_transformer.ShiftedWindowAttention")
    assert not is_taken(type("ShiftedWindowAttentionV2", (swin,), {})(), "qkv")
    assert is_taken(type("ShiftedWindowAttention", (nn.Module,), {"__init__": swin.__init__})(), "qkv")


@pytest.mark.parametrize("path", [path for path in READS_WEIGHTS_OF if path.startswith("timm.")])
def test_timms_qkv_is_refused_where_its_bias_is_added_in_one_product(path):
    bias = nn.Parameter(torch.zeros(4))
    for attributes, taken in (
        ({"q_bias": bias, "qkv_bias_separate": False}, False),
        ({"q_bias": bias, "qkv_bias_separate": True}, True),
        ({"q_bias": None, "qkv_bias_separate": False}, True),
        ({"q_bias": bias}, False),  # older versions
        ({"q_bias": None}, False),
    ):
        assert is_taken(class_of(path, **attributes)(), "qkv") == taken, attributes


@pytest.mark.parametrize(
    ("path", "attributes", "taken"),
    [
        ("BloomMLP", {"pretraining_tp": 1, "slow_but_exact": True}, True),
        ("BloomMLP", {"pretraining_tp": 2, "slow_but_exact": False}, True),
        ("BloomMLP", {"pretraining_tp": 2, "slow_but_exact": True}, False),
        ("Gemma3nTextAltUp", {"config": types.SimpleNamespace(altup_coef_clip=None)}, True),
        ("Gemma3nTextAltUp", {"config": types.SimpleNamespace(altup_coef_clip=120.0)}, False),
        ("Gemma4AssistantForCausalLM", {"config": types.SimpleNamespace(use_ordered_embeddings=False)}, True),
        ("Gemma4AssistantForCausalLM", {"config": types.SimpleNamespace(use_ordered_embeddings=True)}, False),
    ],
)
def test_layers_that_are_read_under_a_condition(path, attributes, taken):
    [layer] = READS_WEIGHTS_OF[path]
    assert is_taken(class_of(path, **attributes)(), layer) == taken


# --- wrapped ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))


def ddp():
    return nn.parallel.DistributedDataParallel(block())


def ddp_inside():
    model = block()
    model[1] = nn.parallel.DistributedDataParallel(model[1])
    return model


def fsdp1():
    fsdp = torch.distributed.fsdp
    strategy = fsdp.ShardingStrategy.NO_SHARD
    cpu = torch.device("cpu")
    return fsdp.FullyShardedDataParallel(block(), device_id=cpu, use_orig_params=True, sharding_strategy=strategy)


def fsdp2():
    model = block()
    torch.distributed.fsdp.fully_shard(model)
    return model


def deepspeed():
    return type("DeepSpeedEngine", (nn.Sequential,), {})(*block())


WRAPPED = {
    ddp: "it is already wrapped by DistributedDataParallel",
    ddp_inside: "its '1' is already wrapped by DistributedDataParallel",
    fsdp1: "it is already wrapped by FullyShardedDataParallel",
    fsdp2: "it is already wrapped by FSDPModule",
    deepspeed: "it is already wrapped by DeepSpeedEngine",
}


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning")
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_model_takes_no_adapters(wrap, group):
    model = wrap()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    with pytest.raises(ValueError, match=f"model: {WRAPPED[wrap]}.*inject first, then wrap"):
        hk.inject(model, ["0"])
    if peft := pytest.importorskip("peft"):
        from hydra_kernels.peft import HydraConfig

        with pytest.raises(ValueError, match=f"model: {WRAPPED[wrap]}.*inject first, then wrap"):
            peft.inject_adapter_in_model(HydraConfig(target_modules=["0"]), model)
    assert [m for m in model.modules() if isinstance(m, nn.Linear)] == linear


def test_a_part_of_a_sharded_model_takes_no_adapters(group):
    part = fsdp2()[1]
    with pytest.raises(
        ValueError, match=r"model: the weight of '0' is sharded over processes.*inject first, then wrap"
    ):
        hk.inject(part, ["0"])
    assert not isinstance(part[0], hk.HydraLinear)


def test_what_is_wrapped_is_checked_before(group):
    model = block()
    hk.inject(model, ["0"])
    assert hk.check_adapters(model, torch.randn(3, 4)).ok
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(ValueError, match=r"already wrapped by DistributedDataParallel; .*check the model before"):
        hk.check_adapters(wrapped, torch.randn(3, 4))
    part = nn.Sequential(block(), nn.Linear(4, 4))
    hk.inject(part, ["0.0"])
    torch.distributed.fsdp.fully_shard(part)
    with pytest.raises(ValueError, match="model: 0 is sharded over processes; check the model before"):
        hk.check_adapters(part[0], torch.randn(3, 4))


# --- without weights --------------------------------------------------------------------------------------------------


def offloaded(model):
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    for name in hk.inject(model, ["0", "2"]):
        trained(model.get_submodule(name))
    return model.eval()


@pytest.mark.parametrize(
    ("caller", "call"),
    [
        ("merge", hk.merge),
        ("merge_and_unload", hk.merge_and_unload),
        ("merge", lambda model: model[0].merge()),
        ("to_linear", lambda model: model[0].to_linear()),
    ],
    ids=["hk.merge", "hk.merge_and_unload", "merge", "to_linear"],
)
@pytest.mark.parametrize("lose", [offloaded, lambda model: model.to("meta")], ids=["offloaded", "meta"])
def test_what_holds_no_weights_is_not_merged(lose, caller, call):
    model = lose(adapted())
    printed = repr(model)
    with pytest.raises(ValueError, match=rf"{caller}: (0\.)?A_down is on the meta device.*accelerate offloads it"):
        call(model)
    assert repr(model) == printed


def test_one_layer_without_weights_keeps_the_others_from_being_merged():
    for call in (hk.merge, hk.merge_and_unload):
        model = adapted()
        model[2].to("meta")
        with pytest.raises(ValueError, match=r"2\.A_down is on the meta device"):
            call(model)
        assert type(model[0]) is hk.HydraLinear
        assert not model[0].merged


def test_adapters_without_numbers_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"save_adapters: 0\.A_down is on the meta device"):
        hk.save_adapters(offloaded(adapted()), tmp_path / "adapters.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Of a width of 4, as transformers 5 keeps them: a row of each parameter is one expert's."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(count, 8, 4))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(count, 8))
        self.down_proj = nn.Parameter(torch.zeros(count, 4, 4))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.position = nn.Parameter(torch.zeros(1, 3, 4))
        self.conv = nn.Conv1d(4, 4, 1)
        self.mlp = nn.ModuleDict({"experts": Experts(), "shared_expert": nn.ModuleDict({"up_proj": nn.Linear(4, 4)})})


EXPERTS = r"experts without an nn.Linear get no adapter: mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj"


@pytest.mark.parametrize(
    ("targets", "exclude", "said"),
    [
        (["q_proj"], (), None),
        (["q_proj", "shared_expert.up_proj"], (), None),
        (["q_proj", "up_proj"], (), f"^inject: {EXPERTS}$"),
        (["q_proj", "up_proj"], r"mlp\.experts.*", None),
        (r"(.*\.)?(q|up|down)_proj", (), f"^inject: {EXPERTS}$"),
        (r"q_proj|mlp\.experts\.\d+\.w1", (), f"^inject: {EXPERTS}$"),
        (r"q_proj|mlp\.experts\.down_proj", (), r"^inject: .* get no adapter: mlp\.experts\.down_proj$"),
        (r".*shared_expert\.up_proj", (), None),
    ],
)
def test_inject_says_which_experts_it_leaves_out(targets, exclude, said, recwarn):
    model = Moe()
    if exclude:
        model.mlp["experts"].gate = nn.Linear(4, 3)  # what an exclusion of all in there can match
    hk.inject(model, targets, exclude=exclude)
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == (said is not None)
    if said:
        with pytest.warns(UserWarning, match=said):
            hk.inject(Moe(), targets)


def test_a_name_that_only_experts_once_had_is_explained():
    with pytest.raises(ValueError, match=rf"\['w1', 'w3'\] matches no module; {EXPERTS}; near names: "):
        hk.inject(Moe(), ["q_proj", "w1", "w3"])


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "w1", "w2", "w3"], rf"{EXPERTS}; \['w1', 'w2', 'w3'\] matches no module"),
        ("all-linear", f"target_modules: {EXPERTS}$"),
        (r".*\.(up|gate)_proj", f"target_modules: {EXPERTS}$"),
        (["q_proj", "vproj"], r"target_modules: \['vproj'\] matches no module; near names: q_proj"),
    ],
)
def test_the_configuration_of_peft_says_what_it_leaves_out(targets, said):
    peft = pytest.importorskip("peft")
    from hydra_kernels.peft import HydraConfig

    with pytest.warns(RuntimeWarning, match=said):
        model = peft.inject_adapter_in_model(HydraConfig(target_modules=targets), Moe())
    assert hasattr(model.mlp["shared_expert"]["up_proj"], "hydra_adapters") == isinstance(targets, str)
    peft.inject_adapter_in_model(HydraConfig(target_modules=["q_proj"]), Moe())  # a warning would be an error here


def test_the_experts_of_transformers_are_named():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    with pytest.raises(ValueError, match=r"no adapter: model\.layers\.0\.mlp\.experts\.gate_up_proj, .* and 1 more; "):
        hk.inject(model, ["q_proj", "w1", "w2", "w3"])
    hk.inject(model, ["q_proj"])
    report = hk.check_adapters(model, input_ids=torch.arange(6)[None], labels=torch.arange(6)[None])
    assert (report.checked, report.ok) == (2, True)
