"""The choice: every reason that it gives, at and beside its thresholds, and that what the user fixed stays fixed."""

import pytest
import torch

from hydra_kernels import extension
from hydra_kernels.backend.native import no_sweep
from hydra_kernels.choose import explain as choose_explain
from hydra_kernels.choose.choice import Cpu, Machine, Measured, choose
from hydra_kernels.choose.machine import fixed_backward

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
RUNS = dict.fromkeys(("aten", "native", "hybrid", "triton"))
NATIVE = Machine("a processor", None, RUNS | {"hybrid": "no GPU", "triton": "no GPU"}, [])
CPU = NATIVE._replace(reasons={**NATIVE.reasons, "native": "not built"})
INTEL = NATIVE._replace(cpu=Cpu("Intel", True, True, "auto"))
AMD = NATIVE._replace(cpu=Cpu("AMD", True, True, "auto", instructions="avx512"))
AMD_AVX2 = NATIVE._replace(cpu=Cpu("AMD", False, True, "auto", (F16, BF16)))
INTEL_FP16 = NATIVE._replace(cpu=Cpu("Intel", True, True, "auto", (F16,)))
BUILT = Machine("a card", (9, 0), RUNS, [])
H100 = BUILT._replace(reasons=RUNS | {"native": "not built"})


def chosen(*arguments, **options) -> tuple[str, str]:
    return choose(*arguments, **options)[:2]


@pytest.mark.parametrize(
    ("M", "K", "N", "r_a", "r_b", "dtype", "form"),
    [
        (1600, 3072, 768, 8, 8, torch.float32, "composed"),
        (1600, 3072, 768, 8, 8, torch.float64, "composed"),
        (1600, 3072, 768, 8, 8, torch.bfloat16, "kept"),
        (1600, 3072, 768, 8, 8, torch.float16, "kept"),
        (1600, 3072, 768, 16, 0, torch.bfloat16, "composed"),
        (1228, 3072, 768, 8, 8, torch.float32, "kept"),
        (1229, 3072, 768, 8, 8, torch.float32, "composed"),
        (307, 768, 3072, 8, 8, torch.float32, "kept"),
        (308, 768, 3072, 8, 8, torch.float32, "composed"),
        (1023, 128, 128, 8, 8, torch.float32, "kept"),
        (1024, 128, 128, 8, 8, torch.float32, "composed"),
        (1600, 3072, 768, 0, 16, torch.float32, "kept"),
        (1600, 768, 3072, 0, 16, torch.float32, "composed"),
        (1600, 768, 768, 0, 16, torch.float32, "composed"),
        (16, 4096, 4096, 16, 0, torch.float32, "composed"),
    ],
)
def test_form(M, K, N, r_a, r_b, dtype, form):
    assert chosen(M, K, N, r_a, r_b, dtype, CPU) == ("aten", form)


@pytest.mark.parametrize("backend", ["triton", "hybrid"])
def test_the_triton_kernels_compose_at_any_size_and_dtype(backend):
    assert chosen(16, 4096, 4096, 8, 8, BF16, CPU, backend=backend) == (backend, "composed")
    assert chosen(16, 4096, 4096, 8, 8, F32, CPU, form="kept", backend=backend) == (backend, "kept")  # refused later


