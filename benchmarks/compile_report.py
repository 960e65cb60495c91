"""Compiles every kernel with its shipped tiles, without a GPU: what each costs on each architecture.

``python -m benchmarks.compile_report --arch 80 86 89 90 100 120`` prints a row a kernel: registers, spills, shared
memory, matrix instructions, and how many programs fit a multiprocessor. Triton's own launcher specializes the launches
of a forward and a backward over tensors without data, so the binaries are those that a GPU would run.
``--early``: as programmatic dependent launch takes them, which no configuration asks for yet.

Known spill: in full fp32 products run without matrix instructions, and at R = 64 the GEMM spills up to 200 bytes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.device.compilation import DTYPES, Compilation, assembled, compilation, step_launches
from benchmarks.measuring import timing
from benchmarks.measuring.methods import Ranks
from benchmarks.rendering.tables import Table, show
from hydra_kernels.backend.interface import Operands
from hydra_kernels.kernels import configs
from hydra_kernels.kernels.language import INTERPRETED
from hydra_kernels.kernels.launch import Launch

# ViT-B/16 fc2, 128 images.
M, K, N = 128 * 197, 3072, 768
ADAPTERS = frozenset({"x", "A_down", "A_up", "B_down", "B_up"})
OPTIONS = frozenset({"bias", "A_down_bias", "A_up_bias", "B_down_bias", "B_up_bias", "scale_a", "scale_b"})
# Matrix instructions by generation, fused multiply-adds, loads by TMA and by cp.async, spilled registers' traffic.
MATRIX_OPCODES = ("HMMA", "HGMMA", "UTCHMMA")
OPCODES = (*MATRIX_OPCODES, "FFMA", "FFMA2", "UTMALDG", "LDGSTS", "STL", "LDL")
_OPCODE = re.compile(rf"\b({'|'.join(OPCODES)})\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
# An instruction of PTX, after a predicate or none; those that touch global memory; and the one by which programs count.
_INSTRUCTION = re.compile(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", re.MULTILINE)
_GLOBAL = re.compile(r"(?:ld|st|atom|red)\.(?!param|shared|const|local)|cp\.|prefetch")
COUNT = "atom.global.gpu.acq_rel.add.u32"


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor, from the CUDA programming guide; every one has 65536 registers in four parts."""

    warps: int
    programs: int
    shared_bytes: int
    shared_bytes_of_program: int


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 << 10, 163 << 10),
    86: Multiprocessor(48, 16, 100 << 10, 99 << 10),
    89: Multiprocessor(48, 24, 100 << 10, 99 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 227 << 10),
    100: Multiprocessor(64, 32, 228 << 10, 227 << 10),
    120: Multiprocessor(48, 24, 100 << 10, 99 << 10),
}
TENSOR_MEMORY_COLUMNS = 512


class Variant(NamedTuple):
    """``options``: adapter biases, learnable scales, dropout, a trainable b0; ``aligned``: the rows of x, W0 and G.

    ``drops_input``: input dropout beside the options.
    """

    options: bool
    aligned: bool
    drops_input: bool = False

    def __str__(self) -> str:
        name = "input-dropout" if self.drops_input else "options" if self.options else "plain"
        return name + ("" if self.aligned else "-unaligned")


KINDS = ((False, False), (True, False), (True, True))
VARIANTS = {str(v): v for v in (Variant(o, aligned, d) for (o, d), aligned in itertools.product(KINDS, (True, False)))}


