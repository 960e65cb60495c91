"""The mask of input dropout in plain torch. `kernels.philox` makes the same bits where the kernels read x.

Philox4x32-10 (Salmon et al., 2011) makes four words of 32 bits from a key and a counter. Element [m, k] of the mask is
word k % 4 for the key (low, high half of the seed) and the counter (k // 4, m, 0, 0); it is kept where that word is at
least `threshold(p)`. So a mask depends on nothing but (seed, m, k), and no two layers or steps share a seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operators import traced

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
# On a CPU so many words are made at a time: what is computed on the way then stays in cache.
_BLOCK = 2**16


def draw_seed(device: torch.device) -> Tensor:
    """A seed [] from torch's generator. Out of place: selective checkpointing may keep what is drawn."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """The smallest word that keeps its element."""
    return round(p * 2**32)


def kept(seed: Tensor, p: float, M: int, K: int, first: int = 0) -> Tensor:
    """Which elements [M, K] stay, columns ``first`` to ``first + K`` of the whole mask: boolean."""
    if seed.device.type != "cpu" or traced(seed):
        return _rows(seed, p, 0, M, K, first)
    rows = max(1, 4 * _BLOCK // max(K, 1))
    return torch.cat([_rows(seed, p, m, min(rows, M - m), K, first) for m in range(0, max(M, 1), rows)])


def _rows(seed: Tensor, p: float, m: int, M: int, K: int, first: int) -> Tensor:
    """M rows from row m on."""
    key = [seed & _WORD, (seed >> 32) & _WORD]
    # Words of 32 bits in int64. Until the third round some of them are the same in every row or column.
    c0 = torch.arange(first // 4, (first + K + 3) // 4, device=seed.device)[None]
    c1 = torch.arange(m, m + M, device=seed.device)[:, None]
    c2 = c3 = torch.zeros(1, 1, dtype=torch.int64, device=seed.device)
    for _ in range(10):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the lower 64 bits, in which nothing is lost
        c0, c1 = ((product2 >> 32) & _WORD) ^ (c1 ^ key[0]), product2 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ (c3 ^ key[1]), product0 & _WORD
        key = [(word + step) & _WORD for word, step in zip(key, _KEY_STEPS, strict=True)]
    words = torch.stack([word >= threshold(p) for word in (c0, c1, c2, c3)], -1)
    return words.flatten(1)[:, first % 4 : first % 4 + K]
