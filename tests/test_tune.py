"""tune: right candidates only, the fastest wins, and a folder of measurements that outlives accidents; and explain."""

import contextlib
import itertools
import json
import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
import triton

import hydra_kernels as hk
from hydra_kernels import extension
from hydra_kernels.backend import TABLE, aten
from hydra_kernels.backend.interface import LIBRARIES
from hydra_kernels.choose import accuracy, machine
from hydra_kernels.choose import tune as tuning
from hydra_kernels.choose.choice import choose
from hydra_kernels.choose.machine import CPU, here
from hydra_kernels.choose.tune import _store

SHAPE = (64, 48, 32, 3, 2)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path))
    machine.forget()
    yield tmp_path
    machine.forget()


@pytest.fixture
def of_aten(monkeypatch):
    """Where it does not matter what is measured: nothing that the interpreter runs."""
    monkeypatch.setattr(tuning, "CANDIDATES", (("aten", "composed"), ("aten", "kept")))


def tune(*shapes, **options):
    return hk.tune(shapes or [SHAPE], **{"dtype": F32, "rounds": 2, "report": lambda line: None, **options})


def native_runs() -> bool:
    return hk.backends()["native"] is None


def native_forms() -> list[str]:
    return [f"native {form}" for form in ("composed", "kept", "effective")] if native_runs() else []


def chosen(M: int = 64, dtype: torch.dtype = F32) -> tuple[str, str]:
    return choose(M, *SHAPE[1:], dtype, here(CPU))[:2]


def test_every_candidate_is_measured_and_the_fastest_stored(folder):
    lines = []
    (tuned,) = tune(report=lines.append)
    assert set(tuned.us) == {
        *("hybrid composed", "hybrid effective", "triton composed", "aten composed", "aten kept"),
        *native_forms(),
    }
    assert tuned.us[f"{tuned.backend} {tuned.form}"] == min(tuned.us.values())
    assert not tuned.failed
    library = "" if tuned.library == "aten" else f" {tuned.library}"
    assert lines[0].startswith(f"M=64 K=48 N=32 3+2 float32: {tuned.backend} {tuned.form}{library} (")
    (path,) = folder.iterdir()
    assert json.loads(path.read_text()) == json.loads(json.dumps(tuned._asdict()))
    assert choose(*SHAPE, F32, here(CPU))[:3] == (
        tuned.backend,
        tuned.form,
        "it was the fastest when measured on this device",
    )


def test_the_winner_is_what_auto_runs(monkeypatch):
    """A measurement that says triton makes the layer launch triton's kernels, and one of another dtype does not."""
    (tuned,) = tune()
    _store(tuned._replace(backend="triton", form="composed"))
    machine.forget()
    calls = []
    forward = TABLE["triton"].forward
    monkeypatch.setattr(TABLE["triton"], "forward", lambda *a: calls.append(a) or forward(*a))
    for dtype in (F32, BF16):
        layer = hk.HydraLinear(48, 32, r_a=3, r_b=2, dtype=dtype)
        layer(torch.randn(4, 16, 48, dtype=dtype))
        layer(torch.randn(7, 48, dtype=dtype))  # far from 64 rows
    assert [call[0].shape for call in calls] == [(64, 48)]


