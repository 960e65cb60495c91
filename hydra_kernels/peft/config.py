"""HydraConfig: the configuration of Hydra adapters that PEFT takes, and stores beside them."""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ..adapter import Adapter
from .translate import options_of


# PEFT's own enumeration cannot be extended, and transformers reads `.value`, which a plain string does not have.
class HydraType(str, enum.Enum):
    """The name of the method, in PEFT's tables and in ``adapter_config.json``."""

    HYDRA = "HYDRA"


@dataclass
class HydraConfig(PeftConfig):
    """The configuration of Hydra adapters (arXiv 2309.06922), for ``get_peft_model`` and ``model.add_adapter``.

    Args:
        r_a, r_b: ranks of the parallel (LoRA) and of the sequential (SeqLoRA) branch; 0 leaves the branch out.
        target_modules: names, their ends, or a regular expression of the ``nn.Linear`` layers to adapt, or
            "all-linear"; None for the layers that PEFT's LoRA adapts in a known architecture.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in ``peft.LoraConfig``.
        scale_a, scale_b: factors of the branches; LoRA's is ``lora_alpha / r``.
        learnable_scale, dropout, input_dropout, adapter_bias, init_std, form, backend: as for
            :class:`hydra_kernels.HydraLinear`: dropout acts on the bottleneck, input_dropout is ``lora_dropout``.
        init: how down projections start: "gaussian" with init_std; "peft" as in PEFT's LoRA, uniform within
            1/sqrt(fan_in), so with the standard deviation 1/sqrt(3 fan_in).
        bias: which biases of the base train too: "none", "all" or "hydra_only" (those of the adapted layers).
        rank_pattern: other ranks for some layers, ``{name or regular expression: [r_a, r_b]}``.
        scale_pattern: other scales for some layers, ``{name or regular expression: [scale_a, scale_b]}``. In neither
            pattern may two keys match one layer and disagree, because PEFT stores patterns in another order.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    r_a: int = 4
    r_b: int = 4
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    scale_a: float = 1.0
    scale_b: float = 1.0
    learnable_scale: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0
    adapter_bias: bool = False
    init_std: float | None = None
    init: str = "gaussian"
    form: str = "auto"
    backend: str = "auto"
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, list[int]] = field(default_factory=dict)
    scale_pattern: dict[str, list[float]] = field(default_factory=dict)

    def __new__(cls, *args: Any, **kwargs: Any) -> HydraConfig:
        for name in ("r", "lora_alpha", "lora_dropout"):
            if name in kwargs:
                raise TypeError(
                    f"{name}: HydraConfig does not have it; pass r_a and r_b for r, scale_a and scale_b for "
                    "lora_alpha / r, input_dropout for lora_dropout, and r_b=0 for LoRA alone; or use "
                    "HydraConfig.from_lora_config(LoraConfig(...))"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HydraType.HYDRA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if self.bias not in ("none", "all", "hydra_only"):
            raise ValueError(f"bias: expected one of none, all, hydra_only, got {self.bias!r}")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: expected None with target_modules={self.target_modules!r}, a string, got "
                    f"{getattr(self, name)!r}; pass target_modules as a list"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: expected layers_to_transform to be given too, got None")
        for name in ("rank_pattern", "scale_pattern"):
            for key, pair in getattr(self, name).items():
                if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                    raise ValueError(f"{name}: expected two numbers, for A and for B, got {pair!r} for {key!r}")
        if not any((self.r_a, self.r_b, *(rank for pair in self.rank_pattern.values() for rank in pair))):
            raise ValueError("r_a, r_b: expected 1 or more, got 0: nothing would train")
        if self.input_dropout and not any((self.r_a, *(pair[0] for pair in self.rank_pattern.values()))):
            raise ValueError(
                f"input_dropout: expected 0 with r_a = 0, since only the parallel branch has it, "
                f"got {self.input_dropout}"
            )
        for key in ("", *self.rank_pattern, *self.scale_pattern):
            Adapter(1, 1, device="meta", **self.options(key))  # an invalid option raises here, not in the model

    @classmethod
    def from_lora_config(cls, config: PeftConfig, r_b: int = 0) -> HydraConfig:
        """The configuration of the same adapters as a LoraConfig's, in the same layers and started as PEFT starts them.

        Ranks, scales (``lora_alpha / r``, or ``/ sqrt(r)`` with rsLoRA) and their patterns become r_a, scale_a and the
        patterns of Hydra. So learning rates that were tuned for the LoRA carry over.

        Args:
            config: the LoraConfig.
            r_b: rank of a sequential branch beside it, with the scale of the parallel one; 0 for none.

        Raises:
            ValueError: naming an option of config that changes the result and that Hydra does not have.
            TypeError: where config is no LoraConfig.
        """
        return cls(**options_of(config, r_b))

    def options(self, layer: str) -> dict[str, Any]:
        """The arguments of `hydra_kernels.adapter.Adapter` for the layer of that dotted name."""
        r_a, r_b = _of_pattern("rank_pattern", self.rank_pattern, layer, (self.r_a, self.r_b))
        scale_a, scale_b = _of_pattern("scale_pattern", self.scale_pattern, layer, (self.scale_a, self.scale_b))
        return {
            "r_a": r_a,
            "r_b": r_b,
            "scale_a": scale_a,
            "scale_b": scale_b,
            "learnable_scale": self.learnable_scale,
            "dropout": self.dropout,
            "input_dropout": self.input_dropout if r_a else 0.0,  # a layer without the branch has nothing to drop
            "adapter_bias": self.adapter_bias,
            "init_std": self.init_std,
            "init": self.init,
            "form": self.form,
            "backend": self.backend,
        }


def _of_pattern(
    argument: str, pattern: Mapping[str, Sequence[Any]], layer: str, default: Sequence[Any]
) -> Sequence[Any]:
    """What a pattern says of the layer of that dotted name; ValueError where two of its keys say different things."""
    found = [key for key in pattern if matches(key, layer)]
    if any(list(pattern[key]) != list(pattern[found[0]]) for key in found):
        # In PEFT the first match wins, but save_pretrained sorts the keys: the adapter would load as another one.
        said = ", ".join(f"{key!r}: {list(pattern[key])}" for key in found)
        raise ValueError(
            f"{argument}: expected one value for each layer, got {said} for {layer!r}; write keys that do not "
            "overlap, such as '^' and the whole name"
        )
    return pattern[found[0]] if found else default


def matches(key: str, layer: str) -> bool:
    """Whether a key of a pattern means the layer of that dotted name, as in PEFT."""
    return key == layer or _compiled(key).match(layer) is not None


# Each key is matched with every layer, and re's own cache has room for 512 keys alone.
@functools.lru_cache(4096)
def _compiled(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")
