"""The doctors of `benchmarks.gpu`: what a check that fails, dies or hangs costs, and what is checked."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import doctor
from benchmarks.device import isolated
from benchmarks.device.doctor_kernels import FORMATS, Compared, Finding, judge, slack_of
from benchmarks.device.isolated import CheckRow, Isolated
from hydra_kernels.choose.choice import Machine
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


@pytest.mark.slow  # it waits
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


@pytest.mark.parametrize("dry", [True, False])
def test_every_kernel_and_backend_is_checked(dry):
    groups = doctor.groups(dry)
    kernels = ("compose", "down", "one_pass", "gemm-forward", "gemm-dx", "grad_z", "sum_rows", "reduce")
    kernels += ("through_weight", "effective")
    alone = {check.split()[0] for group, found in groups.items() if group.startswith("kernel") for check in found}
    assert alone == set(kernels)
    for backend in ("aten", "hybrid", "triton"):
        checks = " ".join(check for group, found in groups.items() if group.startswith(backend) for check in found)
        assert all(
            name in checks for name in (*FORMATS, "same bits", "stream", "CUDA graph", "no sync", "torch.compile")
        )
    assert len(groups) <= 31


@pytest.mark.parametrize("dry", [True, False])
def test_the_quick_doctor_checks_every_backend_and_form_in_bf16_and_tf32(dry):
    groups = doctor.quick(dry)
    named = {
        (*group.split(), check.split()[1]) for group, checks in groups.items() if group != "machine" for check in checks
    }
    forms = {"triton": ["composed"], "hybrid": ["composed", "effective"], "aten": ["composed", "kept"]}
    wanted = {(backend, dtype, form) for backend in forms for dtype in ("bf16", "tf32") for form in forms[backend]}
    assert {name for name in named if name[0] != "native"} == wanted
    for group, checks in groups.items():
        if group.endswith("bf16"):
            for form in {check.split()[1] for check in checks}:
                cases = [check.split()[2] for check in checks if check.split()[1] == form]
                assert [case.endswith(kind) for case in cases for kind in ("cancelling", "huge")].count(True) == 2
                others = {case for case in cases if not case.endswith(("cancelling", "huge"))}
                assert len(others) == (2 if form == "effective" else 3)  # that form has no dropout
    # A process each, so that all of them run at once on 16 cores.
    assert len(groups) <= 16


@pytest.mark.skipif(not doctor.sweeps(), reason="the compiled part is not built")
def test_the_sweep_is_checked_by_what_a_user_would_set(monkeypatch):
    """In every format, at both ways to divide the columns; where another backward would run, the check fails."""
    wanted = {f"sweep {name} {case}" for name in ("bf16", "fp16", "tf32") for case in doctor.SWEPT}
    wanted |= {f"sweep bf16 {case}" for case in doctor.SWEPT_WIDE} | {"sweep fp32, same bits"}
    monkeypatch.setattr(doctor, "serves", lambda backend, form: True)  # as on a GPU
    assert wanted <= doctor.groups(False)["native in use"].keys()
    assert {f"sweep bf16 {case}" for case in doctor.DRY} <= doctor.quick(True)["native by sweep"].keys()

    def seen() -> Finding:
        return Finding("pass", reason=os.environ["HYDRA_KERNELS_BACKWARD"])

    case = doctor.DRY[0]
    assert doctor.by_sweep(seen, FORMATS["bf16"], case).reason == "sweep"
    assert "HYDRA_KERNELS_BACKWARD" not in os.environ
    card = Machine("a card", (10, 0), dict.fromkeys(doctor.TABLE), [], backward="sweep", no_sweep="not for 10.0")
    monkeypatch.setattr(doctor, "here", lambda device: card)
    monkeypatch.setattr(doctor, "device", lambda: torch.device("cuda"))
    finding = doctor.by_sweep(seen, FORMATS["bf16"], case)
    assert (finding.status, finding.reason) == ("fail", "it ran by passes: not for 10.0")
    monkeypatch.setattr(doctor, "here", lambda device: card._replace(no_sweep=None))
    assert doctor.by_sweep(seen, FORMATS["bf16"], case) == Finding("pass", reason="sweep")


def test_a_form_is_checked_as_itself(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "backend_check", lambda *arguments: seen.append(arguments))
    for name, check in doctor.quick(True)["aten tf32"].items():
        check()
        backend, form, case, _, way = seen[-1]
        assert (backend, form, f"tf32 {way} {case}") == ("aten", FORMATS["tf32"], name)
    assert [arguments[-1] for arguments in seen] == ["composed", "composed", "kept", "kept"]


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
