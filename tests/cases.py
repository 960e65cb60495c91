"""The cases of the one matrix: sizes, ranks, options and layouts, and random operands for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .oracle import Tensors, hydra, input_mask

ADAPTERS = (
    *("A_down", "A_up", "B_down", "B_up"),
    *("A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias", "scale_a", "scale_b"),
)


# What a call draws after torch.manual_seed(INPUT_SEED), and a probability whose 1/(1-p) every dtype holds.
INPUT_SEED, INPUT_P = 3, 0.2


@dataclass(frozen=True)
class Case:
    """x [*lead, K] (lead may be empty), weight [N, K], ranks, options, and how x and G lie in memory."""

    lead: tuple[int, ...]
    K: int
    N: int
    r_a: int
    r_b: int
    bias: bool = True
    adapter_bias: bool = False
    scales: tuple[float, float] | str = (1.0, 1.0)
    dropout: bool = False
    input_dropout: str = ""  # "mask": given as such; "seed": as what INPUT_SEED makes, for a call that draws it
    x_layout: str = "contiguous"
    G_layout: str = "contiguous"
    rounding: str = ""

    def __str__(self) -> str:
        lead = "x".join(map(str, self.lead)) or "vector"
        words = [f"{lead}-{self.K}-{self.N}-r{self.r_a}+{self.r_b}"]
        words += [] if self.bias else ["nobias"]
        words += ["adapterbias"] if self.adapter_bias else []
        words += ["learnable"] if self.scales == "learnable" else []
        words += [] if self.scales in ((1.0, 1.0), "learnable") else ["scaled"]
        words += ["dropout"] if self.dropout else []
        words += [f"input-{self.input_dropout}"] if self.input_dropout else []
        words += [f"x-{self.x_layout}"] if self.x_layout != "contiguous" else []
        words += [f"G-{self.G_layout}"] if self.G_layout != "contiguous" else []
        return "-".join(words + ([self.rounding] if self.rounding else []))

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    @property
    def constant_scales(self) -> dict[str, float]:
        return {} if self.scales == "learnable" else {"scale_a": self.scales[0], "scale_b": self.scales[1]}


PLAIN = Case((7,), 13, 11, 3, 5)
WIDE = Case((130,), 257, 67, 16, 4)
TALL = replace(WIDE, K=97)  # as many tiles in the interpreter as a remainder of every loop needs

SIZES = [
    Case((1,), 1, 1, 1, 1),
    PLAIN,
    Case((2, 3), 31, 7, 2, 1),
    Case((2, 3, 5), 17, 29, 1, 2),
    Case((), 19, 23, 4, 4),
    Case((0,), 13, 11, 3, 5),
    Case((3, 0), 13, 11, 3, 5),
    WIDE,
    Case((3,), 127, 131, 8, 8),
    Case((64,), 96, 80, 8, 8),
    Case((37,), 41, 43, 37, 33),
    Case((29,), 61, 19, 0, 5),
    Case((29,), 19, 61, 0, 5),
    Case((29,), 19, 61, 3, 0),
]

OPTIONS = [
    replace(PLAIN, bias=False),
    replace(PLAIN, adapter_bias=True),
    replace(PLAIN, adapter_bias=True, bias=False),
    replace(PLAIN, scales=(0.7, -1.9)),
    replace(PLAIN, scales=(0.0, 2.0), adapter_bias=True),
    replace(PLAIN, scales="learnable"),
    replace(PLAIN, scales="learnable", adapter_bias=True),
    replace(PLAIN, dropout=True),
    replace(PLAIN, dropout=True, adapter_bias=True, scales="learnable", lead=(23, 3)),
    replace(PLAIN, dropout=True, adapter_bias=True, scales=(0.7, -1.9), r_a=0),
    replace(PLAIN, dropout=True, adapter_bias=True, scales=(0.7, -1.9), r_b=0),
    replace(PLAIN, dropout=True, adapter_bias=True, scales="learnable", r_a=0, bias=False),
    replace(PLAIN, dropout=True, adapter_bias=True, scales="learnable", r_b=0, bias=False),
]

LAYOUTS = [
    replace(PLAIN, lead=(6, 5), x_layout=layout) for layout in ("sliced", "transposed", "expanded", "strided")
] + [replace(PLAIN, lead=(6, 5), G_layout=layout) for layout in ("sliced", "transposed", "expanded", "strided")]

INPUT_DROPOUT = [
    replace(PLAIN, input_dropout="seed"),
    replace(PLAIN, input_dropout="mask"),
    replace(PLAIN, input_dropout="seed", lead=(37,), K=42, N=19, r_b=0, bias=False),
    replace(PLAIN, input_dropout="seed", dropout=True, adapter_bias=True, scales="learnable", lead=(3, 3)),
    replace(PLAIN, input_dropout="mask", dropout=True, adapter_bias=True, scales="learnable", r_b=0),
    replace(PLAIN, input_dropout="seed", lead=(6, 5), x_layout="transposed", G_layout="sliced", r_a=37, r_b=33),
    replace(PLAIN, input_dropout="seed", lead=(0,)),
    Case((48,), 48, 32, 8, 8, input_dropout="seed"),
]

CASES = SIZES + OPTIONS + LAYOUTS

# b0 cancels what x's mean, spread over all channels or sitting in a few huge ones, adds to W0 x: the naive layer sees a
# small y0, while a C = B_down W0, a T = dZ_b^T x, B_down b0 or sum_m dZ_b rounded to low precision is visibly wrong.
ROUNDING = [Case((64,), 96, 80, 4, 6, rounding=kind) for kind in ("cancelling", "huge")]


def operands(
    case: Case, dtype: torch.dtype, adapter_dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[Tensors, Tensor]:
    """Random operands of the case by name, up projections non-zero, the absent ones missing; and G = dL/dh."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * std

    K, N, r_a, r_b, M = case.K, case.N, case.r_a, case.r_b, case.M
    t: Tensors = {"x": normal(M, K), "weight": normal(N, K, std=K**-0.5), "bias": normal(N)}
    G = normal(M, N)
    if case.rounding:
        mean = normal(K, std=16.0)
        if case.rounding == "huge":
            mean[torch.arange(K) % 31 > 0] = 0
            mean *= 8
        t["x"] += mean
        t["bias"] = -(t["weight"] @ mean)
    # In the rounding cases the sequential branch must show: the parallel one sees all of x's mean and would drown it.
    up_std = {"A": 2**-6, "B": 2.0} if case.rounding else {"A": 0.5, "B": 0.5}
    for side, fan_in, r in (("A", K, r_a), ("B", N, r_b)):
        if r == 0:
            continue
        t[f"{side}_down"], t[f"{side}_up"] = normal(r, fan_in, std=fan_in**-0.5), normal(N, r, std=up_std[side])
        if case.adapter_bias:
            t[f"{side}_down_bias"], t[f"{side}_up_bias"] = normal(r, std=0.3), normal(N, std=0.3)
        if case.scales == "learnable":
            t[f"scale_{side.lower()}"] = 1.0 + normal(std=0.5)
    if not case.bias:
        del t["bias"]
    if case.scales == "learnable":
        # Along the branches, so that ds = <G, delta> is not a sum that cancels to nothing.
        G += hydra(t) - hydra({**t, "scale_a": 0, "scale_b": 0})
    t = {name: v.to(adapter_dtype or dtype) if name in ADAPTERS else v.to(dtype) for name, v in t.items()}
    if case.dropout:
        t["mask"] = ((torch.rand(M, r_a + r_b, generator=g) < 0.7) / 0.7).to(dtype)
    if case.input_dropout:
        seed = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(INPUT_SEED)).item()
        t["input_mask"] = input_mask(int(seed), INPUT_P, M, K).to(dtype)
    t["x"] = _laid_out(t["x"].reshape(*case.lead, K), case.x_layout)
    return t, _laid_out(G.to(dtype).reshape(*case.lead, N), case.G_layout)


def _laid_out(v: Tensor, layout: str) -> Tensor:
    """v's values (for "expanded": its first row's, repeated) in another memory layout."""
    if layout == "sliced":
        return torch.cat([v, v, v], -1)[..., v.shape[-1] : 2 * v.shape[-1]]
    if layout == "strided":
        return v.repeat_interleave(2, -1)[..., ::2]
    if layout == "transposed":
        return v.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return v[:1, :1].expand(v.shape)
    return v
