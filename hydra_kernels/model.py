"""Adapters in a whole model: put them in, say what trains, merge, take them out again."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from .adapter import Adapter
from .backend.interface import LOW_PRECISION
from .layers import HydraLinear, LoRALinear, SeqLoRALinear
from .refusals import (
    check_wrappable,
    experts_say,
    experts_without_layers,
    reads_past_forward,
    refuse_meta,
    refuse_wrapped,
)
from .sharding import is_sharded
from .weights import dtype_of, is_quantised, sizes

# Parts of a name that torch's wrappers inside a model add: activation checkpointing, torch.compile.
WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")
INJECT_FIRST = "the wrapper would not see the adapters' parameters: inject first, then wrap"
METHODS: dict[str, type[HydraLinear]] = {"hydra": HydraLinear, "lora": LoRALinear, "seqlora": SeqLoRALinear}


def inject(
    model: nn.Module,
    target_modules: str | Iterable[str],
    method: str = "hydra",
    exclude: str | Iterable[str] = (),
    **options: Any,
) -> list[str]:
    """Replaces linear layers of model by adapted ones, in place, and freezes those layers (nothing else).

    Args:
        model: any module; it is changed.
        target_modules: a regular expression that a module's whole dotted name matches, or an iterable of suffixes at a
            dot: ``["query", "output.dense"]``. Experts that are bare parameters have no layer to adapt: a warning names
            those that it matches.
        method: "hydra", "lora" or "seqlora".
        exclude: names to leave out although they match, written in the same two ways.
        options: of the layer: ``r_a`` and ``r_b`` for hydra, ``r`` for the others, ``dropout``, ... Over a bfloat16 or
            float16 base the adapters have its dtype, and a warning says so, unless ``adapter_dtype`` is given.

    Returns:
        The dotted names of what was replaced, in the model's order; a shared layer under each of its names.

    Raises:
        ValueError, TypeError: for an unknown method or option, for a name in target_modules or exclude that matches
            nothing (with near names), for a match that is no plain ``nn.Linear`` or whose weight the model reads
            without calling it, and for a model that DDP or FSDP has wrapped; the model is then unchanged.
    """
    refuse_wrapped(model, INJECT_FIRST)
    layer_class = layer_class_of(method)
    _check_ranks(method, options)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    excluded = exclude if isinstance(exclude, str) else list(exclude)
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    try:
        names = [n for n in modules if _matches(n, targets) and not _matches(n, excluded)]
    except re.error as error:
        raise ValueError(f"target_modules, exclude: {error.pattern!r} is not a regular expression: {error}") from error
    _check_matched("target_modules", targets, modules)
    _check_matched("exclude", excluded, modules)
    if not names:
        raise ValueError(f"target_modules: exclude={excluded!r} excludes every module that {targets!r} matches")
    check_targets("target_modules", model, names, layer_class, options)
    for name in names:
        if is_sharded(modules[name].weight):
            raise ValueError(f"model: the weight of {name!r} is sharded over processes; {INJECT_FIRST}")

    experts = _experts(modules, targets, excluded)
    if experts:
        warnings.warn(f"inject: {experts_say(experts)}", stacklevel=2)
    _warn_of_trained_embeddings(model, {name: modules[name].weight for name in names})
    _warn_of_low_precision([modules[name].weight for name in names if not is_quantised(modules[name])], options)
    adapted: dict[int, HydraLinear] = {}
    for name in names:
        linear = modules[name]
        if id(linear) not in adapted:
            adapted[id(linear)] = layer_class.from_linear(linear, **options)
        _replace(model, name, adapted[id(linear)])
    return names


def _check_ranks(method: str, options: Mapping[str, Any]) -> None:
    """Raises where the options are those of another method, or leave nothing to train."""
    others = {"r", "scale"} if method == "hydra" else {"r_a", "r_b", "scale_a", "scale_b"}
    wrong = sorted(options.keys() & others)
    if wrong and method == "hydra":
        raise TypeError(
            f"{wrong[0]}: hydra has two branches; pass r_a and r_b (scale_a and scale_b), or method='lora' or 'seqlora'"
        )
    if wrong:
        raise TypeError(f"{wrong[0]}: {method} has one branch; pass r (and scale), or method='hydra'")
    ranks = (options.get("r_a", 4), options.get("r_b", 4)) if method == "hydra" else (options.get("r", 8),)
    if not any(ranks):
        raise ValueError(f"{'r_a, r_b' if method == 'hydra' else 'r'}: expected 1 or more, got 0: nothing would train")


def _check_matched(argument: str, targets: str | Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for a target that matches no module."""
    if isinstance(targets, str):
        unmatched = [] if not targets or any(_matches(n, targets) for n in modules) else [targets]
    else:
        unmatched = [target for target in targets if not any(_matches(n, [target]) for n in modules)]
    if not unmatched and (targets or argument == "exclude"):
        return
    shown = targets if isinstance(targets, str) else unmatched
    hint = ""
    if isinstance(targets, str) and any(_matches(n, [targets]) for n in modules):
        hint = f"a string is a regular expression for the whole name, so pass [{targets!r}]; "
    experts = _experts(modules, targets if isinstance(targets, str) else unmatched, [])
    hint += f"{experts_say(experts)}; " if experts and argument == "target_modules" else ""
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    names = linear if linear and argument == "target_modules" else modules
    raise ValueError(f"{argument}: {shown!r} matches no module; {hint}{near_names(names, unmatched)}")


