"""Checkpoints of other code as this package's adapters, and adapters as PEFT's LoRA.

``load(model, from_authors(...))`` (github.com/extremebird/Hydra) or ``load(model, from_loralib(...))`` puts adapted
layers into a model, filled. PEFT's checkpoints are those of `hydra_kernels.peft`; `to_lora` writes them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_finite
from .export import to_lora
from .model import check_targets, inject, layer_class_of, names_containing, near_names
from .sharding import is_sharded

__all__ = ["Converted", "LayerAdapters", "from_authors", "from_loralib", "load", "to_lora"]

# Where the authors' code puts a branch: the module's name, which branch it is, and the linear layer beside it that is
# adapted. vtab1k (ViT) adapts two; elevater (CLIP) renames c_proj to ad_lin.linear; nlu (RoBERTa) adapts output.dense.
_BRANCHES = {
    "hydra_mlp_par": ("A", "fc2"),
    "hydra_mlp_seq": ("B", "fc2"),
    "hydra_proj_par": ("A", "proj"),
    "hydra_proj_seq": ("B", "proj"),
    "ad_lin.adapter_par": ("A", "c_proj"),
    "ad_lin.adapter_seq": ("B", "c_proj"),
    "hydra_par": ("A", "dense"),
    "hydra_seq": ("B", "dense"),
}
_TENSORS = {
    "down_proj.weight": "down",
    "down_proj.bias": "down_bias",
    "up_proj.weight": "up",
    "up_proj.bias": "up_bias",
    "hydra_A.weight": "down",
    "hydra_B.weight": "up",
    "scale": "scale",
}
_AUTHORS_KEY = re.compile(
    rf"(?P<owner>(?:.+\.)?)(?P<branch>{'|'.join(map(re.escape, _BRANCHES))})"
    rf"\.(?P<tensor>{'|'.join(map(re.escape, _TENSORS))})"
)
_LORALIB_KEY = re.compile(r"(?:(?P<linear>.+)\.)?lora_(?P<side>[AB])")
# Options of a layer that no user may add to what a checkpoint says.
_FIXED = {"r", "r_a", "r_b", "scale", "scale_a", "scale_b", "adapter_bias", "learnable_scale", "method"}
_SHOWN = 5  # names in an error

Rename = Callable[[str], str]


class LayerAdapters(NamedTuple):
    """What one linear layer is adapted with.

    ``method`` and ``options`` are arguments of `inject` (ranks, scales, biases); ``tensors`` has what
    ``HydraLinear.adapters()`` of such a layer has, under its names and in its shapes.
    """

    method: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]


class Converted(NamedTuple):
    """A converted checkpoint: ``layers`` by the dotted name of the linear layer, ``others`` the included tensors."""

    layers: dict[str, LayerAdapters]
    others: dict[str, Tensor]


def from_authors(
    state_dict: Mapping[str, Tensor],
    *,
    scale: float | None = None,
    include: Iterable[str] = (),
    rename: Rename | None = None,
) -> Converted:
    """Converts a checkpoint of the paper's authors: vtab1k's ViT, elevater's CLIP or nlu's RoBERTa.

    Their branch is ``scale * up(dropout(down(v)))``, v = x for ``*_par`` and y0 for ``*_seq``: Eq. 9-10 with biases. So
    ``*_par`` becomes A, ``*_seq`` B, and their dropout is this package's ``dropout``: pass it to `load`.

    Args:
        state_dict: theirs by name, such as ``blocks.0.mlp.hydra_mlp_par.down_proj.weight`` [r_a, K]; floating dtypes.
        scale: of both branches. vtab1k has it in its configuration (``configs/hydra_both/*.yaml``), elevater in its
            source (1.0): give it. None where the checkpoint holds learnable scales, and for nlu, which has none.
        include: dotted names, or parts of them, of other tensors to take over, such as the trained ``["head"]``.
        rename: their name of a linear layer or of an included tensor -> the model's; unchanged by default. Theirs end
            in ``mlp.fc2`` and ``attn.proj`` (vtab1k), ``mlp.c_proj`` (elevater), ``output.dense`` (nlu).

    Raises:
        ValueError, TypeError: naming the key: one that is neither a branch's nor included, a branch or a tensor that is
            missing, shapes that do not fit each other, a scale that is missing or given twice.
    """
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in _tensors(state_dict).items():
        if match := _AUTHORS_KEY.fullmatch(key):
            side, linear = _BRANCHES[match["branch"]]
            kind = _TENSORS[match["tensor"]]
            name = f"scale_{side.lower()}" if kind == "scale" else f"{side}_{kind}"
            found.setdefault(match["owner"] + linear, {})[name] = tensor
        else:
            rest[key] = tensor
    others = _included(rest, include, found, "a branch of the authors' code")
    layers = {}
    for name, tensors in found.items():
        ranks = _check_layer(name, tensors, ("A_down", "A_up", "B_down", "B_up"))
        scales: dict[str, Tensor] = {k: t.reshape(()) for k, t in tensors.items() if k in ("scale_a", "scale_b")}
        biased = _all_or_none(name, tensors, ("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias"))
        learnable = _all_or_none(name, tensors, ("scale_a", "scale_b"))
        options: dict[str, Any] = {**ranks, "adapter_bias": biased}
        if learnable:
            if scale is not None:
                raise ValueError(f"scale: expected None, since the checkpoint holds those of {name!r}, got {scale}")
            options["learnable_scale"] = True
        elif scale is None and not name.endswith("dense"):
            raise ValueError(
                f"scale: expected a number, since the checkpoint has none for {name!r}, got None; pass the one of "
                "its training (vtab1k: `scale` in configs/hydra_both/*.yaml, elevater: 1.0)"
            )
        else:
            check_finite("scale", 1.0 if scale is None else scale)
            options["scale_a"] = options["scale_b"] = 1.0 if scale is None else scale
        layers[name] = LayerAdapters("hydra", options, {**tensors, **scales})
    return _renamed(layers, others, rename)


def from_loralib(
    state_dict: Mapping[str, Tensor],
    *,
    alpha: float,
    include: Iterable[str] = (),
    rename: Rename | None = None,
) -> Converted:
    """Converts a checkpoint of loralib's ``Linear``, such as ``loralib.lora_state_dict(model)``.

    Its formula is ``x W0^T + b0 + (alpha / r) (dropout(x) lora_A^T) lora_B^T``: lora_A becomes A_down, lora_B A_up,
    alpha / r the scale. Its dropout acts on x, as this package's ``input_dropout``: pass it to `load`.

    Args:
        state_dict: ``NAME.lora_A`` [r, K] and ``NAME.lora_B`` [N, r]; floating dtypes.
        alpha: ``lora_alpha``, which no checkpoint holds.
        include: dotted names, or parts of them, of other tensors to take over, such as ``["classifier"]``.
        rename: their name of a linear layer or of an included tensor -> the model's; unchanged by default.

    Raises:
        ValueError, TypeError: naming the key: one that is neither lora_A, lora_B nor included, half a branch, shapes
            that do not fit each other (``MergedLinear``'s, which adapts parts of a fused layer), PEFT's keys, and the
            included weight of an adapted layer, which loralib's ``eval()`` may have merged.
    """
    check_finite("alpha", alpha)
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in _tensors(state_dict).items():
        if match := _LORALIB_KEY.fullmatch(key):
            found.setdefault(match["linear"] or "", {})["A_down" if match["side"] == "A" else "A_up"] = tensor
        elif re.search(r"\.lora_[AB]\.", key):
            raise ValueError(f"state_dict: {key!r} is PEFT's, not loralib's; use hydra_kernels.peft.from_lora")
        else:
            rest[key] = tensor
    others = _included(rest, include, found, "loralib's lora_A or lora_B")
    layers = {}
    for name, tensors in found.items():
        if f"{name}.weight" in others:
            raise ValueError(
                f"include: {f'{name}.weight'!r} may contain the adapters already, since loralib's eval() merges them; "
                "leave it out, and load the pretrained weight into the model"
            )
        down, up = tensors.get("A_down"), tensors.get("A_up")
        if down is not None and up is not None and down.dim() == up.dim() == 2:
            r, inner = down.shape[0], up.shape[1]
            if r != inner and inner and r % inner == 0:
                raise ValueError(
                    f"state_dict: expected adapters of loralib's Linear for {name!r}, got those of its MergedLinear, "
                    f"which adapts parts of a fused layer (lora_A {list(down.shape)}, lora_B {list(up.shape)})"
                )
        r = _check_layer(name, tensors, ("A_down", "A_up"))["r_a"]
        layers[name] = LayerAdapters("lora", {"r": r, "scale": alpha / r}, tensors)
    return _renamed(layers, others, rename)


def load(model: nn.Module, converted: Converted, **options: Any) -> list[str]:
    """Adapts model as the checkpoint says, with its ranks and scales, and copies its tensors in; freezes those layers.

    Args:
        model: with a plain ``nn.Linear`` under every name in ``converted.layers``; it is changed. Its own weights stay:
            load the pretrained ones first.
        converted: of `from_authors` or `from_loralib`.
        options: of the layers, except what the checkpoint sets: ``dropout``, ``input_dropout``, ``adapter_dtype``,
            ``form``, ``backend``. The copies have the layer's dtype: over a bfloat16 base only
            ``adapter_dtype=torch.float32`` keeps float32.

    Returns:
        The dotted names of the adapted layers, in the model's order.

    Raises:
        ValueError, TypeError: naming what does not fit; the model is then unchanged.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = [name for name in converted.layers if name == "" or name not in modules]
    if absent:
        raise ValueError(f"model: it has no layer {absent[0]!r}; {near_names(modules, absent[:1])}; or pass rename")
    state = model.state_dict(keep_vars=True)
    groups: dict[tuple[Any, ...], list[str]] = {}
    seen: dict[int, str] = {}
    for name, layer in converted.layers.items():
        clash = sorted(options.keys() & (layer.options.keys() | _FIXED))
        if clash:
            raise TypeError(f"{clash[0]}: the checkpoint sets this option; leave it out")
        check_targets("model", model, [name], layer_class_of(layer.method), {**layer.options, **options})
        _check_fits(name, layer, modules[name])
        other = seen.setdefault(id(modules[name]), name)
        if other != name:
            raise ValueError(f"model: {other!r} and {name!r} are the same layer, but the checkpoint adapts both")
        groups.setdefault((layer.method, *sorted(layer.options.items())), []).append(name)
    for name, tensor in converted.others.items():
        if name not in state:
            raise ValueError(f"include: the model has no {name!r}; {near_names(state, [name])}; or pass rename")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"include: expected shape {list(state[name].shape)} for {name!r}, as in the model, got "
                f"{list(tensor.shape)} in the checkpoint"
            )
        _check_can_be_filled("include", name, state[name])

    for (method, *fixed), names in groups.items():
        inject(model, "|".join(map(re.escape, names)), method=method, **dict(fixed), **options)
    with torch.no_grad():
        for name, layer in converted.layers.items():
            adapted: Any = model.get_submodule(name)
            for key, parameter in adapted.adapters().items():
                parameter.copy_(layer.tensors[key])
        for name, tensor in converted.others.items():
            state[name].copy_(tensor)
    return [name for name in modules if name in converted.layers]


def _tensors(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict: expected a Tensor under {key!r}, got {type(tensor).__name__}")
    return state_dict


def _included(
    rest: Mapping[str, Tensor], include: Iterable[str], found: Mapping[str, object], expected: str
) -> dict[str, Tensor]:
    """Those of rest that are included; raises where one is not, or where nothing was found."""
    chosen = names_containing(rest, include, "include")
    unknown = [key for key in rest if key not in chosen]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise ValueError(
            f"state_dict: expected keys of {expected}, got {', '.join(map(repr, unknown[:_SHOWN]))}{more}; to copy "
            "other tensors too, name them in include"
        )
    if not found:
        raise ValueError(f"state_dict: expected keys of {expected}, got none")
    return {key: rest[key] for key in rest if key in chosen}


def _check_layer(name: str, tensors: Mapping[str, Tensor], needed: tuple[str, ...]) -> dict[str, int]:
    """Raises unless the tensors of a layer are there and fit each other; returns its ranks."""
    side = {"A": "the parallel branch", "B": "the sequential branch"}
    for key in needed:
        if key not in tensors:
            raise ValueError(f"state_dict: the {key[2:]} projection of {side[key[0]]} of {name!r} is missing")
        if tensors[key].dim() != 2 or 0 in tensors[key].shape:
            raise ValueError(f"state_dict: {key} of {name!r}: expected a matrix, got {list(tensors[key].shape)}")
    r_a, K = tensors["A_down"].shape
    N = tensors["A_up"].shape[0]
    r_b = tensors["B_down"].shape[0] if "B_down" in tensors else 0
    expected: dict[str, tuple[int, ...]] = {
        "A_down": (r_a, K),
        "A_up": (N, r_a),
        "B_down": (r_b, N),
        "B_up": (N, r_b),
        "A_down_bias": (r_a,),
        "A_up_bias": (N,),
        "B_down_bias": (r_b,),
        "B_up_bias": (N,),
    }
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"state_dict: {key} of {name!r}: expected a floating dtype, got {tensor.dtype}")
        if key in expected and tensor.shape != expected[key]:
            raise ValueError(
                f"state_dict: {key} of {name!r}: expected shape {list(expected[key])}, which fits the layer's other "
                f"tensors, got {list(tensor.shape)}"
            )
        if key not in expected and tensor.numel() != 1:
            raise ValueError(f"state_dict: {key} of {name!r}: expected one number, got {list(tensor.shape)}")
    return {"r_a": r_a, "r_b": r_b}


def _all_or_none(name: str, tensors: Mapping[str, Tensor], keys: tuple[str, ...]) -> bool:
    missing = [key for key in keys if key not in tensors]
    if missing and len(missing) < len(keys):
        raise ValueError(f"state_dict: {missing[0]} of {name!r} is missing; expected all of {', '.join(keys)}, or none")
    return not missing


def _check_fits(name: str, layer: LayerAdapters, linear: nn.Module) -> None:
    own: Any = linear  # an nn.Linear: check_targets has checked that
    K, N = layer.tensors["A_down"].shape[1], layer.tensors["A_up"].shape[0]
    if (own.in_features, own.out_features) != (K, N):
        raise ValueError(
            f"model: expected {name!r} to have {K} inputs and {N} outputs, as in the checkpoint, got "
            f"{own.in_features} and {own.out_features}"
        )
    _check_can_be_filled("model", name, own.weight)


def _check_can_be_filled(argument: str, name: str, target: Tensor) -> None:
    if target.is_meta:
        raise ValueError(f"{argument}: {name!r} is on the meta device; call to_empty first")
    if is_sharded(target):
        raise ValueError(f"{argument}: {name!r} is sharded; load before fully_shard or parallelize_module")


def _renamed(layers: dict[str, LayerAdapters], others: dict[str, Tensor], rename: Rename | None) -> Converted:
    if rename is None:
        return Converted(layers, others)
    for names in (layers, others):
        for name, count in Counter(map(rename, names)).items():
            if count > 1:
                raise ValueError(f"rename: expected a new name for each name, got {name!r} for {count} of them")
    return Converted({rename(n): v for n, v in layers.items()}, {rename(n): v for n, v in others.items()})
