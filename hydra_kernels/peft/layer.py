"""HydraLinearLayer: one ``nn.Linear`` with named adapters, as PEFT switches, merges and saves them.

Both branches are linear in what they read, so adapters that are active together are one: with ``down = [down_1; ...]``
and ``up = [s_1 up_1, ...]`` the sum of their branches is a branch of the ranks' sum, and one call of `hydra_linear`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..adapter import Adapter, Merging, joined, operands_of, wide
from ..backend.interface import LOW_PRECISION
from ..functional import hydra_linear
from ..reference import drop, low_rank, merged_parameters
from ..refusals import has_hooks, refuse_meta, warn_of_hooks
from ..sharding import is_sharded
from ..weights import (
    base_forward,
    dtype_of,
    frozen_of,
    is_quantised,
    linear_of,
    plain_value,
    undo_repacking,
    warn_of_dense,
    warn_of_dtype,
)


# "Linear" is in the name so that PEFT's "all-linear" finds the layer when another adapter is added.
class HydraLinearLayer(Merging, BaseTunerLayer):
    """An ``nn.Linear`` with named Hydra adapters (`hydra_kernels.adapter.Adapter`) in ``hydra_adapters``.

    Args:
        base_layer: the ``nn.Linear`` [N, K], or a quantised layer that `hydra_kernels.weights` knows; PEFT freezes it.
            A quantised one does not change in `merge`: its merged weight and bias are kept beside it.
        adapter_name, options, inference_mode: of the first adapter, see `add_adapter`.
    """

    adapter_layer_names = ("hydra_adapters",)
    cast_input_dtype_enabled = True  # peft.helpers sets it; as in nn.Linear, no input is cast here outside autocast
    base_layer: nn.Linear
    unmerged_weight: Tensor | None = None
    unmerged_bias: Tensor | None = None
    # Move with the module, so unmerging works after a `.to()`.
    HELD = ("unmerged_weight", "unmerged_bias", "merged_weight", "merged_bias")

    def __init__(
        self, base_layer: nn.Linear, adapter_name: str, options: dict[str, Any], inference_mode: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # A size may be a 0-dimensional tensor.
        self.in_features, self.out_features = int(base_layer.in_features), int(base_layer.out_features)
        self.hydra_adapters = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.train(base_layer.training)
        self.add_adapter(adapter_name, options, inference_mode)

    def add_adapter(self, name: str, options: dict[str, Any], inference_mode: bool = False) -> None:
        """Adds an adapter at the start of its training, float32 over a low-precision base.

        It trains if it is active and not for inference.
        """
        device, dtype = self.base_layer.weight.device, dtype_of(self.base_layer)
        wide = torch.float32 if dtype in LOW_PRECISION else None
        adapter = Adapter(
            self.in_features, self.out_features, adapter_dtype=wide, device=device, dtype=dtype, **options
        )
        adapter.reset_adapters()
        self.hydra_adapters[name] = adapter.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor) -> Tensor:
        """h [*, N] for x [*, K]."""
        # Not self.base_layer: what is found through Module.__getattr__ costs host time in every forward.
        base: Any = self._modules["base_layer"]
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self.merged_adapters:
            self._check_unchanged()
            return base(x) if self.merged_weight is None else self._by_merged(x)
        active = [] if self._disable_adapters else self._named(self.active_adapters)
        if not active:
            return base_forward(base, x)
        if has_hooks(base):
            return self._around_hooks(x, active)
        if getattr(base.__dict__.get("_hf_hook"), "offload", False):
            raise ValueError(
                "base_layer: accelerate offloads its weight, which must be in memory; dispatch it without offload"
            )
        # Not in _parameters in the replicas that nn.DataParallel makes.
        weight, bias = frozen_of(base)
        if len(active) == 1:
            return active[0].adapted(x, weight, bias)
        routes = sorted({(adapter.form, adapter.backend) for adapter in active})
        if len(routes) > 1:
            raise ValueError(f"form, backend: expected the same in all active adapters, got {routes}")
        # Their parallel branches read different x. A sum of ranks would need them all, so these run as plain PyTorch.
        apart = [adapter for adapter in active if adapter.input_dropout] if self.training else []
        mask = _joined_mask(active, apart, x) if self.training else None
        (form, backend), operands = routes[0], _joined(active, apart, dropped=mask is not None)
        h = hydra_linear(x, weight, bias, **operands, mask=mask, form=form, backend=backend)
        for adapter in apart:
            h = h + _parallel_branch(adapter, x)
        return h

    def _around_hooks(self, x: Tensor, active: Sequence[Adapter]) -> Tensor:
        """h where the base layer is called, so that its hooks run; the branches are then plain PyTorch."""
        warn_of_hooks(stacklevel=5)
        h = y0 = base_forward(self.base_layer, x)
        for a in active:
            if a.A_down is not None:
                h = h + _parallel_branch(a, x)
            if a.B_down is not None and a.B_up is not None:
                h = h + low_rank(y0, a.B_down, a.B_up, a.B_down_bias, a.B_up_bias, a.scale_b, a.dropout, a.training)
        return h

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Puts adapters into the base layer's weight and bias (Eq. 11-12), beside those that are merged already.

        Args:
            safe_merge: whether to raise, and change nothing, where a result is not finite.
            adapter_names: None for the active ones.

        Raises:
            ValueError: where ``safe_merge`` finds a value that is not finite, where adapters with biases
                (``adapter_bias``) are over a base layer without a bias to add them to, and under FSDP2.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hydra_adapters]
        if not names:
            return
        base, merged = self.base_layer, [*self.merged_adapters, *names]
        weight, bias = self._merged_parameters(merged, safe_merge)
        if is_quantised(base):
            if not self.merged:
                warn_of_dense(base, stacklevel=3)
            self.merged_weight, self.merged_bias = weight, bias
        else:
            if not self.merged:
                self.unmerged_weight = base.weight.data
                self.unmerged_bias = None if base.bias is None else base.bias.data
            base.weight.data = weight
            if bias is not None:
                base.bias.data = bias
        self.merged_adapters = merged
        self._note(base, *self._named(merged))

    def unmerge(self) -> None:
        """Gives the base layer its own weight and bias back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.unmerged_weight is not None:
            self.base_layer.weight.data = self.unmerged_weight
        if self.unmerged_bias is not None:
            self.base_layer.bias.data = self.unmerged_bias
        self.unmerged_weight = self.unmerged_bias = self.merged_weight = self.merged_bias = None
        self.merged_adapters, self.merged_from = [], ()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base layer for good. Merged, it gets a weight of its own: an embedding tied to the old one stays."""
        base = self.base_layer
        names = [*self.merged_adapters, *check_adapters_to_merge(self, adapter_names)] if merge else []
        if self.merged_weight is not None and not merge:
            names = self.merged_adapters
        if self._named(names):
            weight, bias = self._merged_parameters(names, safe_merge)
            if is_quantised(base):
                warn_of_dtype(base, stacklevel=3)
                return linear_of(weight, bias).train(self.training)
            base.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                base.bias = nn.Parameter(bias, requires_grad=False)
        return base

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        undo_repacking(self.base_layer)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.merged:
            self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def __repr__(self) -> str:
        return f"hydra.{super().__repr__()}"

    def _named(self, names: Sequence[str]) -> list[Adapter]:
        """The adapters of those names that this layer has: adapters of one model need not adapt the same layers."""
        adapters: Any = self._modules["hydra_adapters"]._modules  # type: ignore[union-attr]
        return [adapters[name] for name in names if name in adapters]

    # Not in inference mode, even where the caller is: a later backward must be able to save the merged weight.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _merged_parameters(self, names: list[str], safe: bool) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the named adapters in them, computed from W0 and b0, which B reads."""
        refuse_meta("merge", dict(self.named_parameters()))
        if any(is_sharded(p) for p in self.parameters()):
            raise ValueError(
                "merge: the layer's parameters are sharded over processes; save the adapter and merge it in an "
                "unsharded model"
            )
        weight, bias = frozen_of(self.base_layer)
        if self.unmerged_weight is not None:
            weight, bias = self.unmerged_weight, self.unmerged_bias
        merged = merged_parameters(plain_value(weight), bias, **_joined(self._named(names)))
        if merged[1] is not None and bias is None:
            raise ValueError("merge: expected a bias in the base layer, to which adapter biases are added, got none")
        if safe and not all(part is None or bool(part.isfinite().all()) for part in merged):
            raise ValueError(f"merge: expected finite weights, got infinity or NaN from {', '.join(names)}")
        return merged