def _experts(
    modules: Mapping[str, nn.Module], targets: str | Sequence[str], excluded: str | Sequence[str]
) -> list[str]:
    """The experts without a layer that targets name."""
    return experts_without_layers(modules.items(), lambda n: _matches(n, targets) and not _matches(n, excluded))


def layer_class_of(method: str) -> type[HydraLinear]:
    """The layer of a method; ValueError for an unknown one."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]


def check_targets(
    argument: str, model: nn.Module, names: Sequence[str], layer_class: type[Adapter], options: Mapping[str, Any]
) -> None:
    """Raises, naming the argument, unless the modules of these names can be adapted so; changes nothing."""
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for name in names:
        try:
            check_wrappable(modules[name])
        except (TypeError, ValueError) as error:
            inside = [n for n, m in modules[name].named_modules() if n and isinstance(m, nn.Linear)]
            instead = f"; name the layers in it: {', '.join(inside[:5])}" if inside else ""
            raise type(error)(f"{argument}: {name!r} matches, but {error}{instead}") from None
        path, _, child = name.rpartition(".")
        parent = model.get_submodule(path)
        if reads_past_forward(parent, child):
            raise TypeError(
                f"{argument}: {name!r} matches, but {type(parent).__name__} reads the layer's weight without calling "
                "the layer, so adapters would have no effect; exclude it"
            )
    for dtype in {dtype_of(modules[name]) for name in names}:
        layer_class(1, 1, device="meta", dtype=dtype, **options)


def mark_only_adapters_trainable(model: nn.Module, bias: str = "none", keep: Iterable[str] = ()) -> None:
    """Lets the adapters train and freezes every other parameter of model.

    Args:
        model: with adapted layers in it.
        bias: which biases train too: "none", "adapted" (b0 of the adapted layers) or "all".
        keep: dotted names, or parts of them, of modules or parameters that train too, such as ``["classifier"]``.

    Raises:
        ValueError: for an unknown bias, a model without adapters, or a name in keep that nothing has.
    """
    if bias not in ("none", "adapted", "all"):
        raise ValueError(f"bias: expected one of none, adapted, all, got {bias!r}")
    layers = list(required_layers(model).values())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = names_containing(parameters, keep, "keep")

    trainable = {id(p) for layer in layers for p in layer.adapters().values()}
    if bias == "adapted":
        trainable |= {id(layer.bias) for layer in layers}
    frozen = {id(layer.weight) for layer in layers}
    for name, parameter in parameters.items():
        if name in kept and id(parameter) in frozen:
            raise ValueError(
                f"keep: {name!r} is the frozen weight of an adapted layer, which cannot train; leave it out"
            )
        if name in kept or (bias == "all" and name.rsplit(".", 1)[-1] == "bias"):
            trainable.add(id(parameter))
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trainable)


def merge(model: nn.Module) -> None:
    """Merges every adapted layer of model (`HydraLinear.merge`).

    Raises:
        ValueError: where there is none, one is in training mode, or one holds no weights, because accelerate offloads
            it. The model is then unchanged.
    """
    layers = required_layers(model)
    refuse_meta("merge", _parameters_of(layers))
    for name, layer in layers.items():
        if layer.training:
            raise ValueError(f"merge: {name or 'the model'} is in training mode; call model.eval() first")
    for layer in layers.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Undoes `merge` in every adapted layer of model, bit for bit; ValueError where there is none."""
    for layer in required_layers(model).values():
        layer.unmerge()


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Puts a plain ``nn.Linear`` with the merged weight in place of every adapted layer, a shared one in every place.

    Layers are replaced one by one, each old weight freed before the next layer is merged. Hooks on the adapted layers
    are lost. Returns the model, which is changed, or the new ``nn.Linear`` if the model itself is an adapted layer.

    Raises:
        ValueError: where there is none, or one holds no weights, because accelerate offloads it. The model is then
            unchanged.
    """
    refuse_meta("merge_and_unload", _parameters_of(required_layers(model)))
    places: dict[int, list[str]] = {}
    for name in [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, HydraLinear)]:
        places.setdefault(id(model.get_submodule(name)), []).append(name)
    if isinstance(model, HydraLinear):
        return model.to_linear()
    for names in places.values():
        # Nothing else may refer to the layer: its weight goes when the last place is replaced.
        plain = cast(HydraLinear, model.get_submodule(names[0])).to_linear()
        for name in names:
            _replace(model, name, plain)
    return model


def adapted_layers(model: nn.Module) -> dict[str, HydraLinear]:
    """The adapted layers of model by dotted name, each once."""
    return {plain_name(name): layer for name, layer in model.named_modules() if isinstance(layer, HydraLinear)}


def has_lora_of_peft(model: nn.Module) -> bool:
    """Whether model has LoRA layers that PEFT made, accelerated or not. PEFT need not be installed."""
    return any(isinstance(getattr(module, "lora_A", None), nn.ModuleDict) for module in model.modules())


def required_layers(model: nn.Module) -> dict[str, HydraLinear]:
    """`adapted_layers`; ValueError where there are none."""
    layers = adapted_layers(model)
    if not layers and (has_lora_of_peft(model) or any(isinstance(module, Adapter) for module in model.modules())):
        raise ValueError(
            "model: its adapters are PEFT's; use PEFT's methods: merge_adapter, unmerge_adapter, merge_and_unload, "
            "save_pretrained and load_adapter"
        )
    if not layers:
        raise ValueError("model: it has no adapted layer; call inject first")
    return layers


def _parameters_of(layers: Mapping[str, HydraLinear]) -> dict[str, nn.Parameter]:
    return {f"{name}.{key}".lstrip("."): p for name, layer in layers.items() for key, p in layer.named_parameters()}


def plain_name(name: str) -> str:
    """A dotted name without what wrappers inside the model add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many of model's parameters train. Shared ones count once, packed ones as many as they stand for."""
    quantised = sizes(model)
    total = sum(quantised.get(id(p), p.numel()) for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable parameters: {trainable:,} of {total:,} ({share:.4f} %)")


def _matches(name: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def names_containing(names: Iterable[str], parts: str | Iterable[str], argument: str) -> set[str]:
    """Those of the dotted names that contain one of the parts at dots; ValueError where a part is in none."""
    names, chosen = list(names), set()
    for part in [parts] if isinstance(parts, str) else parts:
        found = {name for name in names if f".{part}." in f".{name}."}
        if not found:
            raise ValueError(
                f"{argument}: {part!r} matches no module or parameter of the model; {near_names(names, [part])}"
            )
        chosen |= found
    return chosen


def near_names(names: Iterable[str], targets: str | Iterable[str]) -> str:
    """The parts of the names that look most like the targets, for error messages."""
    parts = list(dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit()))
    wanted = [targets] if isinstance(targets, str) else list(targets)
    near = dict.fromkeys(part for target in wanted for part in difflib.get_close_matches(target, parts, 3, 0.5))
    return f"near names: {', '.join(near or parts[:10])}"


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _warn_of_trained_embeddings(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Warns where a weight about to be frozen is also the trained weight of an embedding (tied input and output)."""
    for embedding_name, module in model.named_modules():
        for name, weight in weights.items():
            if isinstance(module, nn.Embedding) and module.weight is weight and weight.requires_grad:
                warnings.warn(
                    f"inject: the weight of {name!r} is also the embedding {embedding_name!r}, which is now frozen too",
                    stacklevel=3,
                )


def _warn_of_low_precision(weights: Iterable[nn.Parameter], options: Mapping[str, Any]) -> None:
    """Warns where adapters get the low precision of their base by default, which rounds small optimizer steps away."""
    low = sorted({str(weight.dtype) for weight in weights if weight.dtype in LOW_PRECISION})
    if low and options.get("adapter_dtype") is None:
        warnings.warn(
            f"inject: the adapters are {' and '.join(low)}, like the base, so an optimizer's small steps are rounded "
            f"away; pass adapter_dtype=torch.float32, or adapter_dtype={low[0]} to keep this dtype",
            stacklevel=3,
        )
