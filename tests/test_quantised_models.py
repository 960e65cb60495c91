"""Adapters over quantised bases by every door: inject, PEFT's configurations, accelerate, transformers, processes."""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")  # an optional extra, with torchao
pytest.importorskip("torchao")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import hydra_kernels as hk  # noqa: E402
from hydra_kernels.peft import HydraConfig, accelerate, from_lora, report, undo  # noqa: E402

from .distributed import quantised as distributed  # noqa: E402
from .oracle import errors  # noqa: E402
from .quantised import KINDS, TARGETS, Net, randomised, weight_of  # noqa: E402
from .test_backends import slow_if  # noqa: E402
from .test_quantised import of_ours, same, saved_by, step  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
LOADED = {"8bit": "is_loaded_in_8bit", "int8": "nothing"}


def of_peft(kind, compute_dtype=None, **config):
    """PEFT's LoRA over quantised layers, of the classes that it has for them."""
    net = Net(kind, compute_dtype)
    setattr(net, LOADED.get(kind, "is_loaded_in_4bit"), True)
    config = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | config
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass")  # merging over torchao asks for it
        return randomised(peft.get_peft_model(net, peft.LoraConfig(**config)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("active", [1, 2])
def test_accelerate_equals_peft(kind, active):
    model, x = of_peft(kind), torch.randn(2, 20, 64, requires_grad=True)
    if active == 2:
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["one", "three"]))
        model.base_model.set_adapter(["default", "other"])
        randomised(model)
    expected = step(model, x)
    found = accelerate(model, strict=True, int8="dequantise")
    assert set(found.layers.values()) == {"accelerated"}
    names = {type(m).__name__ for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert names <= {"AcceleratedLinear4bit", "AcceleratedLinear8bitLt", "AcceleratedTorchaoLinear"}
    got = step(model, x)
    assert got.keys() == expected.keys()
    assert all(errors(got[name], value.double())[0] < 5e-6 for name, value in expected.items())
    if kind != "int8":  # torchao's layers cannot be pickled
        same(step(torch.load(_through_a_file(model), weights_only=False), x), got)
    with model.disable_adapter():
        assert torch.equal(model(x), undone(model)(x))
    undo(model)
    same(step(model, x), expected)


def _through_a_file(model):
    import io

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def undone(model):
    """A copy with PEFT's forward."""
    other = copy.deepcopy(model)
    undo(other)
    return other


def test_eight_bits_keep_pefts_forward_unless_told():
    model = of_peft("8bit")
    with pytest.warns(UserWarning, match="int8='dequantise'"):
        found = accelerate(model)
    assert found.accelerated == []
    with pytest.raises(ValueError, match="expected every LoRA layer to be accelerated"):
        accelerate(model, strict=True)
    assert len(accelerate(model, int8="dequantise").accelerated) == len(report(model).accelerated) == 3
    with pytest.raises(ValueError, match="int8: expected 'keep' or 'dequantise', got 'round'"):
        accelerate(model, int8="round")


@pytest.mark.parametrize("kind", ["nf4-twice", "8bit"])
def test_merging_of_peft_itself_still_works(kind):
    model, x = of_peft(kind), torch.randn(2, 20, 64)
    accelerate(model, int8="dequantise")
    theirs = undone(model)
    for m in (model, theirs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Merge lora module|Unmerge lora module")
            m.merge_adapter()
    assert torch.equal(model.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("kind", ["nf4-twice", "int8"])
@pytest.mark.parametrize("door", ["HydraConfig", "inject", "accelerate"])
def test_training_equals_pefts_step_by_step(kind, door):
    """Twenty steps of AdamW: losses as PEFT's QLoRA has them, with r_b = 0."""
    x, y = torch.randn(4, 12, 64), torch.randint(10, (4, 12))
    theirs = of_peft(kind)
    if door == "accelerate":
        ours = copy.deepcopy(theirs)
        accelerate(ours, strict=True)
    else:
        config = HydraConfig(r_a=3, r_b=0, scale_a=2.0, target_modules=TARGETS)
        ours = of_ours(kind, r_a=3, r_b=0, scale_a=2.0) if door == "inject" else peft.get_peft_model(Net(kind), config)
        adapters = [p for n, p in ours.named_parameters() if "A_" in n]
        for p, q in zip(adapters, [p for n, p in theirs.named_parameters() if "lora_" in n], strict=True):
            p.data.copy_(q.data)
    losses = []
    for model in (theirs, ours):
        trained = [p for n, p in model.named_parameters() if "lora_" in n or "A_" in n]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-5, atol=0)
    assert losses[0][-1] < losses[0][0] - 0.01


@pytest.mark.filterwarnings("ignore:bitsandbytes.*does not record its original dtype")
@pytest.mark.parametrize("kind", KINDS)
def test_merging(kind):
    """Merged layers are plain and dense, in the dtype that the base computes in; unmerged ones bit for bit the old."""
    model, x = of_ours(kind).eval(), torch.randn(2, 20, 64)
    base = weight_of(copy.deepcopy(model.two.base_layer))
    h = model(x)
    with pytest.warns(UserWarning, match="a merged layer also holds a dense weight in torch.float32"):
        hk.merge(model)
    torch.testing.assert_close(model(x), h)
    assert model.two.merged_weight.shape == (192, 128)
    hk.unmerge(model)
    assert torch.equal(model(x), h)
    tensors = dict(hk.merged_tensors(model))
    plain = hk.merge_and_unload(copy.deepcopy(model))
    assert tensors.keys() == plain.state_dict().keys()
    same(tensors, plain.state_dict())
    assert type(plain.two) is nn.Linear
    torch.testing.assert_close(plain(x), h)
    a, b = model.two, 1.0
    update = a.A_up @ a.A_down + a.B_up @ (a.B_down @ base) * b
    torch.testing.assert_close(plain.two.weight, base + update)


@pytest.mark.filterwarnings("ignore:bitsandbytes.*does not record its original dtype")
@pytest.mark.parametrize("kind", ["nf4-twice", "8bit", "int8"])
def test_pefts_verbs_over_hydra(kind, tmp_path):
    model, x = peft.get_peft_model(Net(kind), HydraConfig(r_a=2, r_b=3, target_modules=TARGETS)), torch.randn(2, 20, 64)
    randomised(model).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {F32}
    h = model(x)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(kind), tmp_path)
    assert torch.equal(again(x), h)
    with pytest.warns(UserWarning, match="a merged layer also holds a dense weight in torch.float32"):
        model.merge_adapter()
    torch.testing.assert_close(model(x), h)
    model.unmerge_adapter()
    assert torch.equal(model(x), h)
    assert model.base_model.model.one.merged_weight is None
    same(dict(hk.merged_tensors(model)), copy.deepcopy(model).merge_and_unload().state_dict())
    plain = model.unload()
    assert type(plain.one) is type(Net(kind).one)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but")
@pytest.mark.parametrize("kind", ["nf4-twice", "int8"])
def test_files_between_lora_and_hydra(kind, tmp_path):
    """A QLoRA checkpoint goes on as Hydra, and a Hydra is served as LoRA, over the same quantised base."""
    theirs, x = of_peft(kind).eval(), torch.randn(2, 20, 64, requires_grad=True)
    theirs.save_pretrained(tmp_path / "lora")
    ours = from_lora(Net(kind), str(tmp_path / "lora"), r_b=2)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "B_up" in name:
                p.normal_(0, 0.1)
    hk.convert.to_lora(
        ours, tmp_path / "served", bias="lora" if kind != "int8" else "refuse"
    ) if kind != "int8" else None
    if kind != "int8":  # PEFT stores no lora_bias over torchao
        served = peft.PeftModel.from_pretrained(Net(kind), tmp_path / "served").eval()
        torch.testing.assert_close(served(x), ours(x), rtol=1e-4, atol=1e-5)


def test_adapter_files(tmp_path):
    model, other, x = of_ours("nf4"), of_ours("nf4", seed=0), torch.randn(2, 20, 64)
    with torch.no_grad():
        for p in other.two.adapters().values():
            p.zero_()
    hk.save_adapters(model, tmp_path / "adapters.safetensors")
    hk.load_adapters(other, tmp_path / "adapters.safetensors")
    assert torch.equal(other(x), model(x))
    assert str(hk.check_adapters(model, x)) == "3 of 3 adapters train"
    state = model.state_dict()
    assert state["one.base_layer.weight"].dtype == torch.uint8
    assert other.load_state_dict(state, strict=False).missing_keys == []


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(kind, backend, marks=slow_if((kind, backend) not in (("nf4-twice", "auto"),)))
        for kind in ("nf4-twice", "8bit", "int8")
        for backend in ("auto", "aten", "native")
    ],
)
def test_compiled(kind, backend):
    """In one graph, with the same gradients, and no dense weight kept from the forward for the backward."""
    torch.compiler.reset()
    model, x = of_ours(kind, backend=backend), torch.randn(2, 20, 64)
    expected = step(model, x)
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    compiled.zero_grad = model.zero_grad
    got = step(compiled, x)
    for name, value in expected.items():
        name_of = name if name == "h" else f"_orig_mod.{name}"
        assert errors(got[name_of], value.double())[0] < 5e-6, name
    eager, traced = (sum(saved_by(lambda m=m: m(x))[1].values()) for m in (model, compiled))
    assert traced <= eager + 64 * 1024, "a dense weight is kept"


