"""Hydra as a method of Hugging Face PEFT: ``get_peft_model(model, HydraConfig(r_a=4, r_b=4, target_modules=[...]))``.

Importing this module registers the method with PEFT: do it before ``PeftModel.from_pretrained`` too. These work as with
PEFT's own LoRA: several named adapters, switching, merging, saving, ``modules_to_save``. `from_lora` takes over a
checkpoint of PEFT's LoRA. Needs the extra: ``pip install hydra-kernels[peft]``.
"""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .config import HydraConfig, HydraType
from .in_place import AcceleratedLinear, Report, accelerate, report, undo
from .layer import HydraLinearLayer
from .lora import from_lora
from .model import HydraModel

# peft.utils.register_peft_method does the same, for the members of PEFT's own enumeration alone.
_METHOD: Any = HydraType.HYDRA
PEFT_TYPE_TO_CONFIG_MAPPING[_METHOD] = HydraConfig
PEFT_TYPE_TO_TUNER_MAPPING[_METHOD] = HydraModel
PEFT_TYPE_TO_PREFIX_MAPPING[_METHOD] = HydraModel.prefix

__all__ = [
    "AcceleratedLinear",
    "HydraConfig",
    "HydraLinearLayer",
    "HydraModel",
    "Report",
    "accelerate",
    "from_lora",
    "report",
    "undo",
]
