"""What compilers make of the kernels for every architecture, without a GPU, and the report's own arithmetic."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction

from benchmarks import compile_report
from benchmarks.compile_report import MULTIPROCESSORS, VARIANTS, Binary, Compilation, CompileRow
from benchmarks.measuring import timing
from benchmarks.measuring.methods import Ranks
from hydra_kernels.kernels import configs

FUSED = [
    *("sum_rows C", "compose stack", "one_pass"),
    *("grad_z", "sum_rows dU", "gemm dx", "sum_rows dD", "reduce", "through_weight"),
]
OTHER_TILES = ["one_pass", "gemm dx"]  # for few, on sm_90; under input dropout there are no others
BY_GEMM = ["gemm forward", "gemm forward"]  # hybrid's, on sm_90
EFFECTIVE = ["effective", "rebuild"]  # the form's own; it has no dropout
DROPPING = ["one_pass", "gemm dx", "sum_rows dD"]  # and a pass of its own around cuBLAS
PASSES = ("effective", "down", "grad_z", "sum_rows C", "sum_rows dU", "sum_rows dD", "through_weight")
KERNEL_MODULES = ("compose", "effective", "gemm", "one_pass", "philox", "reduce", "skinny")
MATRIX_OPCODE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
ALIGNED = [name for name, variant in VARIANTS.items() if variant.aligned]


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: in this one Triton interprets."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", *arguments]
    folder = Path(__file__).parent.parent
    return subprocess.run(command, cwd=folder, env=inherited | (environment or {}), capture_output=True, text=True)


def rows_of(file: Path, *arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments, "--json", str(file))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return timing.read_result(file, CompileRow)[1]


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """What aligned bf16 rows lack: large tiles, the architecture's matrix instructions, TMA loads on sm_90."""
    found = []
    for row in rows:
        arch = int(row["arch"].removeprefix("sm_"))
        about = f"{row['kernel']}, {row['variant']}, {row['arch']}, R = {row['R']}"
        if row["kernel"] in PASSES:
            # In the skinny kernels Triton may prefer the older matrix instructions.
            if row["instructions"].keys().isdisjoint(("HMMA", MATRIX_OPCODE[arch])):
                found.append(f"{about}: no matrix instruction in {row['instructions']}")
            if "LDGSTS" not in row["instructions"]:
                found.append(f"{about}: loads that wait for each other")
        if not row["kernel"].startswith(("gemm", "one_pass")):
            continue
        # Before sm_90 the sums of 64 ranks leave no room for 128 rows.
        few_rows = row["kernel"] == "one_pass" and row["R"] == 64 and arch not in (90, 100)
        if (row["config"]["BLOCK_M"] < 128 and not few_rows) or row["config"]["BLOCK_N"] < 128:
            found.append(f"{about}: small tiles {row['config']}")
        if row["kernel"] == "one_pass" and arch == 90 and not row["variant"].startswith("input-dropout"):
            # One product of x's tile with W0's and one with the stack's, in steps of 16, and at the end Z U^T.
            steps = sum(row["config"][f"BLOCK_{side}"] for side in "KKR") // 16
            found += [] if row["instructions"].get("HGMMA") == steps else [f"{about}: not {steps} HGMMA"]
        wanted = [MATRIX_OPCODE[arch], *(["UTMALDG"] if arch == 90 else [])]
        found += [f"{about}: no {opcode}" for opcode in wanted if opcode not in row["instructions"]]
    return found


