"""Host time and ceilings: what is timed, in which pairs, that ours is proved first, and the arithmetic of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hydra_kernels as hk
from benchmarks import ceilings, host
from benchmarks.measuring import methods, modes, naive, timing
from benchmarks.measuring.rows import CeilingRow, HostRow
from benchmarks.rendering import goals
from benchmarks.rendering import host as render_host

CPU = torch.device("cpu")


def test_the_host_command_stores_every_rival_and_backend(tmp_path, capsys):
    arguments = ["--device", "cpu", "--backend", "aten", "--backend", "reference", "--dry", "--out", str(tmp_path)]
    assert host.main(arguments) == 0
    _, rows = timing.read_result(tmp_path / "host-dry-cpu.json", HostRow)
    ours = [("ours_hydra", "aten"), ("ours_hydra", "reference")]
    assert [(row["method"], row["backend"]) for row in rows] == [(name, None) for name in methods.BASELINES] + ours
    for row in rows:
        assert (row["dry"], row["runs"], row["calls"], row["dtype"], row["device"]) == (True, 3, 1, "fp32", "cpu")
        assert 0 < row["q1_us"] <= row["host_us"] <= row["q3_us"]
        own = row["over"].get(row["method"])
        assert own is None or own == [1.0, 1.0, 1.0]
    printed = capsys.readouterr().out
    assert "our Hydra 4+4, aten" in printed
    assert f"{rows[3]['over']['naive_hydra'][1]:.3f}" in printed


def test_host_ratios_are_of_paired_rounds_and_the_first_rounds_do_not_count(monkeypatch):
    draw = np.random.default_rng(0)
    slow, seen = iter(np.repeat(draw.uniform(1, 10, 42), 4)), []
    factors = {hk.HydraLinear: 3.0, naive.NaiveHydra: 4.0, naive.NaiveLoRA: 2.0}

    def sample(module, x, G, calls):
        seen.append((type(module), x.data_ptr()))
        # A whole round is slow or fast, on top of a first one that compiles.
        return next(slow) * factors.get(type(module), 1.0) * (1e6 if len(seen) <= 8 else 1e-6)

    monkeypatch.setattr(host, "sample", sample)
    monkeypatch.setattr(host, "SHAPES", host.SHAPES[:1])
    rows = {row["method"]: row for row in host.measure(CPU, ["aten"], 40, dry=False)}
    assert rows["ours_hydra"]["over"]["naive_hydra"] == [0.75, 0.75, 0.75]
    assert rows["naive_hydra"]["over"]["frozen"] == [4.0, 4.0, 4.0]
    assert rows["ours_hydra"]["runs"] == 40
    assert rows["ours_hydra"]["q3_us"] < 30
    orders = [tuple(kind for kind, _ in seen[place : place + 4]) for place in range(0, len(seen), 4)]
    assert all(len(set(order)) == 4 for order in orders)
    assert len(set(orders)) > 10
    assert len({x for _, x in seen}) == 1


def test_a_host_sample_is_the_mean_of_steps_that_write_fresh_gradients(monkeypatch):
    linear, seen = nn.Linear(3, 2), []
    linear.register_forward_pre_hook(lambda module, inputs: seen.append((module.weight.grad, inputs[0].grad)))
    clock = iter([0.0, 1.0, 50.0, 52.0, 90.0, 96.0])
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    assert host.sample(linear, torch.randn(4, 3, requires_grad=True), torch.randn(4, 2), 3) == 3.0
    assert seen == [(None, None)] * 3


def test_a_wrong_gradient_ends_the_host_run_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    build = methods.build_layer

    def build_wrong(linear, name, *args, **kwargs):
        made = build(linear, name, *args, **kwargs)
        if name == "ours_hydra":
            made.B_down.register_hook(lambda gradient: gradient * 0.99)
        return made

    monkeypatch.setattr(methods, "build_layer", build_wrong)
    monkeypatch.setattr(host, "sample", lambda *_: pytest.fail("timed"))
    assert host.main(["--device", "cpu", "--backend", "aten", "--dry", "--out", str(tmp_path)]) == 1
    assert "ours_hydra, aten: the gradient of B_down differs from naive_hydra by 1.00e-02" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def host_row(method: str, backend: str | None, ratio: float) -> HostRow:
    over = {name: [0.1, ratio, 9.0] for name in ("frozen", "naive_lora", "naive_hydra")}
    about = dict.fromkeys(HostRow.__annotations__, 1) | {"dtype": "fp32", "device": "cpu", "r_a": 4, "r_b": 4}
    return HostRow(**{**about, "method": method, "backend": backend, "over": over})


def test_goals_are_met_or_missed_by_backend():
    def verdict(backend, ratio):
        return [goal.line()[1:] for goal in goals.host_goals([host_row("ours_hydra", backend, ratio)])]

    assert verdict("aten", 1.05) == [["1.050 (0.100 to 9.000)", "1.05", "met"]]
    assert verdict("aten", 1.051) == [["1.051 (0.100 to 9.000)", "1.05", "MISSED"]]
    assert [verdict("native", ratio)[0][-1] for ratio in (0.6, 0.61)] == ["met", "MISSED"]
    assert verdict("triton", 0.5) == verdict(None, 1.0) == []


def test_ours_alone_is_marked_where_the_host_takes_longer():
    rows = [host_row("naive_hydra", None, 1.2), host_row("ours_hydra", "aten", 1.2), host_row("ours_hydra", "aten", 1)]
    table = render_host.host_table(rows)
    shown, itself = "1.20{} (0.10 to 9.00)", "1"
    assert [line[3:] for line in table.cells] == [
        ["1.20", shown.format(""), itself],
        ["1.20", *[shown.format(" ▲")] * 2],
        ["1.00", *["1.00 (0.10 to 9.00)"] * 2],
    ]
    assert list(table.bold) == [False, True, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--backend", "fast"], "'fast'"), (["--rounds", "0"], "rounds is 0"), (["--device", "tpu"], "'tpu'")],
)
def test_bad_options_of_host_are_named(arguments, message, tmp_path, capsys):
    assert host.main(["--device", "cpu", "--dry", "--out", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_ceiling_is_the_count_over_the_median_time():
    row = ceilings.row_of("copy", "bf16", "GB/s", 1e9, 6_000_000_000, [1.0, 2.0, 3.0, 4.0, 6.0], dry=False)
    assert (row["value"], row["q1"], row["q3"], row["runs"]) == (2.0, 1.5, 3.0, 5)


def test_the_ceilings_command_times_random_data_in_full_precision(tmp_path, monkeypatch, capsys):
    seen, mm = [], torch.mm

    def spy(left, right, out):
        assert left.std() > 0.5
        assert right.std() > 0.5
        assert not torch.equal(left, right)
        seen.append((left.dtype, left.shape, torch.backends.cuda.matmul.fp32_precision))
        return mm(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    assert ceilings.main(["--device", "cpu", "--dry", "--out", str(tmp_path)]) == 0
    with modes.fp32_products("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    _, rows = timing.read_result(tmp_path / "ceilings-dry-cpu.json", CeilingRow)
    assert [(row["what"], row["dtype"], row["unit"]) for row in rows] == [
        ("copy", "bf16", "GB/s"),
        ("product", "bf16", "TFLOP/s"),
        ("product", "fp32", "TFLOP/s"),
    ]
    # 4096 elements of 2 bytes, read and written; 64 x 64 dots of 64 products and sums.
    assert [row["bytes_or_operations"] for row in rows] == [16384, 524288, 524288]
    assert all(0 < row["q1"] <= row["value"] <= row["q3"] and row["dry"] and row["runs"] == 3 for row in rows)
    calls = ceilings.UNCOUNTED_CALLS + 3
    assert seen == [(torch.bfloat16, (64, 64), "ieee")] * calls + [(torch.float32, (64, 64), "ieee")] * calls
    assert f"{rows[0]['value']:g}" in capsys.readouterr().out
    assert ceilings.main(["--device", "tpu", "--out", str(tmp_path)]) == 1
    assert "'tpu'" in capsys.readouterr().err
