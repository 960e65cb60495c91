"""HydraModel: puts HydraLayers into a model, once every target has been checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ..adapter import Adapter
from ..model import check_targets
from .config import HydraConfig
from .layer import HydraLayer


class HydraModel(BaseTuner):
    """A model with Hydra adapters in it; ``get_peft_model`` makes one.

    Raises:
        TypeError, ValueError: naming a target that is no plain ``nn.Linear`` (Conv1D, an embedding, quantised, adapted
            by another method, with hooks), or one whose weight is read past its forward. The model is then unchanged.
    """

    prefix = "hydra_"
    tuner_layer_cls = HydraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        _maybe_include_all_linear_layers(peft_config, model)
        within: tuple[str, ...] = ()
        for name, module in model.named_modules():
            if isinstance(module, HydraLayer):
                within += (f"{name}.",)
            elif name and not name.startswith(within) and self._check_target_module_exists(peft_config, name):
                self._check(peft_config, model, name)

    def _check(self, peft_config: PeftConfig, model: nn.Module, name: str) -> None:
        check_targets("target_modules", model, [name], Adapter, cast(HydraConfig, peft_config).options(name))

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
        if isinstance(target, HydraLayer):
            target.add_adapter(adapter_name, options, peft_config.inference_mode)
            return
        self._check(peft_config, self.model, current_key)
        layer = HydraLayer(cast(nn.Linear, target), adapter_name, options, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # In every place: PEFT visits a shared module once. Nor is child.weight copied, which a head need not have.
        for module in list(self.model.modules()):
            for name in [name for name, other in module._modules.items() if other is child]:
                setattr(module, name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name}: expected None, since Hydra has no batches of several adapters; got {kwargs[name]!r}"
                )
        yield
