"""What cannot be adapted: layers whose weight is read without calling them, wrapped models, offloaded weights, experts.

Most would give no error: the adapters would not train, or merged weights would be lost.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter, Merging
from .private import FakeTensor
from .sharding import is_sharded
from .weights import SERVED, packed

# Their fast paths hand the weights of their nn.Linear children to fused operators.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Other classes, and those of their layers whose weights they read themselves. Names without a module are transformers';
# in other packages a name alone, such as "Attention", could be any class.
_QKV = ("q_proj", "k_proj", "v_proj")
READS_WEIGHTS_OF: dict[str, tuple[str, ...]] = {
    "WavLMAttention": (*_QKV, "out_proj"),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "dt_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
    **dict.fromkeys(("NemotronHMamba2Mixer", "Zamba2MambaMixer"), ("out_proj",)),
    "JambaMambaMixer": ("dt_proj",),
    **dict.fromkeys(
        ("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), ("k_proj",)
    ),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "LSHSelfAttention": ("query_key",),
    "LongcatFlashTopkRouter": ("classifier",),
    "TDNNLayer": ("kernel",),
    **dict.fromkeys(("LayoutLMv2Encoder", "LayoutLMv3Encoder"), ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias")),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "BloomAttention": ("dense",),
    "BloomMLP": ("dense_4h_to_h",),
    "Gemma3nTextAltUp": ("correction_coefs",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
    "mamba_ssm.modules.mamba_simple.Mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "clip.model.AttentionPool2d": (*_QKV, "c_proj"),
    "esm.multihead_attention.MultiheadAttention": (*_QKV, "out_proj"),
}


def _adds_the_bias(attention: Any) -> bool:
    """timm: whether qkv runs with biases from elsewhere. Versions without the option never call qkv."""
    if not hasattr(attention, "qkv_bias_separate"):
        return True
    return attention.q_bias is not None and not attention.qkv_bias_separate


# Those of these classes that read weights under a condition alone.
READS_WEIGHTS_IF: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("BloomAttention", "BloomMLP"), lambda m: m.pretraining_tp > 1 and m.slow_but_exact),
    "Gemma3nTextAltUp": lambda m: m.config.altup_coef_clip is not None,
    **dict.fromkeys(
        ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
        lambda m: m.config.use_ordered_embeddings,
    ),
    **dict.fromkeys((name for name in READS_WEIGHTS_OF if name.startswith("timm.")), _adds_the_bias),
}
# Classes, or their bases, that have taken a model's parameters before: torch's DDP, FSDP1 and FSDP2, DeepSpeed.
WRAPPERS_OF_PARAMETERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
# What checkpoints, and models of older versions, call the linear layers of one expert.
EXPERTS_LAYERS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")


def reads_past_forward(parent: nn.Module, child: str) -> bool:
    """Whether parent reads the weight of its layer `child` itself, so that an adapter there would do nothing."""
    if isinstance(parent, (*READS_WEIGHTS, Adapter, Merging)):
        return True
    names = [name for c in type(parent).__mro__ for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")]
    known = [name for name in names if child in READS_WEIGHTS_OF.get(name, ())]
    return any(name not in READS_WEIGHTS_IF or READS_WEIGHTS_IF[name](parent) for name in known)


_QUANTISES = re.compile(r"quant|gptq|awq|hqq|aqlm|eetq|fp8|[48]bit", re.IGNORECASE)


def has_hooks(module: Any) -> bool:
    """Whether a call of module would run hooks of its own."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def warn_of_hooks(stacklevel: int) -> None:
    """Says what hooks on the base layer of an adapted one cost; stacklevel is the caller's, plus 1."""
    if not torch.compiler.is_compiling():
        warnings.warn(
            "base_layer: it has hooks, which run only if the adapters run as plain PyTorch, which is slower; register "
            "the hooks on the adapted layer to avoid this",
            stacklevel=stacklevel,
        )


def check_wrappable(linear: nn.Module) -> None:
    """Raises unless linear is an ``nn.Linear``, or quantised, whose computation an adapted layer reproduces."""
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if isinstance(linear, Adapter):
        raise TypeError(f"linear: expected an nn.Linear, got {kind}, which is already adapted")
    if not isinstance(linear, nn.Linear):
        # What quantises elsewhere has such a name; of an embedding that would say nothing.
        instead = f"; {SERVED}" if _QUANTISES.search(kind) else ""
        raise TypeError(f"linear: expected an nn.Linear, got {kind}{instead}")
    if isinstance(linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(f"linear: {kind} belongs to nn.MultiheadAttention, which reads its weight without calling it")
    if hasattr(linear, "_hf_hook"):
        raise ValueError(
            f"linear: {kind} has a hook of accelerate's (device_map), which the adapted layer would lose; call "
            "accelerate.hooks.remove_hook_from_submodules(model), adapt it, then dispatch_model"
        )
    if has_hooks(linear):
        raise ValueError(f"linear: {kind} has hooks, which the adapted layer would lose; remove them first")
    if packed(linear) is not None:
        return
    if getattr(linear.forward, "__func__", None) is not nn.Linear.forward:
        raise TypeError(f"linear: expected the forward of nn.Linear, got another one in {kind}; {SERVED}")
    weight = linear._parameters.get("weight")
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"linear: the weight of {kind} is computed or quantised, not a plain Parameter; {SERVED}")
    # torchao leaves the class nn.Linear and makes the weight a tensor subclass.
    if not (type(weight.data) in (Tensor, FakeTensor) or is_sharded(weight)):
        raise TypeError(
            f"linear: expected a plain tensor as the weight of {kind}, got {type(weight.data).__qualname__}"
        )


def refuse_wrapped(model: nn.Module, instead: str) -> None:
    """Raises ValueError where DDP, FSDP or DeepSpeed has wrapped model, or a part of it; says what to do instead."""
    for name, module in model.named_modules():
        for c in type(module).__mro__:
            if c.__name__ in WRAPPERS_OF_PARAMETERS:
                place = f"its {name!r}" if name else "it"
                raise ValueError(f"model: {place} is already wrapped by {c.__name__}; {instead}")


def refuse_meta(caller: str, parameters: Mapping[str, Tensor]) -> None:
    """Raises ValueError where one of the parameters has no values."""
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(
                f"{caller}: {name} is on the meta device and has no values: accelerate offloads it, or it was never "
                "loaded; load the weights first, without offload"
            )


def experts_without_layers(
    modules: Iterable[tuple[str, nn.Module]], wanted: Callable[[str], bool] | None = None
) -> list[str]:
    """Weights of experts that are bare parameters, most of them 3-D, and so have no layer to adapt.

    Args:
        modules: of a model, by dotted name.
        wanted: whether a name is one of those to adapt: the parameter's own, or the one that a linear layer of one
            expert would have; None for all.
    """
    found = []
    for path, module in modules:
        if isinstance(module, Adapter) or type(module).__module__.startswith("torch.nn."):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if "expert" not in f"{name}.{type(module).__name__}".lower() or parameter.dim() < 2 or "bias" in name:
                continue
            if wanted is None or any(map(wanted, (name, *(f"{path}.0.{layer}" for layer in EXPERTS_LAYERS)))):
                found.append(name)
    return found


def experts_say(experts: list[str]) -> str:
    """The words for what `experts_without_layers` found."""
    more = f" and {len(experts) - 3} more" if len(experts) > 3 else ""
    return f"experts without an nn.Linear get no adapter: {', '.join(experts[:3])}{more}"
