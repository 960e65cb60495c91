"""Quantised W0: the one place that reads the formats of other libraries.

A quantised W0 [N, K] is dequantised once in the forward and once in the backward of a layer, and only its packed
tensors are saved between them. All formulas hold with W0 := `Packed.dense`. A further format is three functions: from a
layer to its `Packed` in `READERS`; from it to its tensors, and from these to the dense weight, in `FORMATS`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Packed(NamedTuple):
    """A quantised W0 as a call of `hydra_linear` takes it.

    ``dtype`` is the one in which the layer computes, whatever x has; None for x's own. ``original`` is the weight's
    before it was quantised; None where the library has not kept it. ``base`` is the layer itself. With ``numbers`` the
    ``tensors``, which `ready` looks up, give the dense weight; they are saved for the backward, plain and detached.
    """

    format: str  # a key of FORMATS
    shape: tuple[int, int]  # N, K
    device: torch.device
    dtype: torch.dtype | None
    original: torch.dtype | None
    base: nn.Module | None
    own_products: bool = True  # whether the base's forward is x W0^T with that very W0, for any x
    tensors: tuple[Tensor, ...] = ()
    numbers: tuple[int, ...] = ()

    def ready(self) -> Packed:
        """With its tensors. Where a forward of the base has laid them out for itself, this undoes it."""
        tensors, numbers = FORMATS[self.format].contents(self.base)
        return self._replace(tensors=tensors, numbers=numbers)

    def value(self) -> Tensor:
        """W0 [N, K] as dense copies of the layer hold it, in its compute dtype or its original one."""
        return (self if self.tensors else self.ready()).dense(_plain_dtype(self))

    def forward(self, x: Tensor) -> Tensor:
        """The base's own forward, which may not need W0 dense. It leaves its bias and its settings as they were."""
        base: Any = self.base
        if x.numel() == 0 and not torch.is_grad_enabled():
            return x.new_empty(*x.shape[:-1], self.shape[0])  # bitsandbytes' kernel for AVX512-BF16 ends the process
        x = x.contiguous()  # bitsandbytes' kernel for AVX512-BF16 passes over strides
        graph = torch.is_grad_enabled()
        if graph:
            self.ready()
        state = getattr(base.weight, "quant_state", None)
        if _is_repacked(state):
            if self.dtype is not None and base.bias is None:
                return base(x)  # there is nothing left that it could change
            state = None
        elif self.format in ("nf4", "fp4"):
            _refuse_cast(base)
        kept = {name: base.__dict__[name] for name in _SETTINGS if name in base.__dict__}
        state = copy.copy(state)
        bias = None if base.bias is None else base.bias.data
        if state is not None and (graph or self.shape[0] % 32 or self.shape[1] % state.blocksize):
            base.support_avx512bf16_for_cpu = False  # its layout for that has no gradient and no such sizes
        try:
            y0: Tensor = base(x)
        finally:
            base.__dict__.update(kept)
            if bias is not None and base.bias.dtype != bias.dtype:
                base.bias.data = bias
            if state is not None and _is_repacked(base.weight.quant_state):
                base.weight.quant_state.before_repacking = state  # the repacked one has rounded it
        return y0

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W0 [N, K] in a dtype, a new tensor."""
        return dense(self.format, self.shape, self.tensors, self.numbers, dtype)


def dense(
    format: str, shape: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`Packed.dense` of what it keeps."""
    # The libraries have no float64.
    made = FORMATS[format].dense(format, shape, tensors, numbers, torch.float32 if dtype == torch.float64 else dtype)
    return made.to(dtype)


# What a forward of bitsandbytes' layers changes for good, or we for one of them.
_SETTINGS = ("compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")


def packed(layer: nn.Module) -> Packed | None:
    """The quantised weight of a linear layer; None where it is not quantised.

    Raises:
        TypeError: for a layer whose weight is quantised in a way that is not served, naming it; ValueError for one
            that waits for its quantisation.
    """
    reader = _reader(layer)
    return None if reader is None else reader(layer)


def _plain_dtype(found: Packed) -> torch.dtype:
    return found.dtype or found.original or torch.get_default_dtype()


def warn_of_dtype(layer: nn.Module, stacklevel: int) -> None:
    """Where a plain layer in place of this one has a dtype that may not be the model's."""
    found = packed(layer)
    if found is not None and found.dtype is None and found.original is None:
        warnings.warn(
            f"{_kind(layer)} does not record its original dtype, so the plain layer is in {_plain_dtype(found)}; if "
            "the model has another dtype, cast it, such as model.to(torch.bfloat16)",
            stacklevel=stacklevel,
        )


def warn_of_dense(layer: nn.Module, stacklevel: int) -> None:
    """Says what a merged layer holds beside this quantised one; stacklevel is the caller's, plus 1."""
    warnings.warn(
        f"merge: the base is quantised, so a merged layer also holds a dense weight in {dtype_of(layer)}",
        stacklevel=stacklevel,
    )


