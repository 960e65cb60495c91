"""Tensor parallelism: `ColwiseHydra` and `RowwiseHydra`, for adapted layers what torch's styles are for ``nn.Linear``.

And `keep_scales_whole`, for FSDP2. Not imported by ``import hydra_kernels``.

Each of n ranks holds a part of what is sharded; a part is marked '. Ranks send each other what torch's styles send for
an ``nn.Linear``, and products with a side of R = r_a + r_b, packed into one all-reduce a pass. In training with dropout
the mask [M, R] is sent too, with input dropout a seed, which the first rank draws.

Row-wise: x' [M, K/n], W0' [N, K/n] and A_down' [r_a, K/n], everything else whole. h is linear in x, in b0 and in the
biases. So h is the sum over ranks of Eq. 9-10 in x' and W0', where only the first rank has the biases. That sum is what
torch's style sends. The gradients of the whole parameters are sums over ranks, too.

Column-wise: W0' [N/n, K], b0', A_up', B_up', a_u', b_u' and B_down' [r_b, N/n]; x, A_down and all of size R whole.
- composed: with C = sum B_down' W0' [r_b, K] and c = sum B_down' b0' [r_b] both branches are one LoRA of rank R,
      h' = x W0'^T + b0' + (mask * (x [A_down; C]^T + [a_d, c + b_d])) [s_a A_up', s_b B_up']^T + s_a a_u' + s_b b_u',
  which every kernel can compute. In low precision D has rows for C_hi and for C_lo, so nothing of C is lost;
- kept, where `choice` keeps y0: y0' = x W0'^T + b0' and sum y0' B_down'^T [M, r_b].
If there is a sequential branch, a parallel branch with input dropout runs as plain PyTorch in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn import functional as F

from .autograd import computed_in
from .backend import TABLE
from .backend.interface import LOW_PRECISION, Operands
from .backend.philox import draw_seed, kept
from .choose.choice import choose
from .choose.machine import here
from .functional import applied, hydra_linear
from .layers import HydraLinear, QuantisedBase
from .private import found
from .reference import drop, low_rank
from .scales import keep_scales_whole, summed
from .sharding import is_sharded

__all__ = ["ColwiseHydra", "RowwiseHydra", "keep_scales_whole"]

_COLUMNS = {name: Shard(0) for name in ("weight", "bias", "A_up", "B_up", "A_up_bias", "B_up_bias")} | {
    "B_down": Shard(1)
}
_ROWS = {"weight": Shard(1), "A_down": Shard(1)}
found("torch.distributed.tensor.parallel.style", "ParallelStyle._apply")  # which both styles override
Masks = tuple[Tensor | None, Tensor | None]  # of the two branches
Local = dict[str, Any]  # of a layer, by name: this rank's parts of the parameters, None where absent, and float scales


class ColwiseHydra(ColwiseParallel):
    """Shards an adapted layer over its outputs N, as torch's ``ColwiseParallel`` does an ``nn.Linear``.

    For ``parallelize_module``, with torch's arguments and defaults:

    Args:
        input_layouts: how x [*, K] comes, if not as a DTensor; replicated by default.
        output_layouts: how h [*, N] leaves; sharded over its last dimension by default.
        use_local_output: whether h leaves as a plain tensor, not as a DTensor.

    Raises:
        TypeError, ValueError: where the module is not an adapted layer, is merged or sharded already, where N is no
            multiple of the number of ranks, or the mesh has more than one dimension.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked("ColwiseHydra", module, device_mesh, "out_features")
        return _spread(layer, device_mesh, _COLUMNS, self)

    def __call__(self, layer: HydraLinear, x: Tensor) -> Tensor:
        mesh = _mesh(layer)
        x = _enter(x, mesh, self.input_layouts, Replicate(), Partial())  # each rank's dx is a summand
        h = _plain(layer, x, _COLUMNS) if _is_plain(layer) else _column_wise(layer, x, mesh)
        return _leave(h, mesh, Shard(-1), self.output_layouts, self.use_local_output)


