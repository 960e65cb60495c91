"""How `native`'s backward reads x and G on a GPU: as benchmarks fix it, by what a user would set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hydra_kernels.choose import machine

VARIABLE = "HYDRA_KERNELS_BACKWARD"


@contextmanager
def backward_by(name: str) -> Iterator[None]:
    """Inside, ``$HYDRA_KERNELS_BACKWARD`` is ``name``, and the machine knows it."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    machine.forget()
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        machine.forget()
