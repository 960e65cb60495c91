"""Builds the compiled part, `hydra_kernels._native`, from csrc; all other metadata lives in pyproject.toml.

    HYDRA_BUILD  builds                                                       needs
    cuda         csrc/*.cpp, csrc/cpu/*.cpp, csrc/cuda/*.cu                   torch, ninja, a C++ compiler, nvcc
    cpp          csrc/*.cpp, csrc/cpu/*.cpp                                   torch, ninja, a C++ compiler
    none         nothing: the package is pure Python
    unset        the first of these that succeeds, and never fails the install

The mode, why it is not a higher one, and what it was built with and from go to `_native.json` beside the module:
pip hides what a build prints, and `extension.py` loads only the module that this record describes.
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME and CXX mean what they mean to torch.

Each mode has a `build.ninja` in a folder of its own, build/cpp or build/cuda, with paths relative to this folder, so
that a copy of the whole tree builds on from where the tree was.

Not torch's CUDAExtension, which refuses where torch is a CPU build: the .cu files know nothing of torch, so nvcc
compiles them for either, and its static runtime imports without a driver. Nor torch's BuildExtension, which prints the
compiler's words and raises without them: the record could not quote them. pybind11 is the one that torch ships: another
has its own registry of types and would not know torch's.
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
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
PACKAGE = "hydra_kernels"
MODES = ("cuda", "cpp", "none")  # the order in which they are tried
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def source_hash(mode: str) -> str:
    """That of extension.py, which compares it; loaded by itself, since the package imports torch."""
    spec = importlib.util.spec_from_file_location("extension", ROOT / PACKAGE / "extension.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension.source_hash(ROOT / "csrc", mode)


def asked() -> str | None:
    mode = os.environ.get("HYDRA_BUILD") or None
    if mode is not None and mode not in MODES:
        raise SystemExit(f"HYDRA_BUILD is {mode!r}: expected none, cpp, cuda, or unset for what this machine can build")
    return mode


def run(command: list[str], **more: str) -> str:
    """What a command prints. Where it fails, the error's first line says why, the others are the command's last."""
    environment = {**os.environ, "LC_ALL": "C", **more}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    done = subprocess.run(command, cwd=ROOT, env=environment, **both)
    if done.returncode:
        print(shlex.join(command), done.stdout, sep="\n", file=sys.stderr)
        said = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
        failed = next((i for i, line in enumerate(said) if line.startswith("FAILED: ")), None)
        if failed is not None:  # ninja's account of the first command that failed: its output, itself, its words
            command = shlex.split(said[failed + 1])
            said = list(takewhile(lambda line: not line.startswith(("[", "ninja: ")), said[failed + 2 :]))
        cause = next((line for line in said if "error:" in line), said[-1] if said else "it said nothing")
        raise ExecError("\n".join([f"{Path(command[0]).name} failed: {cause}", *said[-10:]]))
    return done.stdout


def find_ninja() -> str:
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    found = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja") or shutil.which("ninja-build")
    if found is None:
        raise ExecError("no ninja found: pip install ninja")
    return found


def cpp_tools() -> tuple[list[str], list[str], list[str]]:
    """The C++ compiler, its flags and the linker's for this Python and this torch; ExecError where one is missing."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not compiler:
        raise ExecError("no C++ compiler found (CXX, or c++, g++ or clang++ in PATH)")
    find_ninja()
    try:
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise ExecError(f"no torch in the build: install it first, give pip --no-build-isolation ({error})") from error
    flags = ["-O3", "-std=c++20", "-fopenmp", "-g0", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wall"]
    flags += ["-DTORCH_EXTENSION_NAME=_native", "-Icsrc", f"-I{sysconfig.get_path('include')}"]
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


def touch_what_changed(noted: Path) -> None:
    """ninja compares times, which a copied or restored file may keep. So a file with new content gets a new time."""
    before = json.loads(noted.read_text(encoding="utf-8")) if noted.exists() else {}
    paths = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob("csrc/**/*.*"))}
    now = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    for name in now:
        if before.get(name, now[name]) != now[name]:
            paths[name].touch()
    noted.write_text(json.dumps(now, indent=2), encoding="utf-8")


def build_file(folder: str, compile_: dict[str, tuple], link: list[str], libraries: list[str]) -> str:
    """What ninja reads: for each compiler a rule and its sources, then the module that the objects are linked to."""

    def quoted(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    lines, objects = [f"builddir = {folder}"], []
    for name, (command, sources) in compile_.items():
        lines += [f"rule {name}", f"  command = {quoted(command)} -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {name} $in"]
        for source in sources:
            path = source.relative_to(ROOT).as_posix()
            objects.append(f"{folder}/{path}.o")
            lines.append(f"build {objects[-1]}: {name} {path}")
    lines += ["rule link", f"  command = {quoted(link)} $in {quoted(libraries)} -o $out", "  description = link $out"]
    return "\n".join([*lines, f"build {folder}/_native.so: link {' '.join(objects)}"]) + "\n"


def compile_native(mode: str, target: Path) -> dict[str, object]:
    """Compiles and links target; what the record says of it."""
    compiler, flags, libraries = cpp_tools()
    import torch

    compilers = {"c++": run([*compiler, "--version"]).splitlines()[0]}
    link, targets, compile_, environment = [*compiler, "-shared", "-fopenmp"], [], {}, {"NINJA_STATUS": "[%f/%t] "}
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    if mode == "cuda":
        nvcc, nvcc_flags, targets = nvcc_tools()
        said = run([nvcc, "--version"]).splitlines()
        compilers["nvcc"] = next((line for line in said if "release" in line), said[-1])
        major = compilers["nvcc"].partition("release ")[2].partition(".")[0]
        if torch.version.cuda and torch.version.cuda.partition(".")[0] != major:  # a driver need not serve both
            raise ExecError(f"nvcc is of another CUDA than torch's {torch.version.cuda}: {compilers['nvcc']}")
        flags.append("-DHYDRA_WITH_CUDA")
        host = [f"-ccbin={compiler[-1]}"] if os.environ.get("CXX") else []  # the last word: not ccache
        link = [nvcc, *host, "-shared", "-cudart=static", "-nodlink", "-Xcompiler=-fopenmp"]
        cu = sorted(ROOT.glob("csrc/cuda/*.cu"))
        if not cu:
            raise ExecError("csrc/cuda holds no .cu file")
        compile_["nvcc"] = [nvcc, *host, *nvcc_flags, "-MD"], cu
        # The architectures of one file beside each other. Not in the command, lest another MAX_JOBS compile all again.
        threads = f"--threads={max(1, jobs // len(cu))}"
        environment["NVCC_APPEND_FLAGS"] = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {threads}"
    cpp = [*sorted(ROOT.glob("csrc/*.cpp")), *sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    compile_["cpp"] = [*compiler, *flags, "-MMD"], cpp
    # No source reads this macro. It makes commands differ where a compiler or torch does, so that ninja compiles again.
    tools = hashlib.sha256(json.dumps([compilers, torch.__version__]).encode()).hexdigest()[:16]
    for command, _ in compile_.values():
        command.append(f"-DHYDRA_TOOLS={tools}")

    folder = ROOT / "build" / mode
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(build_file(f"build/{mode}", compile_, link, libraries), encoding="utf-8")
    touch_what_changed(folder / "contents.json")
    print(run([find_ninja(), "-f", f"build/{mode}/build.ninja", f"-j{jobs}"], **environment), end="")
    part = target.with_name(f"{target.name}-{os.getpid()}")
    shutil.copy(folder / "_native.so", part)
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
        parts, sources = {}, source_hash(built)  # before the compiler reads them
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