@pytest.mark.slow
def test_inductor():
    torch.compiler.reset()
    model, x = of_ours("nf4-twice"), torch.randn(2, 20, 64)
    expected = step(model, x)
    compiled = torch.compile(model, fullgraph=True)
    compiled.zero_grad = model.zero_grad
    got = step(compiled, x)
    assert all(errors(got[n if n == "h" else f"_orig_mod.{n}"], v.double())[0] < 5e-6 for n, v in expected.items())


def tiny_llama(tmp_path, dtype):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(tmp_path)


def quantisation(kind):
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    )


@pytest.mark.parametrize(
    ("kind", "door"),
    [
        pytest.param(kind, door, marks=slow_if(i != j))
        for i, kind in enumerate(("nf4", "8bit", "int8"))
        for j, door in enumerate(("accelerate", "HydraConfig", "inject"))
    ],
)
@pytest.mark.filterwarnings("ignore")  # of transformers and torchao at loading
def test_a_model_of_transformers_loaded_quantised(tmp_path, kind, door):
    tiny_llama(tmp_path, BF16)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation(kind), dtype=BF16
    )
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(96, (2, 12))
    if door == "inject":
        hk.inject(model, ["q_proj", "down_proj"], r_a=2, r_b=2)
    elif door == "HydraConfig":
        model = peft.get_peft_model(model, HydraConfig(r_a=2, r_b=2, target_modules="all-linear"))
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        assert len(accelerate(model, strict=True, int8="dequantise").accelerated) == 14
    randomised(model)
    model.train()
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    assert all(g is not None and g.isfinite().all() and g.any() for g in grads.values())
    if door == "accelerate":
        undo(model)
        model.zero_grad()
        theirs = model(input_ids=tokens, labels=tokens)
        assert abs(theirs.loss - out.loss) < 2e-2 * abs(theirs.loss)
    model.eval()
    made = model.generate(input_ids=tokens[:, :4], max_new_tokens=3, do_sample=False)
    assert made.shape == (2, 7)


