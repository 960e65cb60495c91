"""`python -m tests.sanitize`: the kernels under AddressSanitizer, UBSan and ThreadSanitizer, CUDA's on the host.

The tests of test_cuda_kernels run with g++'s runtimes loaded: all of them under AddressSanitizer and UBSan, every
kernel in fp32 and bf16 under ThreadSanitizer, to which barriers alone order two CUDA threads and nothing orders two
blocks. Then each bug of PLANTED must be reported: a sanitizer that sees nothing proves nothing.
The CPU kernels are built as users build them, into a copy of the package. ThreadSanitizer cannot judge them, since it
does not know the barriers of GCC's OpenMP.
Exit status 1 if the kernels are not clean, a planted bug goes unreported, or a tool is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .cuda_on_host.library import cuda_headers

ROOT = Path(__file__).parent.parent
FILE = "tests/test_cuda_kernels.py"
SOURCES = ("csrc/cuda", "tests", "pyproject.toml")
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
# Several tiles, parts and blocks; the second has rows of 16-byte lines.
QUICK = [
    f"{FILE}::test_{kernel}[{shape}-{dtype}-{dtype}]"
    for kernel in ("compose", "down", "grad_z", "grad_w", "reduce")
    for shape in ("67x129x131-3+5", "300x328x200-16+0")
    for dtype in ("float32", "bfloat16")
]
QUICK += [
    f"{FILE}::test_sm90_sweep[{shape}-{dtype}-{dtype}-{Z}]"
    for shape in ("67x129x131-3+5", "300x328x200-16+0")
    for dtype, Z in (("float32", "Z given"), ("bfloat16", "Z given"), ("bfloat16", "Z computed"))
]
QUICK += [f"{FILE}::test_sm90_sweep[33x200x900-8+8-bfloat16-bfloat16-Z computed]"]  # by clusters of 16


class Planted(NamedTuple):
    name: str
    sanitizer: str
    says: str  # what the report then has in it
    file: str
    old: str
    new: str
    test: str


PLANTED = [
    Planted(
        "a tile is read before all of it is written", "thread", "data race", "down.cu",
        "    if (with_rest) share_rest.store(rest_tile);\n    __syncthreads();\n",
        "    if (with_rest) share_rest.store(rest_tile);\n",
        "down[67x129x131-3+5-float32-float32]",
    ),
    Planted(
        "a tile is written while others read it", "thread", "data race", "tiles.cuh",
        "    __syncthreads();\n    share.store(tile);\n", "    share.store(tile);\n",
        "grad_w[300x328x200-16+0-bfloat16-bfloat16]",
    ),
    Planted(
        "two blocks write one element", "thread", "data race", "grad_z.cu",
        "p.dz_ptr[(split * p.M + m) * R + r] = v", "p.dz_ptr[m * R + r] = v",
        "grad_z[67x129x131-3+5-float32-float32]",
    ),
    Planted(
        "sums of another block's warps are read before they are there", "thread", "data race", "sm90_sweep.cu",
        "    cluster_barrier();\n#pragma unroll\n    for (int j = 0; j < OWNED; ++j) {  // 3\n",
        "#pragma unroll\n    for (int j = 0; j < OWNED; ++j) {  // 3\n",
        "sm90_sweep[67x129x131-3+5-bfloat16-bfloat16-Z given]",
    ),
    Planted(
        "rows are overwritten while a warp reads them", "thread", "data race", "sm90_sweep.cu",
        "    __syncthreads();  // nobody reads the tile before this one any more\n", "",
        "sm90_sweep[300x328x200-16+0-float32-float32-Z given]",
    ),
    Planted(
        "a block writes into one that has not begun", "address", "AddressSanitizer", "sm90_sweep.cu",
        "  cluster_barrier();  // a block's shared memory may be written from now on: the block runs\n", "",
        "sm90_sweep[67x129x131-3+5-float32-float32-Z given]",
    ),
    Planted(
        "a barrier that some threads skip", "address", "waits at a barrier", "tiles.cuh",
        "    __syncthreads();\n    share.store(tile);\n",
        "    if (threadIdx.x != 5) __syncthreads();\n    share.store(tile);\n",
        "grad_w[67x129x131-3+5-float32-float32]",
    ),
    Planted(
        "a read past the end of x", "address", "AddressSanitizer", "tiles.cuh",
        "k + WIDTH <= from.columns", "k < from.columns", "down[271x80x97-40+24-float32-float32]",
    ),
    Planted(
        "a write past a shared array", "address", "AddressSanitizer", "grad_z.cu",
        "up_tile, RANKS * STRIDE<T>)", "up_tile, RANKS * STRIDE<T> - 24)", "grad_z[64x128x192-8+8-float32-float32]",
    ),
    Planted(
        "a misaligned load of 16 bytes", "address", "misaligned address", "tiles.cuh",
        "from.lines && k + WIDTH", "k + WIDTH", "grad_w[67x129x131-3+5-float16-float16]",
    ),
]  # fmt: skip


CPU_SOURCES = ("csrc", "hydra_kernels", "benchmarks", "tests", "setup.py", "pyproject.toml")
CPU_TESTS = [
    "tests/test_native.py",
    "-k",
    "test_kernels or few_rows or test_sums_that or test_weights or nearest or float16 or several_blocks",
]
CPU_PLANTED = Planted(
    "a write past scratch memory", "address", "AddressSanitizer", "small.cpp",
    "float* out = Scratch<float, 0>::of(rows * columns);", "float* out = Scratch<float, 0>::of(rows);",
    "kernels_that_widen",
)  # fmt: skip


def missing_tools() -> list[str]:
    missing = [] if cuda_headers() else ["cuda_bf16.h (the CUDA toolkit)"]
    if shutil.which("g++") is None:
        return [*missing, "g++"]
    return missing + [name for name in RUNTIMES.values() if not Path(runtime(name)).is_absolute()]


def runtime(name: str) -> str:
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_tests(folder: Path, sanitizer: str, tests: list[str], **more: str) -> tuple[int, str]:
    """pytest's exit status and all that was said, with more in the environment."""
    settings = {
        **more,
        "CUDA_ON_HOST_SANITIZER": sanitizer,
        "LD_PRELOAD": f"{runtime(RUNTIMES[sanitizer])}:{runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "TSAN_OPTIONS": "halt_on_error=1",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    done = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def shipped(sanitizer: str, tests: list[str]) -> str | None:
    """What is wrong with the kernels, or None."""
    status, said = run_tests(ROOT, sanitizer, tests)
    clean = status == 0 and " passed" in said and "skipped" not in said
    return None if clean else f"exit status {status}\n{said[-6000:]}"


def reported(bug: Planted) -> str | None:
    """Why a planted bug does not count as reported, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder, kernel = Path(name), bug.test.partition("[")[0]
        for source in SOURCES:
            (folder / source).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, folder / source)
        for other in (folder / "csrc" / "cuda").glob("*.cu"):
            if other.stem != kernel:
                other.unlink()  # not needed to run this one
        path = folder / "csrc" / "cuda" / bug.file
        text = path.read_text()
        if text.count(bug.old) != 1:
            return f"STALE: its text occurs {text.count(bug.old)} times in {bug.file}"
        path.write_text(text.replace(bug.old, bug.new))
        status, said = run_tests(folder, bug.sanitizer, [f"{FILE}::test_{bug.test}"], TMPDIR=name)
    return None if status != 0 and bug.says in said else f"UNREPORTED: exit status {status}\n{said[-3000:]}"


def cpu() -> str | None:
    """What is wrong with the CPU kernels, or with the report of the bug that is then planted in them, or None."""
    bug, flags = CPU_PLANTED, "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in CPU_SOURCES:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("_native*", "*.pyc"))
            else:
                shutil.copy(ROOT / source, folder / source)

        def run(tests: list[str]) -> tuple[int, str]:
            command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            environment = {**os.environ, "CXX": f"g++ {flags}", "HYDRA_BUILD": "cpp"}
            built = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
            if built.returncode:
                return built.returncode, "it does not compile: " + built.stdout + built.stderr
            return run_tests(folder, "address", tests)

        status, said = run(CPU_TESTS)
        if status != 0 or " passed" not in said or "skipped" in said:
            return f"exit status {status}\n{said[-6000:]}"
        path = folder / "csrc" / "cpu" / bug.file
        text = path.read_text()
        if text.count(bug.old) != 1:
            return f"STALE: the text of a planted bug occurs {text.count(bug.old)} times in {bug.file}"
        path.write_text(text.replace(bug.old, bug.new))
        status, said = run(["tests/test_native.py", "-k", bug.test])
    return None if status != 0 and bug.says in said else f"UNREPORTED: {bug.name}: exit status {status}\n{said[-3000:]}"


def main() -> int:
    missing = missing_tools()
    if missing:
        print("not found: " + ", ".join(missing))
        return 1
    everything = [FILE, "-k", "not architecture and not 2_to_the_31"]
    jobs = {
        "the kernels under AddressSanitizer and UBSan": lambda: shipped("address", everything),
        "the kernels under ThreadSanitizer": lambda: shipped("thread", QUICK),
        f"the CPU kernels under AddressSanitizer and UBSan; planted: {CPU_PLANTED.name}": cpu,
        **{f"planted: {bug.name}": lambda bug=bug: reported(bug) for bug in PLANTED},
    }
    start, wrong = time.monotonic(), 0
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for name, said in zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True):
            wrong += said is not None
            print(f"{'ok' if said is None else 'FAILED':6s} {name}" + (f": {said}" if said else ""), flush=True)
    print(f"{len(jobs) - wrong} of {len(jobs)} as expected in {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
