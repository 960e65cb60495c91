"""from_lora: a checkpoint of PEFT's LoRA as Hydra adapters, with the same outputs."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn

from .config import HydraConfig, matches
from .layer import HydraLinearLayer
from .translate import KEPT, LAYERS, TRANSLATED, WITHOUT_EFFECT, bias_of, refuse_others, scale_of

# lora_B acts on lora_A's output, with a bias where lora_bias was set.
NAMES = {".lora_A.weight": "A_down", ".lora_B.weight": "A_up", ".lora_B.bias": "A_up_bias"}
PREFIX = "base_model.model."
# Of init_lora_weights: the others (PiSSA, OLoRA, LoftQ, CorDA, ...) change the base weights.
SPARES_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


def from_lora(
    model: nn.Module,
    path: str,
    *,
    r_b: int = 0,
    adapter_name: str = "default",
    is_trainable: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """A model with the adapter of a PEFT LoRA checkpoint, as Hydra: the same outputs.

    ``lora_alpha / r``, or ``/ sqrt(r)`` with rsLoRA, becomes scale_a, layer by layer; ranks, trained biases and
    ``modules_to_save`` come along. ``save_pretrained`` then writes a Hydra checkpoint.

    Args:
        model: the base model that the LoRA was trained on; or one that has Hydra adapters, from PEFT or from
            transformers' ``add_adapter``: the new one joins them, and is inactive in a PeftModel until ``set_adapter``.
        path: the folder of the checkpoint, or its name on the Hub.
        r_b: rank of a new sequential branch, which changes no output before it is trained.
        adapter_name: of the new adapter.
        is_trainable: whether the adapter trains on; if not, the model is put into eval mode, as PEFT does.
        subfolder, revision, token: where in the folder or on the Hub, as in ``PeftModel.from_pretrained``.
        options: of `HydraConfig`, what the checkpoint does not fix: scale_b, input_dropout (LoRA's own), dropout, form,
            backend, init_std.

    Returns:
        The PeftModel, or the model itself if it has transformers' own adapters.

    Raises:
        ValueError: naming what the checkpoint has and Hydra does not have (DoRA, Conv1D, embeddings, an initialisation
            that changes the base, ...), or what does not fit the model, which is then unchanged.
        TypeError: naming a layer of the model that is no plain ``nn.Linear``. The model is then unchanged.
    """
    lora = PeftConfig.from_pretrained(path, subfolder=subfolder, revision=revision, token=token)
    weights = load_peft_weights(path, device="cpu", subfolder=subfolder, revision=revision, token=token)
    ranks = _ranks(path, lora, weights)
    if lora.lora_dropout and options.keys().isdisjoint(("dropout", "input_dropout")):
        warnings.warn(
            f"from_lora: the LoRA was trained with lora_dropout={lora.lora_dropout}, but this Hydra has none; pass "
            f"input_dropout={lora.lora_dropout} for the same dropout, or dropout for one on the bottleneck",
            stacklevel=2,
        )
    scales = {name: _scale(lora, name, r) for name, r in ranks.items()}
    scale_a, scale_b = _scale(lora, "", lora.r), options.get("scale_b", 1.0)
    config = HydraConfig(
        **{name: getattr(lora, name) for name in (*KEPT, *LAYERS)},
        r_a=lora.r,
        r_b=r_b,
        scale_a=scale_a,
        adapter_bias=lora.lora_bias,
        bias=bias_of(lora),
        inference_mode=not is_trainable,
        rank_pattern={_exactly(name): [r, r_b] for name, r in ranks.items() if r != lora.r},
        scale_pattern={_exactly(name): [scale, scale_b] for name, scale in scales.items() if scale != scale_a},
        **options,
    )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if adapter_name in getattr(base, "peft_config", {}):
        raise ValueError(f"adapter_name: expected a new name, got {adapter_name!r}, which the model already has")
    stored = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in weights}
    before = [(t, t.clone()) for name, t in base.state_dict().items() if name.replace(".base_layer.", ".") in stored]
    trained = [(p, p.requires_grad) for p in base.parameters()]
    children = [(module, name, child) for module in base.modules() for name, child in module._modules.items()]
    active: list[str] = next((m.active_adapters for m in base.modules() if isinstance(m, HydraLinearLayer)), [])
    try:
        adapted, prefix = _with_adapter(model, config, adapter_name)
    except Exception:
        getattr(base, "peft_config", {}).pop(adapter_name, None)
        raise
    try:
        modules = base.named_modules(remove_duplicate=False)
        layers = {name for name, m in modules if isinstance(m, HydraLinearLayer) and adapter_name in m.hydra_adapters}
        if layers != ranks.keys():
            raise ValueError(f"target_modules and the file name different layers: {sorted(layers ^ ranks.keys())[:5]}")
        found = _renamed(weights, prefix)
        unexpected = set_peft_model_state_dict(adapted, found, adapter_name=adapter_name).unexpected_keys  # type: ignore[attr-defined]
        if unexpected:
            raise ValueError(f"{', '.join(unexpected[:5])} is not in the model")
    except (ValueError, RuntimeError, KeyError) as error:
        for module in base.modules():
            if isinstance(module, HydraLinearLayer):
                module.set_adapter(active)
        adapted.delete_adapter(adapter_name)
        if not getattr(base, "peft_config", True):
            del base.peft_config
        for module, name, child in children:
            setattr(module, name, child)
        for t, old in before:
            t.copy_(old)
        for p, requires_grad in trained:
            p.requires_grad_(requires_grad)
        raise ValueError(f"path: the LoRA of {path} does not fit the model: {error}") from error
    return adapted if is_trainable else adapted.eval()


def _with_adapter(model: nn.Module, config: HydraConfig, name: str) -> tuple[Any, str]:
    """The model with a new adapter, and the prefix of its modules' names in a state_dict."""
    own: Any = model
    if isinstance(model, PeftModel):
        own.add_adapter(name, config)
    elif getattr(model, "_hf_peft_config_loaded", False):
        own.add_adapter(config, name)
        if config.inference_mode:  # add_adapter lets it train
            for layer in (m for m in own.modules() if isinstance(m, HydraLinearLayer)):
                layer.set_adapter(layer.active_adapters, inference_mode=True)
        return own, ""
    else:
        own = get_peft_model(own, config, adapter_name=name)
    return own, PREFIX


def _ranks(path: str, lora: PeftConfig, weights: dict[str, Tensor]) -> dict[str, int]:
    """The rank of each adapted layer by its dotted name; ValueError for what is no plain LoRA of linear layers."""
    if not isinstance(lora, LoraConfig):
        raise ValueError(f"path: expected a LoRA checkpoint, got one of {lora.peft_type} in {path}")
    if lora.init_lora_weights not in SPARES_THE_BASE:
        raise ValueError(
            f"path: expected LoRA that did not change the base, got init_lora_weights={lora.init_lora_weights!r} in "
            f"{path}; convert it with path_initial_model_for_weight_conversion of PEFT's save_pretrained"
        )
    if lora.fan_in_fan_out:
        raise ValueError(f"path: expected LoRA of nn.Linear, got fan_in_fan_out=True, LoRA of Conv1D, in {path}")
    known = {*KEPT, *LAYERS, *TRANSLATED, *WITHOUT_EFFECT, "init_lora_weights", "eva_config"}
    refuse_others(lora, known, "path")
    down = ".lora_A.weight"
    for key, tensor in weights.items():
        if "lora_" in key and (not key.endswith(tuple(NAMES)) or (key.endswith(down) and tensor.dim() != 2)):
            raise ValueError(f"path: expected only LoRA of linear layers, got {key} {list(tensor.shape)} in {path}")
    return {
        key.removesuffix(down).removeprefix(PREFIX): len(tensor)
        for key, tensor in weights.items()
        if key.endswith(down)
    }


def _scale(lora: LoraConfig, name: str, r: int) -> float:
    alphas = lora.alpha_pattern or {}
    alpha = next((alphas[key] for key in alphas if matches(key, name)), lora.lora_alpha)
    return scale_of(lora, alpha, r)


def _exactly(name: str) -> str:
    """The pattern of one layer: PEFT lets others match names that end in it."""
    return f"^{re.escape(name)}"


def _renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        key = prefix + key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in NAMES if key.endswith(suffix)), None)
        renamed[key if suffix is None else f"{key.removesuffix(suffix)}.hydra_adapters.{NAMES[suffix]}"] = tensor
    return renamed
