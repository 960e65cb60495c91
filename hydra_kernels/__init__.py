"""Hydra, LoRA and SeqLoRA adapters (arXiv 2309.06922) whose training step costs hardly more than the frozen layer."""

from . import analysis, convert, reference
from .autograd import HydraFunction
from .backend import backends
from .checkpoint import adapter_state_dict, load_adapters, save_adapters
from .choose.explain import explain
from .choose.tune import tune
from .functional import hydra_linear
from .layers import HydraLinear, LoRALinear, SeqLoRALinear
from .merged import merged_tensors
from .model import (
    inject,
    mark_only_adapters_trainable,
    merge,
    merge_and_unload,
    print_trainable_parameters,
    unmerge,
)
from .probe import check_adapters
from .training import parameter_groups
from .version import VERSION

__version__ = VERSION

__all__ = [
    "HydraFunction",
    "HydraLinear",
    "LoRALinear",
    "SeqLoRALinear",
    "adapter_state_dict",
    "analysis",
    "backends",
    "check_adapters",
    "convert",
    "explain",
    "hydra_linear",
    "inject",
    "load_adapters",
    "mark_only_adapters_trainable",
    "merge",
    "merge_and_unload",
    "merged_tensors",
    "parameter_groups",
    "print_trainable_parameters",
    "reference",
    "save_adapters",
    "tune",
    "unmerge",
]