def test_what_the_user_fixed_stays_fixed():
    assert chosen(16, 4096, 4096, 8, 8, F32, CPU, form="composed") == ("aten", "composed")
    assert chosen(8192, 64, 64, 8, 8, F32, CPU, form="kept") == ("aten", "kept")
    assert chosen(8192, 64, 64, 8, 0, F32, CPU, form="kept") == ("aten", "composed")
    assert chosen(8192, 64, 64, 8, 8, BF16, H100, form="kept") == ("aten", "kept")
    assert chosen(8192, 64, 64, 8, 8, BF16, H100, backend="aten") == ("aten", "kept")
    assert chosen(8192, 64, 64, 8, 0, BF16, H100, form="kept") == ("hybrid", "composed")


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_few_rows_of_a_large_weight_are_kept_on_a_gpu(dtype):
    assert chosen(819, 4096, 4096, 8, 8, dtype, H100) == ("aten", "kept")
    assert chosen(820, 4096, 4096, 8, 8, dtype, H100) == ("hybrid", "composed")
    assert chosen(1, 4096, 1024, 0, 8, dtype, H100) == ("aten", "kept")
    assert chosen(1, 4095, 1024, 0, 8, dtype, H100) == ("hybrid", "composed")
    assert chosen(1, 4096, 4096, 8, 0, dtype, H100) == ("hybrid", "composed")
    assert chosen(1, 4096, 4096, 8, 8, dtype, H100, form="composed") == ("hybrid", "composed")
    assert "M is below 0.2 K" in choose(1, 4096, 4096, 8, 8, dtype, H100).why_backend


@pytest.mark.parametrize(
    ("machine", "dtype", "backend", "why"),
    [
        (H100, BF16, "hybrid", "take the GPU the least time"),
        (BUILT, BF16, "hybrid", "take the GPU the least time"),
        (BUILT, F32, "aten", "in fp32"),
        (H100, F64, "aten", "do not support float64"),
        (H100._replace(reasons=RUNS | {"hybrid": "too old"}), BF16, "aten", "cannot run on this device"),
        (CPU, F32, "aten", "not built"),
        (NATIVE, BF16, "aten", "no matrix units"),
        (NATIVE._replace(cpu=Cpu("Intel", False, True, "auto")), BF16, "aten", "no matrix units"),
        (INTEL, BF16, "native", "faster than ATen calls"),
        (INTEL, F16, "aten", "oneDNN kernels for float16"),
        (INTEL_FP16, F16, "native", "no oneDNN kernels for this dtype"),
        (INTEL_FP16, BF16, "native", "faster than ATen calls"),
        (AMD_AVX2, BF16, "native", "no oneDNN kernels for this dtype"),
        (NATIVE, F32, "native", "faster than ATen calls"),
        (NATIVE._replace(reasons=RUNS), F32, "native", "faster"),  # the interpreter is for tests that ask for it
    ],
)
def test_backend_without_a_measurement(machine, dtype, backend, why):
    choice = choose(8192, 4096, 4096, 8, 8, dtype, machine)
    assert choice.backend == backend
    assert why in choice.why_backend


def test_small_layers_on_a_gpu_are_the_compiled_parts():
    fewest = 50_000_000_000 // (3072 * 768) + 1
    assert chosen(fewest - 1, 3072, 768, 8, 8, BF16, BUILT) == ("native", "composed")
    assert chosen(fewest, 3072, 768, 8, 8, BF16, BUILT) == ("hybrid", "composed")
    assert chosen(6400, 3072, 768, 32, 33, BF16, BUILT) == ("hybrid", "composed")  # more ranks than it takes
    assert chosen(6400, 3072, 768, 8, 8, BF16, H100) == ("hybrid", "composed")
    assert chosen(256, 4096, 4096, 8, 8, BF16, BUILT) == ("aten", "kept")


