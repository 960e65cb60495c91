"""The runner of `benchmarks.gpu`: what a check that fails, dies or hangs costs, and what is stored."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import doctor, gpu
from benchmarks.device import isolated
from benchmarks.device.doctor_kernels import FORMATS, Compared, judge, slack_of
from benchmarks.device.isolated import CheckRow, Isolated
from benchmarks.gpu import Part, Settings, Stage
from benchmarks.measuring import timing
from benchmarks.measuring.rows import CeilingRow
from hydra_kernels.kernels.launch import Launch

# Stands for `benchmarks.doctor`: each check does what its name says.
CHILD = f"""
import json, os, signal, sys, time
print("a library's line", flush=True)
for name in sys.argv[2:]:
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(60)
    if name == "exit":
        sys.exit("no such device")
    status = "fail" if name in ("wrong", "broken") else "pass"
    row = {{"check": name, "status": status, "error": 2.0, "allowed": 1.0, "what": "h max", "reason": None}}
    print(json.dumps(row | {{"seconds": 0.1}}), flush=True)
    if name == "broken":
        sys.exit({doctor.START_OVER})
"""


def checks_of(limit: float = 60.0, seconds: float = 60.0) -> Isolated:
    end = time.monotonic() + seconds
    command = lambda group, checks: [sys.executable, "-c", CHILD, group, *checks]  # noqa: E731
    return Isolated(command, {}, limit, 4, end, True, doctor.START_OVER)


def statuses(rows: list[CheckRow]) -> dict[str, str]:
    return {row["check"]: row["status"] for row in rows}


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        ("crash", "the process ended, killed by SIGSEGV"),
        ("exit", "the process ended, exit status 1: no such device"),
        ("wrong", None),
        ("broken", None),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_check_costs_one_line(check, reason, place):
    checks = ["a", "b"]
    checks.insert(place, check)
    rows = checks_of().run({"group": checks}, lambda row: None)
    assert [row["check"] for row in rows] == checks
    assert statuses(rows) == {"a": "pass", "b": "pass", check: "fail"}
    assert rows[place]["reason"] == reason


def test_a_check_that_hangs_is_killed_and_costs_one_line():
    start = time.monotonic()
    rows = checks_of(limit=8.0).run({"one": ["a", "hang", "b"], "two": ["c"]}, lambda row: None)
    assert statuses(rows) == {"a": "pass", "hang": "fail", "b": "pass", "c": "pass"}
    assert rows[1]["reason"] == "no result within 8 s: killed"
    assert time.monotonic() - start < 60


def test_what_the_time_did_not_reach_fails_and_says_so():
    rows = checks_of(seconds=0.0).run({"group": ["a", "b"]}, lambda row: None)
    assert [(row["status"], row["reason"]) for row in rows] == [("fail", "not run: the time was over")] * 2


def test_every_check_is_reported_once_when_it_is_known():
    reported: list[CheckRow] = []
    rows = checks_of().run({"one": ["a", "crash"], "two": ["b"]}, reported.append)
    assert sorted(row["check"] for row in reported) == ["a", "b", "crash"]
    assert all(set(row) == set(CheckRow.__annotations__) for row in rows)
    assert all(row["dry"] for row in rows)
    assert all(isinstance(isolated.line_of(row), str) for row in rows)


def row_of(status: str) -> CheckRow:
    return CheckRow(
        group="g", check="c", status=status, error=None, allowed=None, what=None, reason=None, seconds=0.0, dry=True
    )


def settings(tmp_path: Path, seconds: float = 60.0) -> Settings:
    return Settings(True, time.monotonic() + seconds, tmp_path)


def test_what_a_stage_had_before_it_failed_is_stored(tmp_path):
    def run(settings: Settings) -> Iterator[Part]:
        yield Part([row_of("pass")])
        yield Part([row_of("fail")], 1)
        raise RuntimeError("no driver")

    stage = Stage("first", run, CheckRow, 10)
    with pytest.raises(RuntimeError, match="no driver"):
        gpu.run_stage(stage, settings(tmp_path))
    stored = timing.read_result(tmp_path / "first-dry-cpu.json", CheckRow)[1]
    assert stored == [row_of("pass"), row_of("fail")]
    assert gpu.run_stage(stage._replace(run=lambda s: iter([Part([row_of("fail")], 2)])), settings(tmp_path)) == 2


def test_one_task_that_raises_does_not_stop_the_next(tmp_path, capsys):
    def broken() -> list[CheckRow]:
        raise ValueError("no such kernel")

    tasks = [("one", broken), ("two", lambda: [row_of("pass")])]
    parts = list(gpu.attempts(settings(tmp_path), tasks, lambda row: row["status"] == "fail"))
    assert parts == [Part([], 1), Part([row_of("pass")], 0)]
    assert "ValueError: no such kernel" in capsys.readouterr().err
    assert list(gpu.attempts(settings(tmp_path, -1.0), tasks, lambda row: 0)) == []
    assert capsys.readouterr().out == "one: skipped, the time was over\ntwo: skipped, the time was over\n"


def test_a_stage_that_crashes_or_hangs_does_not_stop_the_next(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    bodies = {"crash": "import os; os.abort()", "hang": "import time; time.sleep(60)", "good": "print('ran')"}
    selected = [
        Stage(name, lambda settings: iter(()), CheckRow, seconds)
        for name, seconds in zip(bodies, (5.0, 2.0, 20.0), strict=True)
    ]
    allowed: dict[str, float] = {}

    def command(stage: Stage, seconds: float) -> list[str]:
        allowed[stage.name] = seconds
        return [sys.executable, "-c", bodies[stage.name]]

    start = time.monotonic()
    assert gpu.run_stages(selected, settings(tmp_path, 27.0), command, {}) == 2
    assert time.monotonic() - start < 50
    out = capfd.readouterr().out
    assert "crash: FAILED (-6)" in out
    assert "hang: FAILED (killed, " in out
    assert "ran\ngood: ok" in out
    # The time that a stage leaves goes to the next.
    assert allowed["crash"] == pytest.approx(5, abs=1)
    assert 2 < allowed["hang"] <= 7
    assert gpu.run_stages(selected, settings(tmp_path, -1.0), command, {}) == 3
    assert capfd.readouterr().out.count("skipped, the time was over") == 3


def test_the_stages_of_a_dry_run_store_their_rows(tmp_path):
    """Those that the other benchmarks' own tests do not go through: ceilings, and a tuned shape."""
    here = settings(tmp_path)
    by_name = {stage.name: stage for stage in gpu.STAGES}
    assert list(by_name) == ["doctor", "ceilings", "tune", "host", "layer", "table4"]
    assert sum(stage.seconds for stage in gpu.STAGES) <= 9 * 60 - 20
    assert gpu.run_stage(by_name["ceilings"], here) == 0
    rows = timing.read_result(here.path("ceilings"), CeilingRow)[1]
    assert {(row["what"], row["dry"]) for row in rows} == {("copy", True), ("product", True)}
    tflops, gigabytes = gpu._ceilings(here)
    assert tflops > 0
    assert gigabytes > 0