def is_quantised(layer: nn.Module) -> bool:
    """Whether `packed` knows the layer's kind."""
    return _reader(layer) is not None


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a base layer's weight; if it is quantised the compute dtype, else that of what it was made of."""
    found = packed(layer)
    weight: Any = layer.weight
    return weight.dtype if found is None else _plain_dtype(found)


def sizes(model: nn.Module) -> dict[int, int]:
    """How many numbers W0 has in each quantised layer of model, by its weight's id: one element may hold several."""
    layers: list[Any] = [module for module in model.modules() if is_quantised(module)]
    return {id(layer.weight): layer.out_features * layer.in_features for layer in layers}


def frozen_of(layer: Any) -> tuple[Any, Tensor | None]:
    """Weight, `Packed` where it is quantised, and bias of a base layer."""
    return packed(layer) or layer.weight, layer.bias


def base_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """y0 by a base layer's own forward; a quantised layer stays as it is (`Packed.forward`)."""
    found = packed(layer)
    y0: Tensor = layer(x) if found is None else found.forward(x)
    return y0


def plain_value(weight: Tensor | Packed) -> Tensor:
    """A weight [N, K] as it is, or dequantised."""
    return weight.value() if isinstance(weight, Packed) else weight


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen ``nn.Linear`` of these very tensors."""
    N, K = weight.shape
    linear = nn.Linear(K, N, bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


# --- bitsandbytes, 4 bits: NF4 and FP4, with and without double quantisation ------------------------------------------


def _four_bits(layer: Any) -> Packed:
    state = _state_of(layer)
    if state is None:
        raise ValueError(f"linear: {_kind(layer)} is not quantised yet; move it to a device first, such as layer.to(0)")
    # Until the first forward sets it for good, the layer computes in x's dtype.
    dtype = layer.compute_dtype if layer.compute_type_is_set else None
    original = getattr(state, "original_dtype", state.dtype)
    return Packed(state.quant_type, tuple(state.shape), layer.weight.device, dtype, original, layer)


def _contents_of_four_bits(layer: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    state = _state_of(layer)
    # Repacked, or so that the library itself has undone it, for a state_dict: with other numbers.
    if state.absmax.dim() > 1 or hasattr(state, "before_repacking"):
        state = _unpacked(layer, state)
    _refuse_cast(layer)
    tensors, numbers = (_plain(layer.weight), state.absmax), (state.blocksize,)
    if state.nested:
        return (*tensors, state.state2.absmax, state.state2.code, state.offset), (*numbers, state.state2.blocksize)
    return tensors, numbers


def _refuse_cast(layer: Any) -> None:
    """Raises where packed numbers were cast as if they were weights. FSDP's weight has lost the storage's dtype."""
    weight = layer.weight
    storage = getattr(weight, "quant_storage", layer.quant_storage)
    if weight.dtype != storage:
        raise ValueError(
            f"weight: a cast from {storage} to {weight.dtype} has destroyed its packed numbers; load the layer again, "
            "and cast the model before it is quantised or use quant_storage=torch.uint8; under FSDP2 set the policy's "
            "param_dtype to the quant_storage"
        )


def _state_of(layer: Any) -> Any:
    return getattr(layer.weight, "quant_state", None) or layer.quant_state  # FSDP loses the weight's own


def undo_repacking(layer: nn.Module) -> None:
    """Before a state_dict of a base layer: the library then undoes the layout below itself, and loses numbers."""
    state = getattr(layer.weight, "quant_state", None)
    if _is_repacked(state):
        _unpacked(layer, state)


# Not in inference mode, even where the caller is: a later backward must be able to save the weight.
@torch.inference_mode(False)
@torch.no_grad()
def _unpacked(layer: Any, state: Any) -> Any:
    """Undoes the layout that an eval forward on a CPU with AVX512-BF16 leaves, which nothing else can read."""
    import bitsandbytes

    weight = layer.weight
    if _is_repacked(state):
        weight.data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state = getattr(state, "before_repacking", state)
    if state.absmax.dim() > 1:  # without double quantisation the library leaves it as its layout has it
        state.absmax = state.absmax.t().reshape(-1).to(torch.float32)
    state.to(weight.device)
    weight.quant_state = layer.quant_state = state
    return state


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dense_four_bits(
    quant_type: str, shape: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> Tensor:
    ops: Any = torch.ops.bitsandbytes
    data, absmax = tensors[:2]
    if len(tensors) > 2:
        absmax_of_absmax, code, offset = tensors[2:]
        absmax = ops.dequantize_blockwise(absmax, absmax_of_absmax, code, numbers[1], torch.float32) + offset
    made: Tensor = ops.dequantize_4bit(data, absmax, numbers[0], quant_type, shape, dtype)
    return made


# --- bitsandbytes, 8 bits, as weights: without LLM.int8's rounding of activations -------------------------------------


def _eight_bits(layer: Any) -> Packed:
    weight, state = layer.weight, layer.state
    if state.has_fp16_weights:
        raise TypeError(f"linear: expected {_kind(layer)} with has_fp16_weights=False, a frozen weight, got True")
    if state.SCB is None and not hasattr(weight, "SCB"):
        raise ValueError(
            f"linear: the scales of {_kind(layer)} are lost, since a tracer has replaced its weight; with torch.export "
            "pass strict=True"
        )
    if (state.SCB is None and weight.SCB is None) or weight.dtype != torch.int8:
        raise ValueError(f"linear: {_kind(layer)} is not quantised yet; move it to a device first, such as layer.to(0)")
    # The library quantises from float16 and keeps no other dtype.
    original = None if layer.bias is None else layer.bias.dtype
    return Packed("8bit", tuple(weight.shape), weight.device, None, original, layer, own_products=False)


def _contents_of_eight_bits(layer: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return (_plain(layer.weight), scales), ()


def _dense_eight_bits(
    _: str, shape: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> Tensor:
    data, scales = tensors
    return _scaled(data, scales[:, None] * (1 / 127), None, dtype)


# --- torchao, int8 weights --------------------------------------------------------------------------------------------


def _of_torchao(layer: Any) -> Packed:
    weight = layer.weight
    kind = f"{type(weight).__module__}.{type(weight).__qualname__}"
    if type(weight).__name__ != "Int8Tensor":
        raise TypeError(f"linear: expected torchao's Int8Tensor as the weight, got {kind}; {SERVED}")
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        raise TypeError(f"linear: expected weight-only int8, got {kind}, which quantises the activations too")
    return Packed("int8", tuple(weight.shape), weight.device, None, weight.dtype, layer)


def _contents_of_torchao(layer: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    weight = layer.weight
    zero_point = () if weight.zero_point is None else (weight.zero_point,)
    return (weight.qdata, weight.scale, *zero_point), tuple(weight.block_size)


def _dense_of_torchao(
    _: str, shape: Sequence[int], tensors: Sequence[Tensor], numbers: Sequence[int], dtype: torch.dtype
) -> Tensor:
    (data, scale, *rest), (rows, columns) = tensors, numbers
    # Blocks of [rows, columns] of W0 share a scale and a zero point.
    blocks = data.view(scale.shape[0], rows, scale.shape[1], columns)
    zero_point = rest[0][:, None, :, None] if rest else None
    return _scaled(blocks, scale[:, None, :, None], zero_point, dtype).view(shape)


# --- what formats share -----------------------------------------------------------------------------------------------


def _plain(weight: Tensor) -> Tensor:
    """The packed numbers alone: a later change of ``weight.data`` does not reach what a graph has saved of them."""
    # torch.compile cannot trace as_subclass, and nothing can change the weight between its graphs.
    return weight if torch.compiler.is_compiling() else weight.detach().as_subclass(Tensor)


def _scaled(data: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(data - zero_point) * scale, computed in float32 and rounded once, for scales that broadcast over data."""
    if data.device.type != "cpu" or torch.compiler.is_compiling():
        values = data if zero_point is None else data.to(torch.float32) - zero_point
        return (values * scale).to(dtype)
    out = torch.empty(data.shape, dtype=dtype, device=data.device)
    # Part by part: else a float32 copy of all of it would be in memory beside the result.
    for part, few, s, z in zip(
        out.split(_PART), data.split(_PART), scale.split(_PART), _parts(zero_point, scale), strict=True
    ):
        part.copy_(few * s if z is None else (few.to(torch.float32) - z) * s)
    return out


