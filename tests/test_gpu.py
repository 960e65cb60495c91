"""The runner of `benchmarks.gpu`: what a check that fails, dies or hangs costs, and what is stored."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from benchmarks import doctor, gpu, timing
from benchmarks.doctor_kernels import FORMATS, Compared, judge, slack_of
from benchmarks.gpu import CheckRow, Isolated, Outcome, Settings, Stage
from hydra_kernels.kernels.launch import Launch

CPU = torch.device("cpu")
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


def isolated(limit: float = 60.0, seconds: float = 60.0) -> Isolated:
    settings = Settings(dry=True, deadline=time.monotonic() + seconds)
    return Isolated(lambda group, checks: [sys.executable, "-c", CHILD, group, *checks], {}, limit, 4, settings)


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
    rows = isolated().run({"group": checks}, lambda row: None)
    assert [row["check"] for row in rows] == checks
    assert statuses(rows) == {"a": "pass", "b": "pass", check: "fail"}
    assert rows[place]["reason"] == reason


def test_a_check_that_hangs_is_killed_and_costs_one_line():
    start = time.monotonic()
    rows = isolated(limit=2.0).run({"one": ["a", "hang", "b"], "two": ["c"]}, lambda row: None)
    assert statuses(rows) == {"a": "pass", "hang": "fail", "b": "pass", "c": "pass"}
    assert rows[1]["reason"] == "no result within 2 s: killed"
    assert time.monotonic() - start < 15


def test_what_the_time_did_not_reach_fails_and_says_so():
    rows = isolated(seconds=0.0).run({"group": ["a", "b"]}, lambda row: None)
    assert [(row["status"], row["reason"]) for row in rows] == [("fail", "not run: the time was over")] * 2


def test_every_check_is_reported_once_when_it_is_known():
    reported: list[CheckRow] = []
    rows = isolated().run({"one": ["a", "crash"], "two": ["b"]}, reported.append)
    assert sorted(row["check"] for row in reported) == ["a", "b", "crash"]
    assert all(set(row) == set(CheckRow.__annotations__) for row in rows)
    assert all(row["dry"] for row in rows)
    assert all(isinstance(gpu.line_of(row), str) for row in rows)


def row_of(status: str) -> CheckRow:
    return CheckRow(
        group="g", check="c", status=status, error=None, allowed=None, what=None, reason=None, seconds=0.0, dry=True
    )


def test_a_failing_stage_does_not_stop_the_next(tmp_path, capsys):
    def raises(settings: Settings) -> Outcome:
        raise RuntimeError("no driver")

    stages = [
        Stage("first", raises, CheckRow),
        Stage("second", lambda settings: Outcome([row_of("fail")], 1), CheckRow),
        Stage("third", lambda settings: Outcome([row_of("pass")], 0), CheckRow),
    ]
    settings = Settings(dry=True, deadline=time.monotonic() + 60)
    assert gpu.run_stages(stages, settings, tmp_path, CPU) == 2
    assert "RuntimeError: no driver" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-second.json", "gpu-third.json"]
    assert timing.read_result(tmp_path / "gpu-third.json", CheckRow)[1] == [row_of("pass")]
    assert gpu.run_stages(stages[2:], settings, tmp_path, CPU) == 0


def test_a_stage_that_starts_too_late_is_skipped(tmp_path, capsys):
    stage = Stage("late", lambda settings: pytest.fail("it ran"), CheckRow)
    assert gpu.run_stages([stage], Settings(dry=True, deadline=time.monotonic() - 1), tmp_path, CPU) == 0
    assert capsys.readouterr().out == "late: skipped, the time was over\n"
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_only_the_dry_run_starts(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--dry-run needs none" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [True, False])
def test_every_kernel_and_backend_is_checked(dry):
    groups = doctor.groups(dry)
    kernels = ("compose", "down", "gemm-forward", "gemm-dx", "grad_z", "grad_w", "reduce")
    alone = {check.split()[0] for group, found in groups.items() if group.startswith("kernel") for check in found}
    assert alone == set(kernels)
    for backend in ("aten", "hybrid", "triton"):
        checks = " ".join(check for group, found in groups.items() if group.startswith(backend) for check in found)
        assert all(name in checks for name in (*FORMATS, "same bits", "stream", "CUDA graph"))
    assert len(groups) <= 22


def test_the_doctors_own_process_prints_a_row_a_check(capsys):
    checks = [check for check in doctor.groups(True)["kernels"] if check.startswith("grad_w")]
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


@pytest.mark.parametrize("broken", ["grad_w", "reduce"])
def test_a_broken_kernel_is_named(broken, monkeypatch):
    """A launch that runs nothing leaves its outputs blank: its own check fails, and no other."""
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: None if self.kernel.__name__ == f"{broken}_kernel" else run(self))
    for kernel in ("grad_w", "reduce"):
        check = next(c for name, c in doctor.groups(True)["kernels"].items() if name.startswith(kernel))
        assert check().status == ("fail" if kernel == broken else "pass")
