"""setup.py builds what was asked for or what it can, and says why not more; extension.py loads nothing that is stale.

A miniature package with one C++ source stands for the real one, and a script that calls the C++ compiler for nvcc.
"""

import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hydra_kernels import extension

ROOT = Path(__file__).parent.parent
CPP = """
#include "answer.h"
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, nullptr}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, methods};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
"""
HEADER = """
#include <Python.h>
#ifdef HYDRA_WITH_CUDA
#include "cuda/answer.cuh"
#define ANSWER cuda_answer()
#else
#define ANSWER 1
#endif
"""
NVCC = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    sys.exit(print("nvcc\\nCuda compilation tools, release 99.1\\nBuild 99"))
if arguments == ["--list-gpu-arch"]:
    sys.exit(print("compute_80\\ncompute_90"))
with open(__file__ + ".log", "a") as log:
    print(*arguments, sep="\\t", file=log)
flags = ("-c", "-o", "-shared", "-MD", "-MF")
taken = [a for a in arguments if a.endswith((".o", ".o.d", ".cu", ".so")) or a in flags]
command = [{shutil.which("c++")!r}, "-fPIC", *(["-x", "c++"] if "-c" in taken else []), *taken]
sys.exit(subprocess.run(command).returncode)
"""
COMPILER = f"""#!/bin/sh
printf '%s\\t' "$@" >> "$0.log"
echo >> "$0.log"
exec {shutil.which("c++")} "$@"
"""
REBUILD = re.escape("pip install --no-build-isolation -e .")
numbers = itertools.count()
compiles = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


@pytest.fixture
def mini(tmp_path, monkeypatch):
    """setup.py's functions on a package of its own, whose extension.py is the real one."""
    name = f"mini{next(numbers)}"
    for path, text in {
        "setup.py": "",
        f"{name}/__init__.py": "",
        f"{name}/extension.py": Path(extension.__file__).read_text(),
        "csrc/native.cpp": CPP,
        "csrc/answer.h": HEADER,
        "csrc/cuda/answer.cu": '#include "answer.cuh"\nint cuda_answer() { return 2; }\n',
        "csrc/cuda/answer.cuh": "int cuda_answer();\n",
        "cuda/bin/nvcc": NVCC,
        "tools/c++": COMPILER,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    tools = [tmp_path / "cuda/bin/nvcc", tmp_path / "tools/c++"]
    for tool in tools:
        tool.chmod(0o755)
    for variable in ("HYDRA_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)  # a CUDA build takes no nvcc of another version than its own
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("builder", ROOT / "setup.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    builder.ROOT, builder.PACKAGE = tmp_path, name
    folder, logs = tmp_path / name, [Path(f"{tool}.log") for tool in tools]

    def loaded():
        return importlib.import_module(f"{name}.extension")

    def build(mode=None):
        for log in logs:
            log.unlink(missing_ok=True)
        builder.build_native(mode, folder)
        record = json.loads((folder / "_native.json").read_text())
        left = {path.name for path in folder.glob("_native*")}
        assert left == {"_native.json"} | ({record["file"]} if record["mode"] != "none" else set())
        return record

    def commands(of):
        log = logs[tools.index(of)]
        return [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []

    def compiled():
        """The files that the last build compiled."""
        found = [command for tool in tools for command in commands(tool)]
        return sorted(Path(command[command.index("-c") + 1]).name for command in found if "-c" in command)

    return SimpleNamespace(
        builder=builder,
        root=tmp_path,
        folder=folder,
        name=name,
        build=build,
        commands=commands,
        compiled=compiled,
        loaded=loaded,
    )


@compiles
@pytest.mark.parametrize(("mode", "answer"), [("cpp", 1), ("cuda", 2), (None, 2)])
def test_what_is_asked_for_is_built_recorded_and_loaded(mini, mode, answer):
    record = mini.build(mode)
    assert record["mode"] == (mode or "cuda")
    assert record["why_not"] == ({"cuda": "HYDRA_BUILD=cpp was asked for"} if mode == "cpp" else {})
    assert record["compilers"].get("nvcc") == (None if mode == "cpp" else "Cuda compilation tools, release 99.1")
    assert record["architectures"] == ([] if mode == "cpp" else ["sm_80", "sm_90", "compute_90"])
    assert mini.loaded().load().answer() == answer
    assert mini.loaded().why_not() is None
    said = mini.loaded().why_not("cuda")
    assert said == (None if answer == 2 else "the compiled part has no CUDA kernels: HYDRA_BUILD=cpp was asked for")


@compiles
def test_a_build_of_none_removes_the_old_module(mini):
    mini.build("cpp")
    assert mini.build("none")["mode"] == "none"
    assert [path.name for path in mini.folder.glob("_native*")] == ["_native.json"]
    assert mini.loaded().load() is None
    assert mini.loaded().why_not() == "the compiled part was not built: HYDRA_BUILD=none was asked for"


def test_an_unknown_mode_is_an_error(mini, monkeypatch):
    monkeypatch.setenv("HYDRA_BUILD", "gpu")
    with pytest.raises(SystemExit, match="HYDRA_BUILD is 'gpu': expected none, cpp, cuda"):
        mini.builder.modules()


@compiles
def test_unset_a_failing_compiler_is_recorded_and_the_next_mode_tried(mini):
    (mini.root / "csrc/cuda/answer.cu").write_text("nonsense;\n")
    record = mini.build()
    assert record["mode"] == "cpp"
    assert re.match(
        r"nvcc failed: .*answer\.cu:1:1: error: .nonsense. does not name a type\n", record["why_not"]["cuda"]
    )
    assert re.fullmatch("the compiled part has no CUDA kernels: nvcc failed: .*a type", mini.loaded().why_not("cuda"))

    (mini.root / "csrc/native.cpp").write_text(CPP + "folly;\n")
    record = mini.build()
    assert record["mode"] == "none"
    assert "folly" in record["why_not"]["cpp"]
    assert "nonsense" in record["why_not"]["cuda"]


@compiles
@pytest.mark.parametrize("mode", ["cpp", "cuda"])
def test_asked_for_a_failing_compiler_fails_the_build_and_leaves_nothing_old(mini, mode):
    mini.build(mode)
    (mini.root / "csrc/native.cpp").write_text(CPP + "folly;\n")
    with pytest.raises(mini.builder.ExecError, match=r"c\+\+ failed: .*native\.cpp.*folly"):
        mini.builder.build_native(mode, mini.folder)
    assert not list(mini.folder.glob("_native*"))


def without_compiler(mini, monkeypatch):
    monkeypatch.setenv("PATH", str(mini.root))
    return "no C++ compiler found"


def without_torch(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils", None)
    return "no torch in the build: install it first, give pip --no-build-isolation"


def without_ninja(mini, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **more: None if "ninja" in name else which(name, **more))
    return "no ninja found: pip install ninja"


def with_another_compiler(mini, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    return "No such file or directory: 'no-such-compiler'"


def with_odd_jobs(mini, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "many")
    return "'many'"


WITHOUT = [without_compiler, without_torch, without_ninja, with_another_compiler, with_odd_jobs]


@compiles
@pytest.mark.parametrize("case", WITHOUT)
def test_without_its_tools_it_is_pure_python_unless_asked_for(mini, monkeypatch, case):
    reason = case(mini, monkeypatch)
    record = mini.build()
    assert record["mode"] == "none"
    assert reason in record["why_not"]["cpp"]
    if case in (without_compiler, without_torch, without_ninja):
        assert mini.builder.modules() == []
    with pytest.raises(mini.builder.ExecError, match=re.escape(reason)):
        mini.builder.build_native("cpp", mini.folder)


@compiles
def test_without_nvcc_or_kernels_there_is_the_rest(mini, monkeypatch):
    (mini.root / "csrc/cuda/answer.cu").unlink()
    assert mini.build()["why_not"] == {"cuda": "csrc/cuda holds no .cu file"}
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert mini.build()["why_not"] == {"cuda": "no nvcc found (/nowhere/bin/nvcc)"}
    assert mini.loaded().load().answer() == 1


@compiles
def test_only_what_changed_is_compiled_again(mini, monkeypatch):
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu", "native.cpp"]
    monkeypatch.setenv("MAX_JOBS", "3")
    mini.build("cuda")
    assert mini.compiled() == []
    mini.build("cpp")
    assert mini.compiled() == ["native.cpp"]  # without -DHYDRA_WITH_CUDA
    (mini.root / "csrc/answer.h").write_text(HEADER + "\n")
    mini.build("cuda")
    assert mini.compiled() == ["native.cpp"]
    (mini.root / "csrc/cuda/answer.cuh").write_text("int cuda_answer();\n\n")
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu", "native.cpp"]  # of both: answer.h includes it
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu"]
    monkeypatch.setattr(torch, "__version__", "99.0")
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu", "native.cpp"]
    monkeypatch.setenv("PATH", f"{another_version(mini)}:{os.environ['PATH']}")
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu", "native.cpp"]
    mini.build("cuda")
    assert mini.compiled() == []


def another_version(mini):
    """A folder with a C++ compiler that does the same and gives another version."""
    folder = mini.root / "other"
    folder.mkdir()
    says = '#!/bin/sh\ncase "$*" in --version) echo c++ 99;; *) exec {} "$@";; esac\n'
    (folder / "c++").write_text(says.format(shutil.which("c++")))
    (folder / "c++").chmod(0o755)
    return folder


@compiles
def test_a_source_that_is_as_old_as_before_but_differs_is_compiled(mini):
    """As where a folder is restored or copied with its times."""
    mini.build("cuda")
    header = mini.root / "csrc/answer.h"
    times = header.stat()
    header.write_text(HEADER.replace("cuda_answer()", "(cuda_answer() + 5)"))
    os.utime(header, ns=(times.st_atime_ns, times.st_mtime_ns))
    mini.build("cuda")
    assert mini.compiled() == ["native.cpp"]
    assert mini.loaded().load().answer() == 7


@compiles
def test_a_copy_of_the_tree_builds_on(mini):
    mini.build("cuda")
    mini.builder.ROOT = Path(shutil.copytree(mini.root, mini.root / "copy"))
    mini.build("cuda")
    assert mini.compiled() == []
    (mini.root / "copy/csrc/cuda/answer.cu").write_text('#include "answer.cuh"\nint cuda_answer() { return 9; }\n')
    mini.build("cuda")
    assert mini.compiled() == ["answer.cu"]
    (mini.root / "setup.py").unlink()  # as where it is installed: extension.py then compares no sources
    assert mini.loaded().load().answer() == 9


@compiles
def test_the_ninja_of_its_package_is_used_and_given_max_jobs(mini, monkeypatch):
    stub, log = mini.root / "scripts/ninja", mini.root / "ninja.log"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" > {log}\nexec {mini.builder.find_ninja()} "$@"\n')
    stub.chmod(0o755)
    monkeypatch.setitem(sys.modules, "ninja", SimpleNamespace(BIN_DIR=str(stub.parent)))
    monkeypatch.setenv("MAX_JOBS", "3")
    mini.build("cpp")
    assert "-j3" in log.read_text().split()
    assert mini.loaded().load().answer() == 1


@compiles
def test_a_module_in_use_is_not_written_over(mini):
    mini.build("cpp")
    with open(binary(mini), "rb") as old:
        before = old.read()
        (mini.root / "csrc/native.cpp").write_text(CPP.replace("(ANSWER)", "(ANSWER + 10)"))
        mini.build("cpp")
        old.seek(0)
        assert old.read() == before
    assert binary(mini).read_bytes() != before


def test_architectures_are_those_of_torchs_variable(mini, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a 12.0+PTX")
    _, flags, targets = mini.builder.nvcc_tools()
    assert targets == ["sm_86", "sm_90a", "sm_120", "compute_120"]
    assert " ".join(flags).endswith("-gencode arch=compute_120,code=sm_120 -gencode arch=compute_120,code=compute_120")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(mini.builder.ExecError, match="names 'Hopper': expected numbers"):
        mini.builder.nvcc_tools()


@compiles
def test_the_compiled_code_decides_on_which_devices_it_runs(mini, monkeypatch):
    devices = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
    for wanted, expected in {
        "8.0": devices[1:4],
        "8.6+PTX": devices[2:],
        "9.0a 10.0a+PTX": [(9, 0), (10, 0)],
        "10.0f 8.6": [(8, 6), (8, 9), (10, 0), (10, 3)],
        "12.0": devices[-2:],
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
        mini.build("cuda")
        extension = importlib.reload(mini.loaded())
        said = {device: extension.why_not_on(device) for device in devices}
        assert [device for device in devices if said[device] is None] == expected
    assert said[(9, 0)].startswith(
        "its kernels were built for sm_120, and this GPU has compute capability 9.0; rebuild it"
    )


@compiles
def test_nvcc_is_of_torchs_cuda_and_uses_the_compiler_that_was_asked_for(mini, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(
        mini.builder.ExecError, match=r"another CUDA than torch's 12\.8: Cuda compilation tools, release 99"
    ):
        mini.build("cuda")
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setenv("CXX", shutil.which("c++"))
    mini.build("cuda")
    of_nvcc = [command for command in mini.commands(mini.root / "cuda/bin/nvcc") if "-o" in command]
    assert len(of_nvcc) == 2
    assert all(f"-ccbin={shutil.which('c++')}" in command for command in of_nvcc)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_nvccs_own_module_imports_without_a_driver(mini, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (mini.root / "csrc/cuda/answer.cu").write_text(
        '#include "answer.cuh"\n__global__ void kernel() {}\n'
        "int cuda_answer() { kernel<<<1, 1>>>(); return cudaGetLastError() == cudaSuccess ? 3 : 4; }\n"
    )
    assert mini.build("cuda")["architectures"] == ["sm_90"]
    assert mini.loaded().load().answer() in (3, 4)


def change(mini, **entries):
    path = mini.folder / "_native.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def binary(mini):
    return next(mini.folder.glob("_native*.so"))


STALE = {
    "another torch": (lambda m: change(m, torch="1.0"), "was built for torch 1.0, and this is torch 2"),
    "another source": (
        lambda m: (m.root / "csrc/native.cpp").write_text(""),
        "the sources in csrc have changed",
    ),
    "a new header": (lambda m: (m.root / "csrc/b.h").write_text(""), "the sources in csrc have changed"),
    "another Python": (lambda m: change(m, file="_native.cpython-27.so"), r"another Python \(_native.cpython-27.so\)"),
    "no binary": (lambda m: binary(m).unlink(), r"file of the compiled part is missing \(_native.*so\)"),
    "a broken binary": (
        lambda m: binary(m).write_bytes(b"\x7fELF"),
        r"does not load \(ImportError: .*file too short\)",
    ),
    "no record": (lambda m: (m.folder / "_native.json").unlink(), "was never built"),
    "half a record": (
        lambda m: (m.folder / "_native.json").write_text('{"mode": "cpp"'),
        "is damaged .*JSONDecodeError",
    ),
    "a foreign record": (lambda m: (m.folder / "_native.json").write_text("[]"), "is damaged .*TypeError"),
    "a record without reasons": (lambda m: change(m, why_not={}), "is damaged .*KeyError"),
    "a record without a file": (lambda m: change(m, file=None), "is damaged .*TypeError"),
}


@compiles
@pytest.mark.parametrize("case", STALE)
def test_nothing_stale_or_damaged_is_loaded(mini, case):
    mini.build("cpp")
    damage, reason = STALE[case]
    damage(mini)
    assert mini.loaded().load() is None
    assert f"{mini.name}._native" not in sys.modules
    assert re.search(f"{reason}.*; rebuild it in the source folder: {REBUILD}$", mini.loaded().why_not())
    assert mini.loaded().why_not("cuda") == mini.loaded().why_not()


@compiles
@pytest.mark.parametrize(
    ("mode", "wheel"),
    [("none", "py3-none-any.whl"), pytest.param("cpp", "linux_", marks=pytest.mark.slow), (None, "linux_")],
)
def test_setup_py_builds_in_place_and_wheels(mini, mode, wheel):
    shutil.copy(ROOT / "setup.py", mini.root)
    mini.folder.rename(mini.root / "hydra_kernels")
    (mini.root / "pyproject.toml").write_text(
        '[project]\nname = "mini"\nversion = "1"\n[tool.setuptools]\npackages = ["hydra_kernels"]\n'
    )
    environment = {**os.environ, "HYDRA_BUILD": mode or ""}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "bdist_wheel"]
    subprocess.run(command, cwd=mini.root, env=environment, check=True, capture_output=True)
    (built,) = (mini.root / "dist").iterdir()
    assert wheel in built.name
    inside = {Path(name).name for name in zipfile.ZipFile(built).namelist()}
    beside = {path.name for path in (mini.root / "hydra_kernels").glob("_native*")}
    assert {name for name in inside if name.startswith("_native")} == beside
    assert len(beside) == (1 if mode == "none" else 2)


def test_the_sdist_has_all_that_a_build_needs_and_no_half_of_the_tests(tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    environment = {**os.environ, "HYDRA_BUILD": "none"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    listed = set((tmp_path / "hydra_kernels.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {path for path in ROOT.glob("csrc/**/*") if path.is_file() and path.suffix != ".md"}
    package = ROOT / "hydra_kernels"
    needed |= {*package.glob("**/*.py"), *package.glob("*/*.json"), package / "py.typed"}
    assert {path.relative_to(ROOT).as_posix() for path in needed} <= listed
    assert not [name for name in listed if name.startswith("tests/") or "_native." in name]


def test_the_package_loads_nothing_before_it_is_needed():
    code = "import sys, hydra_kernels; assert 'hydra_kernels._native' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