_PART = 64  # rows


def _parts(t: Tensor | None, like: Tensor) -> list[Tensor | None]:
    return [None] * math.ceil(len(like) / _PART) if t is None else list(t.split(_PART))


# --- the table of formats ---------------------------------------------------------------------------------------------

SERVED = (
    "supported quantised layers: bitsandbytes' Linear4bit and Linear8bitLt, torchao's int8 weight-only; to add a "
    "format, see hydra_kernels/weights.py"
)
# By class, so that no library is imported here.
READERS: dict[str, Callable[[Any], Packed]] = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bits,
    "bitsandbytes.nn.modules.Linear8bitLt": _eight_bits,
}


class Format(NamedTuple):
    contents: Callable[[Any], tuple[tuple[Tensor, ...], tuple[int, ...]]]
    dense: Callable[[str, Sequence[int], Sequence[Tensor], Sequence[int], torch.dtype], Tensor]


FORMATS = {
    "nf4": Format(_contents_of_four_bits, _dense_four_bits),
    "fp4": Format(_contents_of_four_bits, _dense_four_bits),
    "8bit": Format(_contents_of_eight_bits, _dense_eight_bits),
    "int8": Format(_contents_of_torchao, _dense_of_torchao),
}


def _reader(layer: nn.Module) -> Callable[[Any], Packed] | None:
    if type(layer) is nn.Linear:
        weight = layer._parameters.get("weight")
        if type(weight) is nn.Parameter:
            return None
        return _of_torchao if type(weight).__module__.partition(".")[0] == "torchao" else None
    for c in type(layer).__mro__:
        if c.__module__ == "bitsandbytes.nn.modules" and (reader := READERS.get(f"{c.__module__}.{c.__qualname__}")):
            # A subclass with another forward computes something else.
            return reader if type(layer).forward is c.__dict__["forward"] else None
    return None


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