class RowwiseHydra(RowwiseParallel):
    """Shards an adapted layer over its inputs K, as torch's ``RowwiseParallel`` does an ``nn.Linear``.

    For ``parallelize_module``, with torch's arguments and defaults:

    Args:
        input_layouts: how x [*, K] comes, if not as a DTensor; sharded over its last dimension by default.
        output_layouts: how h [*, N] leaves; replicated by default.
        use_local_output: whether h leaves as a plain tensor, not as a DTensor.

    Raises:
        TypeError, ValueError: as `ColwiseHydra`, where K is no multiple of the number of ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked("RowwiseHydra", module, device_mesh, "in_features")
        return _spread(layer, device_mesh, _ROWS, self)

    def __call__(self, layer: HydraLinear, x: Tensor) -> Tensor:
        mesh, last = _mesh(layer), Shard(x.dim() - 1)
        x = _enter(x, mesh, self.input_layouts, last, last)
        first = mesh.get_local_rank() == 0
        h = _plain(layer, x, _ROWS, first) if _is_plain(layer) else _row_wise(layer, x, mesh, first)
        return _leave(h, mesh, Partial(), self.output_layouts, self.use_local_output)


def _checked(style: str, module: nn.Module, mesh: DeviceMesh, size: str) -> HydraLinear:
    if not isinstance(module, HydraLinear):
        raise TypeError(
            f"{style}: expected an adapted layer, got {type(module).__name__}; use one of torch's own styles for it"
        )
    if isinstance(module, QuantisedBase):
        raise TypeError(f"{style}: expected a layer without quantisation, since packed weights cannot be sharded")
    if mesh.ndim != 1:
        raise ValueError(f"{style}: expected a mesh of one dimension, got {mesh.ndim}; pass one of them, mesh['name']")
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError(f"{style}: the layer is already sharded; apply the style once, and before fully_shard")
    if module.merged:
        raise ValueError(f"{style}: the layer is merged; call unmerge() first")
    if getattr(module, size) % mesh.size():
        raise ValueError(
            f"{style}: expected {size} to be a multiple of the {mesh.size()} ranks, got {getattr(module, size)}"
        )
    return module


def _spread(layer: HydraLinear, mesh: DeviceMesh, placements: dict[str, Shard], style: Any) -> HydraLinear:
    """Makes DTensors of layer's parameters, from the values of the first rank, and style its forward."""
    for name, p in list(layer.named_parameters(recurse=False)):
        placement = [placements.get(name, Replicate())]
        spread = distribute_tensor(p.detach(), mesh, placement, src_data_rank=style.src_data_rank)
        layer.register_parameter(name, nn.Parameter(spread, requires_grad=p.requires_grad))
    layer.parallel = style
    return layer


def _mesh(layer: HydraLinear) -> DeviceMesh:
    weight: Any = layer.weight
    return weight.device_mesh


def _enter(x: Tensor, mesh: DeviceMesh, layouts: Sequence[Placement], wanted: Placement, gradient: Placement) -> Tensor:
    """This rank's part of x, placed as wanted; its gradient will be placed as said."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, layouts, run_check=False)
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    return x.to_local(grad_placements=[gradient])


def _leave(h: Tensor, mesh: DeviceMesh, placement: Placement, layouts: Sequence[Placement], as_local: bool) -> Tensor:
    whole = DTensor.from_local(h, mesh, [placement], run_check=False)
    if whole.placements != tuple(layouts):
        whole = whole.redistribute(placements=layouts, async_op=True)
    return whole.to_local() if as_local else whole


def _local(layer: HydraLinear) -> Local:
    operands = {name: getattr(layer, name) for name in ("weight", "bias", *layer.ADAPTERS)}
    return {name: t.to_local() if isinstance(t, DTensor) else t for name, t in operands.items()}


def _is_plain(layer: HydraLinear) -> bool:
    return layer.merged or not layer.adapters_enabled or layer.r_a + layer.r_b == 0


def _plain(layer: HydraLinear, x: Tensor, placements: dict[str, Shard], with_bias: bool = True) -> Tensor:
    """This rank's part of h, or summand, where the layer is one product: merged, or without adapters."""
    weight, bias = layer.weight, layer.bias
    if layer.adapters_enabled and layer.merged_weight is not None:
        layer._check_unchanged()
        weight, bias = layer.merged_weight, layer.merged_bias

    def local(name: str, t: Any) -> Tensor:
        return t.redistribute(placements=[placements.get(name, Replicate())]).to_local()

    b = None if bias is None or not with_bias else local("bias", bias)
    return hydra_linear(x, local("weight", weight), b, None, None, None, None)


def _row_wise(layer: HydraLinear, x: Tensor, mesh: DeviceMesh, first: bool) -> Tensor:
    """This rank's summand of h [*, N] for x' [*, K/n]."""
    p, seed, mask = _local(layer), _seed(layer, x, mesh), _mask(layer, x, mesh)
    _meet(p, [], [name for name in p if name not in _ROWS], mesh)
    if not first:
        p |= dict.fromkeys(("bias", *layer.BIASES))
    op = Operands(**p, mask=mask)
    if seed is not None:
        op = op._replace(input_mask=_kept_of(seed, layer, x, mesh.get_local_rank()), input_p=layer.input_dropout)
    return _run(layer, x, op)


