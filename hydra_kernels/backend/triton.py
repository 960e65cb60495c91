"""Backends `triton` and `hybrid`: the composed form (see `aten`) as a sequence of Triton kernels.

`hybrid` has the effective form too: `effective`.

forward     sum_rows: C    compose: D, C's rounding rest, d, U, u    one_pass: Z and h
backward    grad_z: dZ, sums over rows    sum_rows: dU    gemm: dx    sum_rows: dD
            reduce: every other gradient but dB_down      through_weight: dB_down

So 3 + 6 launches where every gradient is wanted, and fewer where not. That is `triton`: x is read once in the forward.

`hybrid` takes Z from a pass of its own, `down`. It computes h, and also dx, in `gemm` where that was measured to be
faster (`Tiles.fuses`), else in two GEMMs of cuBLAS. A configuration can make it read x once too, where h has few
columns (`Tiles.once_up_to`); none does.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Set
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import configs
from ..kernels.configs import Architecture, cdiv
from ..kernels.launch import Launch
from .interface import CPU, FROM_Z, LOW_PRECISION, Operands, Saved, read_backwards
from .philox import threshold

if TYPE_CHECKING:
    from ..kernels.philox import InputDropout  # which imports Triton

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOWEST_CAPABILITY = (8, 0)
Run = Callable[[Launch], None]  # what is done with each launch: it runs, or a report collects it
_ADAPTERS = ("A_down", "A_up", "B_down", "B_up", "A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias")


class TritonBackend:
    """``always_fused`` (`triton`): h with Z, and dx, by our kernels. Else (`hybrid`) where it is faster, any rank."""

    def __init__(self, always_fused: bool) -> None:
        self.always_fused = always_fused

    def unavailable(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        from ..kernels.language import INTERPRETED

        if INTERPRETED.value:
            return None
        if device.type != "cuda" or torch.version.cuda is None:
            return (
                "it needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment for Triton's interpreter on the CPU"
            )
        return too_old(torch.cuda.get_device_capability(device))

    def refusal(
        self,
        form: str,
        dtype: torch.dtype,
        r_a: int,
        r_b: int,
        masked: bool = False,
        device: torch.device = CPU,
        drops_input: bool = False,
    ) -> str | None:
        if dtype not in KERNEL_DTYPES:
            return f"its kernels do not support {dtype}"
        if form == "effective" and not self.always_fused:
            return _effective_refusal(r_a, r_b, masked)
        if form != "composed":
            return f"it has only the composed {'form' if self.always_fused else 'and the effective form'}"
        if self.always_fused and r_a + r_b > configs.MAX_RANK_BLOCK:
            limit = configs.MAX_RANK_BLOCK
            return f"it supports ranks up to {limit}, and r_a + r_b is {r_a + r_b}; 'hybrid' supports any rank"
        return None

    def forward(self, x: Tensor, op: Operands, needs: Set[str], form: str) -> tuple[Tensor, Operands, Saved]:
        if form == "effective":
            from . import effective  # which imports this module

            return effective.forward(x, op, needs, tiles_of(x.device))
        return forward(x, op, needs, self.always_fused, tiles_of(x.device))

    def backward(self, G: Tensor, op: Operands, saved: Saved, needs: Set[str], form: str) -> dict[str, Tensor]:
        if form == "effective":
            from . import effective

            return effective.backward(G, contiguous(op), saved, needs, tiles_of(G.device))
        return backward(G, contiguous(op), saved, needs, self.always_fused, tiles_of(G.device))


def _effective_refusal(r_a: int, r_b: int, masked: bool) -> str | None:
    if masked:
        return "the effective form does not support dropout"
    if r_a + r_b > configs.MAX_RANK_BLOCK:
        return f"its effective form supports ranks up to {configs.MAX_RANK_BLOCK}, and r_a + r_b is {r_a + r_b}"
    return None


def too_old(capability: tuple[int, int]) -> str | None:
    """Why the kernels cannot run on GPUs of a capability, or None."""
    if capability >= LOWEST_CAPABILITY:
        return None
    return f"it needs compute capability 8.0 or later, and this GPU has {capability[0]}.{capability[1]}"


def forward(
    x: Tensor, op: Operands, needs: Set[str], always_fused: bool, arch: Architecture, run: Run = Launch.run
) -> tuple[Tensor, Operands, Saved]:
    # Triton is imported at the first use, not with the package.
    from ..kernels import compose, gemm, one_pass, skinny

    run = launching(run, arch)
    op = contiguous(op)
    precision = precision_of(x.dtype)
    (M, K), N, R = x.shape, op.weight.shape[0], op.r_a + op.r_b
    h = x.new_empty(M, N)
    D, U = x.new_empty(R, K), x.new_empty(N, R)
    tiles = arch.tiles(x.dtype, precision, [x, op.weight, h])
    once = always_fused or tiles.reads_once(N, R)
    if once:
        tiles = arch.tiles(x.dtype, precision, [x, op.weight, h, D])
    fuse_h = once or tiles.fuses(N, R)
    up_bias = op.A_up_bias is not None or op.B_up_bias is not None
    down_bias = op.A_down_bias is not None or op.B_down_bias is not None or (op.bias is not None and op.r_b > 0)
    rest = stack = None
    if op.r_b > 0 and (x.dtype in LOW_PRECISION or precision == "tf32"):
        if once:
            stack = x.new_empty(one_pass.rows_of_stack(R), K)
        else:
            rest = x.new_empty(op.r_b, K)
    d = x.new_empty(R, dtype=torch.float32) if down_bias else None
    u = None
    if up_bias or (fuse_h and op.bias is not None):
        u = x.new_empty(N, dtype=torch.float32 if fuse_h else x.dtype)
    adapters = {name: getattr(op, name) for name in _ADAPTERS}
    scales = op.scale_a, op.scale_b
    with_bias = fuse_h and op.bias is not None
    C = b_sums = None
    if op.B_down is not None:
        S = arch.splits(tiles, N, K)
        C = x.new_empty(S, op.r_b, K, dtype=torch.float32)
        b_sums = None if op.bias is None else x.new_empty(S, op.r_b, dtype=torch.float32)
        run(skinny.sum_rows(op.weight, op.B_down.t(), C, tiles.sum_rows, precision, op.bias, b_sums))
    run(compose.compose(
        op.bias, adapters, scales, C, b_sums, D, rest, stack, d, U, u, with_bias, tiles.reduce, precision
    ))  # fmt: skip

    saves_Z = not needs.isdisjoint(FROM_Z)
    Z = x.new_empty(M, R) if saves_Z or not once else None
    if once:
        config = arch.one_pass(tiles, M, N, R, op.drops_input)
        run(one_pass.forward(
            x, op.weight, u, D, D if stack is None else stack, d, op.mask, op.mask_scale, U, Z, h,
            config, arch.multiprocessors, precision, input_dropout(op),
        ))  # fmt: skip
    else:
        of_down = tiles.under(op.drops_input).down
        run(skinny.down(x, D, rest, d, op.mask, op.mask_scale, Z, of_down, precision, input_dropout(op)))
        if fuse_h:
            run(gemm.forward(x, op.weight, u, Z, U, h, arch.gemm(tiles, M, N), arch.multiprocessors, precision))
        else:
            _around_cublas(x, op.weight, op.bias, Z, U, u, h)
    saved = (
        x if "A_down" in needs or "B_down" in needs else None,
        Z if saves_Z else None,
        D if "x" in needs else None,
    )
    return h, read_backwards(op, needs, "composed"), saved


def _around_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, Z: Tensor, U: Tensor, u: Tensor | None, h: Tensor
) -> None:
    """h = x W0^T + Z U^T + (b0 + u)."""
    if bias is None:
        # The small part first: the GEMM then adds to it before rounding, so small updates survive low precision.
        (torch.mm(Z, U.t(), out=h) if u is None else torch.addmm(u, Z, U.t(), out=h)).addmm_(x, weight.t())
        return
    # b0 may cancel W0 x, so the two are added before anything is rounded, as in the naive layer.
    torch.addmm(bias, x, weight.t(), out=h).addmm_(Z, U.t())
    if u is not None:
        h.add_(u)


def backward(
    G: Tensor, op: Operands, saved: Saved, needs: Set[str], always_fused: bool, arch: Architecture,
    run: Run = Launch.run,
) -> dict[str, Tensor]:  # fmt: skip
    from ..kernels import gemm, philox, reduce, skinny

    run = launching(run, arch)
    x, Z, D = saved
    if needs.isdisjoint(("A_down", "B_down")):
        x = None  # it was saved for a gradient that this backward is not asked for
    if 0 in G.stride():
        G = G.contiguous()  # expanded, like the gradient of a sum; three passes would load its elements one by one
    precision = precision_of(G.dtype)
    dx = {"x": G.new_empty(len(G), D.shape[1])} if "x" in needs else {}
    tiles = arch.tiles(G.dtype, precision, [t for t in (G, x, op.weight, *dx.values()) if t is not None])
    (M, N), K, r_a, r_b = G.shape, 0 if x is None else x.shape[1], op.r_a, op.r_b
    R, scales = r_a + r_b, (op.scale_a, op.scale_b)
    grads = {name: torch.empty_like(getattr(op, name)) for name in reduce.GRADIENTS if name in needs and name != "bias"}
    if "bias" in needs:
        grads["bias"] = G.new_empty(N)

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return G.new_empty(shape, dtype=torch.float32) if wanted else None

    drop, dropping = input_dropout(op), tiles.under(op.drops_input)
    P, S = cdiv(M, tiles.grad_z.BLOCK_ROWS), 0 if x is None else arch.splits(dropping, M, K)
    of_scales = "scale_a" in needs or "scale_b" in needs
    z_sums = not needs.isdisjoint(("A_down_bias", "B_down_bias")) or (
        r_b > 0 and ("bias" in needs or ("B_down" in needs and op.bias is not None))
    )
    partials = reduce.Partials(
        dU=partial("A_up" in needs or "B_up" in needs, arch.splits(tiles, M, N), R, N),
        g=partial(not needs.isdisjoint(("bias", "A_up_bias", "B_up_bias")), P, N),
        z_sums=partial(z_sums, P, R),
        scales=partial(of_scales, P, R + 2),
        dD=partial(x is not None, S, R, K),
    )
    dZ = G.new_empty(M, R) if z_sums or x is not None or "x" in needs else None
    up_biases = (op.A_up_bias if "scale_a" in needs else None, op.B_up_bias if "scale_b" in needs else None)
    if dZ is not None or of_scales or partials.g is not None:
        run(skinny.grad_z(
            G, op.A_up, op.B_up, up_biases, scales, Z if of_scales else None, op.mask, op.mask_scale,
            dZ, partials.g, partials.z_sums, partials.scales, tiles.grad_z, precision,
        ))  # fmt: skip
    if partials.dU is not None:
        run(skinny.sum_rows(G, Z, partials.dU, tiles.sum_rows, precision))
    if "x" in needs:
        if always_fused or tiles.fuses(D.shape[1], R):
            config = arch.gemm(dropping, *dx["x"].shape)
            run(gemm.dx(G, op.weight, dZ, D, dx["x"], config, arch.multiprocessors, precision, drop))
        else:
            if op.drops_input:
                run(philox.dropped_product(dZ, D, dx["x"], tiles.down, precision, drop))
            else:
                torch.mm(dZ, D, out=dx["x"])
            dx["x"].addmm_(G, op.weight)  # to what is there, before it is rounded
    if partials.dD is not None:
        run(skinny.sum_rows(x, dZ, partials.dD, dropping.sum_rows, precision, drop=drop))
    if grads:
        through_W0 = "B_down" in needs
        T, z_b = partial(through_W0, r_b, K), partial(through_W0 and op.bias is not None, r_b)
        products = partial(through_W0, arch.splits_of_columns(tiles, N, K), r_b, N)
        ended = G.new_empty(reduce.blocks_of(r_b, N, tiles.through), dtype=torch.int32) if through_W0 else None
        shape, B_down = (N, K, r_a, r_b), op.B_down if "bias" in needs else None
        run(reduce.reduce(partials, P, B_down, scales, shape, grads, T, z_b, ended, tiles.reduce, tiles.through))
        if through_W0:
            run(reduce.through_weight(
                T, op.weight, z_b, op.bias, products, ended, grads["B_down"], tiles.through, precision
            ))  # fmt: skip
    return grads | dx


def launching(run: Run, arch: Architecture) -> Run:
    """run, of early launches where the architecture has them."""
    return (lambda launch: run(launch.early())) if arch.early else run


def input_dropout(op: Operands) -> InputDropout:
    """As the kernels take it."""
    from ..kernels.philox import NONE, InputDropout

    if not op.drops_input:
        return NONE
    return InputDropout(op.r_a, op.input_seed, op.input_mask, threshold(op.input_p), 1 / (1 - op.input_p))


def contiguous(op: Operands) -> Operands:
    """Adapters, bias and masks made contiguous, as the kernels read them; weight may have any strides."""
    read = {name: getattr(op, name) for name in (*_ADAPTERS, "bias", "mask", "input_mask")}
    for name in ("mask", "input_mask"):
        if read[name] is not None and read[name].dtype == torch.bool:
            read[name] = read[name].view(torch.uint8)
    return op._replace(**{name: None if t is None else t.contiguous() for name, t in read.items()})


@functools.cache
def tiles_of(device: torch.device) -> Architecture:
    """The tiles of the device's architecture, with the number of multiprocessors that this card has."""
    from ..kernels.language import INTERPRETED

    if INTERPRETED.value:
        return configs.of(None)
    card = torch.cuda.get_device_properties(device)
    return configs.of((card.major, card.minor))._replace(multiprocessors=card.multi_processor_count)


def precision_of(dtype: torch.dtype) -> str:
    """How products of fp32 operands run: by torch's own setting for its GEMMs."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"