class Binary(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: dict[str, int]
    # What PTX has in the wrong order.
    misordered: tuple[str, ...] = ()


class CompileRow(TypedDict):
    """One kernel with its tiles, or why it did not compile (``error``; its figures are None)."""

    kernel: str
    variant: str
    arch: str
    dtype: str
    R: int
    # [r_a, r_b]
    ranks: list[int]
    # Blocks, warps, stages and, where it is limited, the registers of a thread.
    config: dict[str, int]
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    # What a program may have.
    shared_limit: int
    # By opcode, those of `OPCODES` that occur.
    instructions: dict[str, int] | None
    # That fit a multiprocessor at once: an estimate.
    programs: int | None
    warps: int | None
    misordered: list[str] | None
    error: str | None


def operands(dtype: torch.dtype, ranks: Ranks, variant: Variant) -> tuple[Tensor, Tensor, Operands]:
    """x, G and the rest of a call, on the meta device: shapes, strides and addresses without data."""
    r_a, r_b = ranks

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(count: int, width: int) -> Tensor:
        # An odd row, and a first element that no wide load can reach.
        return new(count, width) if variant.aligned else new(count, width + 1)[:, 1:]

    def where(present: bool, *shape: int) -> Tensor | None:
        return new(*shape) if present else None

    op = Operands(
        weight=rows(N, K),
        bias=new(N),
        A_down=where(r_a > 0, r_a, K),
        A_up=where(r_a > 0, N, r_a),
        B_down=where(r_b > 0, r_b, N),
        B_up=where(r_b > 0, N, r_b),
        A_down_bias=where(variant.options and r_a > 0, r_a),
        A_up_bias=where(variant.options and r_a > 0, N),
        B_down_bias=where(variant.options and r_b > 0, r_b),
        B_up_bias=where(variant.options and r_b > 0, N),
        mask=new(M, r_a + r_b, dtype=torch.bool) if variant.options else None,
        input_seed=new(dtype=torch.int64) if variant.drops_input and r_a else None,
        input_p=0.05 if variant.drops_input and r_a else 0.0,
        scale_a=new() if variant.options and r_a > 0 else 1.5,
        scale_b=new() if variant.options and r_b > 0 else 1.5,
        mask_scale=2.0 if variant.options else 1.0,
    )
    return rows(M, K), rows(M, N), op


def launches(arch: int, dtype: str, ranks: Ranks, variant: Variant, early: bool = False) -> list[Launch]:
    """Every launch of a step of the fused backend with all gradients, its GEMMs in each of the architecture's tiles.

    Then what the hybrid backend launches beside those: a pass for Z, its GEMM of the forward where it has one, and a
    pass around cuBLAS under input dropout, else the effective form's kernels, whose options are all but the mask.
    """
    torch_dtype, precision = DTYPES[dtype]
    x, G, op = operands(torch_dtype, ranks, variant)
    wanted = ADAPTERS | OPTIONS if variant.options else ADAPTERS
    needs = {name for name in wanted if name == "x" or isinstance(getattr(op, name), Tensor)}
    found: list[Launch] = []
    architecture = configs.of(divmod(arch, 10))
    architecture = architecture.with_early_launches() if early else architecture
    by_cublas = architecture._replace(half=architecture.half._replace(fused_from=None))
    ways = [(tiles, True, "composed") for tiles in architecture.with_each_gemm()]
    if architecture.half.fused_from is not None:
        by_gemm = architecture._replace(half=architecture.half._replace(fused_from=1))
        ways += [(tiles, False, "composed") for tiles in by_gemm.with_each_gemm()]
    ways += [(by_cublas, False, "composed")]
    ways += [] if variant.drops_input else [(architecture, False, "effective")]
    for tiles, fused, form in ways:
        step = step_launches(x, G, op, needs, fused, form, tiles, precision)
        known = [(name_of(launch), config_of(launch)) for launch in found]
        found += [launch for launch in step if (name_of(launch), config_of(launch)) not in known]
    return found


def name_of(launch: Launch) -> str:
    name, a = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
    if name == "gemm":
        return f"{name} {'forward' if a['FORWARD'] else 'dx'}"
    if name == "compose" and a["stack_ptr"] is not None:
        return "compose stack"
    if name == "sum_rows":
        # C's is the one over transposed adapters; of the others the wider is dD, here where K is the larger.
        return f"{name} {'C' if a['stride_yr'] != 1 else 'dU' if a['K'] == N else 'dD'}"
    return name


def config_of(launch: Launch) -> dict[str, int]:
    tiles = {name: value for name, value in launch.arguments.items() if name.startswith(("BLOCK_", "GROUP_"))}
    return tiles | launch.options


def compiled(job: Compilation) -> Binary | str:
    """What the assembler made of it, or the error of a compiler that gave up."""
    try:
        binary = assembled(job)
    except Exception as error:  # the compiler's passes raise what they like; whatever it is, it is the finding
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", str(file))
    registers, stack = resources(usage)
    order = misordered(binary.asm["ptx"], binary.metadata.launch_pdl)
    return Binary(registers, stack, binary.metadata.shared, binary.metadata.tmem_size or 0, instructions(sass), order)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(usage: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which holds nothing but spilled registers."""
    found = _RESOURCES.search(usage)
    if found is None:
        raise ValueError(f"cuobjdump names no registers: {usage!r}")
    return int(found[1]), int(found[2])


def misordered(ptx: str, early: bool) -> tuple[str, ...]:
    """What a race could come of, and no serial interpreter would show.

    A kernel that starts early has to wait for those before it where every thread comes by, before it touches memory.
    Before a program counts itself among those that have ended, all of its threads must have stored what they store.
    """
    found, body, stored = [], ptx[ptx.index("{") :], False
    names = _INSTRUCTION.findall(body)
    first = next((name for name in names if name == "griddepcontrol.wait" or name == "bra" or _GLOBAL.match(name)), "")
    if early and first != "griddepcontrol.wait":
        found.append("touches memory before it has waited for the kernels before it")
    for name in names:
        stored = name.startswith("st.global") or (stored and name != "bar.sync")
        if name.startswith("atom.") and (stored or name != COUNT):
            found.append("counts itself before all threads have stored")
    return tuple(found)


def instructions(sass: str) -> dict[str, int]:
    """How often each of `OPCODES` occurs, those that do not left out."""
    counts = Counter(_OPCODE.findall(sass))
    return {opcode: counts[opcode] for opcode in OPCODES if counts[opcode]}


def programs_that_fit(limits: Multiprocessor, binary: Binary, num_warps: int) -> int:
    """Programs that a multiprocessor holds at once; 0 where a single one does not fit."""
    registers_of_warp = -(-32 * binary.registers // 256) * 256
    # 1 KiB of each program's shared memory is the system's.
    shared = -(-(binary.shared_bytes + 1024) // 128) * 128
    fits = [
        limits.programs,
        limits.warps // num_warps,
        4 * (65536 // 4 // registers_of_warp) // num_warps,
        limits.shared_bytes // shared,
    ]
    if binary.tensor_memory_columns:
        fits.append(TENSOR_MEMORY_COLUMNS // binary.tensor_memory_columns)
    return min(fits)


def row_of(subject: dict[str, Any], arch: int, made: Binary | str) -> CompileRow:
    """A row from what it is about and what was made of it."""
    limits, num_warps = MULTIPROCESSORS[arch], subject["config"]["num_warps"]
    binary = None if isinstance(made, str) else made
    programs = None if binary is None else programs_that_fit(limits, binary, num_warps)
    return CompileRow(
        **subject,
        registers=None if binary is None else binary.registers,
        spill_bytes=None if binary is None else binary.spill_bytes,
        shared_bytes=None if binary is None else binary.shared_bytes,
        shared_limit=limits.shared_bytes_of_program,
        instructions=None if binary is None else binary.instructions,
        programs=programs,
        warps=None if programs is None else programs * num_warps,
        misordered=None if binary is None else list(binary.misordered),
        error=made if isinstance(made, str) else None,
    )


def subjects(
    archs: Iterable[int], dtypes: Sequence[str], all_ranks: Sequence[Ranks], variants: Sequence[Variant], early: bool
) -> Iterator[tuple[dict[str, Any], Compilation]]:
    """Every launch asked for: what its row says of it, and how it is compiled."""
    for arch, dtype, ranks, variant in itertools.product(archs, dtypes, all_ranks, variants):
        about = {"variant": str(variant), "arch": f"sm_{arch}", "dtype": dtype, "R": sum(ranks), "ranks": list(ranks)}
        for launch in launches(arch, dtype, ranks, variant, early):
            yield {"kernel": name_of(launch), **about, "config": config_of(launch)}, compilation(launch, arch)


def report(asked: Sequence[tuple[dict[str, Any], Compilation]], workers: int, progress: Progress) -> list[CompileRow]:
    """A row each, in the order asked; what several share is compiled once."""
    jobs = {repr(job): job for _, job in asked}
    made: dict[str, Binary | str] = {}
    # A fresh interpreter each: compilers keep threads, which a fork would lose.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(compiled, job): key for key, job in jobs.items()}
        for done in progress.track(as_completed(running), total=len(running), description="compile"):
            made[running[done]] = done.result()
    return [row_of(subject, job.arch, made[repr(job)]) for subject, job in asked]


def table(rows: Sequence[CompileRow]) -> Table:
    headings = ["kernel", "variant", "arch", "dtype", "R", "config"]
    headings += ["registers", "spill", "shared / limit (KiB)", "programs (warps)", "instructions"]
    cells = []
    for row in rows:
        about = [row["kernel"], row["variant"], row["arch"], row["dtype"], str(row["R"]), _config(row["config"])]
        if row["error"] is not None:
            cells.append([*about, *["-"] * 4, row["error"]])
            continue
        shared = f"{row['shared_bytes'] / 1024:.1f} / {row['shared_limit'] >> 10}"
        figures = [str(row["registers"]), str(row["spill_bytes"]), shared, f"{row['programs']} ({row['warps']})"]
        opcodes = " ".join(f"{opcode} {count}" for opcode, count in row["instructions"].items())
        cells.append([*about, *figures, opcodes])
    title = "Compiled kernels; bold: what the lines below name"
    return Table(title, headings, cells, [bool(faults(row)) for row in rows], left=6)


def _config(config: dict[str, int]) -> str:
    """128x256x64 R16, 8 warps, 3 stages: the blocks in the kernel's order, that of the ranks named."""
    blocks = "x".join(str(v) for name, v in config.items() if name.startswith("BLOCK_") and name != "BLOCK_R")
    limit = f", {config['maxnreg']} registers" if "maxnreg" in config else ""
    ranks = f" R{config['BLOCK_R']}, " if "BLOCK_R" in config else ", "
    return f"{blocks}{ranks}{config['num_warps']} warps, {config['num_stages']} stages{limit}"


def faults(row: CompileRow) -> list[str]:
    """What is wrong with a row, in words."""
    if row["error"] is not None:
        return [row["error"]]
    found = []
    if row["spill_bytes"] or not row["instructions"].keys().isdisjoint(("STL", "LDL")):
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, limit {row['shared_limit']}")
    if row["dtype"] == "fp32" and not row["instructions"].keys().isdisjoint(MATRIX_OPCODES):
        found.append("products of full fp32 by matrix instructions, which round their operands")
    return found + row["misordered"]


def fault_lines(rows: Sequence[CompileRow]) -> list[str]:
    return [
        f"{row['kernel']}, {row['variant']}, {row['arch']}, {row['dtype']}, R = {row['R']}: {fault}"
        for row in rows
        for fault in faults(row)
    ]


def ranks_option(text: str) -> Ranks:
    found = re.fullmatch(r"(\d+)\+(\d+)", text)
    ranks = Ranks(int(found[1]), int(found[2])) if found else Ranks(0, 0)
    if not 0 < sum(ranks) <= configs.MAX_RANK_BLOCK:
        raise argparse.ArgumentTypeError(f"{text!r}, expected A+B with 1 <= A + B <= {configs.MAX_RANK_BLOCK}")
    return ranks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=MULTIPROCESSORS, default=list(MULTIPROCESSORS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--ranks", type=ranks_option, nargs="+", default=[Ranks(8, 8), Ranks(32, 32)], metavar="A+B")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--early", action="store_true", help="by programmatic dependent launch, from sm_90 on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the rows there too")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if INTERPRETED.value:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing. Unset it and run again")
    if options.early and min(options.arch) < 90:
        parser.error(f"--early needs --arch 90 or later, got {min(options.arch)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    variants = [VARIANTS[name] for name in options.variant]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        asked = list(subjects(options.arch, options.dtype, options.ranks, variants, options.early))
        rows = report(asked, options.workers, progress)
    if options.json is not None:
        timing.write_result(options.json, timing.environment(torch.device("cpu")), rows, CompileRow)
    lines = fault_lines(rows) or ["Nothing spills, shared memory suffices, and full fp32 is full everywhere."]
    show(200, [table(rows), *lines])
    return int(any(row["error"] is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
