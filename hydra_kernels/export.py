"""to_lora: adapters as LoRA of rank r_a + r_b, in the files that PEFT loads. Users find it in `hydra_kernels.convert`.

With C = B_down W0 the sequential branch reads x, so both branches are one of LoRA's: down projection [A_down; C], up
projection [s_a A_up, s_b B_up], and a change of bias s_a (A_up a_d + a_u) + s_b (B_up (B_down b0 + b_d) + b_u).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .adapter import Adapter, Merging
from .checkpoint import targets_of, write_whole
from .layers import HydraLinear
from .model import names_containing, plain_name, required_layers
from .refusals import refuse_meta
from .sharding import is_writer, whole
from .weights import Packed, frozen_of

PREFIX = "base_model.model."  # PEFT's, before the names of the base model


class Adapted(NamedTuple):
    """One adapter of one layer, and the frozen layer that it belongs to."""

    adapter: Adapter
    weight: Tensor | Packed
    bias: Tensor | None


class Lora(NamedTuple):
    """What an adapter is as LoRA of scale 1: down [R, K], up [N, R], and its change of bias [N], or None."""

    down: Tensor
    up: Tensor
    bias: Tensor | None


def to_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    bias: str = "refuse",
    modules_to_save: Iterable[str] = (),
    base_model_name_or_path: str | None = None,
) -> list[Path]:
    """Writes the adapters of model as LoRA adapter folders, which PEFT and whatever serves PEFT's LoRA load.

    A Hydra of ranks r_a and r_b is a LoRA of rank r_a + r_b with the same outputs (dropout on the bottleneck apart).
    Use it with the weights that model has now: over others, such as the original of a quantised base, B_down W0 is
    another matrix. You can go on training from the folder, as a LoRA.

    Under FSDP2 or tensor parallelism every rank must call it; the first one writes.

    Args:
        model: with adapters of `inject`, or of PEFT's Hydra; merged or not.
        path: the folder, as in PEFT's ``save_pretrained``: an adapter with another name than "default" gets a folder of
            its own in it.
        bias: what to do if the bias changes, as a sequential branch over a bias and adapter biases change it: "refuse"
            raises, "lora" stores it as PEFT's ``lora_bias``, which not every server has.
        modules_to_save: names of other modules that were trained, such as ``["classifier"]``, as in PEFT. A model of
            PEFT's knows its own.
        base_model_name_or_path: of the base; None for what PEFT's configuration, or the model's, says.

    Returns:
        The folders, one for each adapter.

    Raises:
        ValueError: where model has no such adapters; where the bias changes; where something else trains; where a layer
            is used in two places, of which PEFT adapts one. Nothing is written then.
    """
    if bias not in ("refuse", "lora"):
        raise ValueError(f"bias: expected 'refuse' or 'lora', got {bias!r}")
    saved = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
    names = [_plain_name(model, name) for name, _ in model.named_modules()]
    model.state_dict(keep_vars=True)  # FSDP2 then puts back into shards what a forward left whole
    folders = {}
    for name, layers in _adapters(model).items():
        refuse_meta("to_lora", {f"{k}.{n}": p for k, one in layers.items() for n, p in one.adapter.named_parameters()})
        refuse_meta(
            "to_lora", {f"{k}.weight": one.weight for k, one in layers.items() if isinstance(one.weight, Tensor)}
        )
        others, config = _others(model, name, saved, layers.keys())
        tensors: dict[str, Tensor] = {}
        ranks, changes = {}, {}
        for key, one in layers.items():
            lora = _as_lora(one)
            ranks[key], changes[key] = len(lora.down), lora.bias
            tensors |= {f"{PREFIX}{key}.lora_A.weight": lora.down, f"{PREFIX}{key}.lora_B.weight": lora.up}
        changed = [key for key, change in changes.items() if change is not None and bool(change.any())]
        if changed and bias == "refuse":
            raise ValueError(
                f"bias: the adapter {name!r} changes the bias of {changed[0]!r}, which plain LoRA cannot store; pass "
                "bias='lora' to store it as PEFT's lora_bias, or use the model that merge_and_unload returns"
            )
        if changed:
            for key, change in changes.items():
                up = tensors[f"{PREFIX}{key}.lora_B.weight"]
                tensors[f"{PREFIX}{key}.lora_B.bias"] = up.new_zeros(len(up)) if change is None else change
        named = base_model_name_or_path or config.get("base_model_name_or_path") or _name_of(model)
        dropouts = {one.adapter.input_dropout for one in layers.values()}
        config["lora_dropout"] = dropouts.pop() if len(dropouts) == 1 else 0.0  # LoRA has one for all layers
        config |= {"base_model_name_or_path": named, "lora_bias": bool(changed), **_patterns(ranks, names)}
        folders[Path(path) if name == "default" else Path(path, name)] = (config, {**tensors, **others})
    if is_writer(model.parameters()):
        for folder, (config, tensors) in folders.items():
            _write(folder, config, tensors)
    return list(folders)


def _adapters(model: nn.Module) -> dict[str, dict[str, Adapted]]:
    """Every adapter's layers by dotted name in the base model; those of rank 0 are left out."""
    found: dict[str, dict[str, Adapted]] = {}
    places: dict[int, str] = {}
    for full_name, module in model.named_modules(remove_duplicate=False):
        layer: Any = module
        if isinstance(module, HydraLinear):
            own = {"default": Adapted(module, *module.frozen())}
        elif isinstance(module, Merging):  # PEFT's Hydra, which this module must not import
            base, kept = layer.base_layer, layer.unmerged_weight
            weight, b0 = frozen_of(base) if kept is None else (kept, layer.unmerged_bias)
            own = {name: Adapted(adapter, weight, b0) for name, adapter in layer.hydra_adapters.items()}
        else:
            continue
        name = _plain_name(model, full_name)
        if places.setdefault(id(module), name) != name:
            raise ValueError(
                f"model: {places[id(module)]!r} and {name!r} are the same layer, of which PEFT adapts only the first; "
                "use merge_and_unload"
            )
        for adapter, adapted in own.items():
            if adapted.adapter.r_a + adapted.adapter.r_b:
                found.setdefault(adapter, {})[name] = adapted
    if not found:
        required_layers(model)  # says what is missing
        raise ValueError("model: expected adapters of rank 1 or more, got only rank 0")
    return found


