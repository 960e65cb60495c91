"""Exact tests of paired differences, and their correction for how many there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of sign patterns under which the mean difference is at least as far from 0: an exact paired test."""
    observed = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in patterns]
    return sum(total >= observed * (1 - 1e-12) for total in sums) / len(patterns)


def further_p(differences: Sequence[float]) -> float:
    """The share of sign patterns under which the sum is at least as large: the exact one-sided paired test."""
    slack = 1e-12 * sum(abs(d) for d in differences)
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns]
    return sum(total >= sum(differences) - slack for total in sums) / len(patterns)


def holm(p: Sequence[float]) -> list[float]:
    """Each p corrected for how many there are (Holm 1979): the i-th smallest of m times m - i + 1, never falling."""
    corrected, least = [0.0] * len(p), 0.0
    for place, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        least = max(least, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = least
    return corrected
