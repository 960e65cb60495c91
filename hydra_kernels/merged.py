"""merged_tensors: what `merge_and_unload` would leave of a model, one tensor at a time, also where it is sharded."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter import Adapter, Merging, joined, operands_of
from .layers import HydraLinear
from .model import plain_name, required_layers
from .reference import merged_parameters
from .refusals import refuse_meta
from .sharding import whole
from .weights import Packed, frozen_of, is_quantised

PREFIX = "base_model.model."  # PEFT's, before the names of the base model


class Source(NamedTuple):
    """What the merged weight and bias of a layer are made of, perhaps sharded."""

    weight: Tensor | Packed
    bias: Tensor | None
    adapters: list[dict[str, Any]]  # operands of each


def merged_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The keys and values of ``merge_and_unload().state_dict()``, one at a time, for rollouts and exports.

    Model stays as it is. Under FSDP2 and tensor parallelism the tensors are whole: every rank must iterate to the end,
    since each sharded tensor is gathered by all of them. Beside the shards at most one whole layer is in memory at a
    time.

    Args:
        model: with adapters of `inject`, of PEFT's Hydra or of PEFT's plain LoRA, accelerated or not. Of PEFT's, the
            active adapters are merged, and ``modules_to_save`` come under the names of the base model.

    Yields:
        Names without the prefixes of wrappers, with the values of ``state_dict``: parameters, persistent buffers.
        Values that no adapter changes are the model's own tensors, if these are whole. A weight that another module
        shares with an adapted layer comes as two, with a warning.

    Raises:
        ValueError: where model has no adapted layer; naming a layer that cannot be merged so (DoRA, an embedding,
            another method's); where a tensor is on the meta device.
    """
    names = _Names(model)
    state = model.state_dict(keep_vars=True)  # FSDP2 then puts back into shards what a forward left whole
    sources: dict[str, Source] = {}
    for full_name, module in model.named_modules(remove_duplicate=False):
        name = names.of(full_name)
        source = None if name is None else _source(name, module)
        if name is not None and source is not None:
            sources[name] = source
    if not sources:
        required_layers(model)
    refuse_meta("merged_tensors", {name: t for name, t in state.items() if isinstance(t, Tensor)})
    _warn_of_shared_weights(model, sources)
    return _tensors({name: t for key, t in state.items() if (name := names.of(key)) is not None}, sources)


def _tensors(state: dict[str, Any], sources: dict[str, Source]) -> Iterator[tuple[str, Any]]:
    begun = set()
    for name, value in state.items():
        owner = _owner(name, sources)
        if owner is None:
            yield name, whole(value)
        elif owner not in begun:
            begun.add(owner)
            yield from _merged(owner, sources[owner])


def _owner(name: str, layers: Mapping[str, object]) -> str | None:
    """The adapted layer that a key belongs to."""
    while name:
        name = name.rpartition(".")[0]
        if name in layers:
            return name
    return None


def _merged(name: str, source: Source) -> Iterator[tuple[str, Tensor]]:
    # Popped, so that nothing here holds a layer's tensors while the next one's are gathered.
    parts = list(zip(("weight", "bias"), _merge(source), strict=True))
    while parts:
        if parts[0][1] is None:
            del parts[0]
        else:
            yield _named(name, parts.pop(0))


def _named(layer: str, item: tuple[str, Any]) -> tuple[str, Any]:
    return f"{layer}.{item[0]}" if layer else item[0], item[1]


# Not in inference mode, even where the caller is: what comes out may be trained on.
@torch.inference_mode(False)
@torch.no_grad()
def _merge(source: Source) -> tuple[Tensor, Tensor | None]:
    weight, bias = whole(source.weight), whole(source.bias)
    adapters = [{key: whole(value) for key, value in operands.items()} for operands in source.adapters]
    if not adapters:
        return weight, bias
    return merged_parameters(weight, bias, **(adapters[0] if len(adapters) == 1 else joined(adapters)))