@torch.no_grad()
def _as_lora(one: Adapted) -> Lora:
    a = one.adapter
    parts: dict[str, Any] = {name: whole(getattr(a, name)) for name in Adapter.ADAPTERS}
    dtype = torch.promote_types(next(a.parameters()).dtype, torch.float32)
    parts = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in parts.items()}
    bias = None if one.bias is None else whole(one.bias).to(dtype)
    downs, ups, changes = [], [], []
    for side in "AB":
        down, up = parts[f"{side}_down"], parts[f"{side}_up"]
        if down is None:
            continue
        scaled = parts[f"scale_{side.lower()}"] * up
        offset = parts[f"{side}_down_bias"]
        if side == "B":
            offset = offset if bias is None else down @ bias if offset is None else down @ bias + offset
            down = down @ whole(one.weight).to(dtype)
        downs.append(down)
        ups.append(scaled)
        changes += [] if offset is None else [scaled @ offset]
        up_bias = parts[f"{side}_up_bias"]
        changes += [] if up_bias is None else [parts[f"scale_{side.lower()}"] * up_bias]
    change = sum(changes[1:], changes[0]) if changes else None
    down, up = torch.cat(downs), torch.cat(ups, 1)
    return Lora(_on_cpu(down), _on_cpu(up), None if change is None else _on_cpu(change))


def _others(
    model: nn.Module, adapter: str, saved: list[str], adapted: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What trained beside the adapter in these layers, under PEFT's names, and what the configuration says of it."""
    known = getattr(model, "peft_config", {}).get(adapter)
    if known is None:
        return _trained_beside(model, saved, adapted)
    from peft import get_peft_model_state_dict

    if saved:
        raise ValueError(f"modules_to_save: expected none, since PEFT's configuration has them, got {saved}")
    tensors, kind = {}, "lora_only" if known.bias == "hydra_only" else known.bias
    for key, t in get_peft_model_state_dict(model, adapter_name=adapter).items():
        name = key.removeprefix(PREFIX)
        layer = name.removesuffix(".base_layer.bias")
        if layer != name and layer not in adapted:  # of rank 0: as LoRA it is a plain layer
            name, kind = f"{layer}.bias", "all"
        if ".hydra_adapters." not in name:
            tensors[PREFIX + name] = _on_cpu(t)
    config = {name: getattr(known, name) for name in ("task_type", "base_model_name_or_path", "revision")}
    config["modules_to_save"] = None if known.modules_to_save is None else list(known.modules_to_save)
    return tensors, {**config, "bias": kind}


def _trained_beside(
    model: nn.Module, saved: list[str], adapted: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`_others` of a model without PEFT's configuration: the modules named, and biases where one of them trains."""
    state = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items()}
    layers = required_layers(model)
    chosen = names_containing(state, saved, "modules_to_save")
    own = {id(p) for layer in layers.values() for p in layer.adapters().values()}
    trained = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in own and plain_name(name) not in chosen
    ]
    others = [name for name in map(plain_name, trained) if name.rpartition(".")[2] != "bias"]
    if others:
        raise ValueError(
            f"modules_to_save: {others[0]!r} trains, but is not in an adapter; add its module, or freeze it"
        )
    biases = {f"{name}.bias" for name, layer in layers.items() if layer.bias is not None and name in adapted}
    kind = "none" if not trained else "lora_only" if biases.issuperset(map(plain_name, trained)) else "all"
    if kind == "all":
        chosen |= {name for name in state if name.rpartition(".")[2] == "bias"}
    chosen |= biases if kind != "none" else set()
    renamed = {name: f"{name.removesuffix('bias')}base_layer.bias" if name in biases else name for name in chosen}
    tensors = {PREFIX + renamed[name]: _on_cpu(state[name]) for name in sorted(chosen)}
    return tensors, {"modules_to_save": saved or None, "bias": kind}


def _on_cpu(t: Tensor) -> Tensor:
    return whole(t).to("cpu").contiguous()


def _patterns(ranks: dict[str, int], names: list[str]) -> dict[str, Any]:
    """Which layers have which rank, and an alpha that makes every scale 1."""
    counts = Counter(ranks.values())
    r = max(counts, key=lambda rank: (counts[rank], rank))  # the commonest, of several the largest
    # "^": PEFT would let a bare name match others that end in it.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    targets = targets_of(list(ranks), names)
    return {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": targets}


def _plain_name(model: nn.Module, name: str) -> str:
    """The dotted name of a module in the base model."""
    peft = sys.modules.get("peft")
    of_peft = peft is not None and isinstance(model, peft.PeftModel)
    return plain_name(name).removeprefix(PREFIX) if of_peft else plain_name(name)


def _name_of(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    plain = {
        "peft_type": "LORA",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    text = json.dumps(plain | config, indent=2, sort_keys=True)
    write_whole(folder / "adapter_config.json", text.encode())
