"""The share of small updates that a rounded output keeps: of things that are known, and what is measured of it."""

import pytest
import torch
from torch.nn import functional as F

import hydra_kernels as hk
from benchmarks import rounding
from benchmarks.measuring import timing
from benchmarks.rendering import rounding as render_rounding
from benchmarks.rendering.tables import Stored

CPU = torch.device("cpu")


def test_the_share_of_the_signal_is_one_where_nothing_is_rounded():
    operands = {name: t.double() for name, t in rounding.draw({"M": 16, "K": 12, "N": 20}, 0).items()}
    for ratio in (1e-4, 1e-1):
        assert rounding.kept(operands, "reference", ratio, CPU) == pytest.approx(1.0, rel=1e-6)


def test_a_naive_bf16_layer_loses_small_updates():
    shares = [rounding.kept(rounding.draw({"M": 64, "K": 64, "N": 64}, s), "reference", 1e-3, CPU) for s in range(3)]
    assert max(shares) < 0.7
    assert rounding.kept(rounding.draw({"M": 64, "K": 64, "N": 64}, 0), "reference", 1e-1, CPU) == pytest.approx(
        1, abs=0.02
    )


def test_the_share_kept_is_the_component_along_the_signal(monkeypatch):
    def a_quarter_and_noise(x, weight, bias, *, scale_a, scale_b, form, backend, **named):
        operands = {name: None if t is None else t.double() for name, t in named.items()}
        scales = {"scale_a": scale_a, "scale_b": scale_b}
        y0 = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        wide = (t if t is None else t.double() for t in (x, weight, bias))
        delta = hk.reference.hydra_linear(*wide, **operands, **scales) - y0
        across = torch.randn(delta.shape, generator=torch.Generator().manual_seed(0), dtype=delta.dtype)
        across -= (across * delta).sum() / delta.square().sum() * delta
        assert (delta.norm() / y0.norm()).item() == pytest.approx(0.01, rel=1e-6)
        return y0 + 0.25 * delta + across

    monkeypatch.setattr(hk, "hydra_linear", a_quarter_and_noise)
    for bias in (True, False):
        operands = rounding.draw({"M": 16, "K": 12, "N": 20}, 0, bias)
        assert (operands["bias"] is not None) == bias
        assert rounding.kept(operands, "any", 0.01, CPU) == pytest.approx(0.25, rel=1e-6)


def test_rounding_measures_every_backend_that_takes_bf16_with_a_bias_and_without(monkeypatch):
    def kept(operands, backend, ratio, device):
        if backend == "native":
            raise ValueError("it has no bf16 here")
        seed, bias = operands
        return 10 * seed**2 + bias + ratio + (100 if backend == "triton" else 0)

    monkeypatch.setattr(rounding, "kept", kept)
    monkeypatch.setattr(rounding, "draw", lambda sizes, seed, bias=True: (seed, bias))
    monkeypatch.setattr(hk, "backends", lambda: {"native": None, "hybrid": "no Triton", "triton": None, "aten": None})
    rows = rounding.run(CPU, {"M": 1, "K": 2, "N": 3}, 3, False)
    assert len(rows) == 2 * 2 * len(rounding.RATIOS)
    found = {(r["backend"], r["bias"], r["ratio"]): (r["q1"], r["kept"], r["q3"], r["interpreted"]) for r in rows}
    assert found["aten", True, 0.1] == (6.1, 11.1, 26.1, False)  # of 1.1, 11.1 and 41.1
    assert found["triton", False, 0.01] == (105.01, 110.01, 125.01, True)
    environment = {**timing.environment(CPU), "date": "2026-11-30"}
    text = render_rounding.rounding_markdown(Stored(None, environment, rows))
    assert "frozen output | triton | triton, no b0 | aten | aten, no b0 |" in text
    assert "| 0.1 | 111.10 | 110.10 | 11.10 | 10.10 |" in text
    assert text.endswith(
        "In Triton's interpreter: triton. Not measured: naive, native, hybrid, which has no bf16 on this device."
    )
