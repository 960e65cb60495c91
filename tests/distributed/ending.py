"""How a member ends, after its last answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch.distributed as dist


def rank() -> int:
    return dist.get_rank()


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def notes_how_it_ends(folder: str) -> None:
    """Has this member write a file when it comes to the barrier, and one when it leaves after all have come there."""
    number, barrier, destroy = dist.get_rank(), dist.barrier, dist.destroy_process_group

    def met() -> None:
        Path(folder, f"met {number}").touch()
        barrier()

    def left() -> None:
        if len(list(Path(folder).glob("met *"))) == dist.get_world_size():
            destroy()
            Path(folder, f"left {number}").touch()

    dist.barrier, dist.destroy_process_group = met, left


def dies_at_the_end(number: int) -> int:
    """The member of that rank will be killed while it leaves the group."""
    if dist.get_rank() == number:
        dist.destroy_process_group = lambda: os.kill(os.getpid(), signal.SIGKILL)
    return dist.get_rank()
