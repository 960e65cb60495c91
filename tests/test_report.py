"""`python -m hydra_kernels` says all that a bug report needs, and survives what it reports."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from hydra_kernels import __main__, extension

ROOT = Path(__file__).parent.parent
TITLES = ["system", "versions", "CPU", "GPU", "compiled part", "backends", "environment variables", "measurements"]


def test_it_reports_in_a_fresh_process():
    done = subprocess.run([sys.executable, "-m", "hydra_kernels"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("hydra_kernels ")
    assert re.findall(r"^(\w.*):$", done.stdout, re.MULTILINE) == TITLES
    assert "\n  failed: " not in done.stdout
    assert done.stderr == ""


def test_it_tells_versions_devices_backends_reasons_and_variables(monkeypatch):
    monkeypatch.setattr(extension, "why_not", lambda: "the compiled part was not built: it is Sunday")
    monkeypatch.setattr(extension, "record", lambda: {"mode": "none", "why_not": {"cpp": "c++ failed\nlast words"}})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NVIDIA_API_KEY", "not for a bug report")
    text = "\n".join(__main__.report())
    for line in (
        r"^system:\n  \S.+",
        r"^versions:\n  Python 3\.\d+\.\d+ \(.+\)\n  torch 2\.\S+, git [0-9a-f]{40}$",
        *(rf"^  {name} ([\d.]+|not installed)$" for name in ("triton", "numpy", "safetensors", "peft", "transformers")),
        rf"^CPU:\n  .+, {torch.get_num_threads()} threads\n  \d+ cores, usable here: ",
        r"^GPU:\n  \S",
        r"^  nvidia-smi: \S",
        r"^compiled part:\n  not loaded: .*it is Sunday\n  mode: none\n  why not cpp: c\+\+ failed\n    last words$",
        r"^backends:\n  reference: usable\n  aten: usable$",
        r"^environment variables:\n(  .*\n)*  OMP_NUM_THREADS=3$",
        r"^measurements:\n  \d+ in \S+$",
    ):
        assert re.search(line, text, re.MULTILINE), line
    assert "not for a bug report" not in text


def test_broken_parts_do_not_end_it(monkeypatch):
    def broken(*arguments):
        raise OSError("libcuda.so.1")

    monkeypatch.setattr(__main__, "backends", broken)
    monkeypatch.setattr(__main__, "version", broken)
    monkeypatch.setattr(__main__, "cpu_name", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(extension, "why_not", broken)
    lines = list(__main__.report())
    assert lines.count("  failed: OSError: libcuda.so.1") == 5
    assert [line.rstrip(":") for line in lines[1:] if not line.startswith(" ")] == TITLES


def test_a_terminal_of_few_letters_does_not_end_it(monkeypatch):
    environment = {"PYTHONIOENCODING": "ascii", "TRITON_NAME": "\u00e9", "PATH": "/nowhere", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "-m", "hydra_kernels"], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"  TRITON_NAME=?\n" in done.stdout
    assert b"  nvidia-smi: not found\n" in done.stdout
