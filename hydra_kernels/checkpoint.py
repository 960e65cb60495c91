"""Adapters in a file: safetensors, with what the layers are in its metadata, written whole or not at all.

The metadata has one key, "hydra_kernels": JSON of {"format": 1, "layers": {name: description}, "include": [names]}.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .adapter import Adapter
from .layers import HydraLinear
from .model import METHODS, adapted_layers, names_containing, plain_name, required_layers
from .refusals import refuse_meta
from .sharding import fill, gathered, is_writer

FORMAT = 1
KEY = "hydra_kernels"
_DROPOUTS = ("dropout", "input_dropout")


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' Parameters of every adapted layer by dotted name ("encoder.0.A_down"), detached, not copied.

    A layer in several places, or a Parameter of several layers, appears once, under its first name. Under FSDP2 or
    tensor parallelism they are DTensors, as in ``model.state_dict()``.

    Raises:
        ValueError: where model has no adapted layer.
    """
    layers = required_layers(model)
    model.state_dict(keep_vars=True)  # FSDP2 then puts back into shards what a forward left whole
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for layer_name, layer in layers.items():
        for name, parameter in layer.adapters().items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{layer_name}.{name}" if layer_name else name] = parameter.detach()
    return found


def save_adapters(model: nn.Module, path: str | os.PathLike[str], include: Iterable[str] = ()) -> None:
    """Writes the adapters of model, and how its layers were made, to a safetensors file.

    Under FSDP2 or tensor parallelism every rank must call it: the parameters are gathered one by one, the first rank of
    their mesh writes the file, the others do not wait for it. It is the same file as an unsharded model's.

    Args:
        model: with adapted layers in it, merged or not.
        path: the file. An old file is replaced only by a complete new one. A symbolic link is followed and stays. If a
            process is killed while it writes, a file ``.NAME.HEX`` stays beside it. Nothing reads that file: delete it
            when no save is running.
        include: dotted names, or parts of them, of other parameters and buffers to store with them, such as the
            ``["classifier"]`` that was trained too.

    Raises:
        ValueError: where model has no adapted layer, nothing has a name in include, or what is to be stored is on the
            meta device, as accelerate's offload leaves it.
    """
    include = [include] if isinstance(include, str) else list(include)
    tensors = {**adapter_state_dict(model), **_included(model, include)}
    description = {"format": FORMAT, "layers": _description(model), "include": include}
    refuse_meta("save_adapters", tensors)
    contiguous = {name: gathered(tensor).to("cpu").contiguous() for name, tensor in tensors.items()}
    if is_writer(tensors.values()):
        write_whole(Path(path), save(contiguous, metadata={KEY: json.dumps(description)}))


def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copies what `save_adapters` wrote into model's own Parameters, on their devices, in their dtypes; ends a merge.

    Under FSDP2 or tensor parallelism every rank reads the file and takes its shards.

    Args:
        model: with layers of the same names, kinds, sizes, ranks, biases and constant scales as the saved one's.
        path: the file.

    Raises:
        ValueError: saying what differs or what is wrong with the file. Model is then unchanged.
    """
    description, tensors = _read(Path(path))
    if not any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError(f"model: it has no adapted layer to load {path} into; {_calls(description['layers'], model)}")
    differences = _differences(description["layers"], _description(model))
    if differences:
        raise ValueError(f"load_adapters: the layers of {path} differ from the model's: {'; '.join(differences[:5])}")
    targets = {**adapter_state_dict(model), **_included(model, description["include"])}
    wrong = [
        f"{name}: missing in the {'model' if name in tensors else 'file'}" for name in targets.keys() ^ tensors.keys()
    ]
    wrong += [
        f"{name}: {list(tensors[name].shape)} in the file, {list(target.shape)} in the model"
        for name, target in targets.items()
        if name in tensors and tensors[name].shape != target.shape
    ]
    if wrong:
        raise ValueError(
            f"load_adapters: the tensors of {path} differ from the model's: {'; '.join(sorted(wrong)[:5])}"
        )
    nowhere = sorted(name for name, target in targets.items() if target.is_meta)
    if nowhere:
        raise ValueError(f"load_adapters: the model's {nowhere[0]} is on the meta device; call to_empty first")
    for layer in adapted_layers(model).values():
        layer.unmerge()
    for name, target in targets.items():
        fill(target, tensors[name])


def _description(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What decides the function that a layer computes, by layer; and its dropouts, for the reader."""
    return {
        name: {
            "method": _method(layer),
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "r_a": layer.r_a,
            "r_b": layer.r_b,
            "scale_a": _scale(layer, "scale_a"),
            "scale_b": _scale(layer, "scale_b"),
            "adapter_bias": layer.adapter_bias,
            **{name: getattr(layer, name) for name in _DROPOUTS},
        }
        for name, layer in required_layers(model).items()
    }


