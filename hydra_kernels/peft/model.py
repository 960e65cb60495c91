"""HydraModel: puts HydraLinearLayers into a model, once every target has been checked."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..adapter import Adapter
from ..model import INJECT_FIRST, check_targets, near_names
from ..refusals import experts_say, experts_without_layers, refuse_wrapped
from ..weights import dtype_of
from .config import HydraConfig, matches
from .layer import HydraLinearLayer
from .translate import PAIR


class HydraModel(BaseTuner):
    """A model with Hydra adapters in it; ``get_peft_model`` makes one.

    Raises:
        TypeError, ValueError: naming a target that cannot be adapted (Conv1D, an embedding, a quantised format that is
            not served, a layer with hooks or with adapters of another method), a target whose weight is read without
            calling it, or a model that DDP or FSDP has wrapped. The model is then unchanged.
    """

    prefix = "hydra_"
    tuner_layer_cls = HydraLinearLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        refuse_wrapped(model, INJECT_FIRST)
        self._warn_of_what_is_left_out(cast(HydraConfig, peft_config), model)
        _maybe_include_all_linear_layers(peft_config, model)
        targets, within = [], None
        for name, module in model.named_modules():
            if within is not None and name.startswith(within):
                continue
            found = name and self._check_target_module_exists(peft_config, name)
            if isinstance(module, HydraLinearLayer):
                within = f"{name}."
            elif found:
                self._check(peft_config, model, name)
            targets += [name] if found else []
        _warn_of_biases(cast(HydraConfig, peft_config), model, targets)
        for key in cast(HydraConfig, peft_config).scale_pattern:
            if not key.startswith(PAIR) and not any(matches(key, name) for name in targets):
                warnings.warn(f"scale_pattern: {key!r} matches no adapted layer", RuntimeWarning, stacklevel=2)
        places: dict[nn.Module, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    places[child].append((parent, name))
        self._shared = {child: found for child, found in places.items() if len(found) > 1}

    def _warn_of_what_is_left_out(self, config: HydraConfig, model: nn.Module) -> None:
        """Warns of targets that match nothing, which PEFT passes over where others match, and of experts."""
        named, targets = dict(model.named_modules()), config.target_modules
        everything = isinstance(targets, str) and targets.lower() == "all-linear"
        wanted = None if everything else lambda name: bool(self._check_target_module_exists(config, name))
        said = [experts_say(experts)] if (experts := experts_without_layers(named.items(), wanted)) else []
        if not isinstance(targets, str):
            missing = [t for t in sorted(targets or ()) if not any(f".{name}".endswith(f".{t}") for name in named)]
            said += [f"{missing} matches no module; {near_names(filter(None, named), missing)}"] if missing else []
        if said:
            warnings.warn(f"target_modules: {'; '.join(said)}", RuntimeWarning, stacklevel=2)

    def _check(self, peft_config: PeftConfig, model: nn.Module, name: str) -> None:
        check_targets("target_modules", model, [name], Adapter, cast(HydraConfig, peft_config).options(name))
        # What PEFT refuses of LoRA it would of Hydra: layers whose weights Mamba's kernels read.
        self._check_target_module_compatiblity(LoraConfig(), model, name.rpartition(".")[2])

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options = cast(HydraConfig, peft_config).options(current_key)
        if isinstance(target, HydraLinearLayer):
            target.add_adapter(adapter_name, options, peft_config.inference_mode)
            return
        self._check(peft_config, self.model, current_key)
        layer = HydraLinearLayer(cast(nn.Linear, target), adapter_name, options, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # In every place: PEFT visits a shared module once. Nor is child.weight copied, which a head need not have.
        places = self._shared.pop(child, [(parent, child_name)])
        for module, name in places:
            setattr(module, name, new_module)
        if len(places) > 1:
            self._shared[new_module] = places

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # A layer makes float32 adapters over a low-precision base, whichever way they are added.
        for layer in (m for m in self.model.modules() if isinstance(m, HydraLinearLayer)):
            if not autocast_adapter_dtype and adapter_name in layer.hydra_adapters:
                layer.hydra_adapters[adapter_name].to(dtype_of(layer.base_layer))
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's. Raises ValueError where another module holds the weight, such as an embedding tied to it."""
        holders = Counter(id(p) for m in self.model.modules() for p in m._parameters.values())
        names = self.active_adapters if adapter_names is None else adapter_names
        for name, m in self.model.named_modules():
            if not isinstance(m, HydraLinearLayer) or not any(n in m.hydra_adapters for n in names):
                continue
            if any(holders[id(p)] > 1 for p in m.base_layer.parameters()):
                raise ValueError(
                    f"merge_adapter: {name} shares its weight with another module, which would change too; use "
                    "merge_and_unload, which gives the layer its own weight"
                )
        super().merge_adapter(adapter_names, safe_merge)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: a mean of adapters' weights is not the mean of what they do."""
        raise ValueError(
            "add_weighted_adapter: Hydra does not support it, since averaging the weights of adapters does not average "
            "their effects; to add the branches of several adapters, call base_model.set_adapter([...])"
        )

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: PeftConfig
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = super()._get_learnable_bias_state_dict(model, state_dict, config)
        # While adapters are merged the base layer's bias is not the one that was trained.
        for name, module in model.named_modules():
            key = f"{name}.base_layer.bias"
            if isinstance(module, HydraLinearLayer) and module.unmerged_bias is not None and key in found:
                found[key] = module.unmerged_bias
        return found

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None, since Hydra does not support batches for several adapters, got "
                    f"{kwargs[name]!r}"
                )
        yield


def _warn_of_biases(config: HydraConfig, model: nn.Module, targets: Sequence[str]) -> None:
    """Warns where adapters get biases that the base layer has no place for, as PEFT does of its lora_bias."""
    if not config.adapter_bias:
        return
    layers = ((name, model.get_submodule(name)) for name in targets)
    bases = ((name, m.base_layer if isinstance(m, HydraLinearLayer) else m) for name, m in layers)
    without = [name for name, base in bases if base.bias is None]
    if without:
        more = f" and {len(without) - 1} more" if without[1:] else ""
        warnings.warn(
            f"adapter_bias: these adapters can be trained and saved, but not merged, since their base layers have no "
            f"bias: {without[0]!r}{more}",
            stacklevel=2,
        )