def test_a_measurement_wins_within_a_factor_of_two_of_its_rows():
    rows = [Measured(16, "aten", "kept"), Measured(100, "triton", "composed"), Measured(1000, "hybrid", "composed")]
    card = H100._replace(measured=[((64, 64, 8, 8, BF16), rows)])
    by_M = {7: "hybrid", 8: "aten", 39: "hybrid", 50: "triton", 200: "triton", 201: "hybrid", 499: "hybrid"}
    for M, backend in by_M.items():
        assert choose(M, 64, 64, 8, 8, BF16, card).backend == backend, M
    near = card._replace(
        measured=[((64, 64, 8, 8, BF16), [Measured(100, "aten", "kept"), Measured(144, "triton", "")])]
    )
    assert [choose(M, 64, 64, 8, 8, BF16, near).backend for M in (119, 120)] == ["aten", "triton"]  # 120^2 = 100 * 144
    assert choose(100, 64, 64, 8, 9, BF16, card).backend == "hybrid"
    assert choose(100, 64, 64, 8, 8, torch.float16, card).backend == "hybrid"
    assert chosen(16, 64, 64, 8, 8, BF16, card, form="composed") == ("hybrid", "composed")
    assert chosen(16, 64, 64, 8, 8, BF16, card, backend="triton") == ("triton", "composed")
    gone = card._replace(reasons=card.reasons | {"triton": "not installed"})
    assert choose(100, 64, 64, 8, 8, BF16, gone).backend == "hybrid"


def test_the_effective_form_on_a_gpu_runs_where_it_is_fixed_or_was_measured_without_b0():
    call = (8192, 4096, 4096, 8, 8, BF16)
    assert chosen(*call, H100) == chosen(*call, H100, has_bias=False) == ("hybrid", "composed")
    assert chosen(*call, BUILT, form="effective") == ("hybrid", "effective")
    assert chosen(*call[:-1], F32, H100, form="effective") == ("hybrid", "effective")
    assert chosen(*call, H100, form="effective", backend="triton") == ("triton", "effective")  # refused later
    won = [Measured(8192, "triton", "composed", without_bias=("hybrid", "effective"))]
    card = H100._replace(measured=[(call[1:], won)])
    assert chosen(*call, card) == chosen(*call, card, has_bias=False, masked=True) == ("triton", "composed")
    assert chosen(*call, card, has_bias=False) == ("hybrid", "effective")
    assert chosen(*call, card, has_bias=False, form="composed") == ("hybrid", "composed")
    assert "measured to be faster" in choose(*call, H100).why_form


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        (NATIVE, F32, ("native", "composed")),
        (NATIVE, BF16, ("aten", "kept")),
        (CPU, F32, ("aten", "composed")),
        (BUILT, BF16, ("hybrid", "composed")),
        (BUILT, F32, ("aten", "composed")),
    ],
)
def test_an_open_M_has_one_choice(machine, dtype, expected):
    """Where torch.compile keeps the number of rows open: that of many rows, but for the effective form."""
    assert chosen(None, 4096, 4096, 8, 8, dtype, machine) == expected
    assert chosen(None, 4096, 1024, 0, 8, F64, machine)[1] == "kept"


def test_an_open_M_takes_a_winner_of_every_measurement_alone():
    def measured(*backends: str) -> Machine:
        rows = tuple(Measured(M, backend, "composed") for M, backend in zip((20, 80, 320), backends, strict=False))
        return BUILT._replace(measured=[((13, 11, 2, 3, F32), rows)])

    call = (None, 13, 11, 2, 3, F32)
    assert chosen(*call, measured("triton", "triton")) == ("triton", "composed")
    assert chosen(*call, measured("triton", "hybrid")) == chosen(*call, BUILT) == ("aten", "composed")


def test_up_projections_that_train_alone_do_not_take_the_form_that_saves_x():
    call = (4096, 4096, 1024, 16, 0, F32, NATIVE)
    assert chosen(*call) == ("native", "effective")
    assert chosen(*call, saves_x=False) == ("native", "composed")