@pytest.mark.parametrize(
    ("archs", "ranks", "variants"),
    [
        # The largest ranks take the most registers, all options the longest kernels.
        (["90"], ["32+32"], ["options"]),
        pytest.param(["90"], ["32+32"], ["input-dropout"], marks=pytest.mark.slow),
        pytest.param(list(map(str, MULTIPROCESSORS)), ["8+8", "32+32"], ALIGNED, marks=pytest.mark.slow),
    ],
    ids=["largest", "largest-dropping", "all"],
)
def test_bf16_on_every_architecture(archs, ranks, variants, tmp_path):
    rows = rows_of(tmp_path / "report.json", "--arch", *archs, "--ranks", *ranks, "--variant", *variants)
    for arch in archs:
        for variant in variants:
            found = [row["kernel"] for row in rows if (row["arch"], row["variant"]) == (f"sm_{arch}", variant)]
            drops = variant.startswith("input-dropout")
            other = OTHER_TILES if arch == "90" and not drops else []
            hybrid = ["compose", "down", *(BY_GEMM if arch == "90" else [])]
            hybrid += ["dropped_product"] if drops else EFFECTIVE
            assert found == [*FUSED, *other, *hybrid] * len(ranks)
    assert compile_report.fault_lines(rows) == []
    assert missing(rows) == []


@pytest.mark.slow
def test_bf16_with_rows_that_wide_loads_cannot_take(tmp_path):
    rows = rows_of(
        *(tmp_path / "report.json", "--arch", "86", "90", "--ranks", "16+16", "32+32"),
        *("--variant", "options-unaligned", "input-dropout-unaligned"),
    )
    assert compile_report.fault_lines(rows) == []


