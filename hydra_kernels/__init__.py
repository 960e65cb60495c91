"""Hydra, LoRA and SeqLoRA adapters (arXiv 2309.06922) whose training step costs hardly more than the frozen layer."""

from . import reference
from .backend import backends
from .function import HydraFunction
from .functional import hydra_linear
from .layers import HydraLinear, LoRALinear, SeqLoRALinear
from .model import (
    inject,
    mark_only_adapters_trainable,
    merge,
    merge_and_unload,
    print_trainable_parameters,
    unmerge,
)

__version__ = "0.1.0"

__all__ = [
    "HydraFunction",
    "HydraLinear",
    "LoRALinear",
    "SeqLoRALinear",
    "backends",
    "hydra_linear",
    "inject",
    "mark_only_adapters_trainable",
    "merge",
    "merge_and_unload",
    "print_trainable_parameters",
    "reference",
    "unmerge",
]