@pytest.mark.parametrize(
    ("machine", "M", "N", "dtype", "library", "why"),
    [
        (INTEL, 1, 4096, F32, "aten", "except for 2 to 256 rows"),
        (INTEL, 2, 4096, F32, "onednn-forward", "2 to 256 rows"),
        (INTEL, 256, 4096, F32, "onednn-forward", "2 to 256 rows"),
        (INTEL, 257, 4096, F32, "aten", "except for 2 to 256 rows"),
        (INTEL, 16, 2730, F32, "aten", "and a large W0"),
        (INTEL, 16, 2731, F32, "onednn-forward", "a large W0"),
        (INTEL, None, 4096, F32, "aten", "as fast or more exact"),
        (INTEL, 16, 4096, F64, "aten", ""),
        (INTEL, 16, 4096, BF16, "aten", "ATen calls oneDNN itself"),
        (INTEL_FP16, 16, 768, F16, "aten", "blocks of W0"),
        (AMD, 1, 768, F32, "onednn", "twice as long"),
        (AMD, 1600, 768, F32, "onednn", "twice as long"),
        (AMD, None, 768, F32, "onednn", "twice as long"),
        (AMD, 1600, 8, F32, "onednn", "twice as long"),
        (AMD._replace(cpu=Cpu("AMD", True, True, "auto", (F16,))), 1600, 768, F16, "onednn", "twice as long"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, True, "onednn", (F16,))), 1600, 768, F16, "onednn", "sets it"),
        (AMD_AVX2, 1, 768, F32, "aten", "for one row, for many"),
        (AMD_AVX2, 2, 8, F32, "own", "2 to 32 rows"),
        (AMD_AVX2, 32, 8, F32, "own", "2 to 32 rows"),
        (AMD_AVX2, 33, 170, F32, "aten", "a small W0"),
        (AMD_AVX2, 33, 171, F32, "own", "up to 96 of a larger W0"),
        (AMD_AVX2, 96, 768, F32, "own", "up to 96 of a larger W0"),
        (AMD_AVX2, 97, 768, F32, "onednn-forward", "not for G W0 unless K is a power of two"),
        (AMD_AVX2, 256, 171, F32, "onednn-forward", "not for G W0 unless K is a power of two"),
        (AMD_AVX2, 256, 170, F32, "aten", "a small W0"),
        (AMD_AVX2, 257, 768, F32, "aten", "for one row, for many"),
        (AMD_AVX2, None, 768, F32, "aten", "for one row, for many"),
        (AMD_AVX2, 16, 768, F64, "aten", ""),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, True, "auto", (), "avx512")), 16, 8, F32, "aten", "a small W0"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, True, "auto", (), "plain")), 16, 8, F32, "aten", "a small W0"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, False, "auto")), 96, 768, F32, "own", "up to 96"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, False, "auto")), 97, 768, F32, "aten", "no oneDNN operators"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, True, "onednn")), 16, 768, F32, "onednn", "sets it"),
        (AMD_AVX2._replace(cpu=Cpu("AMD", False, False, "onednn")), 16, 768, F32, "aten", "no oneDNN operators"),
        (INTEL._replace(cpu=Cpu("Intel", True, False, "own")), 1600, 768, F32, "own", "sets it"),
        (INTEL, 16, 768, F32, "aten", "and a large W0"),
        (AMD, 16, 768, F32, "onednn", "twice as long"),
        (AMD_AVX2, 1600, 768, BF16, "aten", "blocks of W0"),
        (AMD_AVX2, 256, 768, F16, "aten", "blocks of W0"),
        (AMD, 1600, 768, BF16, "aten", "ATen calls oneDNN itself"),
        (AMD._replace(cpu=Cpu("AMD", True, False, "onednn")), 1600, 768, F32, "aten", "no oneDNN operators"),
        (AMD._replace(cpu=Cpu("AMD", True, True, "aten")), 1600, 768, F32, "aten", "sets it"),
        (INTEL._replace(cpu=Cpu("Intel", True, True, "onednn")), 1600, 768, BF16, "onednn", "sets it"),
        (NATIVE, 16, 4096, F32, "aten", ""),
        (CPU._replace(cpu=AMD.cpu), 16, 4096, F32, "aten", ""),
    ],
)
def test_library_of_the_large_products(machine, M, N, dtype, library, why):
    """Here K is 3072."""
    choice = choose(M, 3072, N, 8, 8, dtype, machine)
    assert choice.library == library
    assert why in choice.why_library
    assert bool(why) == bool(choice.why_library)
    assert choice.plan == (choice.form if library == "aten" else f"{choice.form} {library}")


