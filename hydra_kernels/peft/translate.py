"""What a LoraConfig says, in the words of HydraConfig: for `HydraConfig.from_lora_config` and `from_lora`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType

from ..adapter import check_count

KEPT = ("task_type", "base_model_name_or_path", "revision", "target_modules", "exclude_modules", "modules_to_save")
LAYERS = ("layers_to_transform", "layers_pattern")
TRANSLATED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "lora_dropout")
PAIR = "^(?:)"  # before the expressions for pairs of keys, of which some may match nothing
WITHOUT_EFFECT = ("peft_type", "peft_version", "auto_mapping", "inference_mode", "runtime_config")


def options_of(lora: PeftConfig, r_b: int) -> dict[str, Any]:
    """The arguments of HydraConfig for the same adapters, started as PEFT starts them, and a branch B of rank r_b."""
    if lora.peft_type != PeftType.LORA or not isinstance(lora, LoraConfig):
        raise TypeError(f"config: expected a LoraConfig, got {type(lora).__name__}")
    check_count("r_b", r_b, 0)
    if lora.init_lora_weights is not True:
        raise ValueError(f"init_lora_weights: expected True, PEFT's default, got {lora.init_lora_weights!r}")
    if lora.lora_bias:
        raise ValueError(
            "lora_bias: expected False, got True; Hydra's adapter_bias also trains biases of the down projections"
        )
    refuse_others(lora, (*KEPT, *LAYERS, *TRANSLATED, *WITHOUT_EFFECT, "init_lora_weights"), "")
    scale = scale_of(lora, lora.lora_alpha, lora.r)
    return {
        **{name: getattr(lora, name) for name in (*KEPT, *LAYERS, "inference_mode")},
        "r_a": lora.r,
        "r_b": r_b,
        "scale_a": scale,
        "scale_b": scale,
        "bias": bias_of(lora),
        "init": "peft",
        "input_dropout": lora.lora_dropout,
        "rank_pattern": {key: [r, r_b] for key, r in (lora.rank_pattern or {}).items()},
        "scale_pattern": {key: [scale_of(lora, alpha, r)] * 2 for key, alpha, r in _patterns(lora)},
    }


def scale_of(lora: LoraConfig, alpha: float, r: int) -> float:
    return float(alpha / math.sqrt(r) if lora.use_rslora else alpha / r)


def bias_of(lora: LoraConfig) -> str:
    return "hydra_only" if lora.bias == "lora_only" else lora.bias


def refuse_others(lora: LoraConfig, known: Iterable[str], place: str) -> None:
    """Raises ValueError for an option that is not known and does not say what it says by default."""
    plain = LoraConfig()
    for name in (f.name for f in fields(lora) if f.name not in known):
        # PEFT writes empty lists too, where nothing was asked for.
        if (getattr(lora, name) or None) != (getattr(plain, name) or None):
            raise ValueError(f"{place or name}: Hydra does not support {name}, got {getattr(lora, name)!r}")


def _patterns(lora: LoraConfig) -> Iterator[tuple[str, float, int]]:
    """Regular expressions of layers, with their alpha and rank where these are not those of all layers."""
    ranks: Mapping[str, int] = lora.rank_pattern or {}
    alphas: Mapping[str, float] = lora.alpha_pattern or {}
    if not ranks or not alphas or ranks.keys() == alphas.keys():
        for key in {**ranks, **alphas}:
            yield key, alphas.get(key, lora.lora_alpha), ranks.get(key, lora.r)
        return
    # A layer may match a key of either: one expression for each pair, so that no two of them match one layer.
    for rank_key in (None, *ranks):
        for alpha_key in (None, *alphas):
            if rank_key is not None or alpha_key is not None:
                r = lora.r if rank_key is None else ranks[rank_key]
                alpha = lora.lora_alpha if alpha_key is None else alphas[alpha_key]
                yield f"{PAIR}{_only(rank_key, ranks)}{_only(alpha_key, alphas)}.*", alpha, r


def _only(key: str | None, keys: Iterable[str]) -> str:
    """What looks ahead for a name that PEFT lets match this key, or for None none of the keys."""
    if key is not None:
        return rf"(?=(?:.*\.)?(?:{key})$)"
    return "".join(rf"(?!(?:.*\.)?(?:{other})$)" for other in keys)