def _method(layer: HydraLinear) -> str:
    """The name of its class as it was before FSDP2 derived another from it."""
    return next(c.__name__ for c in type(layer).__mro__ if c in METHODS.values())


def _scale(layer: HydraLinear, name: str) -> float | str:
    scale = getattr(layer, name)
    return "learnable" if isinstance(scale, Tensor) else float(scale)


def _calls(layers: dict[str, dict[str, Any]], model: nn.Module) -> str:
    """Which calls make layers in a plain model as a file describes them."""
    linear = [plain_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names_of: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        method = next((method for method, kind in METHODS.items() if kind.__name__ == layer.get("method")), None)
        if method is None or not {"r_a", "r_b", "scale_a", "scale_b", "adapter_bias"} <= layer.keys():
            return f"a newer version of hydra_kernels wrote it: {name!r} is {layer}"
        names_of.setdefault((method, _options(method, layer)), []).append(name)
    calls = []
    for (method, options), names in names_of.items():
        if names == [""]:
            calls.append(f"hk.{METHODS[method].__name__}.from_linear(model, {options})")
        else:
            calls.append(f"hk.inject(model, {targets_of(names, linear)!r}, method={method!r}, {options})")
    return f"first call {'; '.join(calls)}"


def _options(method: str, layer: dict[str, Any]) -> str:
    """The arguments of `inject` for a layer of the file, those at their defaults left out."""
    sides = {"hydra": {"a": "_a", "b": "_b"}, "lora": {"a": ""}, "seqlora": {"b": ""}}[method]
    options = {f"r{suffix}": layer[f"r_{side}"] for side, suffix in sides.items()}
    scales = {suffix: layer[f"scale_{side}"] for side, suffix in sides.items()}
    options |= {f"scale{suffix}": scale for suffix, scale in scales.items() if scale not in (1.0, "learnable")}
    options |= {"learnable_scale": True} if "learnable" in scales.values() else {}
    options |= {key: layer[key] for key in ("adapter_bias", *_DROPOUTS) if layer.get(key)}
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def targets_of(names: list[str], linear: list[str]) -> list[str] | str:
    """What `inject` takes for these layers and no other: ends of one or two parts, else a regular expression."""
    for parts in (1, 2):
        ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
        if {name for name in linear if f".{name}".endswith(tuple(f".{end}" for end in ends))} == set(names):
            return ends
    return "|".join(map(re.escape, names))


def _differences(saved: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> list[str]:
    found = [f"layer {name!r} is not in the model" for name in saved.keys() - own.keys()]
    found += [f"layer {name!r} is not in the file" for name in own.keys() - saved.keys()]
    for name in saved.keys() & own.keys():
        for key, value in own[name].items():
            if key not in _DROPOUTS and saved[name].get(key) != value:
                found.append(f"{name}: {key} is {saved[name].get(key)!r} in the file, {value!r} in the model")
    return sorted(found)


def _included(model: nn.Module, include: list[str]) -> dict[str, Tensor]:
    """Parameters and buffers whose dotted names contain a name in include, each once, the adapters not among them."""
    everything = {plain_name(name): t for name, t in model.state_dict(keep_vars=True).items()}
    seen = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters().values()}
    chosen = {}
    for name in sorted(names_containing(everything, include, "include")):
        if id(everything[name]) not in seen:
            seen.add(id(everything[name]))
            chosen[name] = everything[name].detach()
    return chosen


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside path, to the disk, and renames: whoever reads path sees the old file or the new one."""
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder that exists, but {path.parent} does not")
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        # Unlike a temporary file of tempfile's, it has the mode that any new file has.
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file, checked as far as is possible without a model."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"load_adapters: {path} is not a complete safetensors file: {error}") from error
    if KEY not in metadata:
        raise ValueError(f"load_adapters: {path} was not written by save_adapters: its metadata has no {KEY!r}")
    try:
        description = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_adapters: the metadata of {path} is not JSON: {error}") from error
    if not _is_description(description):
        raise ValueError(f"load_adapters: the metadata of {path} is not in format {FORMAT}, the only one that is known")
    return description, tensors


def _is_description(d: object) -> bool:
    return (
        isinstance(d, dict)
        and d.get("format") == FORMAT
        and isinstance(d.get("layers"), dict)
        and all(isinstance(layer, dict) for layer in d["layers"].values())
        and isinstance(d.get("include"), list)
        and all(isinstance(name, str) for name in d["include"])
    )