@pytest.mark.skipif(not native_runs() or not extension.load().onednn(), reason="needs the compiled part and oneDNN")
@pytest.mark.parametrize("fastest", LIBRARIES)
def test_the_fastest_library_is_stored_and_runs(fastest, monkeypatch, folder):
    """Each library's step runs its products by it; the fastest is what the next call is told."""
    by_onednn = {}

    def times(steps, *_):
        for name, step in steps.items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                step()
            by_onednn[name] = sum(event.name == "mkldnn::_linear_pointwise" for event in profile.events())
        return {name: 1.0 if name == fastest else 2.0 for name in steps}

    monkeypatch.setattr(tuning, "CANDIDATES", (("native", "kept"),))
    monkeypatch.setattr(tuning, "_times", times)
    (tuned,) = tune()
    assert by_onednn == {"native kept": 0, "aten": 0, "onednn-forward": 1, "onednn": 2, "own": 0}
    assert tuned.library == fastest
    assert choose(*SHAPE, F32, here(CPU)).plan == ("kept" if fastest == "aten" else f"kept {fastest}")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_in_low_precision_the_effective_form_wins_for_layers_without_a_bias_alone(dtype, monkeypatch, folder):
    """Where b0 cancels W0 x it errs more than the naive layer, which random operands do not show."""
    monkeypatch.setattr(tuning, "CANDIDATES", (("hybrid", "composed"), ("hybrid", "effective")))
    monkeypatch.setattr(tuning, "_times", lambda steps, *_: {name: 1.0 + ("composed" in name) for name in steps})
    lines = []
    (tuned,) = tune(dtype=dtype, report=lines.append)
    expected = ("effective", "") if dtype == F32 else ("composed", "hybrid effective")
    assert (tuned.form, tuned.without_bias) == expected
    assert ("without a bias hybrid effective" in lines[0]) == (dtype == BF16)
    forms = [choose(*SHAPE, dtype, here(CPU), has_bias=bias).form for bias in (True, False)]
    assert forms == [expected[0], "effective"]
    assert hk.explain(*SHAPE, dtype=dtype, bias=False).form == "effective"
    x, calls, forward = torch.randn(64, 48, dtype=dtype), [], TABLE["hybrid"].forward
    monkeypatch.setattr(TABLE["hybrid"], "forward", lambda *a: calls.append(a[-1]) or forward(*a))
    for bias in (True, False):
        hk.HydraLinear(48, 32, bias=bias, r_a=3, r_b=2, dtype=dtype)(x)
    assert calls == forms


def test_only_candidates_for_layers_without_a_bias_are_no_winner(monkeypatch):
    monkeypatch.setattr(tuning, "CANDIDATES", (("hybrid", "effective"),))
    with pytest.raises(RuntimeError, match="no candidate is exact enough"):
        tune(dtype=BF16)


def test_the_rule_of_accuracy_by_hand():
    true = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert accuracy.errors(torch.tensor([3.0, -4.5]), true) == pytest.approx((0.5 / 4, 0.5 / 5))
    assert accuracy.errors(torch.zeros(2), 0 * true) == (0, 0)
    for wrong in (torch.inf, torch.nan):
        assert accuracy.errors(torch.tensor([3.0, wrong]), true) == (torch.inf, torch.inf)
    assert accuracy.errors(torch.ones(2), 0 * true) == (torch.inf, torch.inf)
    assert accuracy.allowed(0.25, 2**-10) == 0.5 + 2**-10
    slacks = {torch.float64: 2**-46, F32: 2**-22, torch.float16: 2**-10, BF16: 2**-7}
    assert {dtype: accuracy.slack_of(dtype) for dtype in slacks} == slacks
    assert accuracy.slack_of(F32, tf32=True) == 2**-9


def test_a_wrong_candidate_is_named_and_never_wins(monkeypatch):
    """dB_down too large by a few times the rounding of the naive layer, from the fastest of all backends."""
    backward = aten.backward

    def wrong(*arguments):
        grads = backward(*arguments)
        return grads | {"B_down": grads["B_down"] * (1 + 5e-6)} if arguments[-1] == "kept" else grads

    monkeypatch.setattr(aten, "backward", wrong)
    lines = []
    (tuned,) = tune(report=lines.append)
    assert list(tuned.failed) == ["aten kept"]
    assert "the error of gradient 4 is" in tuned.failed["aten kept"]
    assert "aten kept" not in tuned.us
    assert "aten kept FAILED: the error of gradient 4 is" in lines[0]


def test_a_crashing_candidate_is_named_and_costs_only_itself(monkeypatch):
    def crash(*arguments):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(TABLE["triton"], "forward", crash)
    (tuned,) = tune()
    assert tuned.failed == {"triton composed": "RuntimeError: no kernel image"}
    assert set(tuned.us) == {"hybrid composed", "hybrid effective", "aten composed", "aten kept", *native_forms()}


