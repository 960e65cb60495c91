"""How a member ends, after its last answer."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def rank() -> int:
    return dist.get_rank()


def threads() -> list[int]:
    """How many threads run collectives of the whole group, and of each group of a mesh."""
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "model"))
    everyone = [dist.group.WORLD, mesh.get_group("data"), mesh.get_group("model")]
    return [group._get_backend(torch.device("cpu")).options._threads for group in everyone]


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
