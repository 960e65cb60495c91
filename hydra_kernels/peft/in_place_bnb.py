"""accelerate's classes over bitsandbytes' layers, in a module of their own, since importing it imports bitsandbytes."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import bnb

from ..weights import undo_repacking
from .in_place import Accelerated

_bnb: Any = bnb  # it defines its classes only if bitsandbytes is installed


class AcceleratedLinear4bit(Accelerated, _bnb.Linear4bit):
    """PEFT's LoRA over bitsandbytes' 4-bit layers, accelerated."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        undo_repacking(self.base_layer)
        super()._save_to_state_dict(*args, **kwargs)


class AcceleratedLinear8bitLt(Accelerated, _bnb.Linear8bitLt):
    """PEFT's LoRA over bitsandbytes' 8-bit layers, accelerated where `accelerate` gets ``int8="dequantise"``."""


ACCELERATED: dict[type, type] = {
    _bnb.Linear4bit: AcceleratedLinear4bit,
    _bnb.Linear8bitLt: AcceleratedLinear8bitLt,
}