@pytest.mark.parametrize(("K", "library"), [(1024, "onednn"), (4096, "onednn"), (3000, "onednn-forward")])
def test_onednn_in_both_passes_on_amd_without_avx512_for_powers_of_two(K, library):
    assert choose(256, K, 1024, 8, 8, F32, AMD_AVX2).library == library


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize(
    ("winner", "library"),
    [
        (Measured(16, "native", "kept", "aten"), "aten"),
        (Measured(16, "native", "kept", "own"), "own"),
        (Measured(16, "aten", "kept"), "own"),  # no library of `native` was timed
    ],
)
def test_a_measured_library_comes_before_the_rule(winner, library, onednn):
    for cpu in (Cpu("AMD", False, onednn, "auto"), Cpu("Intel", True, onednn, "auto")):
        machine = NATIVE._replace(cpu=cpu, measured=[((3072, 768, 8, 8, F32), [winner])])
        found = choose(16, 3072, 768, 8, 8, F32, machine, form="kept", backend="native").library
        assert found == (library if cpu.vendor == "AMD" or winner.backend == "native" else "aten")


SWEEPING = BUILT._replace(backward="sweep")
BY_NATIVE = SWEEPING._replace(measured=[((3072, 768, 8, 8, BF16), [Measured(6400, "native", "composed")])])


@pytest.mark.parametrize(
    ("machine", "backend", "ranks", "backward", "why"),
    [
        (BUILT, "native", (8, 8), "passes", ""),
        (BUILT._replace(backward="passes"), "native", (8, 8), "passes", ""),
        (SWEEPING, "native", (8, 8), "sweep", "HYDRA_KERNELS_BACKWARD sets it"),
        (SWEEPING, "native", (16, 16), "sweep", "HYDRA_KERNELS_BACKWARD sets it"),
        (SWEEPING, "native", (16, 17), "passes", "ranks up to 32, and r_a + r_b is 33"),
        (SWEEPING._replace(no_sweep="no code for sm_90"), "native", (8, 8), "passes", "no code for sm_90"),
        (SWEEPING, "hybrid", (8, 8), "passes", ""),
        (SWEEPING, "auto", (8, 8), "sweep", "HYDRA_KERNELS_BACKWARD sets it"),
        (BY_NATIVE, "auto", (8, 8), "sweep", "HYDRA_KERNELS_BACKWARD sets it"),
        (NATIVE._replace(backward="sweep"), "native", (8, 8), "passes", ""),
    ],
)
def test_the_sweep_runs_where_it_is_asked_for_alone(machine, backend, ranks, backward, why):
    choice = choose(6400, 3072, 768, *ranks, BF16, machine, backend=backend)
    assert choice.backward == backward
    assert why in choice.why_backward
    assert bool(why) == bool(choice.why_backward)
    assert choice.plan == (f"{choice.form} sweep" if backward == "sweep" else choice.form)


def test_a_backward_of_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("HYDRA_KERNELS_BACKWARD", "one pass")
    with pytest.raises(
        ValueError, match=r"HYDRA_KERNELS_BACKWARD: expected one of auto, passes, sweep, got 'one pass'"
    ):
        fixed_backward()
    for value, found in (("sweep", "sweep"), ("passes", "passes"), ("", "auto")):
        monkeypatch.setenv("HYDRA_KERNELS_BACKWARD", value)
        assert fixed_backward() == found


def test_the_sweep_needs_compute_capability_9_and_code_for_it(monkeypatch):
    monkeypatch.setattr(extension, "record", lambda: {"architectures": ["sm_80", "sm_90", "compute_120"]})
    assert no_sweep((9, 0)) is None
    assert "needs compute capability 9.x, and this GPU has 10.0" in no_sweep((10, 0))
    monkeypatch.setattr(extension, "record", lambda: {"architectures": ["sm_80", "compute_80"]})
    assert "no code for sm_90" in no_sweep((9, 0))


