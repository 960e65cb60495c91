"""A run of `benchmarks.gpu`: its order, its limits, what is compiled before it, and what is left when it is cut off."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import hydra_kernels as hk
from benchmarks import gpu, render
from benchmarks.device import compilation, run
from benchmarks.device.compilation import KERNEL_SECONDS, RIVAL_SECONDS, START, Compilation, Rival
from benchmarks.device.doctor_backends import call
from benchmarks.device.isolated import CheckRow
from benchmarks.device.run import Part, Planned, Settings, Stage
from benchmarks.measuring import timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import CeilingRow, HostRow, LayerRow, StageRow, TuneRow
from benchmarks.measuring.shapes import HEADLINE, Shape
from benchmarks.rendering.run import summary
from hydra_kernels.backend import effective
from hydra_kernels.backend import triton as steps
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.launch import Launch

from .cases import PLAIN, Case, operands
from .oracle import differentiate
from .test_render import ENVIRONMENT, GPU, layer_row, layer_rows, table4_rows

ORDER = ["doctor", "table4", "layer", "host", "llama", "all-checks", "tune", "shapes"]
TABLE4 = (
    "our Hydra 3+3 over naive LoRA 4 0.970 (goal 0.95, MISSED), "
    "our Hydra 3+3 over naive SeqLoRA 11 1.078 (goal 0.97, MISSED)"
)
FILES = {stage.name: stage.files for stage in gpu.STAGES}
KERNEL = Compilation("module", "down_kernel", {}, {}, {}, {}, 90)
RIVAL = Rival("compiled_lora", HEADLINE[0], Ranks(16, 0), True)


def check_row(status: str, check: str = "c") -> CheckRow:
    return CheckRow(
        group="g", check=check, status=status, error=None, allowed=None, what=None, reason=None, seconds=0.0, dry=False
    )


def settings(tmp_path: Path, seconds: float = 60.0) -> Settings:
    return Settings(True, time.monotonic() + seconds, tmp_path, tmp_path / "compiled")


def stage_of(name: str, seconds: float = 10.0, **files: type) -> Stage:
    return Stage(name, lambda settings: iter(()), files or {name: CheckRow}, dict, seconds)


def test_what_a_stage_had_before_it_failed_is_stored(tmp_path):
    def parts(settings: Settings) -> Iterator[Part]:
        yield Part("first", [check_row("pass")])
        yield Part("second", [check_row("pass", "other")])
        yield Part("first", [check_row("fail")], 1)
        raise RuntimeError("no driver")

    stage = Stage("stage", parts, {"first": CheckRow, "second": CheckRow}, dict, 10)
    with pytest.raises(RuntimeError, match="no driver"):
        run.run_stage(stage, settings(tmp_path))
    for file, rows in (("first", [check_row("pass"), check_row("fail")]), ("second", [check_row("pass", "other")])):
        assert timing.read_result(tmp_path / f"{file}-dry-cpu.json", CheckRow)[1] == rows
    failing = stage._replace(run=lambda s: iter([Part("first", [check_row("fail")], 2)]))
    assert run.run_stage(failing, settings(tmp_path)) == 2


def test_one_task_that_raises_does_not_stop_the_next(tmp_path, capsys):
    def broken() -> list[CheckRow]:
        raise ValueError("no such kernel")

    tasks = [("one", broken), ("two", lambda: [check_row("pass")])]
    parts = list(run.attempts(settings(tmp_path), "file", tasks, lambda row: row["status"] == "fail"))
    assert parts == [Part("file", [], 1), Part("file", [check_row("pass")], 0)]
    assert "ValueError: no such kernel" in capsys.readouterr().err
    assert list(run.attempts(settings(tmp_path, -1.0), "file", tasks)) == []
    assert capsys.readouterr().out == "one: skipped, the time was over\ntwo: skipped, the time was over\n"


def test_a_stage_that_crashes_or_hangs_does_not_stop_the_next(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(run, "GRACE", 0.5)
    monkeypatch.setattr(run, "START", 0.0)
    monkeypatch.setattr(run, "TERMINATION", 0.2)
    monkeypatch.setattr(run, "LEAST", 0.1)
    bodies = {"crash": "os.abort()", "hang": "time.sleep(60)", "good": "print('ran')"}
    plan = [Planned(stage_of(name, seconds), {}, 2) for name, seconds in zip(bodies, (5, 2, 20), strict=True)]
    given: dict[str, int] = {}

    def command(stage: Stage) -> list[str]:
        log = tmp_path / "compiled"
        body = f"open({str(log)!r}, 'a').write('late_kernel\\n')" if stage.name == "good" else ""
        path = tmp_path / "run-dry-cpu.json"
        given[stage.name] = len(timing.read_result(path, StageRow)[1]) if path.exists() else 0
        return [sys.executable, "-c", f"import os, time\nfloat(input())\n{body}\n{bodies[stage.name]}"]

    start = time.monotonic()
    rows = run.run_stages(plan, settings(tmp_path, 22.5), command, dict(os.environ))
    assert time.monotonic() - start < 25
    # Each row is stored before the next stage starts.
    assert given == {"crash": 0, "hang": 1, "good": 2}
    assert [row["status"] for row in rows][::2] == ["FAILED (-6)", "ok"]
    assert rows[1]["status"].startswith("FAILED (killed, ")
    assert [row["late"] for row in rows] == [[], [], ["late_kernel"]]
    assert timing.read_result(tmp_path / "run-dry-cpu.json", StageRow)[1] == rows
    out = capfd.readouterr().out
    assert "ran\ngood: ok" in out
    assert "good: compiled late: late_kernel" in out
    late = run.run_stages(plan, settings(tmp_path, -1.0), command, {})
    assert [row["status"] for row in late] == ["skipped"] * 3
    assert capfd.readouterr().out.count("skipped, the time was over") == 3


def test_where_the_time_is_short_the_last_stages_go_without(tmp_path, monkeypatch):
    """Limits of 20 s, half of them the start: what one spares the next may have, what is missing the last ones lack."""
    given: dict[str, float] = {}
    clock, taken = [1000.0], [0.0]

    def one(planned, settings, seconds, command, environment):
        given[planned.stage.name] = seconds
        clock[0] += taken[0]
        return run._row(planned, "ok", settings)

    monkeypatch.setattr(run, "_run_one", one)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    plan = [Planned(stage_of(name, 20.0 - START), {}, 16) for name in "abc"]
    for left, taken[0], expected in (
        *((60, 20, [10, 10, 10]), (75, 20, [25, 25, 25]), (60, 15, [10, 15, 20])),
        *((50, 20, [10, 10]), (36, 20, [10, 6]), (22, 20, [10]), (12, 20, [])),
    ):
        given.clear()
        run.run_stages(plan, settings(tmp_path, left), lambda stage: [], {})
        assert list(given.values()) == expected, left


def test_what_several_stages_need_is_compiled_for_the_first():
    stages = [
        Stage("a", lambda s: iter(()), {}, lambda: {"k": KERNEL, "r": RIVAL}, 5),
        Stage("b", lambda s: iter(()), {}, lambda: {"k": KERNEL, "l": KERNEL}, 5),
    ]
    plan = run.plan_of(stages, 16)
    assert [list(planned.jobs) for planned in plan] == [["k", "r"], ["l"]]
    assert [planned.limit for planned in plan] == [
        START + KERNEL_SECONDS + RIVAL_SECONDS + 5,
        START + KERNEL_SECONDS + 5,
    ]
    assert compilation.seconds_for([KERNEL] * 17 + [RIVAL] * 3, 2) == START + 9 * KERNEL_SECONDS + 2 * RIVAL_SECONDS
    assert compilation.seconds_for([], 2) == 0
    assert compilation.count_of([KERNEL, RIVAL, KERNEL]) == "1 compiled_lora, 2 down"


def test_compilers_start_no_workers_of_their_own(monkeypatch):
    """16 processes with a worker a core each would have the cores compile nothing but torch's imports."""
    given = []
    monkeypatch.setattr(compilation.Isolated, "run", lambda self, groups, report: given.append(self) or [])
    compilation.compile_all({"rival": RIVAL, "kernel": KERNEL}, 16, time.monotonic() + 60, {"HOME": "here"})
    (isolated,) = given
    assert isolated.environment == {"HOME": "here", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def test_a_stage_without_a_run_above_it_ends(monkeypatch, capsys):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert gpu.main(["--here", "--dry-run", "--stage", "host"]) == 1


def test_a_dry_run_runs_the_stages_in_the_order_of_what_counts(tmp_path, monkeypatch, capsys):
    """The command itself, each stage's process a stand-in; all of it, with the stages' own, is `--dry-run`."""
    assert [stage.name for stage in gpu.STAGES] == ORDER
    started = []

    def command(settings: Settings, stage: Stage) -> list[str]:
        started.append(stage.name)
        return [sys.executable, "-S", "-c", "input()"]

    monkeypatch.setattr(gpu, "command_of", command)
    without_jobs(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    every = [*ORDER, "candidates"]
    assert started == every
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in told if ": at most" in line] == ["csrc", *every, "in all"]
    names = [line.partition(":")[0] for line in told[-12:]]
    assert names == ["run", *ORDER[:2], *["layer"] * 3, *ORDER[3:], "skipped"]
    rows = timing.read_result(tmp_path / "run-dry-cpu.json", StageRow)[1]
    assert [(row["stage"], row["status"]) for row in rows] == [(name, "ok") for name in every]


def without_jobs(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", tuple(stage._replace(jobs=dict) for stage in gpu.STAGES))
    monkeypatch.setattr(gpu, "CANDIDATES", gpu.CANDIDATES._replace(jobs=dict))
    monkeypatch.setattr(gpu, "INTERPRETED", type("Off", (), {"value": False}))


def test_candidates_run_where_they_are_named_and_overwrite_no_run(tmp_path, monkeypatch, capsys):
    without_jobs(monkeypatch)
    monkeypatch.setattr(gpu, "command_of", lambda settings, stage: [sys.executable, "-S", "-c", "input()"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        for stages, expected in (([], ORDER), (["--stage", "candidates"], ["candidates"])):
            assert gpu.main(["--plan", *stages]) == 0
            told = capsys.readouterr().out.splitlines()
            assert [line.partition(":")[0] for line in told] == ["csrc", *expected, "in all"]
        (tmp_path / "run-dry-cpu.json").write_text("of before", encoding="utf-8")
        assert gpu.main(["--dry-run", "--stage", "candidates", "--out", str(tmp_path)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "run-dry-cpu.json").read_text(encoding="utf-8") == "of before"
    (row,) = timing.read_result(tmp_path / "run-candidates-dry-cpu.json", StageRow)[1]
    assert (row["stage"], row["status"]) == ("candidates", "ok")
    assert capsys.readouterr().out.splitlines()[-1].startswith("candidates: ok, ")


def test_the_ceilings_come_before_the_layers_whose_floors_they_are(tmp_path, monkeypatch):
    here = settings(tmp_path)
    monkeypatch.setattr(gpu.layer, "run", lambda options, progress: [layer_row(Shape(256, 24, 16), "frozen", Ranks(0, 0), None, {}, dtype="bf16")])  # fmt: skip # noqa: E501
    [stage] = [stage for stage in gpu.STAGES if stage.name == "layer"]
    assert run.run_stage(stage, here) == 0
    rows = timing.read_result(here.path("ceilings"), CeilingRow)[1]
    assert {(row["what"], row["dry"]) for row in rows} == {("copy", True), ("product", True)}
    layers = timing.read_result(here.path("layer"), LayerRow)[1]
    assert len(layers) == 2
    assert all(row["floor_us"] > 0 for row in layers)


def test_without_a_gpu_only_the_dry_run_and_the_plan_start(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.main([]) == 2
    assert "--dry-run and --plan need none" in capsys.readouterr().err
    assert gpu.main(["--plan"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


EVERYTHING = replace(PLAIN, lead=(23, 3), adapter_bias=True, scales="learnable", dropout=True)


def about(launch: Launch) -> tuple[str, dict[str, object], dict[str, int]]:
    """All of a launch that decides what is compiled for it."""

    def value(v: object) -> object:
        v = getattr(v, "base", v)  # a descriptor's tensor
        return (v.dtype, v.shape, v.stride()) if isinstance(v, torch.Tensor) else (type(v), v)

    return launch.kernel.__name__, {name: value(v) for name, v in launch.arguments.items()}, launch.options


@pytest.mark.parametrize(
    ("case", "dtype", "adapters", "bias"),
    [
        (EVERYTHING, "bf16", None, True),
        (replace(PLAIN, adapter_bias=True), "fp32", None, False),
        (replace(PLAIN, bias=False, r_a=0), "bf16", torch.float32, False),
        (Case((64,), 96, 80, 16, 0, scales="learnable"), "bf16", None, False),
    ],
    ids=str,
)
def test_what_is_planned_is_what_hydra_linear_launches(case, dtype, adapters, bias, monkeypatch):
    """In the interpreter, with its tiles; the plan's tensors hold nothing."""
    base = compilation.DTYPES[dtype][0]
    t, G = operands(case, base, adapters)
    wanted = set(t) - {"weight", "mask", *([] if bias else ["bias"])}
    for backend, form in (("triton", "composed"), ("hybrid", "composed"), ("hybrid", "effective")):
        found: list[Launch] = []
        way = effective if form == "effective" else steps
        if form == "effective":
            case = replace(case, dropout=False)
            t.pop("mask", None)
            wanted.discard("mask")

        def noted(launch: Launch, found: list[Launch] = found) -> None:
            found.append(launch)
            launch.run()

        with monkeypatch.context() as patch:
            for name in ("forward", "backward"):
                patch.setattr(way, name, partial(getattr(way, name), run=noted))
            differentiate(partial(call, hk.hydra_linear, case, backend=backend, form=form), t, G, wanted)
        step = compilation.Step(case, dtype, backend == "triton", adapters, bias, form)
        planned = compilation.launches_of(step, configs.INTERPRETER)
        assert [launch.kernel.__name__ for launch in planned] == [launch.kernel.__name__ for launch in found]
        for launch, ran in zip(planned, found, strict=True):
            assert about(launch) == about(ran)
        assert len(found) >= 6


def kind_of(launch: Launch, capability: int) -> Compilation:
    """In place of Triton's specialization, which the interpreter lacks: types, constants, what is 1 or 16 divides."""
    signature, decorator = {}, inspect.getsource(launch.kernel.fn).partition("\ndef ")[0]
    for name, v in launch.arguments.items():
        v = getattr(v, "base", v)
        about = v.dtype if isinstance(v, torch.Tensor) else type(v)
        if type(v) is not float and name.isupper() and len(name) > 1:
            about = v
        elif type(v) is int and f'"{name}"' not in decorator:  # as of those that are not to be specialized
            about = (v == 1, v % 16 == 0)
        signature[name] = str(about)
    return Compilation("", launch.kernel.__name__, signature, {}, {}, launch.options, capability)


def test_the_limits_of_all_stages_end_within_eight_minutes_on_16_cores(monkeypatch):
    monkeypatch.setattr(compilation, "compilation", kind_of)
    plan = run.plan_of(gpu.STAGES, 16)
    assert all(planned.jobs for planned in plan)
    assert sum(isinstance(job, Rival) for job in plan[2].jobs.values()) == 3 * len(HEADLINE)
    assert 460 <= gpu.BUILD_LIMIT + sum(planned.limit for planned in plan) <= 60 * gpu.MINUTES == 480
    assert plan[0].limit <= 60


# In a process that does not interpret: the limits of the true plan; then two kernels are compiled as the run does, and
# Triton's launcher must find each in the cache. A driver stands in for the GPU's, which is not asked to run.
PLANNED = """
import os, sys, time
from pathlib import Path
import triton
from benchmarks import gpu
from benchmarks.device import compilation
from benchmarks.device.run import plan_of
from hydra_kernels.kernels import configs

plan = plan_of(gpu.STAGES, 16)
print(gpu.BUILD_LIMIT + sum(planned.limit for planned in plan), *(len(planned.jobs) for planned in plan))

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return triton.backends.compiler.GPUTarget("cuda", 90, 32)

step = compilation.Step(gpu.Case((6400,), 3072, 768, 8, 8), "bf16", fused=False)
wanted = [launch for launch in compilation.launches_of(step, configs.SM90) if launch.kernel.__name__ in sys.argv[1:]]
jobs = {repr(job): job for job in (compilation.compilation(launch, 90) for launch in wanted)}
rows = compilation.compile_all(jobs, 1, time.monotonic() + 300, dict(os.environ))
print(*(row["status"] for row in rows))
log = Path(os.environ["TRITON_CACHE_DIR"]) / "log"
compilation.tell_compilations(log)
triton.runtime.driver.set_active(Driver())
for launch in wanted:
    launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)
print(len(compilation.told(log)))
other = wanted[-1]
other.kernel.warmup(**other.arguments, **(other.options | {"num_warps": 2}), grid=other.grid)
print(*compilation.told(log))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_tritons_launcher_looks_for(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PLANNED, "reduce_kernel", "compose_kernel"],
        env=environment, cwd=render.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    limits, statuses, late, after = done.stdout.splitlines()
    total, *counts = map(float, limits.split())
    assert total <= 480
    assert len(counts) == len(ORDER)
    assert min(counts) >= 1
    assert statuses == "pass pass"
    assert late == "0"
    # One that was not compiled is told.
    assert after in ("reduce_kernel", "compose_kernel")


def host_row() -> HostRow:
    return HostRow(
        M=8, K=32, N=32, r_a=4, r_b=4, dtype="bf16", device="cuda", method="ours_hydra", backend="native", host_us=50.0,
        q1_us=49.0, q3_us=51.0, over={name: [0.5, 0.55, 0.6] for name in ("frozen", "naive_hydra", "naive_lora")},
        runs=3,
        calls=20, dry=False,
    )  # fmt: skip


def tune_row() -> TuneRow:
    row = {"M": 6400, "K": 3072, "N": 768, "r_a": 8, "r_b": 8, "dtype": "bfloat16", "device": "A Card"}
    row |= {"backend": "native", "form": "composed", "us": {"native composed": 10.0, "hybrid composed": 11.0}}
    return TuneRow(**row, library="aten", library_us={}, failed={}, without_bias="", versions={}, date="", dry=False)


def lora_over_peft() -> list[LayerRow]:
    return [
        layer_row(HEADLINE[0], "peft_lora", Ranks(16, 0), "rank", {}, **GPU),
        layer_row(HEADLINE[0], "ours_lora", Ranks(16, 0), "rank", {"peft_lora": 0.75}, **GPU),
    ]


def stand_ins() -> list[Stage]:
    """Every stage of the run, whose parts are there at once."""
    ceiling = CeilingRow(
        what="copy", dtype="bf16", value=1.0, q1=1.0, q3=1.0, unit="GB/s", bytes_or_operations=1, runs=3, dry=False
    )
    llama = table4_rows(model="Llama-shaped", dtype="bf16")
    peft = [2 * taken for taken in llama[-2]["step_seconds"]]  # our LoRA's are 1.5 of naive LoRA's
    r32 = layer_rows(HEADLINE[:1], ours=1.6, hydra=[16, 16], **GPU)
    made = {
        "doctor": [("doctor-quick", [check_row("pass"), check_row("fail", "d")], 1)],
        "table4": [("table4", table4_rows(dtype=dtype)) for dtype in ("bf16", "tf32")],
        "layer": [("ceilings", [ceiling]), ("layer", layer_rows(HEADLINE[:2], ours=1.4, **GPU) + lora_over_peft())],
        "host": [("host", [host_row()])],
        "llama": [("table4-llama", [*llama, {**llama[-2], "method": "peft_lora", "step_seconds": peft}])],
        "all-checks": [("doctor", [check_row("pass")])],
        "tune": [("tune", [tune_row()])],
        "shapes": [("layer-shapes", r32)],
    }
    return [
        Stage(stage.name, lambda settings, parts=made[stage.name]: iter([Part(*part) for part in parts]), stage.files, dict, 10)  # noqa: E501
        for stage in gpu.STAGES
    ]  # fmt: skip


def whole_run(out: Path) -> None:
    """What the run and the processes of its stages store, here in one process."""
    here, rows = Settings(True, time.monotonic() + 60, out), []
    for stage in stand_ins():
        failures = run.run_stage(stage, here)
        row = run._row(Planned(stage, {}, 2), "FAILED (1)" if failures else "ok", here, 5.0)
        rows.append(StageRow(**{**row, "dry": False}))
        timing.write_result(here.path("run"), ENVIRONMENT, rows, StageRow)


@pytest.fixture
def quick_environment(monkeypatch):
    monkeypatch.setattr(timing, "environment", lambda device: ENVIRONMENT)


def calls_of(out: Path) -> int:
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(counted)
    try:
        whole_run(out)
    finally:
        sys.setprofile(None)
    return count


def cut_off(out: Path, calls: int) -> None:
    """A process of its own that is killed, by a signal it cannot catch, at that call of Python's."""
    child = os.fork()
    if child == 0:
        left = calls

        def counted(*_: object) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(counted)
        whole_run(out)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_run_that_is_cut_off_anywhere_leaves_what_it_had_and_pages_of_it(tmp_path, quick_environment, monkeypatch):
    """At ten points; the tables are made each time, charts once."""
    charted = render.BLOCKS
    monkeypatch.setattr(render, "BLOCKS", tuple(b._replace(chart=None, overview=None) for b in charted))
    monkeypatch.setattr(render, "PICTURES", ())
    whole_run(tmp_path / "first")  # whatever is done once in a process is not counted
    total, reached = calls_of(tmp_path / "whole"), []
    for point in range(10):
        root = tmp_path / str(point)
        out = root / "results"
        out.mkdir(parents=True)
        cut_off(out, 1 + total * (2 * point + 1) // 20)
        if point == 9:
            monkeypatch.setattr(render, "BLOCKS", charted)
        reached.append(check_cut_off(root, out))
    assert reached == sorted(reached)
    assert reached[0] == 0 < reached[5] < reached[9]


def check_cut_off(root: Path, out: Path) -> int:
    """How many files there are, each whole, and each in the pages and in the twelve lines."""
    schemas = {"run": StageRow} | {file: schema for files in FILES.values() for file, schema in files.items()}
    found = {path.name.removesuffix("-dry-cpu.json"): path for path in out.glob("*.json")}
    for file, path in found.items():
        assert timing.read_result(path, schemas[file])[1]
    for page in {part.page for part in (*render.BLOCKS, *render.DIGESTS)}:
        (root / page).parent.mkdir(exist_ok=True)
        (root / page).write_text(
            "\n".join(f"<!-- {p.marker} -->\n<!-- /{p.marker} -->" for p in (*render.BLOCKS, *render.DIGESTS) if p.page == page)  # noqa: E501
        )  # fmt: skip
    assert render.main(["--root", str(root), "--results", str(out)]) == 0
    results, of_gpu = ((root / page).read_text(encoding="utf-8") for page in ("docs/results.md", "docs/gpu.md"))
    assert ("| native composed | 10.0 |" in of_gpu) == ("tune" in found)
    assert ("| doctor | FAILED (1) |" in of_gpu) == ("run" in found)
    assert ("| 8 x 32 x 32 | our Hydra 4+4, native |" in results) == ("host" in found)
    assert ("| naive SeqLoRA 11 |" in results) == ("table4" in found)
    assert ("**Llama-shaped, bf16" in results) == ("table4-llama" in found)
    assert f"<!-- measured:layer -->\n{render.NOTHING}\n" in results  # a CPU's
    assert (render.NOTHING in of_gpu) == ("tune" not in found)
    ended = {row["stage"] for row in timing.read_result(found["run"], StageRow)[1]} if "run" in found else set()
    told = summary(lambda file: out / f"{file}-dry-cpu.json", FILES, "2026-11-30")
    assert len(told) == 12
    statuses = {line.partition(":")[0]: line.partition(": ")[2].split("; ")[0].split(",")[0] for line in reversed(told)}
    for stage, files in FILES.items():
        begun = "cut off" if files.keys() & found.keys() else "not reached"
        assert statuses[stage] == ("FAILED (1)" if stage == "doctor" else "ok") if stage in ended else begun
    assert told[-1].startswith(f"skipped: {', '.join(stage for stage in FILES if stage not in ended)}; ")
    return len(found)


def test_the_last_lines_are_twelve_and_hold_the_goals(tmp_path, quick_environment):
    whole_run(tmp_path)
    path = lambda file: tmp_path / f"{file}-dry-cpu.json"  # noqa: E731
    told = summary(path, FILES, ENVIRONMENT["date"])
    assert told == [
        f"run: A Card, 2026-11-30; commit 0123456789ab; 7 of 8 stages ok, 40 s; {tmp_path}",
        "doctor: FAILED (1), 5 s; 1 passed, 1 failed, 0 cannot run here",
        f"table4: ok, 5 s; bf16 eager: {TABLE4}; tf32 eager: {TABLE4}",
        "layer: ok, 5 s; our Hydra 8+8 over frozen at 6400 x 3072 x 768 1.400 (goal 1.52), "
        "our Hydra 8+8 over frozen at 25216 x 4096 x 1024 1.400 (goal 1.27, MISSED)",
        "layer: our Hydra 8+8 over naive LoRA 16 at 6400 x 3072 x 768 1.400 (goal 0.72, MISSED), "
        "our Hydra 8+8 over naive LoRA 16 at 25216 x 4096 x 1024 1.400 (goal 0.74, MISSED)",
        "layer: our LoRA 16 over PEFT LoRA 16 at 6400 x 3072 x 768 0.750 (goal 0.72, MISSED)",
        "host: ok, 5 s; our Hydra 4+4, native, over naive Hydra at 8 x 32 x 32 0.550 (goal 0.6)",
        f"llama: ok, 5 s; bf16 eager: {TABLE4}, our LoRA 4 over PEFT LoRA 4 0.500",
        "all-checks: ok, 5 s; 1 passed, 0 failed, 0 cannot run here",
        "tune: ok, 5 s; native composed won 1; 0 candidates were wrong",
        "shapes: ok, 5 s; our Hydra 8+8 over frozen at 6400 x 3072 x 768 1.600 (goal 1.65)",
        "skipped: nothing; compiled after a clock had started: nothing",
    ]
    rows = timing.read_result(path("run"), StageRow)[1]
    rows[-1] |= {"status": "skipped"}
    rows[2]["late"] = ["down_kernel", "down_kernel"]
    timing.write_result(path("run"), ENVIRONMENT, rows, StageRow)
    last = summary(path, FILES, ENVIRONMENT["date"])[-1]
    assert last == "skipped: shapes; compiled after a clock had started: 2 in layer"
    # A stage that stored results and then did not end was cut off.
    timing.write_result(path("run"), ENVIRONMENT, [row for row in rows if row["stage"] != "doctor"], StageRow)
    assert summary(path, FILES, ENVIRONMENT["date"])[1].startswith("doctor: cut off; 1 passed, 1 failed")
    timing.write_result(path("run"), ENVIRONMENT, rows, StageRow)
    # Of another run's results nothing is told.
    later = summary(path, FILES, "2026-12-01T00:00:00+00:00")
    assert later[1:3] == ["doctor: not reached", "table4: not reached"]
    assert len(later) == 12
