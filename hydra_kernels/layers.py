"""HydraLinear, LoRALinear and SeqLoRALinear: their parameters, initialisation, forward, merging and conversion."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .adapter import Adapter, Device, Merging, check_count
from .backend.interface import LOW_PRECISION
from .checks import check_finite
from .functional import hydra_linear
from .reference import drop, low_rank
from .refusals import check_wrappable, has_hooks, refuse_meta, warn_of_hooks
from .sharding import mesh_dimensions
from .weights import Packed, dtype_of, frozen_of, is_quantised, linear_of, undo_repacking, warn_of_dense, warn_of_dtype

Layer = TypeVar("Layer", bound="HydraLinear")


class Branches(NamedTuple):
    """The three summands of h (Fig. 4), each [*, N]."""

    pretrained: Tensor
    parallel: Tensor
    sequential: Tensor


class HydraLinear(Merging, Adapter):
    """A frozen linear layer with two low-rank branches (Eq. 9-10 of arXiv 2309.06922), in place of an ``nn.Linear``.

    ``h = y0 + scale_a A_up drop(A_down x') + scale_b B_up drop(B_down y0)`` with ``y0 = weight x + bias`` and x' = x
    under input dropout; x [*, K] and h [*, N] have weight's dtype. The up projections start at zero, so training starts
    at exactly the frozen layer.

    Args:
        in_features, out_features: K and N.
        bias: whether the frozen layer has a bias.
        r_a, r_b: ranks of the parallel and of the sequential branch; 0 leaves the branch out.
        scale_a, scale_b: factors of the branches; with ``learnable_scale`` their initial values.
        learnable_scale: makes the factors trainable 0-dimensional Parameters.
        dropout: probability in [0, 1) of zeroing an element of the rank-r bottleneck in training mode.
        input_dropout: likewise, of zeroing an element of x as the parallel branch reads it: LoRA's ``lora_dropout``.
        adapter_bias: puts a trainable bias on each down and each up projection.
        adapter_dtype: of the adapters: None for the base's dtype, or float32 over a bfloat16 or float16 base.
        init_std: standard deviation of the down projections, None for 1/sqrt(fan_in).
        form, backend: as for :func:`hydra_kernels.hydra_linear`.
        device, dtype: of the base, as in ``nn.Linear``.

    Parameters: ``weight`` [N, K] and ``bias`` [N], frozen; ``A_down`` [r_a, K], ``A_up`` [N, r_a], ``B_down`` [r_b, N],
    ``B_up`` [N, r_b]; where asked for ``A_down_bias`` [r_a], ``A_up_bias`` [N], ``B_down_bias`` [r_b], ``B_up_bias``
    [N], ``scale_a`` and ``scale_b`` []. What is absent is None; a scale that is not learnable is a float.

    Raises:
        ValueError, TypeError: naming the argument, at construction; in the forward, as ``hydra_linear``.
    """

    weight: Tensor
    bias: Tensor | None
    HELD = ("merged_weight", "merged_bias")
    # How tensor parallelism computes h (`hydra_kernels.parallel`), in place of the layer alone.
    parallel: Callable[[HydraLinear, Tensor], Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r_a: int = 4,
        r_b: int = 4,
        scale_a: float = 1.0,
        scale_b: float = 1.0,
        learnable_scale: bool = False,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        adapter_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_std: float | None = None,
        form: str = "auto",
        backend: str = "auto",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            r_a=r_a,
            r_b=r_b,
            scale_a=scale_a,
            scale_b=scale_b,
            learnable_scale=learnable_scale,
            dropout=dropout,
            input_dropout=input_dropout,
            adapter_bias=adapter_bias,
            adapter_dtype=adapter_dtype,
            init_std=init_std,
            form=form,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.adapters_enabled = True

        def frozen(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.weight = frozen(out_features, in_features)
        self.register_parameter("bias", frozen(out_features) if bias else None)
        self.reset_parameters()

    @classmethod
    def from_linear(cls: type[Layer], linear: nn.Linear, **options: Any) -> Layer:
        """An adapted layer that holds linear's own Parameter objects and freezes them: tied weights stay tied.

        Args:
            linear: an ``nn.Linear`` or a subclass that keeps its forward, without hooks or parametrizations; or a
                quantised layer that `hydra_kernels.weights` knows (`QuantisedBase`), whose adapters are float32.
            options: of the constructor, except in_features, out_features, bias, device and dtype.

        Raises:
            TypeError, ValueError: for anything else, naming its class; linear is then unchanged.
        """
        check_wrappable(linear)
        if is_quantised(linear):
            return _over_quantised(cls, linear, options)
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        K, N = int(linear.in_features), int(linear.out_features)  # a size may be a 0-dimensional tensor
        layer = cls(K, N, has_bias, device="meta", dtype=dtype, **options)
        layer.weight, layer.bias = linear.weight, linear.bias
        for name, parameter in layer.adapters().items():
            setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=linear.weight.device)))
        layer.reset_adapters()
        layer.weight.requires_grad_(False)
        if layer.bias is not None:
            layer.bias.requires_grad_(False)
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draws the base as ``nn.Linear`` does, then the adapters."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)
        self.reset_adapters()

    def reset_adapters(self) -> None:
        """Puts the layer back at the start of training: down projections Gaussian, up projections and biases zero."""
        self.unmerge()
        super().reset_adapters()

    def forward(self, x: Tensor) -> Tensor:
        """h [*, N] for x [*, K]."""
        if self.parallel is not None:
            return self.parallel(self, x)
        if not self.adapters_enabled:
            return self._y0(x)
        if self.merged_weight is not None:
            self._check_unchanged()
            return hydra_linear(x, self.merged_weight, self.merged_bias, None, None, None, None)
        return self.adapted(x, self.weight, self.bias)

    def frozen(self) -> tuple[Tensor | Packed, Tensor | None]:
        """W0 [N, K], packed where it is quantised, and b0 [N] or None."""
        return self.weight, self.bias

    def branches(self, x: Tensor) -> Branches:
        """The three summands of h for x [*, K] (Fig. 4), from W0 also while merged; zeros for a branch that is off."""
        y0 = self._y0(x)
        parallel = sequential = torch.zeros_like(y0)
        p = self.dropout
        if self.adapters_enabled and self.A_down is not None and self.A_up is not None:
            dropped = drop(x, self.input_dropout, self.training)
            parallel = low_rank(
                dropped, self.A_down, self.A_up, self.A_down_bias, self.A_up_bias, self.scale_a, p, self.training
            )
        if self.adapters_enabled and self.B_down is not None and self.B_up is not None:
            sequential = low_rank(
                y0, self.B_down, self.B_up, self.B_down_bias, self.B_up_bias, self.scale_b, p, self.training
            )
        return Branches(y0, parallel, sequential)

    def _y0(self, x: Tensor) -> Tensor:
        return hydra_linear(x, *self.frozen(), None, None, None, None)

    def enable_adapters(self) -> None:
        """Undoes `disable_adapters`."""
        self.adapters_enabled = True

    def disable_adapters(self) -> None:
        """Makes the forward that of the frozen layer, merged or not."""
        self.adapters_enabled = False

    @property
    def merged(self) -> bool:
        """Whether the forward uses the merged weight."""
        return self.merged_weight is not None

    def merge(self) -> None:
        """Makes the forward one plain product with W0 + s_a A_up A_down + s_b B_up B_down W0 (Eq. 11-12).

        The merged weight and bias are not in the state_dict. The Parameters do not change, and gradients flow to x
        alone. `unmerge`, `train` and `load_state_dict` end the mode. If a Parameter is changed in place meanwhile, the
        forward raises ValueError, and a second merge merges again; otherwise a second merge does nothing.

        Raises:
            ValueError: in training mode, under FSDP2, and where a parameter is on the meta device.
        """
        self._check_whole("merge", dimensions=0 if self.parallel is None else 1)
        if self.training:
            raise ValueError(
                "merge: the layer is in training mode, in which merged adapters would get no gradient; call eval()"
            )
        if not self.merged or self._is_outdated():
            self.merged_weight, self.merged_bias = self.merged_with(*self.frozen())
            self._note(self)

    def unmerge(self) -> None:
        """Drops the merged weight and bias: the layer is bit for bit what it was."""
        self.merged_weight = self.merged_bias = None
        self.merged_from = ()

    def to_linear(self) -> nn.Linear:
        """A plain, frozen ``nn.Linear`` with the merged weight and bias as new tensors.

        Raises:
            ValueError: under FSDP2 and tensor parallelism, and where a parameter is on the meta device.
        """
        self._check_whole("to_linear")
        return linear_of(*self.merged_with(*self.frozen())).train(self.training)

    def train(self: Layer, mode: bool = True) -> Layer:
        if mode:
            self.unmerge()
        return super().train(mode)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
        shown += super().extra_repr() + (", merged=True" if self.merged else "")
        return shown + ("" if self.adapters_enabled else ", adapters_enabled=False")

    def _check_whole(self, caller: str, dimensions: int = 0) -> None:
        """Raises where parameters have no values, or are sharded over a mesh of more dimensions."""
        refuse_meta(caller, dict(self.named_parameters()))
        if any(mesh_dimensions(p) > dimensions for p in self.parameters()):
            raise ValueError(
                f"{caller}: the layer's parameters are sharded over processes; call save_adapters on every rank, "
                f"load_adapters in an unsharded model, and {caller} there"
            )

    def _replicate_for_data_parallel(self) -> HydraLinear:
        replica: Any = super()._replicate_for_data_parallel()
        replica.unmerge()  # what is merged stays on the first device; a replica's Parameters are on its own
        return replica

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)


class LoRALinear(HydraLinear):
    """A frozen linear layer with LoRA in parallel (Eq. 2): `HydraLinear` without a sequential branch.

    Args:
        in_features, out_features, bias: of the frozen layer, as in ``nn.Linear``.
        r: rank, kept as ``r_a``; 0 leaves the frozen layer alone.
        scale: factor of the branch, such as LoRA's alpha / r; kept as ``scale_a``.
        options: all other options of `HydraLinear`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, r: int = 8, scale: float = 1.0, **options: Any
    ) -> None:
        check_count("r", r, 0)
        check_finite("scale", scale)
        super().__init__(in_features, out_features, bias, r_a=r, r_b=0, scale_a=scale, scale_b=1.0, **options)


