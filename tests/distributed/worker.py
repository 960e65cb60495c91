"""`python -m tests.distributed.worker FOLDER`: imports torch once and forks the members of groups (`group.Groups`).

gloo's threads now and then abort a process that leaves while another still talks to it, or while it exits ("terminate
called"), without this package as well. So a member hands over each answer at once, and when it is told to end, it meets
the others at a barrier, closes the group and leaves without exit handlers. What becomes of it after its last answer is
nobody's concern: `group.Groups` asks for no status.

They can also end a process at work, by a signal in malloc. In torch 2.13 a gloo group has two threads, and each notes
the name of the collective that it has completed in one string of the group, without a lock (``runLoop``). Where both do
so at once and the name is longer than 15 characters, as in ``full_tensor`` and in FSDP2's reduction, they free its
memory twice. So the groups of the members have one thread each (`_in_one_thread`).
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import traceback
import warnings
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["HYDRA_KERNELS_CACHE"] = os.path.join(tempfile.gettempdir(), "hydra_kernels-without-measurements")

import torch
import torch._dynamo
import torch.distributed as dist

from ..interpreter import without_waste
from . import checkpoints, ending, tensor_parallel, training  # noqa: F401  (what members run, imported before they fork)

without_waste()

TIMEOUT = datetime.timedelta(seconds=60)
BACKEND = "gloo_in_one_thread"  # a mesh gives its own groups the backend of the whole group


def _in_one_thread(store: Any, rank: int, world: int, timeout: datetime.timedelta) -> Any:
    options: Any = dist.ProcessGroupGloo._Options()
    options._devices, options._timeout = [dist.ProcessGroupGloo.create_default_device()], timeout
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, world, options)


dist.Backend.register_backend(BACKEND, _in_one_thread, devices=["cpu"])


def serve(folder: str) -> None:
    """Forks a group for every (size, address) that the tests send, until they close the connection."""
    server = Client(str(Path(folder, "server")), "AF_UNIX")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the members
    while True:
        try:
            world, address = pickle.loads(server.recv_bytes())
        except (EOFError, ConnectionError):
            return
        store = tempfile.mktemp(prefix="store", dir=folder)
        for rank in range(world):
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                try:
                    be_member(rank, world, address, store)
                except Exception:
                    traceback.print_exc()
                os._exit(0)


def be_member(rank: int, world: int, address: str, store: str) -> None:
    faulthandler.enable()  # a member that a signal ends says where
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    connection = Client(address, "AF_UNIX")
    dist.init_process_group(BACKEND, init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT)
    connection.send_bytes(
        pickle.dumps((rank, os.getpid()))
    )  # only now: a task may end a member that others still wait for
    while True:
        try:
            task = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionError):  # the tests are gone, and the other members may be
            return
        if task is None:
            break
        function, arguments = task
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(sys.argv[1])
