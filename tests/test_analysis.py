"""The paper's measures against plain formulas, cases with a known answer, and the paper's own table."""

import numpy as np
import pytest
import torch

from hydra_kernels.analysis import parameter_efficiency, subspace_similarity


@pytest.mark.parametrize(
    ("p", "q", "K", "i", "j"), [(4, 30, 20, 1, 1), (4, 30, 20, 4, 7), (8, 9, 50, 3, 9), (1, 5, 6, 1, 5)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_subspace_similarity_is_the_plain_formula(p, q, K, i, j, dtype):
    g = torch.Generator().manual_seed(p + q)
    X, Y = torch.randn(p, K, generator=g, dtype=dtype), torch.randn(q, K, generator=g, dtype=dtype)
    V_X = np.linalg.eigh(X.double().numpy().T @ X.double().numpy())[1][:, ::-1][:, :i]
    V_Y = np.linalg.eigh(Y.double().numpy().T @ Y.double().numpy())[1][:, ::-1][:, :j]
    expected = np.linalg.norm(V_X.T @ V_Y, "fro") ** 2 / min(i, j)
    assert subspace_similarity(X, Y, i, j) == pytest.approx(expected, rel=1e-6)


def test_subspace_similarity_of_known_subspaces():
    X = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0]))
    assert subspace_similarity(X, X, 2, 2) == pytest.approx(1)
    assert subspace_similarity(X, X, 1, 4) == pytest.approx(1)
    assert subspace_similarity(X[:2], X[2:], 2, 2) == pytest.approx(0)
    assert subspace_similarity(X, X[1:], 2, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("shapes", "i", "j", "message"),
    [
        (((3, 4), (3, 5)), 1, 1, r"Y: expected shape \[\*, 4\]"),
        (((3,), (3, 5)), 1, 1, "X: expected a matrix"),
        (((3, 4), (0, 4)), 1, 1, "Y: expected a matrix"),
        (((3, 4), (3, 4)), 0, 1, "i: expected an integer from 1 to 3, got 0"),
        (((3, 4), (2, 4)), 1, 3, "j: expected an integer from 1 to 2, got 3"),
    ],
)
def test_subspace_similarity_refuses(shapes, i, j, message):
    with pytest.raises(ValueError, match=message):
        subspace_similarity(torch.ones(shapes[0]), torch.ones(shapes[1]), i, j)


@pytest.mark.parametrize(
    ("parameters", "accuracy", "expected"),
    [(87.9e6, 0.6549, 0.498), (0.20e6, 0.7095, 0.709)],
    ids=["full tuning", "Hydra"],
)
def test_parameter_efficiency_reproduces_table_1(parameters, accuracy, expected):
    assert round(parameter_efficiency(accuracy, parameters), 3) == expected


@pytest.mark.parametrize(("score", "parameters"), [(65.49, 1), (-0.1, 1), (0.5, -1), (0.5, float("nan"))])
def test_parameter_efficiency_refuses(score, parameters):
    with pytest.raises(ValueError, match="expected"):
        parameter_efficiency(score, parameters)