def test_explain_says_why_the_backward_sweeps(monkeypatch, capsys):
    monkeypatch.setattr(choose_explain, "_machine", lambda capability: BY_NATIVE)
    assert choose_explain.explain(6400, 3072, 768, 8, 8, BF16).backward == "sweep"
    assert "backward  by sweep: $HYDRA_KERNELS_BACKWARD sets it" in capsys.readouterr().out


def test_a_measured_library_wins_for_its_rows():
    winners = [Measured(64, "native", "kept", "aten"), Measured(1600, "native", "kept", "onednn")]
    machine = INTEL._replace(measured=[((3072, 4096, 8, 8, F32), winners)])
    found = [choose(M, 3072, 4096, 8, 8, F32, machine).library for M in (31, 64, 1600, 6400)]
    assert found == ["onednn-forward", "aten", "onednn", "aten"]
    assert choose(1600, 3072, 4096, 8, 8, F32, machine, form="composed", backend="native").library == "onednn"


@pytest.mark.parametrize(
    ("M", "r_a", "r_b", "form"), [(1600, 8, 8, "composed"), (1200, 8, 8, "kept"), (9999, 16, 0, "composed")]
)
def test_form_in_bf16_by_the_compiled_part(M, r_a, r_b, form):
    assert chosen(M, 3072, 768, r_a, r_b, BF16, INTEL) == ("native", form)


def test_few_rows_under_torch_compile_are_plain_operators():
    def backend(M, N=768, machine=INTEL, dtype=F32, **options):
        return choose(M, 3072, N, 8, 8, dtype, machine, compiling=True, **options).backend

    assert [backend(M) for M in (1, 64, 65, None)] == ["reference", "reference", "native", "native"]
    assert [backend(16, N) for N in (2730, 2731)] == ["reference", "native"]
    assert [backend(16, N, AMD_AVX2) for N in (170, 171)] == ["reference", "native"]
    assert [backend(M, 171, AMD_AVX2) for M in (1, 2, 64)] == ["reference", "native", "native"]
    fixed = [AMD_AVX2._replace(cpu=Cpu("AMD", False, True, library)) for library in ("own", "aten")]
    assert [backend(16, 171, machine) for machine in fixed] == ["native", "reference"]
    assert backend(16, machine=CPU) == "reference"
    assert backend(16, machine=H100) == "aten"
    assert [backend(16, dtype=dtype) for dtype in (BF16, F64)] == ["native", "native"]
    assert backend(16, masked=True) == backend(16, form="kept") == backend(16, backend="native") == "native"
    assert choose(16, 3072, 768, 8, 8, F32, INTEL).backend == "native"
    assert "torch.compile fuses" in choose(16, 3072, 768, 8, 8, F32, INTEL, compiling=True).why_backend


def test_input_dropout_is_left_to_the_backends_that_have_it():
    dropping = {"masked": True, "drops_input": True}
    call = (1600, 3072, 768, 8, 8, F32)
    assert chosen(*call, NATIVE) == chosen(*call, NATIVE, **dropping) == ("native", "composed")
    assert chosen(9999, *call[1:], NATIVE, **dropping) == ("native", "composed")  # not effective
    small = (6400, 3072, 768, 8, 8, BF16)
    assert chosen(*small, BUILT) == ("native", "composed")
    assert chosen(*small, BUILT, **dropping) == ("hybrid", "composed")
    won = BUILT._replace(measured=[(small[1:], [Measured(6400, "native", "composed")])])
    assert chosen(*small, won)[0] == "native"
    assert chosen(*small, won, **dropping)[0] == "hybrid"
    assert chosen(*call, NATIVE, form="effective", **dropping) == ("native", "effective")  # refused later
