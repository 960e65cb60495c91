"""The paper's two measures: how alike two subspaces are (Eq. 14), and accuracy weighed against parameters (Eq. 13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def subspace_similarity(X: Tensor, Y: Tensor, i: int, j: int) -> float:
    """How alike the top right-singular subspaces of X and Y are (Eq. 14): 0 if orthogonal, 1 if one lies in the other.

    ``phi(X, Y, i, j) = ||V_X[:, :i]^T V_Y[:, :j]||_F^2 / min(i, j)``, V the right-singular vectors by falling value.

    Args:
        X: [p, K], such as A_down or B_down W0; any floating dtype.
        Y: [q, K], such as W0.
        i, j: how many directions of each, 1 to its rank min(p, K), min(q, K).

    Raises:
        ValueError: for other shapes or sizes.
    """
    for name, matrix in (("X", X), ("Y", Y)):
        if matrix.dim() != 2 or 0 in matrix.shape:
            raise ValueError(f"{name}: expected a matrix that is not empty, got shape {list(matrix.shape)}")
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"Y: expected shape [*, {X.shape[1]}], as wide as X, got {list(Y.shape)}")
    for name, size, matrix in (("i", i, X), ("j", j, Y)):
        if not 1 <= size <= min(matrix.shape):
            raise ValueError(f"{name}: expected an integer from 1 to {min(matrix.shape)}, got {size}")
    V_X, V_Y = (torch.linalg.svd(matrix.detach().double(), full_matrices=False).Vh for matrix in (X, Y))
    return ((V_X[:i] @ V_Y[:j].t()).square().sum() / min(i, j)).item()


def parameter_efficiency(score: float, parameters: float) -> float:
    """Parameter efficiency (Eq. 13): ``score * exp(-log10(parameters / 10^8 + 1))``.

    Args:
        score: accuracy, 0 to 1.
        parameters: number of trainable parameters.
    """
    if not 0 <= score <= 1:
        raise ValueError(f"score: expected a number from 0 to 1, got {score}")
    if not 0 <= parameters < math.inf:
        raise ValueError(f"parameters: expected a finite number >= 0, got {parameters}")
    return score * math.exp(-math.log10(parameters / 1e8 + 1))