def test_where_nothing_is_right_it_raises_and_stores_nothing(monkeypatch, folder):
    monkeypatch.setattr("hydra_kernels.choose.tune._wrong", lambda *arguments: "wrong")
    with pytest.raises(RuntimeError, match=r"no candidate is exact enough for \(64, 48, 32, 3, 2\)"):
        tune()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, row: path.write_text(path.read_text()[:40]),
        lambda path, row: path.write_bytes(b"\x80\xff"),
        lambda path, row: path.write_text("[]"),
        lambda path, row: path.write_text(json.dumps({k: v for k, v in row.items() if k != "form"})),
        lambda path, row: path.write_text(json.dumps(row | {"backend": "flash"})),
        lambda path, row: path.write_text(json.dumps(row | {"dtype": "no_such"})),
    ],
)
def test_a_damaged_file_is_warned_of_and_skipped_and_replaced(damage, folder, of_aten):
    (tuned,) = tune()
    (path,) = folder.iterdir()
    damage(path, tuned._asdict())
    machine.forget()
    with pytest.warns(UserWarning, match=f"{path.name} is not a measurement of hk.tune"):
        here(CPU)
    assert not here(CPU).measured
    tune()
    assert [key for key, _ in here(CPU).measured] == [(48, 32, 3, 2, F32)]


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "another card"},
        {"versions": {**machine.versions(), "hydra_kernels": "0.0.1"}},
        {"versions": {**machine.versions(), "torch": "2.0"}},
        {"versions": {**machine.versions(), "triton": "3.0"}},
        {"versions": {**machine.versions(), "native": "built from other sources"}},
        {"versions": {**machine.versions(), "cpu": "another host of the same card"}},
        {"dtype": "tf32"},
    ],
    ids=str,
)
def test_what_another_card_or_version_measured_does_not_count(changed, of_aten):
    (tuned,) = tune()
    for path in machine.cache_folder().iterdir():
        path.unlink()
    _store(tuned._replace(**{"backend": "triton", "form": "composed", **changed}))
    machine.forget()
    assert chosen() == ("native" if native_runs() else "aten", "kept")
    assert not here(CPU).measured


def _in_another_process(function, *arguments) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_two_processes_that_write_at_once_lose_nothing(folder, monkeypatch, of_aten):
    """The other stores the same shape, and another one, when this one has written and not yet replaced."""
    (tuned,) = tune()
    other = tuned._replace(backend="triton", form="composed")
    replace = os.replace

    def late(source, target):
        monkeypatch.setattr(os, "replace", replace)
        for M in (64, 99):
            _in_another_process(_store, other._replace(M=M))
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    _store(tuned)
    machine.forget()
    ((_, rows),) = here(CPU).measured
    assert [(row.M, row.backend) for row in rows] == [(64, tuned.backend), (99, "triton")]
    assert not list(folder.glob("*.tmp"))


def test_a_model_is_tuned_by_its_own_layers():
    model = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    hk.inject(model, ["0", "1", "2"], method="lora", r=3)
    found = hk.tune(model, rows=[8, 64], rounds=1, report=lambda line: None)
    assert [t[:6] for t in found] == [(M, *KN, 3, 0, "float32") for KN in ((48, 32), (32, 48)) for M in (8, 64)]


def test_a_model_is_tuned_in_the_dtype_that_it_will_run_in(monkeypatch):
    """Under autocast a float32 layer runs in bfloat16, and `auto` asks for what was measured there."""
    layer = hk.HydraLinear(48, 32, r_a=3, r_b=2)
    with torch.autocast("cpu", torch.bfloat16):
        (tuned,) = hk.tune(layer, rows=64, rounds=1, report=lambda line: None)
    assert tuned.dtype == "bfloat16"
    _store(tuned._replace(backend="triton", form="composed"))
    machine.forget()
    calls = []
    forward = TABLE["triton"].forward
    monkeypatch.setattr(TABLE["triton"], "forward", lambda *a: calls.append(a[0].dtype) or forward(*a))
    layer(torch.randn(64, 48))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(64, 48))
    assert calls == [BF16]
    (fixed,) = hk.tune(layer, rows=64, rounds=1, dtype=torch.float64, report=lambda line: None)
    assert fixed.dtype == "float64"


