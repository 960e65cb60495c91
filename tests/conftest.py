"""Settings of every test run."""

import os
import tempfile

# Before anything imports the kernels: they run in Triton's interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Nor does what somebody measured on this machine change a test.
os.environ["HYDRA_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "hydra_kernels-without-measurements")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: the workers fill the cores

import pytest
import torch

from hydra_kernels.choose import machine

from .distributed.group import folder, groups  # noqa: F401  (fixtures)
from .interpreter import without_waste

without_waste()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def products_by(library, monkeypatch):
    """What multiplies with W0 in `native`, whatever the processor."""
    monkeypatch.setenv("HYDRA_KERNELS_PRODUCTS", library)
    machine.forget()
    yield
    monkeypatch.undo()
    machine.forget()


@pytest.fixture
def products_by_aten(monkeypatch):
    yield from products_by("aten", monkeypatch)


@pytest.fixture
def products_by_own(monkeypatch):
    yield from products_by("own", monkeypatch)
