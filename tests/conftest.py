"""Settings of every test run."""

import os
import tempfile

# Before anything imports the kernels: they run in Triton's interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Nor does what somebody measured on this machine change a test.
os.environ["HYDRA_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "hydra_kernels-without-measurements")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: the workers fill the cores

import torch

from .distributed.group import folder, groups  # noqa: F401  (fixtures)
from .interpreter import without_waste

without_waste()

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
