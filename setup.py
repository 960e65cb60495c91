"""Builds the compiled part, `hydra_kernels._native`, from csrc; all other metadata lives in pyproject.toml.

    HYDRA_BUILD  builds                                                       needs
    cuda         csrc/*.cpp, csrc/cpu/*.cpp, csrc/cuda/*.cu                   torch, a C++ compiler, nvcc
    cpp          csrc/*.cpp, csrc/cpu/*.cpp                                   torch, a C++ compiler
    none         nothing: the package is pure Python
    unset        the first of these that succeeds, and never fails the install

The mode, why it is not a higher one, and what it was built with and from go to `_native.json` beside the module:
pip hides what a build prints, and `extension.py` loads nothing that this record does not vouch for.
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME and CXX mean what they mean to torch.

Not torch's CUDAExtension, which refuses where torch is a CPU build: the .cu files know nothing of torch, so nvcc
compiles them for either, and its static runtime imports without a driver. Nor torch's BuildExtension: a record cannot
quote the compiler's words from it, and without ninja it compiles everything anew, one file after another.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "objects"
PACKAGE = "hydra_kernels"
MODES = ("cuda", "cpp", "none")  # the order in which they are tried
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def source_hash(csrc: Path, mode: str) -> str:
    """That of extension.py, which compares it; loaded by itself, since the package imports torch."""
    spec = importlib.util.spec_from_file_location("extension", ROOT / PACKAGE / "extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension.source_hash(csrc, mode)


def asked() -> str | None:
    mode = os.environ.get("HYDRA_BUILD") or None
    if mode is not None and mode not in MODES:
        raise SystemExit(f"HYDRA_BUILD is {mode!r}: expected none, cpp, cuda, or unset for what this machine can build")
    return mode


def run(command: list[str]) -> str:
    """What a command prints. Where it fails, the error's first line says why, the others are the command's last."""
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, env=english, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        print(shlex.join(command), done.stdout, sep="\n", file=sys.stderr)
        lines = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
        cause = next((line for line in lines if "error:" in line), lines[-1])
        raise ExecError("\n".join([f"{Path(command[0]).name} failed: {cause}", *lines[-10:]]))
    return done.stdout


def cpp_tools() -> tuple[list[str], list[str], list[str]]:
    """The C++ compiler, its flags and the linker's for this Python and this torch; ExecError where one is missing."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not compiler:
        raise ExecError("no C++ compiler found (CXX, or c++, g++ or clang++ in PATH)")
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise ExecError(f"no torch in the build: install it first, give pip --no-build-isolation ({error})") from error
    flags = ["-O3", "-std=c++20", "-fopenmp", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall"]
    flags += ["-DTORCH_EXTENSION_NAME=_native", f"-I{CSRC}", f"-I{sysconfig.get_path('include')}"]
    flags += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    return shlex.split(compiler), flags, [*libraries, "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]


def nvcc_tools() -> tuple[str, list[str], list[str]]:
    """nvcc, its flags, and the architectures they ask for: the last of them also as PTX, for later cards."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        raise ExecError(f"no nvcc found ({nvcc if home else 'CUDA_HOME, PATH, /usr/local/cuda'})")
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        known = run([nvcc, "--list-gpu-arch"]).split()
        wanted = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
        wanted[-1:] = [f"{arch}+PTX" for arch in wanted[-1:]]
    flags, targets = [], []
    for arch in wanted:
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number[:1].isdigit():
            raise ExecError(f"TORCH_CUDA_ARCH_LIST names {arch!r}: expected numbers, as in '8.0;9.0+PTX'")
        if int(number.rstrip("af")) < 80:  # has no bfloat16 products; its users get aten
            continue
        for code in [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code={code}"]
            targets.append(code)
    if not targets:
        raise ExecError("TORCH_CUDA_ARCH_LIST names no architecture from 8.0 on, which the kernels need")
    return nvcc, ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", *flags], targets


def compile_native(mode: str, target: Path) -> dict[str, object]:
    """Compiles and links target; what the record says of it. Objects are named by all they depend on, and reused."""
    compiler, flags, libraries = cpp_tools()
    import torch

    cpp = [*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp"))]
    compilers = {"c++": run([*compiler, "--version"]).splitlines()[0]}
    command, targets, units = [*compiler, *flags], [], []
    link = [*compiler, "-shared", "-fopenmp"]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    if mode == "cuda":
        nvcc, nvcc_flags, targets = nvcc_tools()
        said = run([nvcc, "--version"]).splitlines()
        compilers["nvcc"] = next((line for line in said if "release" in line), said[-1])
        major = compilers["nvcc"].partition("release ")[2].partition(".")[0]
        if torch.version.cuda and torch.version.cuda.partition(".")[0] != major:  # a driver need not serve both
            raise ExecError(f"nvcc is of another CUDA than torch's {torch.version.cuda}: {compilers['nvcc']}")
        command.append("-DHYDRA_WITH_CUDA")
        host = [f"-ccbin={compiler[-1]}"] if os.environ.get("CXX") else []  # the last word: not ccache
        link = [nvcc, *host, "-shared", "-cudart=static", "-nodlink", "-Xcompiler=-fopenmp"]
        cu = sorted(CSRC.glob("cuda/*.cu"))
        if not cu:
            raise ExecError("csrc/cuda holds no .cu file")
        threads = f"--threads={max(1, jobs // len(cu))}"  # the architectures of one file beside each other
        headers = [path for path in sorted(CSRC.glob("cuda/*")) if path.suffix in (".h", ".cuh")]
        units += [(source, [nvcc, *host, threads, *nvcc_flags], headers) for source in cu]
    units += [(source, command, sorted(CSRC.rglob("*.h"))) for source in cpp]

    def compiled(unit: tuple[Path, list[str], list[Path]]) -> str:
        source, command, headers = unit
        inputs = [json.dumps([command, compilers, torch.__version__]).encode()]
        inputs += [path.read_bytes() for path in [source, *headers]]
        key = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
        done = OBJECTS / f"{source.parent.name}-{source.stem}-{key}.o"
        if not done.exists():
            part = done.with_name(f"{done.stem}-{os.getpid()}.o")
            print(run([*command, "-c", str(source), "-o", str(part)]), end="")  # its warnings
            part.replace(done)
        return str(done)

    OBJECTS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, units))
    part = target.with_name(f"{target.name}-{os.getpid()}")
    run([*link, *objects, *libraries, "-o", str(part)])
    part.replace(target)  # never in place: another process may run the old one
    return {"file": target.name, "torch": torch.__version__, "architectures": targets, "compilers": compilers}


def build_native(mode: str | None, folder: Path) -> dict[str, object]:
    """Builds into folder and stores the record there. A mode that was asked for succeeds or raises ExecError."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("_native.*"):
        old.unlink()
    tried = MODES if mode is None else (mode,)
    why_not = {higher: f"HYDRA_BUILD={mode} was asked for" for higher in MODES[: MODES.index(tried[0])]}
    for built in tried:
        parts, sources = {}, source_hash(CSRC, built)  # before the compiler reads them
        try:
            if built != "none":
                parts = compile_native(built, folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}")
            break
        except (ExecError, OSError, ValueError) as error:
            if mode is not None:
                raise ExecError(str(error)) from error
            why_not[built] = str(error)
    record = {"mode": built, "why_not": why_not, **parts, "python": platform.python_version(), "sources": sources}
    (folder / "_native.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{PACKAGE}: built {built}", *(f"not {name}: {reason}" for name, reason in why_not.items()), sep="\n  ")
    return record


class BuildNative(build_ext):
    def run(self) -> None:
        beside = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
        build_native(asked(), Path(beside) if self.inplace else Path(self.build_lib, PACKAGE))


class Build(build):
    # Mode none has no extension, yet it leaves a record and removes what an earlier build left.
    sub_commands = [(name, None if name == "build_ext" else when) for name, when in build.sub_commands]  # noqa: RUF012


def modules() -> list[Extension]:
    """What makes a wheel one of this platform; pure Python where nothing can be compiled."""
    try:
        if asked() is None:
            cpp_tools()
    except ExecError:
        return []
    return [] if asked() == "none" else [Extension(f"{PACKAGE}._native", [])]


if __name__ == "__main__":
    setup(ext_modules=modules(), cmdclass={"build": Build, "build_ext": BuildNative})
