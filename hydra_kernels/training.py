"""Which parameters an optimizer gets, at which rate: LoRA+ and LoRA-FA for Hydra."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import Adapter
from .checks import check_finite
from .model import has_lora_of_peft

UP = ("A_up", "A_up_bias", "B_up", "B_up_bias")
DOWN = ("A_down", "B_down")


def parameter_groups(
    model: nn.Module, lr: float, *, up_ratio: float = 1.0, freeze_down: bool = False
) -> list[dict[str, Any]]:
    """The parameters that train, in groups for an optimizer: ``torch.optim.AdamW(hk.parameter_groups(model, 1e-4))``.

    PEFT's functions for LoRA+ and LoRA-FA look for the name ``lora_B``, which Hydra's adapters do not have.

    Args:
        model: with adapters, of `inject` or of `hydra_kernels.peft`. Freeze first what is not to train.
        lr: the rate of everything that trains except the up projections.
        up_ratio: by how much the rate of A_up, B_up and their biases is higher; LoRA+ recommends 16.
        freeze_down: whether to freeze A_down and B_down, as LoRA-FA does: then no layer saves its input or y0 for them.
            Do this before DDP wraps the model. PEFT's ``set_adapter`` lets them train again.

    Returns:
        A group of the up projections with the rate ``lr * up_ratio``. If anything else trains, its group comes first.

    Raises:
        ValueError, TypeError: naming the argument, or where no up projection trains. Nothing is frozen then.
    """
    for name, value in (("lr", lr), ("up_ratio", up_ratio)):
        check_finite(name, value)
        if value < 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    up = {id(p) for adapter in adapters for name, p in adapter.adapters().items() if name in UP and p.requires_grad}
    if not up and has_lora_of_peft(model):
        raise ValueError(
            "model: its adapters are PEFT's LoRA; use peft.optimizers' create_loraplus_optimizer or "
            "create_lorafa_optimizer"
        )
    if not up:
        raise ValueError("model: it has no up projection that trains; call inject or get_peft_model first")
    if freeze_down:
        for adapter in adapters:
            for name, parameter in adapter.adapters().items():
                if name in DOWN:
                    parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in up], "lr": lr},
        {"params": [p for p in trained if id(p) in up], "lr": lr * up_ratio},
    ]
    return [group for group in groups if group["params"]]