def _source(name: str, module: Any) -> Source | None:
    """What is merged of an adapted layer, None for any other module; ValueError for one that cannot be merged so."""
    if isinstance(module, HydraLinear):
        return Source(*module.frozen(), [operands_of(module)])
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
        return None
    if isinstance(module, Merging):  # PEFT's Hydra, which this module must not import
        return _of_hydra(name, module)
    lora: Any = peft.tuners.lora
    over_quantised = isinstance(module, lora.LoraLayer) and is_quantised(module.base_layer)
    if isinstance(module, lora.Linear) or over_quantised:
        return _of_lora(name, module, lora.Linear)
    raise ValueError(f"model: merged_tensors cannot merge {name!r}, a {type(module).__name__}; use merge_and_unload")


def _of_hydra(name: str, layer: Any) -> Source:
    base, merged = layer.base_layer, list(layer.merged_adapters)
    kept = layer.unmerged_weight
    weight, bias = frozen_of(base) if kept is None else (kept, layer.unmerged_bias)
    names = [*merged, *(n for n in layer.active_adapters if n not in merged)]
    adapters = [layer.hydra_adapters[n] for n in names if n in layer.hydra_adapters]
    return _checked(name, Source(weight, bias, [operands_of(a) for a in adapters]))


def _of_lora(name: str, layer: Any, plain: Any) -> Source:
    """The adapters that PEFT has merged are in the base layer's weight already, so only the others are listed."""
    names = [n for n in layer.active_adapters if n in layer.lora_A and n not in layer.merged_adapters]
    variants = [type(layer.lora_variant[n]).__name__ for n in names if n in layer.lora_variant]
    same = type(layer).get_delta_weight is plain.get_delta_weight and isinstance(layer.base_layer, nn.Linear)
    own = same or is_quantised(layer.base_layer)
    if variants or not own:
        what = variants[0] if variants else type(layer).__name__
        raise ValueError(f"model: merged_tensors cannot merge {name!r} ({what}); use merge_and_unload")
    adapters = []
    for n in names:
        down, up = layer.lora_A[n], layer.lora_B[n]
        operands = dict.fromkeys(Adapter.ADAPTERS) | {"A_down": down.weight, "A_up": up.weight, "A_up_bias": up.bias}
        adapters.append(operands | {"scale_a": layer.scaling[n], "scale_b": 1.0})
    return _checked(name, Source(*frozen_of(layer.base_layer), adapters))


def _checked(name: str, source: Source) -> Source:
    """Raises where PEFT's merging raises: adapters with biases over a base layer without one."""
    biases = [key for operands in source.adapters for key in Adapter.BIASES if operands[key] is not None]
    if source.bias is None and biases:
        raise ValueError(
            f"model: expected a bias in the base layer of {name!r}, to which the adapters' biases are added, got none"
        )
    return source


class _Names:
    """From a name in the model to the one after merge_and_unload; None for what is gone then."""

    def __init__(self, model: nn.Module) -> None:
        peft = sys.modules.get("peft")
        self.prefix = PREFIX if peft is not None and isinstance(model, peft.PeftModel) else ""
        self.saved: dict[str, str] = {}  # what wrappers of trained copies hold: which stays
        if peft is None:
            return
        for full_name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, peft.utils.ModulesToSaveWrapper):
                active = module.active_adapters
                chosen = f"modules_to_save.{active[0]}" if active else "original_module"
                self.saved[self._bare(full_name)] = chosen
            elif isinstance(module, peft.utils.AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"model: merged_tensors cannot merge {full_name!r}, a {type(module).__name__}; use merge_and_unload"
                )

    def of(self, name: str) -> str | None:
        name = self._bare(name)
        for wrapper, chosen in self.saved.items():
            inside = name.removeprefix(f"{wrapper}.")
            if inside != name:
                if not f"{inside}.".startswith(f"{chosen}."):
                    return None
                name = f"{wrapper}.{inside.removeprefix(chosen).removeprefix('.')}".removesuffix(".")
        return name

    def _bare(self, name: str) -> str:
        return plain_name(name).removeprefix(self.prefix)


def _warn_of_shared_weights(model: nn.Module, sources: Mapping[str, Source]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(plain_name(name))
    for name, source in sources.items():
        sharing = holders.get(id(source.weight), [])
        if source.adapters and len(sharing) > 1:
            warnings.warn(
                f"merged_tensors: the weight of {name!r} is shared by {' and '.join(sharing)}; it is returned twice, "
                "merged and unmerged: load both with tie_word_embeddings=False",
                stacklevel=3,
            )