def _parallel_branch(a: Any, x: Tensor) -> Tensor:
    """Of one adapter that has it, in plain PyTorch."""
    dropped = drop(x, a.input_dropout, a.training)
    return low_rank(dropped, a.A_down, a.A_up, a.A_down_bias, a.A_up_bias, a.scale_a, a.dropout, a.training)


def _joined(adapters: Sequence[Adapter], apart: Sequence[Adapter] = (), dropped: bool = False) -> dict[str, Any]:
    """The operands of the one adapter that acts as all of these, without the parallel branches of those ``apart``.

    1/(1-p) of the bottleneck's dropout is in its up projections where ``dropped``.
    """
    parts = [operands_of(adapter) for adapter in adapters]
    for part, adapter in zip(parts, adapters, strict=True):
        for name in ("A_up", "B_up"):
            if dropped and part[name] is not None:
                part[name] = wide(part[name]) / (1 - adapter.dropout)
        if adapter in apart:
            part |= dict.fromkeys(("A_down", "A_up", "A_down_bias", "A_up_bias"))
    return parts[0] if len(parts) == 1 else joined(parts)


def _joined_mask(adapters: Sequence[Adapter], apart: Sequence[Adapter], x: Tensor) -> Tensor | None:
    """The mask [M, sum of r_a + sum of r_b] of the bottleneck's dropout over x [*, K], of zeros and ones.

    None where no adapter drops. The parallel branches of those ``apart`` have no columns in it.
    """
    if not any(adapter.dropout for adapter in adapters):
        return None
    M = x.shape[:-1].numel()
    ranks = [(a.r_a, 1 - a.dropout) for a in adapters if a not in apart] + [(a.r_b, 1 - a.dropout) for a in adapters]
    return torch.cat([x.new_empty(M, r).bernoulli_(keep) for r, keep in ranks], dim=1)
