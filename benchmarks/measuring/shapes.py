"""The layer benchmark's shapes, and what is measured at each: which method, at which ranks, paired by what."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks.measuring.methods import Ranks


class Shape(NamedTuple):
    """x is [M, K], the weight [N, K]."""

    M: int
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.M}x{self.K}x{self.N}"


# ViT-B/32 (50 tokens an image) fc2, fc1 and attention, ViT-L fc2, a language model's layer, and small batches.
CPU_SHAPES = (
    *(Shape(6400, 3072, 768), Shape(6400, 768, 3072), Shape(6400, 768, 768), Shape(3200, 4096, 1024)),
    *(Shape(2048, 4096, 4096), Shape(256, 4096, 4096)),
    *(Shape(64, 768, 768), Shape(64, 3072, 768), Shape(48, 1024, 1024), Shape(16, 3072, 768), Shape(16, 4096, 4096)),
)
# ViT-B/32 and /16 (197 tokens), ViT-L/16, RoBERTa's fc2, language models, and few tokens.
CUDA_SHAPES = (
    *(Shape(M, K, N) for K, N in ((3072, 768), (768, 3072), (768, 768)) for M in (128 * 50, 128 * 197)),
    *(Shape(128 * 197, 4096, 1024), Shape(8192, 3072, 768)),
    *(Shape(M, K, N) for K, N in ((4096, 4096), (14336, 4096), (4096, 14336)) for M in (8192, 256, 16)),
)
DRY_SHAPES = (Shape(256, 24, 16), Shape(16, 16, 24))
# What a layer of K inputs and N outputs is called. RoBERTa-base has ViT-B's sizes.
LAYER_NAMES = {
    **{(3072, 768): "ViT-B fc2", (768, 3072): "ViT-B fc1", (768, 768): "ViT-B attention"},
    **{(4096, 1024): "ViT-L fc2", (1024, 1024): "ViT-L attention"},
    **{(4096, 4096): "Llama-8B attention", (14336, 4096): "Llama-8B down", (4096, 14336): "Llama-8B up"},
}


# Those of the GPU's goals: ViT-B/32 fc2, ViT-L fc2, and a language model's layers; the ranks of the goals, and others,
# the commonest first.
HEADLINE = (Shape(6400, 3072, 768), Shape(25216, 4096, 1024), Shape(8192, 4096, 4096), Shape(8192, 14336, 4096))
OTHER_SHAPES = tuple(shape for shape in CUDA_SHAPES if shape not in HEADLINE)
GOALS_RANKS, OTHER_RANKS = Ranks(8, 8), (Ranks(16, 16), Ranks(2, 2), Ranks(4, 8), Ranks(32, 32))
PAPERS_FC2 = HEADLINE[0]


def has_bias(shape: Shape) -> bool:
    """Whether a GPU's frozen layer is measured with b0: a ViT's has it, a language model's has not."""
    return min(shape.K, shape.N) < 4096


def layer_name(K: int, N: int) -> str:
    """The layer of a known model, else its sizes."""
    return LAYER_NAMES.get((K, N), f"{K} to {N}")


class Entry(NamedTuple):
    """A method at one shape, and in what it equals the Hydra layer that it is measured beside (`LayerRow.pair`)."""

    method: str
    ranks: Ranks
    pair: str | None

    def names(self) -> tuple[str, ...]:
        """Under which names others are compared with it."""
        both = (self.method, f"{self.method}@parameters")
        return both if self.pair == "both" else both[1:] if self.pair == "parameters" else both[:1]


def trainable(shape: Shape, ranks: Ranks) -> int:
    """Parameters of adapters without biases: A_down and A_up over K + N, B_down and B_up over N twice."""
    return ranks.r_a * (shape.K + shape.N) + ranks.r_b * 2 * shape.N


def equal_rank(hydra: Ranks) -> dict[str, Ranks]:
    """The ranks of each kind that add up to Hydra's."""
    return {"hydra": hydra, "lora": Ranks(sum(hydra), 0), "seqlora": Ranks(0, sum(hydra))}


def equal_parameters(shape: Shape, hydra: Ranks) -> dict[str, Ranks]:
    """LoRA's and SeqLoRA's ranks whose parameters come nearest to Hydra's."""
    wanted = trainable(shape, hydra)
    return {
        "lora": Ranks(max(1, round(wanted / trainable(shape, Ranks(1, 0)))), 0),
        "seqlora": Ranks(0, max(1, round(wanted / trainable(shape, Ranks(0, 1))))),
    }


def entries_of(shape: Shape, hydra: Ranks, names: Sequence[str]) -> list[Entry]:
    """What is measured beside one Hydra layer: every method at equal rank, naive LoRA and SeqLoRA at equal parameters.

    Where equal parameters mean equal rank, as SeqLoRA's do in a square layer, the method is measured once.
    """
    same_rank = equal_rank(hydra)
    near = equal_parameters(shape, hydra)
    entries = []
    for method in names:
        if method == "frozen":
            entries.append(Entry(method, Ranks(0, 0), None))
            continue
        kind = method.partition("_")[2]
        same = kind == "hydra" or near[kind] == same_rank[kind]
        entries.append(Entry(method, same_rank[kind], "both" if same else "rank"))
        if method in ("naive_lora", "naive_seqlora") and not same:
            entries.append(Entry(method, near[kind], "parameters"))
    return entries


def shape_option(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"shape is {text!r}, expected M,K,N of 1 and more")
    return Shape(*map(int, sizes))


def ranks_option(text: str) -> Ranks:
    parts = text.split("+")
    if len(parts) != 2 or not all(map(str.isdecimal, parts)) or not any(map(int, parts)):
        raise ValueError(f"ranks is {text!r}, expected A+B, not both 0")
    return Ranks(*map(int, parts))


def deadlines(shapes: Sequence[Shape], end: float) -> list[tuple[Shape, Callable[[], float]]]:
    """The shapes from the cheapest on, each with a call that gives the end of its share of the time left then.

    A share goes with the arithmetic; what small shapes leave over goes to the large ones. A constant for each shape
    stands for building and compiling.
    """
    cheapest_first = sorted(shapes, key=math.prod)
    weights = [math.prod(shape) + (4 << 30) for shape in cheapest_first]

    def share(place: int) -> float:
        now = time.perf_counter()
        return now + max(0.0, end - now) * weights[place] / sum(weights[place:])

    return [(shape, partial(share, place)) for place, shape in enumerate(cheapest_first)]