class SeqLoRALinear(HydraLinear):
    """A frozen linear layer with SeqLoRA in sequence (Eq. 6): `HydraLinear` without a parallel branch.

    Args:
        in_features, out_features, bias: of the frozen layer, as in ``nn.Linear``.
        r: rank, kept as ``r_b``; 0 leaves the frozen layer alone.
        scale: factor of the branch; kept as ``scale_b``.
        options: all other options of `HydraLinear`.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, r: int = 8, scale: float = 1.0, **options: Any
    ) -> None:
        check_count("r", r, 0)
        check_finite("scale", scale)
        super().__init__(in_features, out_features, bias, r_a=0, r_b=r, scale_a=1.0, scale_b=scale, **options)


class QuantisedBase(HydraLinear):
    """What `from_linear` makes of a quantised layer, which stays as it is in ``base_layer``; ``weight`` is its own.

    The layer computes in the base's ``compute_dtype``, or in x's where that is not set, and h has x's dtype. x may have
    any floating dtype, but float64 without a ``compute_dtype`` only where adapters and bias are float64 too. A merged
    layer holds a dense weight, and `merge` warns of that. Hooks on ``base_layer`` run beside branches in plain PyTorch.
    """

    base_layer: nn.Module

    weight: Any = property(lambda self: self.base_layer.weight)
    bias: Any = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """h [*, N] for x [*, K]."""
        if not self.adapters_enabled:
            return self._y0(x)
        if self.merged_weight is not None:
            self._check_unchanged()
            return self._by_merged(x)
        if has_hooks(self._modules["base_layer"]):
            warn_of_hooks(stacklevel=3)
            pretrained, parallel, sequential = self.branches(x)
            return pretrained + parallel + sequential
        return self.adapted(x, *self.frozen())

    def frozen(self) -> tuple[Tensor | Packed, Tensor | None]:
        base: Any = self._modules["base_layer"]
        return frozen_of(base)

    def merge(self) -> None:
        if not self.merged:
            warn_of_dense(self.base_layer, stacklevel=3)
        super().merge()

    def to_linear(self) -> nn.Linear:
        warn_of_dtype(self.base_layer, stacklevel=3)
        return super().to_linear()

    def reset_parameters(self) -> None:
        self.reset_adapters()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        undo_repacking(self.base_layer)
        super()._save_to_state_dict(*args, **kwargs)


class QuantisedHydraLinear(QuantisedBase):
    """`HydraLinear` over a quantised base."""


class QuantisedLoRALinear(QuantisedBase, LoRALinear):
    """`LoRALinear` over a quantised base."""


class QuantisedSeqLoRALinear(QuantisedBase, SeqLoRALinear):
    """`SeqLoRALinear` over a quantised base."""


_QUANTISED: dict[type[HydraLinear], type[QuantisedBase]] = {
    HydraLinear: QuantisedHydraLinear,
    LoRALinear: QuantisedLoRALinear,
    SeqLoRALinear: QuantisedSeqLoRALinear,
}


def _over_quantised(cls: type[Layer], linear: nn.Linear, options: dict[str, Any]) -> Layer:
    if cls not in _QUANTISED:
        raise TypeError(
            f"linear: {cls.__name__} does not support a quantised layer, got {type(linear).__qualname__}; use "
            "HydraLinear, LoRALinear or SeqLoRALinear"
        )
    dtype = dtype_of(linear)
    if dtype in LOW_PRECISION:
        options = {"adapter_dtype": torch.float32} | options
    layer: Any = _QUANTISED[cls](
        linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=dtype, **options
    )
    del layer._parameters["weight"], layer._parameters["bias"]
    layer.base_layer = linear
    for name, parameter in layer.adapters().items():
        setattr(layer, name, nn.Parameter(torch.empty_like(parameter, device=linear.weight.device)))
    layer.reset_adapters()
    linear.requires_grad_(False)
    return layer.train(linear.training)
