"""Settings of every test run."""

import os

# Before anything imports the kernels: they run in Triton's interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already fill the cores
