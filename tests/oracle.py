"""The tests' own truth: Eq. 9-12 written with einsum in float64, and the rule by which a result counts as right.

Nothing here comes from the package, so that no error can be shared with it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# What a result may err beyond twice the naive layer's own error, in units of the dtype's epsilon.
SLACK = {torch.float64: 64, torch.float32: 2, torch.float16: 1, torch.bfloat16: 1}


def hydra(t: Mapping[str, Tensor], scale_a: float = 1.0, scale_b: float = 1.0) -> Tensor:
    """h of the operands in t, named as hydra_linear's arguments; absent ones are missing. All of one dtype."""
    y0 = torch.einsum("...k,nk->...n", t["x"], t["weight"])
    if "bias" in t:
        y0 = y0 + t["bias"]
    h = y0
    dropped = t["x"] * t["input_mask"].reshape(t["x"].shape) if "input_mask" in t else t["x"]
    r_a = t["A_down"].shape[0] if "A_down" in t else 0
    for side, v, columns in (("A", dropped, slice(0, r_a)), ("B", y0, slice(r_a, None))):
        if f"{side}_down" not in t:
            continue
        z = torch.einsum("...k,rk->...r", v, t[f"{side}_down"])
        if f"{side}_down_bias" in t:
            z = z + t[f"{side}_down_bias"]
        if "mask" in t:
            z = z * t["mask"][:, columns].reshape(z.shape)
        delta = torch.einsum("...r,nr->...n", z, t[f"{side}_up"])
        if f"{side}_up_bias" in t:
            delta = delta + t[f"{side}_up_bias"]
        scale = t.get(f"scale_{side.lower()}", scale_a if side == "A" else scale_b)
        h = h + scale * delta
    return h


def philox(key: Iterable[int], counter: Iterable[int]) -> list[int]:
    """Four words of Philox4x32-10 (Salmon et al., 2011) from a key of two and a counter of four."""
    word = 2**32
    key, c = list(key), list(counter)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second // word ^ c[1] ^ key[0], second % word, first // word ^ c[3] ^ key[1], first % word]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    return c


def input_mask(seed: int, p: float, M: int, K: int) -> Tensor:
    """The mask of input dropout [M, K], scaled, in float64."""
    key = seed % 2**32, seed // 2**32 % 2**32
    words = [[word for c in range((K + 3) // 4) for word in philox(key, (c, m, 0, 0))][:K] for m in range(M)]
    kept = torch.tensor(words, dtype=torch.int64).reshape(M, K) >= round(p * 2**32)
    return kept.double() / (1 - p)


def differentiate(function: Callable[[Tensors], Tensor], t: Tensors, G: Tensor, wanted: set[str]) -> Tensors:
    """h under the name "h", and dL/d(name) of every wanted operand for dL/dh = G, each operand a fresh leaf.

    Checks that operands and G come back unchanged and that the others get no gradient.
    """
    leaves = {name: v.detach().requires_grad_(name in wanted) for name, v in t.items()}
    before = {name: v.detach().clone() for name, v in t.items()}
    G_before = G.clone()
    h = function(leaves)
    if wanted:
        h.backward(G)
    for name, v in before.items():
        assert torch.equal(leaves[name].detach(), v), f"{name} was changed"
        assert (leaves[name].grad is not None) == (name in wanted), f"{name}: a gradient where none is wanted, or none"
    assert torch.equal(G, G_before), "G was changed"
    return {"h": h.detach(), **{name: leaves[name].grad for name in wanted}}


def out_of_bounds(got: Tensors, t: Tensors, G: Tensor, true: Tensors, dtype: torch.dtype) -> list[str]:
    """What of got misses true by more than 16 epsilons of the sum of the absolute values of all terms, elementwise.

    The bound of forward error analysis: it holds at any size, where an error relative to a result of one element that
    cancels to nothing says little. That sum is the same formula over absolute values.
    """
    magnitudes = differentiate(
        hydra, {name: v.double().abs() for name, v in t.items()}, G.double().abs(), set(true) - {"h"}
    )
    eps = 16 * torch.finfo(dtype).eps
    return [name for name, want in true.items() if not ((got[name] - want).abs() <= eps * magnitudes[name]).all()]


def errors(got: Tensor, true: Tensor) -> tuple[float, float]:
    """Maximal and root-mean-square error of got, relative to the largest and the rms value of true."""
    assert got.shape == true.shape, f"shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    difference = got.double() - true
    if true.numel() == 0:
        return 0.0, 0.0
    if not true.any():
        return (0.0, 0.0) if not difference.any() else (math.inf, math.inf)
    largest = (difference.abs().max() / true.abs().max()).item()
    rms = (difference.square().mean().sqrt() / true.square().mean().sqrt()).item()
    return (largest, rms) if math.isfinite(largest) and math.isfinite(rms) else (math.inf, math.inf)


def median_violations(draws: Iterable[tuple[Tensors, Tensors, Tensors]], dtype: torch.dtype) -> list[str]:
    """As `violations` for the median over draws of (got, naive, true), where chance can break a single one."""
    slack = SLACK[dtype] * torch.finfo(dtype).eps
    shares: dict[tuple[str, str], list[float]] = {}
    for got, naive, true in draws:
        for name, want in true.items():
            ours, theirs = errors(got[name], want), errors(naive[name], want)
            for kind, e, n in zip(("max", "rms"), ours, theirs, strict=True):
                shares.setdefault((name, kind), []).append(e / (2 * n + slack))
    medians = {key: statistics.median(values) for key, values in shares.items()}
    return [f"{name}: {kind} error {m:.3g} of what is allowed" for (name, kind), m in medians.items() if not m <= 1]


def violations(got: Tensors, naive: Tensors, true: Tensors, dtype: torch.dtype) -> list[str]:
    """What of got errs more than twice as much as naive, plus the slack of their dtype; empty where all is right."""
    slack = SLACK[dtype] * torch.finfo(dtype).eps
    found = []
    for name, want in true.items():
        ours, theirs = errors(got[name], want), errors(naive[name], want)
        for kind, e, limit in zip(("max", "rms"), ours, (2 * n + slack for n in theirs), strict=True):
            if not e <= limit:
                found.append(f"{name}: {kind} error {e:.3g}, allowed {limit:.3g}")
    return found