def test_without_a_gpu_only_the_dry_run_starts(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--dry-run needs none" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [True, False])
def test_every_kernel_and_backend_is_checked(dry):
    groups = doctor.groups(dry)
    kernels = ("compose", "down", "gemm-forward", "gemm-dx", "grad_z", "sum_rows", "reduce")
    kernels += ("through_weight", "finish")
    alone = {check.split()[0] for group, found in groups.items() if group.startswith("kernel") for check in found}
    assert alone == set(kernels)
    for backend in ("aten", "hybrid", "triton"):
        checks = " ".join(check for group, found in groups.items() if group.startswith(backend) for check in found)
        assert all(
            name in checks for name in (*FORMATS, "same bits", "stream", "CUDA graph", "no sync", "torch.compile")
        )
    assert len(groups) <= 28


def test_the_doctors_own_process_prints_a_row_a_check(capsys):
    checks = [check for check in doctor.groups(True)["kernels"] if check.startswith("sum_rows")]
    assert doctor.main(["--dry", "kernels", *checks]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["check"] for row in rows] == checks
    assert all(row["status"] == "pass" and 0 <= row["error"] <= row["allowed"] for row in rows)


def test_an_exception_is_the_checks_result():
    def compiles() -> doctor.Finding:
        raise ValueError("no such\n  instruction")

    (bad, good) = doctor.findings({"bad": compiles, "good": doctor.versions})
    assert (bad[0], bad[1].status, bad[1].reason) == ("bad", "fail", "ValueError: no such instruction")
    assert good[1].status == "pass"


@pytest.mark.parametrize(("factor", "status"), [(1.0, "pass"), (0.95, "fail"), (float("nan"), "fail")])
def test_what_is_scaled_or_not_a_number_fails(factor, status):
    true = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    naive, slack = true.bfloat16(), slack_of(FORMATS["bf16"], torch.bfloat16)
    finding = judge([[Compared("h", (true * factor).bfloat16(), naive, true, slack)]])
    assert finding.status == status
    assert (finding.error is None) == (factor != factor)


@pytest.mark.parametrize("broken", ["sum_rows", "reduce"])
def test_a_broken_kernel_is_named(broken, monkeypatch):
    """A launch that runs nothing leaves its outputs blank: its own check fails, and no other."""
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: None if self.kernel.__name__ == f"{broken}_kernel" else run(self))
    for kernel in ("sum_rows", "reduce"):
        check = next(c for name, c in doctor.groups(True)["kernels"].items() if name.startswith(kernel))
        assert check().status == ("fail" if kernel == broken else "pass")
