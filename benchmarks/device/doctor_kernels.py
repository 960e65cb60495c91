"""Each kernel alone against its formula in float64, and the rule by which `benchmarks.doctor` judges.

The rule is `hydra_kernels.choose.accuracy`: at most twice the error of the naive way, plus slack. For a kernel alone
the naive way is its formula in fp32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hydra_kernels.backend import triton as steps
from hydra_kernels.choose.accuracy import allowed, errors
from hydra_kernels.choose.accuracy import slack_of as slack_of_dtype
from hydra_kernels.kernels import compose, configs, effective, gemm, one_pass, reduce, skinny
from hydra_kernels.kernels.language import INTERPRETED
from tests.cases import Case
from tests.oracle import Tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MASK_SCALE, SCALES = 1 / 0.7, (0.7, -1.9)


class Format(NamedTuple):
    base: torch.dtype
    adapters: torch.dtype
    tf32: bool = False


FORMATS = {
    "bf16": Format(BF16, BF16),
    "fp16": Format(F16, F16),
    "fp32": Format(F32, F32),
    "tf32": Format(F32, F32, tf32=True),
    "bf16+fp32": Format(BF16, F32),
}


@dataclass(frozen=True)
class Finding:
    """``error`` and ``allowed`` of the output that came nearest to its limit, or passed it: ``what``."""

    status: str  # pass | fail | skip
    error: float | None = None
    allowed: float | None = None
    what: str | None = None
    reason: str | None = None


class Compared(NamedTuple):
    name: str
    got: Tensor
    naive: Tensor
    true: Tensor
    slack: float


def judge(draws: Sequence[Sequence[Compared]]) -> Finding:
    """The rule for the median over draws, of the worst output."""
    shares: dict[str, list[tuple[float, float, float]]] = {}
    for compared in (c for draw in draws for c in draw):
        pairs = zip(errors(compared.got, compared.true), errors(compared.naive, compared.true), strict=True)
        for kind, (error, naive) in zip(("max", "rms"), pairs, strict=True):
            limit = allowed(naive, compared.slack)
            shares.setdefault(f"{compared.name} {kind}", []).append((error / limit, error, limit))
    medians = {what: sorted(found)[len(found) // 2] for what, found in shares.items()}
    what, (share, error, limit) = max(medians.items(), key=lambda item: item[1][0])
    if not math.isfinite(share):
        return Finding("fail", what=what, reason="not finite")
    return Finding("pass" if share <= 1 else "fail", error, limit, what)


def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED.value else "cuda")


def prepare(form: Format) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if form.tf32 else "ieee"
    # Fresh memory is then NaN, so that a kernel which reads what was never written shows it.
    torch.use_deterministic_algorithms(True)


def slack_of(form: Format, dtype: torch.dtype) -> float:
    """What an output of dtype may err beyond twice the naive error."""
    if dtype == F32 and form.base != F32:
        return 2**-14  # matrix instructions truncate their fp32 sums, which the naive fp32 product does not
    return slack_of_dtype(dtype, form.tf32)


Formula = Callable[[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]], Tensors]


class Bench:
    """Inputs, tiles and blank outputs of a kernel that runs alone."""

    def __init__(self, form: Format, case: Case) -> None:
        prepare(form)
        self.form, self.dtype, self.precision = form, form.base, "tf32" if form.tf32 else "ieee"
        self.two_parts = form.base != F32 or form.tf32
        self.generator = torch.Generator().manual_seed(0)
        self.M, self.K, self.N, self.r_a, self.r_b = case.M, case.K, case.N, case.r_a, case.r_b
        self.R = case.r_a + case.r_b
        self.weight = self.normal(case.N, case.K, std=case.K**-0.5)
        self.architecture = steps.tiles_of(device())

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        v = torch.randn(shape, generator=self.generator, dtype=F64) * std
        return v.to(dtype or self.dtype).to(device())

    def mask(self) -> Tensor:
        return (torch.rand(self.M, self.R, generator=self.generator) < 0.7).to(torch.uint8).to(device())

    def rest(self) -> Tensor | None:
        std = self.K**-0.5 * 2**-8
        return self.normal(self.r_b, self.K, std=std) if self.two_parts else None

    def blank(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype or self.dtype, device=device())

    def tiles(self, *inputs: Tensor) -> configs.Tiles:
        return self.architecture.tiles(self.dtype, self.precision, list(inputs))

    def judge(self, outputs: Mapping[str, Tensor], formula: Formula) -> Finding:
        true = formula(Tensor.double, lambda v: v)
        naive = formula(Tensor.float, lambda v: v.to(self.dtype).float())
        return judge([[
            Compared(name, got, naive[name].to(got.dtype), true[name], slack_of(self.form, got.dtype))
            for name, got in outputs.items()
        ]])  # fmt: skip


def bottleneck(x, D, rest, d, mask, to: Callable[[Tensor], Tensor]) -> Tensor:
    z = to(x) @ to(D).t() + to(d)
    if rest is not None:
        z = z + torch.cat([z.new_zeros(len(z), len(D) - len(rest)), to(x) @ to(rest).t()], 1)
    return z * to(mask) * MASK_SCALE


def check_compose(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    bias, low = b.normal(b.N), b.two_parts
    shapes = {"A_down": (b.r_a, b.K), "A_up": (b.N, b.r_a), "B_down": (b.r_b, b.N), "B_up": (b.N, b.r_b)}
    shapes |= {"A_down_bias": (b.r_a,), "A_up_bias": (b.N,), "B_down_bias": (b.r_b,), "B_up_bias": (b.N,)}
    t = {name: b.normal(*shape) for name, shape in shapes.items()}
    D, U, rest = b.blank(b.R, b.K), b.blank(b.N, b.R), b.blank(b.r_b, b.K) if low else None
    stack = b.blank(one_pass.rows_of_stack(b.R), b.K) if low else None
    d, u, S = b.blank(b.R, dtype=F32), b.blank(b.N, dtype=F32), 3
    C_parts, b_sums = b.normal(S, b.r_b, b.K, dtype=F32), b.normal(S, b.r_b, dtype=F32)
    config = b.tiles(b.weight).reduce
    for to, stacked in ((rest, None), (None, stack)):
        compose.compose(bias, t, SCALES, C_parts, b_sums, D, to, stacked, d, U, u, True, config, b.precision).run()

    def formula(to, rounded) -> Tensors:
        a = {name: to(v) for name, v in t.items()}
        return {
            **{name: a["A_down"] for name in ("A_down", "stacked A_down")},
            **{name: to(C_parts).sum(0) for name in ("C", "stacked C")},
            "zeros": torch.zeros(
                one_pass.rows_of_stack(b.R) - b.R - b.r_b, b.K, dtype=to(bias).dtype, device=bias.device
            ),
            "U": torch.cat([SCALES[0] * a["A_up"], SCALES[1] * a["B_up"]], 1),
            "d": torch.cat([a["A_down_bias"], to(b_sums).sum(0) + a["B_down_bias"]]),
            "u": to(bias) + SCALES[0] * a["A_up_bias"] + SCALES[1] * a["B_up_bias"],
        }

    # C is held in two parts, whose sum has fp32's exactness but for what matrix instructions lose.
    C = D[b.r_a :].float() + (0 if rest is None else rest.float())
    outputs = {"A_down": D[: b.r_a], "C": C, "U": U, "d": d, "u": u}
    if stack is not None:
        upper, lower = stack[: len(stack) - b.R], stack[len(stack) - b.R :]
        outputs |= {"stacked A_down": upper[: b.r_a], "stacked C": upper[b.r_a : b.R].float() + lower[b.r_a :].float()}
        outputs |= {"zeros": torch.cat([upper[b.R :], lower[: b.r_a]])}
    return b.judge(outputs, formula)


def check_effective(form: Format, case: Case) -> Finding:
    """In as many ranges of rows as the card takes, and in three; then W again from D."""
    b = Bench(form, case)
    if b.R > configs.MAX_RANK_BLOCK:
        return Finding("skip", reason=f"it takes ranks up to {configs.MAX_RANK_BLOCK}")
    bias, tiles = b.normal(b.N), b.tiles(b.weight)
    shapes = {"A_down": (b.r_a, b.K), "A_up": (b.N, b.r_a), "B_down": (b.r_b, b.N), "B_up": (b.N, b.r_b)}
    t = {name: b.normal(*shape, std=shape[1] ** -0.5) for name, shape in shapes.items()}
    t |= {"A_down_bias": b.normal(b.r_a), "A_up_bias": b.normal(b.N)}
    t |= {"B_down_bias": b.normal(b.r_b), "B_up_bias": b.normal(b.N)}
    out = {}
    for splits in dict.fromkeys((b.architecture.splits_of_effective(tiles, b.N, b.K), 3)):
        D, d = b.blank(b.R if form.base == F32 else b.R + b.r_b, b.K), b.blank(b.R, dtype=F32)
        v, W, again = b.blank(b.N), b.blank(b.N, b.K), b.blank(b.N, b.K)
        effective.effective(
            b.weight, bias, t, SCALES, D, d, v, W, splits, tiles.effective, b.precision
        ).run()  # fmt: skip
        effective.rebuild(b.weight, t["A_up"], t["B_up"], SCALES, D, again, tiles.rebuild, b.precision).run()
        C = D[b.r_a : b.R].float() + (0 if form.base == F32 else D[b.R :].float())
        made = {"A_down": D[: b.r_a], "C": C, "d": d, "b": v, "W": W, "W again": again}
        out |= {f"{name} in {splits}": value for name, value in made.items()}

    def formula(to, rounded) -> Tensors:
        a, W0 = {name: to(value) for name, value in t.items()}, to(b.weight)
        C, d_a = a["B_down"] @ W0, a["A_down_bias"]
        d_b = a["B_down"] @ to(bias) + a["B_down_bias"]
        of_a = SCALES[0] * (a["A_up"] @ d_a + a["A_up_bias"])
        found = {"A_down": a["A_down"], "C": C, "d": torch.cat([d_a, d_b])}
        found["b"] = to(bias) + of_a + SCALES[1] * (a["B_up"] @ d_b + a["B_up_bias"])
        found["W"] = W0 + SCALES[0] * a["A_up"] @ a["A_down"] + SCALES[1] * a["B_up"] @ C
        return {name: found[name.partition(" ")[0]] for name in out}

    return b.judge(out, formula)


def check_down(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    x, D, rest = b.normal(b.M, b.K), b.normal(b.R, b.K, std=b.K**-0.5), b.rest()
    d, mask, Z = b.normal(b.R, dtype=F32), b.mask(), b.blank(b.M, b.R)
    skinny.down(x, D, rest, d, mask, MASK_SCALE, Z, b.tiles(x, b.weight).down, b.precision).run()
    return b.judge({"Z": Z}, lambda to, rounded: {"Z": bottleneck(x, D, rest, d, mask, to)})


def check_one_pass(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    x, D, rest = b.normal(b.M, b.K), b.normal(b.R, b.K, std=b.K**-0.5), b.rest()
    d, mask, U, u = b.normal(b.R, dtype=F32), b.mask(), b.normal(b.N, b.R), b.normal(b.N, dtype=F32)
    stack, outputs = D, {}
    if rest is not None:
        zeros = D.new_zeros(one_pass.rows_of_stack(b.R) - b.R - b.r_b, b.K)
        stack = torch.cat([D, zeros, rest])
    for arch in b.architecture.with_each_gemm():
        h, Z = b.blank(b.M, b.N), b.blank(b.M, b.R)
        config = arch.one_pass(arch.tiles(b.dtype, b.precision, [x, b.weight, h, D]), b.M, b.N, b.R, False)
        one_pass.forward(
            x, b.weight, u, D, stack, d, mask, MASK_SCALE, U, Z, h, config, arch.multiprocessors, b.precision
        ).run()
        tile = f"{config.BLOCK_M} x {config.BLOCK_N}"
        outputs |= {f"h by {tile}": h, f"Z by {tile}": Z}

    def formula(to, rounded) -> Tensors:
        Z = bottleneck(x, D, rest, d, mask, to)
        h = to(x) @ to(b.weight).t() + rounded(Z) @ to(U).t() + to(u)
        return {name: h if name.startswith("h") else Z for name in outputs}

    return b.judge(outputs, formula)


def check_gemm_forward(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    x, Z, U, u = b.normal(b.M, b.K), b.normal(b.M, b.R), b.normal(b.N, b.R), b.normal(b.N, dtype=F32)
    outputs = {}
    for arch in b.architecture.with_each_gemm():
        h = b.blank(b.M, b.N)
        config = arch.tiles(b.dtype, b.precision, [x, b.weight, h]).gemm
        gemm.forward(x, b.weight, u, Z, U, h, config, arch.multiprocessors, b.precision).run()
        outputs[f"h by {config.BLOCK_M} x {config.BLOCK_N}"] = h

    def formula(to, rounded) -> Tensors:
        return dict.fromkeys(outputs, to(x) @ to(b.weight).t() + to(Z) @ to(U).t() + to(u))

    return b.judge(outputs, formula)


def check_gemm_dx(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    G, dZ, D = b.normal(b.M, b.N), b.normal(b.M, b.R), b.normal(b.R, b.K)
    outputs = {}
    for arch in b.architecture.with_each_gemm():
        dx = b.blank(b.M, b.K)
        config = arch.tiles(b.dtype, b.precision, [G, b.weight, dx]).gemm
        gemm.dx(G, b.weight, dZ, D, dx, config, arch.multiprocessors, b.precision).run()
        outputs[f"dx by {config.BLOCK_M} x {config.BLOCK_N}"] = dx
    return b.judge(outputs, lambda to, rounded: dict.fromkeys(outputs, to(G) @ to(b.weight) + to(dZ) @ to(D)))


def check_grad_z(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    G, Z, mask, up = b.normal(b.M, b.N), b.normal(b.M, b.R), b.mask(), b.normal(b.N, b.R, std=b.N**-0.5)
    up_biases = b.normal(b.N), b.normal(b.N)
    config = b.tiles(G, b.weight).grad_z
    P = triton.cdiv(b.M, config.BLOCK_ROWS)
    out = {"sum G": b.blank(P, b.N, dtype=F32), "sum dZ": b.blank(P, b.R, dtype=F32)}
    out |= {"scales": b.blank(P, b.R + 2, dtype=F32)}
    dZ, ups = b.blank(b.M, b.R), [side.contiguous() for side in up.split((b.r_a, b.r_b), 1)]
    skinny.grad_z(G, *ups, up_biases, SCALES, Z, mask, MASK_SCALE, dZ, *out.values(), config, b.precision).run()

    def blocks(v: Tensor) -> Tensor:
        return torch.cat([v, v.new_zeros(P * config.BLOCK_ROWS - b.M, v.shape[1])]).view(P, config.BLOCK_ROWS, -1)

    def formula(to, rounded) -> Tensors:
        product, sums = to(G) @ to(up), blocks(to(G)).sum(1)
        scales = torch.tensor(SCALES).repeat_interleave(torch.tensor([b.r_a, b.r_b])).to(product)
        of_biases = [(sums @ to(bias))[:, None] for bias in up_biases]
        return {
            "dZ": product * scales * to(mask) * MASK_SCALE,
            "sum G": sums,
            "sum dZ": blocks(to(dZ)).sum(1),  # of the dZ it wrote
            "scales": torch.cat([blocks(product * to(Z)).sum(1), *of_biases], 1),
        }

    return b.judge({"dZ": dZ, **out}, formula)


def check_sum_rows(form: Format, case: Case) -> Finding:
    b = Bench(form, case)
    x, y, v = b.normal(b.M, b.K), b.normal(b.R, b.M).t(), b.normal(b.M)
    tiles = b.tiles(x, b.weight)
    S = b.architecture.splits(tiles, b.M, b.K)
    out, v_sums = b.blank(S, b.R, b.K, dtype=F32), b.blank(S, b.R, dtype=F32)
    launch = skinny.sum_rows(x, y, out, tiles.sum_rows, b.precision, v, v_sums)
    launch.run()
    rows_of_split = launch.arguments["rows_of_split"]
    splits = [slice(s * rows_of_split, (s + 1) * rows_of_split) for s in range(S)]

    def formula(to, rounded) -> Tensors:
        return {
            "y^T x": torch.stack([to(y[rows]).t() @ to(x[rows]) for rows in splits]),
            "v^T y": torch.stack([to(v[rows]) @ to(y[rows]) for rows in splits]),
        }

    return b.judge({"y^T x": out, "v^T y": v_sums}, formula)


def check_reduce(form: Format, case: Case) -> Finding:
    b, P, Q, S = Bench(form, case), 19, 5, 3
    new, N, r_a = partial(b.normal, dtype=F32), b.N, b.r_a
    partials = reduce.Partials(new(Q, b.R, N), new(P, N), new(P, b.R), new(P, b.R + 2), new(S, b.R, b.K))
    B_down = b.normal(b.r_b, N)
    shapes = {"A_down": (r_a, b.K), "A_up": (N, r_a), "B_up": (N, b.r_b), "bias": (N,)}
    shapes |= {"A_down_bias": (r_a,), "A_up_bias": (N,), "B_down_bias": (b.r_b,), "B_up_bias": (N,)}
    grads = {name: b.blank(*shape) for name, shape in {**shapes, "scale_a": (), "scale_b": ()}.items()}
    T, z_b = b.blank(b.r_b, b.K, dtype=F32), b.blank(b.r_b, dtype=F32)
    shape, tiles = (N, b.K, r_a, b.r_b), b.tiles(b.weight)
    ended = torch.full((reduce.blocks_of(b.r_b, N, tiles.through),), -1, dtype=torch.int32, device=device())
    reduce.reduce(
        partials, P, B_down, SCALES, shape, grads, T, z_b, ended, tiles.reduce, tiles.through
    ).run()  # fmt: skip

    def formula(to, rounded) -> Tensors:
        dU, g, z, scales, dD = (to(p).sum(0) for p in partials)
        s_a, s_b = SCALES
        return {
            **{"A_up": s_a * dU[:r_a].t(), "B_up": s_b * dU[r_a:].t(), "A_up_bias": s_a * g, "B_up_bias": s_b * g},
            **{"A_down": dD[:r_a], "T": dD[r_a:], "z_b": z[r_a:], "zeros to count from": dD.new_zeros(len(ended))},
            **{"A_down_bias": z[:r_a], "B_down_bias": z[r_a:], "bias": g + z[r_a:] @ to(B_down)},
            **{"scale_a": scales[:r_a].sum() + scales[b.R], "scale_b": scales[r_a : b.R].sum() + scales[b.R + 1]},
        }

    return b.judge({**grads, "T": T, "z_b": z_b, "zeros to count from": ended.float()}, formula)


def check_through_weight(form: Format, case: Case) -> Finding:
    """Three times: whichever program adds the others' sums up, the bits are the same."""
    b = Bench(form, case)
    T, z_b, bias, tiles = b.normal(b.r_b, b.K, dtype=F32), b.normal(b.r_b, dtype=F32), b.normal(b.N), b.tiles(b.weight)
    splits, config = b.architecture.splits_of_columns(tiles, b.N, b.K), tiles.through
    outputs = {f"dB_down {time}": b.blank(b.r_b, b.N) for time in range(3)}
    for dB_down in outputs.values():
        products = b.blank(splits, b.r_b, b.N, dtype=F32)
        ended = torch.zeros(reduce.blocks_of(b.r_b, b.N, config), dtype=torch.int32, device=device())
        reduce.through_weight(T, b.weight, z_b, bias, products, ended, dB_down, config, b.precision).run()
    first, *others = outputs.values()
    if not all(torch.equal(first, other) for other in others):
        return Finding("fail", what="dB_down", reason="other bits the second time")
    return b.judge(
        outputs,
        lambda to, rounded: dict.fromkeys(outputs, to(T) @ to(b.weight).t() + torch.outer(to(z_b), to(bias))),
    )


KERNELS = {
    **{"compose": check_compose, "effective": check_effective, "down": check_down, "one_pass": check_one_pass},
    **{"gemm-forward": check_gemm_forward, "gemm-dx": check_gemm_dx},
    **{"grad_z": check_grad_z, "sum_rows": check_sum_rows, "reduce": check_reduce},
    "through_weight": check_through_weight,
}