@pytest.mark.parametrize(("gpu_ms", "host_s", "us"), [(0.2, 0.0003, 300), (0.4, 0.0003, 400)])
def test_on_a_gpu_the_longer_of_its_time_and_the_hosts_counts(gpu_ms, host_s, us, monkeypatch):
    """A long flush before the first event hides the host's time from the events."""

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: object) -> float:
            return gpu_ms

    cuda = SimpleNamespace(
        Event=Event,
        device=lambda device: contextlib.nullcontext(),
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=1),
    )
    flush = SimpleNamespace(zero_=lambda: None)
    monkeypatch.setattr(tuning, "torch", SimpleNamespace(cuda=cuda, empty=lambda *a, **k: flush, uint8=None))
    clock = itertools.cycle((0.0, host_s))
    monkeypatch.setattr(tuning, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tuning._times({"step": lambda: None}, SimpleNamespace(type="cuda"), 3) == {"step": pytest.approx(us)}


def test_a_measurement_names_all_that_it_depends_on(of_aten):
    (tuned,) = tune()
    assert tuned.versions == {
        "hydra_kernels": hk.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "native": extension.record().get("sources"),
        "cpu": machine.cpu_name(),
    }


def test_the_number_of_threads_is_part_of_a_processor():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert here(CPU).name.endswith(f", {threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        (hk.LoRALinear(4, 4), {}, ValueError, "rows: expected the number of rows of the model's inputs, got None"),
        (torch.nn.Linear(4, 4), {"rows": 3}, ValueError, "has no Hydra, LoRA or SeqLoRA layer"),
        ([(1, 2, 3)], {}, ValueError, r"expected \(M, K, N, r_a, r_b\)"),
        ([(1, 2, 3, 0, 0)], {}, ValueError, "expected r_a or r_b to be 1 or more"),
        ([SHAPE], {"rounds": 0}, ValueError, "rounds: expected 1 or more, got 0"),
        ([SHAPE], {"dtype": torch.int8}, ValueError, "dtype: expected one of .*, got torch.int8"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, match):
    with pytest.raises(error, match=match):
        hk.tune(arguments, **options)


@pytest.mark.parametrize("capability", ["sm_80", (8, 6), (9, 0), "sm_100", "sm_120", "cpu", (7, 5), (13, 0), None])
@pytest.mark.parametrize("dtype", [torch.float64, F32, BF16], ids=str)
def test_explain_answers_for_any_machine(capability, dtype, capsys):
    choice = hk.explain(8192, 4096, 4096, 8, 8, dtype, capability)
    text = capsys.readouterr().out
    on_gpu = capability not in ("cpu", (7, 5), None)
    expected = "hybrid" if on_gpu and dtype == BF16 else "aten"
    native = extension.load() if capability in ("cpu", None) and native_runs() else None
    if native is not None and (dtype != BF16 or native.matrix_units() or native.widened(fp16=False)):
        expected = "native"
    assert choice.backend == expected
    assert f"runs      {choice.backend}, {choice.form} form" in text
    assert choice.why_backend in text
    assert f"hk.tune([(8192, 4096, 4096, 8, 8)], dtype={dtype})" in text
    if capability in ((9, 0), (13, 0)):
        card = {(9, 0): "9.0, as NVIDIA H100 80GB HBM3", (13, 0): "13.0"}[capability]
        assert text.splitlines()[0].endswith(f", {dtype}, on compute capability {card}")


def test_explain_takes_another_card_to_have_the_compiled_part():
    assert hk.explain(6400, 3072, 768, 8, 8, BF16, (9, 0))[:2] == ("native", "composed")


def test_explain_says_who_has_input_dropout(capsys):
    assert hk.explain(6400, 3072, 768, 8, 8, BF16, (9, 0), input_dropout=0.05)[:2] == ("hybrid", "composed")
    assert "ranks 8+8, input dropout 0.05, torch.bfloat16" in capsys.readouterr().out
    assert hk.explain(6400, 3072, 768, 0, 8, BF16, (9, 0), input_dropout=0.05)[:2] == ("native", "composed")
    assert "input dropout" not in capsys.readouterr().out  # without a parallel branch there is none


def test_explain_takes_r_for_lora_and_names_of_cards(capsys):
    choice = hk.explain(8192, 4096, 4096, r=16, capability="h100")
    assert choice == hk.explain(8192, 4096, 4096, 16, 0, BF16, (9, 0))
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("x ["))
    assert first == second
    assert first.endswith("ranks 16+0, torch.bfloat16, on compute capability 9.0, as NVIDIA H100 80GB HBM3")
    for name, said in {
        "H200": "9.0, as NVIDIA H200",
        "RTX 3090": "8.6, as NVIDIA GeForce RTX 3090",
        "3090": "8.6, as NVIDIA GeForce RTX 3090",
        "NVIDIA A100-SXM4-80GB": "8.0, as NVIDIA A100-SXM4-80GB",
        "90": "9.0, as NVIDIA H100 80GB HBM3",
    }.items():
        hk.explain(8, 8, 8, r=1, capability=name)
        assert capsys.readouterr().out.splitlines()[0].endswith(f"on compute capability {said}"), name


@pytest.mark.parametrize(("capability", "dtype"), [("cpu", F32), (None, F32), ("sm_90", BF16)])
def test_explain_asks_in_the_dtype_that_the_device_is_used_in(capability, dtype, capsys):
    hk.explain(64, 64, 64, 8, 8, capability=capability)
    assert f"ranks 8+8, {dtype}, on " in capsys.readouterr().out


@pytest.mark.parametrize("capability", ["cpu", None])
def test_explain_tells_the_cpu_that_was_measured_from_the_one_that_is_asked(capability, monkeypatch, capsys):
    """In the name of the CPU, in the reasons, and where something was measured here."""

    def said():
        machine.forget()
        hk.explain(64, 48, 32, 3, 2, capability=capability)
        lines = capsys.readouterr().out.splitlines()
        return lines[0], next(line for line in lines if line.startswith("numbers"))

    monkeypatch.setattr(machine, "cpu_name", lambda: "AMD EPYC 9B45")
    threads = torch.get_num_threads()
    here, numbers = said()
    assert here.endswith(f"on AMD EPYC 9B45, {threads} threads")
    assert "the rules were measured on Intel(R) Xeon(R) Processor, 2 threads; nothing was measured on this" in numbers
    row = (*SHAPE, "float32", f"AMD EPYC 9B45, {threads} threads", "aten", "kept", "aten", {}, {}, {})
    _store(tuning.Tuned(*row, without_bias="", versions=machine.versions(), date=""))
    here, numbers = said()
    assert here.endswith(f"on AMD EPYC 9B45, {threads} threads")
    assert numbers.startswith(
        "numbers   some shapes were measured on this device; for others the rules were measured on Intel"
    )


def test_explain_knows_the_card_that_was_measured(capsys):
    for name, said in (
        ("h200", "the rules were measured on NVIDIA H200, the same as this device"),
        ("h100", "the rules were measured on NVIDIA H200; nothing was measured on this device"),
    ):
        hk.explain(8, 8, 8, r=1, capability=name)
        assert f"numbers   {said}" in capsys.readouterr().out


def test_explain_says_why_gpu_time_does_not_decide_for_small_layers(capsys):
    """roofline predicts that the others take less of the GPU's time here."""
    assert hk.explain(1024, 4096, 1024, 16, 0, capability="sm_90").backend == "native"
    out = capsys.readouterr().out
    assert "in a CUDA graph only the GPU's time counts: there try backend='hybrid'" in out


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"r": 4}, TypeError, "r: expected either r, LoRA's rank, or r_a and r_b"),
        ({"r": -1, "r_a": None, "r_b": None}, ValueError, "^r: expected an integer >= 0, got -1"),
        ({"r": 0, "r_a": None, "r_b": None}, ValueError, "^r: expected 1 or more, got 0"),
        ({"r_b": None}, TypeError, "r_b: expected an integer >= 0, got NoneType"),
        (
            {"capability": "nvidia"},
            ValueError,
            "capability: expected a compute capability such as .*a card such as 'h100'",
        ),
        ({"capability": ""}, ValueError, "capability: expected a compute capability such as"),
        ({"capability": "hopper"}, ValueError, "capability: expected a compute capability such as"),
        ({"capability": 9.0}, ValueError, "capability: expected a compute capability such as"),
        ({"M": 0}, ValueError, "M: expected an integer >= 1, got 0"),
        ({"K": 2.0}, TypeError, "K: expected an integer >= 1, got float"),
        ({"r_a": 0, "r_b": 0}, ValueError, "^r_a, r_b: expected 1 or more, got 0 and 0"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected"),
        ({"input_dropout": 1.0}, ValueError, r"input_dropout: expected a number in \[0, 1\), got 1.0"),
    ],
    ids=str,
)
def test_explain_refuses_bad_input(options, error, match):
    with pytest.raises(error, match=match):
        hk.explain(**{"M": 8, "K": 8, "N": 8, "r_a": 1, "r_b": 1, **options})