def products(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the kernels that multiply matrices; the others go element by element."""
    return [row for row in rows if row["kernel"] in PASSES or row["kernel"].startswith("gemm")]


@pytest.mark.slow
def test_tf32(tmp_path):
    rows = rows_of(
        *(tmp_path / "report.json", "--arch", "80", "90", "--dtype", "tf32", "--ranks", "32+32"),
        *("--variant", "options", "input-dropout"),
    )
    assert compile_report.fault_lines(rows) == []
    assert all("HMMA" in row["instructions"] or "HGMMA" in row["instructions"] for row in products(rows))


@pytest.mark.slow
def test_one_pass_of_many_ranks_in_full_fp32(tmp_path):
    """An odd number of ranks too: U's rows are then loaded one by one, which takes the most registers."""
    rows = rows_of(
        *(tmp_path / "report.json", "--arch", "80", "90", "--dtype", "fp32", "--ranks", "17+16", "32+32"),
        *("--variant", "options", "input-dropout-unaligned"),
    )
    assert [line for line in compile_report.fault_lines(rows) if line.startswith("one_pass")] == []


@pytest.mark.slow
def test_full_fp32(tmp_path):
    rows = rows_of(
        *(tmp_path / "report.json", "--arch", "80", "90", "100", "--dtype", "fp32", "--ranks", "16+16"),
        *("--variant", "options", "input-dropout"),
    )
    assert compile_report.fault_lines(rows) == []
    assert all("FFMA" in row["instructions"] or "FFMA2" in row["instructions"] for row in products(rows))


@pytest.mark.slow  # of the tool, not of a kernel
def test_a_kernel_that_does_not_compile_is_a_row_and_a_failure(tmp_path):
    file = tmp_path / "report.json"
    assembler = tmp_path / "ptxas"
    # Triton asks an assembler for its version before it trusts it.
    assembler.write_text('#!/bin/sh\ntest "$1" = --version && echo "Cuda compilation tools, release 12.8, V12.8.93"\n')
    assembler.chmod(0o755)
    broken = {"TRITON_PTXAS_PATH": str(assembler), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ["--arch", "80", "--ranks", "8+8", "--variant", "plain", "--json", str(file)]
    done = run(*arguments, environment=broken)
    rows = timing.read_result(file, CompileRow)[1]
    assert done.returncode == 1, done.stderr[-2000:]
    assert [row["kernel"] for row in rows] == [*FUSED, "compose", "down", *EFFECTIVE]
    assert all(row["error"] and row["registers"] is None for row in rows)


def test_an_interpreted_process_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        compile_report.main(["--arch", "90"])
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def jobs(arch: int, dtype: str, ranks: Ranks, variant: str) -> dict[str, Compilation]:
    made = {}
    for launch in compile_report.launches(arch, dtype, ranks, VARIANTS[variant]):
        # Here kernels are the interpreter's, which have no parameters to specialize.
        jit = launch._replace(kernel=JITFunction(launch.kernel.fn))
        made[compile_report.name_of(launch)] = compile_report.compilation(jit, arch)
    return made


def divisible(job: Compilation) -> set[str]:
    return {list(job.signature)[place] for (place, *_), hints in job.attributes.items() if hints}


@pytest.mark.parametrize("ranks", [Ranks(8, 8), Ranks(16, 0), Ranks(0, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_launch_of_a_step_is_there(ranks, variant):
    expected = [name for name in FUSED if ranks.r_b or name not in ("sum_rows C", "through_weight")]
    if not ranks.r_b:
        expected[0] = "compose"
    expected += ["compose", "down"] if ranks.r_b else ["down"]
    if not VARIANTS[variant].drops_input:
        expected += EFFECTIVE
    elif ranks.r_a:
        expected += ["dropped_product"]
    assert list(jobs(80, "bf16", ranks, variant)) == expected


def test_a_launch_is_specialized_as_by_tritons_launcher():
    made = jobs(80, "bf16", Ranks(8, 8), "options")
    dx = made["gemm dx"]
    assert (dx.module, dx.kernel) == ("hydra_kernels.kernels.gemm", "gemm_kernel")
    assert dx.options == {"num_warps": 8, "num_stages": 4}
    assert (dx.signature["x"], dx.signature["M"], made["down"].signature["mask_scale"]) == ("*bf16", "i32", "fp32")
    names = list(dx.signature)
    constants = {names[place]: value for (place,), value in dx.constants.items()}
    assert constants["stride_xk"] == 1
    assert constants["bias_ptr"] is None
    assert constants["BLOCK_M"] == 128
    assert {"x", "w", "N", "stride_xm"} <= divisible(dx)
    assert made["down"].signature["mask_ptr"] == "*u8"
    assert made["grad_z"].signature["scale_a"] == "*bf16"
    assert jobs(80, "bf16", Ranks(8, 8), "plain")["grad_z"].signature["scale_a"] == "fp32"
    assert jobs(80, "fp32", Ranks(8, 8), "plain")["down"].options["maxnreg"] == 255


def test_unaligned_rows_give_no_divisibility():
    job = jobs(90, "bf16", Ranks(8, 8), "plain-unaligned")["one_pass"]
    assert divisible(job).isdisjoint({"x", "w", "stride_xm", "stride_wn"})
    assert (job.signature["x"], job.signature["stack"]) == ("*bf16", "*bf16")


def test_descriptors_carry_their_blocks():
    launches = compile_report.launches(90, "bf16", Ranks(8, 8), VARIANTS["plain"])
    described = [
        (compile_report.name_of(launch), launch.arguments["w"].block_shape)
        for launch in launches
        if "DESCRIPTORS" in launch.arguments
    ]
    # W0's block of the tile of 128 x 256, and of the one for few outputs.
    triton = [("one_pass", [256, 64]), ("gemm dx", [64, 256]), ("one_pass", [128, 64]), ("gemm dx", [64, 128])]
    assert described == [*triton, ("gemm forward", [256, 64]), ("gemm forward", [128, 64])]
    few = jobs(90, "bf16", Ranks(8, 8), "plain")
    assert few["gemm forward"].signature["w"] == "tensordesc<bf16[128, 64]>"
    assert few["gemm dx"].signature["w"] == "tensordesc<bf16[64, 128]>"
    # D over C's rest, 16 rows each; h in two halves.
    assert few["one_pass"].signature["stack"] == "tensordesc<bf16[32, 64]>"
    assert few["one_pass"].signature["h"] == "tensordesc<bf16[128, 64]>"
    wide = jobs(90, "bf16", Ranks(16, 16), "input-dropout")["one_pass"]
    assert [wide.signature[name] for name in ("stack", "D")] == ["tensordesc<bf16[64, 64]>", "tensordesc<bf16[32, 64]>"]


def test_what_two_variants_share_is_one_compilation():
    plain, options = (jobs(90, "bf16", Ranks(8, 8), variant) for variant in ("plain", "options"))
    same = [name for name in FUSED if repr(plain[name]) == repr(options[name])]
    assert same == ["sum_rows C", "sum_rows dU", "gemm dx", "sum_rows dD", "through_weight"]
    assert repr(plain["gemm forward"]) == repr(options["gemm forward"])
    dropping = jobs(90, "bf16", Ranks(8, 8), "input-dropout")
    assert [name for name in FUSED if repr(dropping[name]) != repr(options[name])] == DROPPING
    assert dropping["down"].signature["seed_ptr"] == "*i64"


def test_the_precision_of_fp32_products_is_chosen_and_put_back():
    before = torch.backends.cuda.matmul.fp32_precision
    tf32, fp32 = (compile_report.launches(90, dtype, Ranks(8, 8), VARIANTS["plain"]) for dtype in ("tf32", "fp32"))
    assert {launch.arguments.get("PRECISION", "sums") for launch in tf32} == {"tf32", "tf32x3", "sums"}
    assert {launch.arguments.get("PRECISION", "sums") for launch in fp32} == {"ieee", "sums"}
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "columns", "num_warps", "expected"),
    [
        (80, 32, 0, 0, 4, 16),  # 64 warps
        (86, 32, 0, 0, 4, 12),  # 48 warps
        (86, 16, 0, 0, 1, 16),  # programs
        (80, 255, 0, 0, 8, 1),  # 8 warps of 8192 registers
        (80, 129, 0, 0, 4, 3),  # 4 parts with 3 warps of 4352 registers each
        (90, 168, 0, 0, 8, 1),  # 4 parts with 3 warps of 5376 registers each: 12 warps are one program of 8
        (90, 64, 227 << 10, 0, 8, 1),
        (90, 64, 113 << 10, 0, 8, 2),  # 1 KiB more for each: 228 in all
        (90, 64, (113 << 10) + 1, 0, 8, 1),
        (86, 64, 100 << 10, 0, 4, 0),
        (100, 64, 0, 256, 4, 2),  # 512 columns of tensor memory
    ],
)
def test_programs_that_fit(arch, registers, shared_bytes, columns, num_warps, expected):
    binary = Binary(registers, 0, shared_bytes, columns, {})
    assert compile_report.programs_that_fit(MULTIPROCESSORS[arch], binary, num_warps) == expected


@pytest.mark.slow
def test_kernels_that_start_early_wait_first(tmp_path):
    """With programmatic dependent launch, which no configuration has."""
    arguments = ["--early", "--arch", "90", "--ranks", "8+8", "--variant", "options", "input-dropout"]
    rows = rows_of(tmp_path / "report.json", *arguments)
    assert {row["kernel"] for row in rows} == {*FUSED, *EFFECTIVE, "compose", "down", "gemm forward", "dropped_product"}
    assert compile_report.fault_lines(rows) == []


WAIT = "griddepcontrol.wait; // dummy %r1"


@pytest.mark.parametrize(
    ("body", "early", "fault"),
    [
        ([WAIT, "@%p1 ld.global.b32 %r2, [%rd1];"], True, None),
        (["ld.param.b64 %rd1, [k_param_0];", "st.shared.b32 [%r3], %r4;", WAIT, "bra $L1;"], True, None),
        (["@%p1 ld.global.b32 %r2, [%rd1];", WAIT], True, "touches memory"),
        (["st.global.b32 [%rd1], %r2;", WAIT], True, "touches memory"),
        (["cp.async.cg.shared.global [%r1], [%rd1], 16;", WAIT], True, "touches memory"),
        (["@%p1 bra $L1;", WAIT], True, "touches memory"),
        (["ret;"], True, "touches memory"),
        (["@%p1 ld.global.b32 %r2, [%rd1];"], False, None),
        (["st.global.b32 [%rd1], %r2;", "bar.sync 0;", f"@%p1 {compile_report.COUNT} %r3, [%rd2], 1;"], False, None),
        (["st.global.b32 [%rd1], %r2;", f"@%p1 {compile_report.COUNT} %r3, [%rd2], 1;"], False, "counts itself"),
        (["bar.sync 0;", "atom.global.gpu.relaxed.add.u32 %r3, [%rd2], 1;"], False, "counts itself"),
    ],
)
def test_what_ptx_has_in_the_wrong_order(body, early, fault):
    ptx = "\n".join([".visible .entry k(.param .u64 k_param_0)", "{", *(f"\t{line}" for line in body), "}"])
    found = compile_report.misordered(ptx, early)
    assert len(found) == (fault is not None)
    assert all(line.startswith(fault) for line in found)
    row = compile_report.row_of({"dtype": "bf16", "config": {"num_warps": 4}}, 90, Binary(64, 0, 0, 0, {}, found))
    assert compile_report.faults(row) == list(found)


def test_every_kernel_begins_by_waiting():
    """What it compiles to is looked at above; here, that none is forgotten."""
    modules = [importlib.import_module(f"hydra_kernels.kernels.{name}") for name in KERNEL_MODULES]
    kernels = {v for module in modules for name, v in vars(module).items() if name.endswith("_kernel")}
    assert len(kernels) == 11
    for kernel in kernels:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
        assert ast.unparse(function.body[0]) == "begin(DEPENDENT)"
        assert inspect.signature(kernel.fn).parameters["DEPENDENT"].default is False


def test_no_architecture_starts_kernels_early_and_only_hopper_and_later_can():
    assert not any(arch.early for arch in (*configs.BY_CAPABILITY.values(), configs.INTERPRETER))
    plain, early = (compile_report.launches(90, "bf16", Ranks(8, 8), VARIANTS["plain"], way) for way in (False, True))
    assert not any("DEPENDENT" in launch.arguments or "launch_pdl" in launch.options for launch in plain)
    assert all(launch.arguments["DEPENDENT"] is launch.options["launch_pdl"] is True for launch in early)
    assert [compile_report.name_of(launch) for launch in early] == [compile_report.name_of(launch) for launch in plain]
    for arch in (configs.SM80, configs.SM86, configs.INTERPRETER):
        with pytest.raises(ValueError, match=f"needs sm_90 or later, and these tiles are of {arch.name}"):
            arch.with_early_launches()
    assert configs.SM120.with_early_launches().early


def test_limits_of_shared_memory():
    assert {arch: limits.shared_bytes_of_program >> 10 for arch, limits in MULTIPROCESSORS.items()} == SHARED_KIB


def test_what_the_tools_print_is_read():
    usage = " Function gemm_kernel:\n  REG:170 STACK:8 SHARED:1024 LOCAL:0 CONSTANT[0]:1032 TEXTURE:0\n"
    assert compile_report.resources(usage) == (170, 8)
    with pytest.raises(ValueError, match="names no registers"):
        compile_report.resources("nothing")
    sass = "/*00*/ HGMMA.64x256x16.F32 R24 ;\n/*10*/ @P0 HGMMA R1 ;\n/*20*/ STL.64 [R1], R2 ;\n/*30*/ LDGSTS.E R1 ;"
    assert compile_report.instructions(sass) == {"HGMMA": 2, "LDGSTS": 1, "STL": 1}


@pytest.mark.parametrize(
    ("binary", "expected"),
    [
        (
            Binary(64, 0, 0, 0, {"UTCHMMA": 1}),
            ["products of full fp32 by matrix instructions, which round their operands"],
        ),
        (Binary(255, 8, 0, 0, {"FFMA": 1}), ["spills 8 bytes"]),
        (Binary(255, 0, 0, 0, {"LDL": 1}), ["spills 0 bytes"]),
        (Binary(64, 0, (99 << 10) + 1, 0, {}), ["101377 bytes of shared memory, limit 101376"]),
        (Binary(64, 0, 99 << 10, 0, {}), []),
        ("RuntimeError: no", ["RuntimeError: no"]),
    ],
)
def test_faults(binary, expected):
    row = compile_report.row_of({"dtype": "fp32", "config": {"num_warps": 4}}, 86, binary)
    assert compile_report.faults(row) == expected
    assert row["shared_limit"] == 99 << 10


@pytest.mark.parametrize("text", ["0+0", "8", "33+32", "8+", "a+b"])
def test_ranks_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        compile_report.main(["--ranks", text])
    assert "expected A+B" in capsys.readouterr().err