@pytest.mark.parametrize("kind", ["nf4-twice", *(pytest.param(k, marks=pytest.mark.slow) for k in ("8bit", "int8"))])
def test_ddp_equals_one_process(groups, kind):
    alone = distributed.gradients(kind)
    for got in groups.run(2, distributed.with_ddp, kind):
        assert got.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(got[name], value)


def test_fsdp2_equals_one_process(groups):
    alone = distributed.gradients("nf4-in-bf16")
    for got in groups.run(2, distributed.with_fsdp2, "nf4-in-bf16"):
        assert got.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(got[name], value)


def test_fsdp2_computes_in_low_precision_beside_packed_numbers_in_it(groups):
    """`quant_storage` and the policy's ``param_dtype`` are one dtype. The batch's halves are rounded apart."""
    alone = distributed.alone_in("nf4-in-bf16", torch.bfloat16)
    for rank, (got, *few) in enumerate(groups.run(2, distributed.with_mixed_precision, "nf4-in-bf16", torch.bfloat16)):
        assert got.keys() == alone.keys()
        h = alone["h"].chunk(2)[rank]
        for name, value in (alone | {"h": h}).items():
            assert errors(got[name], value.double())[1] < 1e-2, name
        for rows in few:
            assert errors(rows, h[:, :2].double())[1] < 1e-2


def test_fsdp2_that_would_cast_packed_numbers_is_refused(groups):
    for found in groups.run(2, distributed.with_mixed_precision, "nf4-in-bf16", torch.float16):
        assert len(found) == 2
        for said in found:
            assert said.startswith("weight: a cast from torch.bfloat16 to torch.float16 has destroyed its packed")
            assert said.endswith("set the policy's param_dtype to the quant_storage")


def test_merging_and_exporting_under_fsdp2(groups, tmp_path):
    for whole, sharded in groups.run(2, distributed.exported_under_fsdp2, "nf4-in-bf16", tmp_path):
        same(sharded, whole)


def test_tensor_parallelism_is_refused(groups):
    assert groups.run(2, distributed.with_tensor_parallelism)[0].startswith(
        "ColwiseHydra: expected a layer without quantisation"
    )