def _column_wise(layer: HydraLinear, x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part of h [*, N/n] for x [*, K]."""
    p, seed, mask = _local(layer), _seed(layer, x, mesh), _mask(layer, x, mesh)
    whole = [name for name in p if name not in _COLUMNS]
    masks = (None, None) if mask is None else (mask[:, : layer.r_a], mask[:, layer.r_a :])
    return (_composed if _composes(layer, x) else _kept)(layer, x, p, whole, masks, seed, mesh)


def _composed(
    layer: HydraLinear, x: Tensor, p: Local, whole: list[str], masks: Masks, seed: Tensor | None, mesh: DeviceMesh
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, u = [], []
    if layer.r_b > 0:
        p["C"], p["c"] = _Compose.apply(p["B_down"], p["weight"], p["bias"])
    _meet(p, ["C", "c"], whole, mesh)
    for side, mask, down, d in (("A", masks[0], p["A_down"], None), ("B", masks[1], p.get("C"), p.get("c"))):
        apart = side == "A" and seed is not None and layer.r_b > 0  # the rows of C read x as it is
        if down is None or apart:
            continue
        d = _sum(d, p[f"{side}_down_bias"])
        d = down.new_zeros(len(down)) if d is None else d
        scale, up, up_bias = p[f"scale_{side.lower()}"], p[f"{side}_up"].to(wide), p[f"{side}_up_bias"]
        split = computed_in(x) if side == "B" else wide
        for row, bias in zip(_parts(down.to(wide), split), _parts(d.to(wide), split), strict=True):
            rows.append((row, bias, scale * up, mask))
        u += [] if up_bias is None else [scale * up_bias.to(wide)]
    downs, biases, ups, columns = zip(*rows, strict=True)
    op = Operands(
        p["weight"],
        p["bias"],
        torch.cat(downs),
        torch.cat(ups, 1),
        None,
        None,
        A_down_bias=torch.cat(biases),
        A_up_bias=sum(u[1:], u[0]) if u else None,
        mask=None if masks[0] is None else torch.cat(columns, 1),
    )
    if seed is None:
        return _run(layer, x, op)
    if layer.r_b == 0:
        return _run(layer, x, op._replace(input_seed=seed, input_p=layer.input_dropout))
    return _run(layer, x, op) + _parallel_branch(layer, x, p, masks[0], seed)


def _run(layer: HydraLinear, x: Tensor, op: Operands) -> Tensor:
    """`hydra_linear` with dropout that is drawn already."""
    return applied(x, op, 0.0, 0.0, layer.training, layer.form, layer.backend)


def _parallel_branch(layer: HydraLinear, x: Tensor, p: Local, mask: Tensor | None, seed: Tensor | None) -> Tensor:
    if seed is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        x = drop(x, 0.0, False, _kept_of(seed, layer, x).to(wide) / (1 - layer.input_dropout))
    return low_rank(x, p["A_down"], p["A_up"], p["A_down_bias"], p["A_up_bias"], p["scale_a"], mask=mask)


def _kept(
    layer: HydraLinear, x: Tensor, p: Local, whole: list[str], masks: Masks, seed: Tensor | None, mesh: DeviceMesh
) -> Tensor:
    h = y0 = hydra_linear(x, p["weight"], p["bias"], None, None, None, None)
    p["S"] = F.linear(y0, p["B_down"].to(y0.dtype))
    _meet(p, ["S"], whole, mesh)
    if p["A_down"] is not None:
        h = h + _parallel_branch(layer, x, p, masks[0], seed)
    S = p["S"] if p["B_down_bias"] is None else p["S"] + p["B_down_bias"].to(y0.dtype)
    S = S if masks[1] is None else S * masks[1].view(S.shape)
    up_bias = None if p["B_up_bias"] is None else p["B_up_bias"].to(y0.dtype)
    return h + p["scale_b"] * F.linear(S, p["B_up"].to(y0.dtype), up_bias)


def _composes(layer: HydraLinear, x: Tensor) -> bool:
    """Whether C is made. All ranks must agree: by what they have in common, not by what was measured on each."""
    if layer.r_b == 0 or layer.backend == "reference":
        return layer.r_b == 0
    M, K, N = x.numel() // max(x.shape[-1], 1), layer.in_features, layer.out_features
    dtype, drops = computed_in(x), layer.training and layer.input_dropout > 0
    masked = drops or (layer.training and layer.dropout > 0)
    machine = here(x.device, measured=False)
    choice = choose(M, K, N, layer.r_a, layer.r_b, dtype, machine, layer.form, layer.backend, masked, drops_input=drops)
    reason = machine.reasons[choice.backend] or TABLE[choice.backend].refusal(
        choice.form, dtype, layer.r_a, layer.r_b, masked, x.device, drops
    )
    if reason is not None:
        raise ValueError(f"backend: {choice.backend!r} cannot serve this call: {reason}")
    return choice.form != "kept"


def _mask(layer: HydraLinear, x: Tensor, mesh: DeviceMesh) -> Tensor | None:
    """The dropout mask [M, R], already scaled, of the first rank. All ranks draw, so their generators stay alike."""
    if not layer.training or layer.dropout == 0:
        return None
    M, R = x.numel() // max(x.shape[-1], 1), layer.r_a + layer.r_b
    mask = torch.empty(M, R, dtype=torch.uint8, device=x.device).bernoulli_(1 - layer.dropout)
    if mesh.get_local_rank() > 0:
        mask.zero_()
    dist.all_reduce(mask, group=mesh.get_group())  # torch.compile takes no broadcast into its graph
    return mask.to(x.dtype) / (1 - layer.dropout)


def _seed(layer: HydraLinear, x: Tensor, mesh: DeviceMesh) -> Tensor | None:
    """The seed of input dropout that the first rank draws, likewise."""
    if not layer.training or layer.input_dropout == 0:
        return None
    seed = draw_seed(x.device)
    if mesh.get_local_rank() > 0:
        seed.zero_()
    dist.all_reduce(seed, group=mesh.get_group())
    return seed


def _kept_of(seed: Tensor, layer: HydraLinear, x: Tensor, rank: int = 0) -> Tensor:
    """The mask of input dropout for this rank's columns of x [*, K], or [*, K/n]: booleans [M, K], or [M, K/n]."""
    K = x.shape[-1]
    return kept(seed, layer.input_dropout, x.numel() // max(K, 1), K, first=rank * K)


def _meet(p: Local, summands: list[str], whole: list[str], mesh: DeviceMesh) -> None:
    """Replaces in p the summands by their sums over ranks, and sees to the gradients of those and of what is whole."""
    summands, whole = ([name for name in names if isinstance(p.get(name), Tensor)] for names in (summands, whole))
    tensors = [p[name] for name in (*summands, *whole)]
    p |= zip((*summands, *whole), _Meet.apply(mesh.get_group(), len(summands), *tensors), strict=True)


class _Meet(torch.autograd.Function):
    """Sums over ranks of the first tensors, then the others, which are whole on every rank, as they are.

    Each rank uses them for its part of h, so the gradients of all are sums over ranks.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, summands: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        sums = summed(tensors[:summands], group)
        return (*sums, *(t.view_as(t) for t in tensors[summands:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        sums = iter(summed([g for g, need in zip(grads, needed, strict=True) if need], ctx.group))
        return None, None, *(next(sums) if need else None for need in needed)


class _Compose(torch.autograd.Function):
    """This rank's summands of C [r_b, K] and c [r_b], in float32 or better."""

    @staticmethod
    def forward(ctx: Any, B_down: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(B_down, weight, bias)
        with torch.autocast(weight.device.type, enabled=False):
            wide = torch.promote_types(weight.dtype, torch.float32)
            B = B_down.to(wide)
            return B @ weight.to(wide), None if bias is None else B @ bias.to(wide)

    @staticmethod
    def backward(ctx: Any, dC: Tensor, dc: Tensor | None) -> Any:
        B_down, weight, bias = ctx.saved_tensors
        need_B, _, need_bias = ctx.needs_input_grad
        dB_down = dbias = None
        with torch.autocast(weight.device.type, enabled=False):
            if need_B:
                dB_down = dC @ weight.to(dC.dtype).t()
                if bias is not None:
                    dB_down.addr_(dc, bias.to(dC.dtype))
                dB_down = dB_down.to(B_down.dtype)
            if need_bias:
                dbias = (dc @ B_down.to(dC.dtype)).to(bias.dtype)
        return dB_down, None, dbias


def _parts(t: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """t, or where dtype is low what of t it holds and the rest; all of the gradient flows through the first part."""
    if dtype not in LOW_PRECISION:
        return [t]
    held = t + (t.to(dtype).to(t.dtype) - t).detach()
    return [held, (t - held).detach()]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
