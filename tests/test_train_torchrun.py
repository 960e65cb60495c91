"""examples/train_torchrun.py: alone, as its page says, and in groups that are there already."""

import os
import re
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from .distributed import example

pytestmark = pytest.mark.xdist_group("processes")
STEPS = ["--steps", "6", "--save-every", "3", "--lr", "0.001"]


def differences(one, other) -> dict[str, float]:
    """Largest difference of each tensor of two adapter files, in the largest change that these steps make."""
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    return {name: (one[name] - other[name]).abs().max().item() / 0.006 for name in one}


@pytest.fixture(scope="module")
def ddp(groups, tmp_path_factory):
    """The folder of a training by data parallelism on two processes."""
    path = tmp_path_factory.mktemp("ddp")
    for difference in groups.run(2, example.train, ["--parallel", "ddp", "--folder", str(path), *STEPS]):
        assert difference < 1e-4
    return path


@pytest.mark.slow  # both ways are halves of the next test
@pytest.mark.parametrize(("world", "parallel"), [(2, "fsdp"), (4, "tp")])
def test_every_way_trains_the_same_model(groups, folder, ddp, world, parallel):
    other = folder / parallel
    other.mkdir()
    for difference in groups.run(world, example.train, ["--parallel", parallel, "--folder", str(other), *STEPS]):
        assert difference < 1e-4
    found = differences(ddp / "adapters.safetensors", other / "adapters.safetensors")
    assert max(found.values()) < 0.01, found


@pytest.mark.slow
def test_a_training_goes_on_elsewhere(groups, folder, ddp):
    """Three steps by tensor parallelism on four processes, three more by FSDP2 on two."""
    other = folder / "other"
    other.mkdir()
    half = ["--steps", "3", "--lr", "0.001", "--folder", str(other)]
    groups.run(4, example.train, ["--parallel", "tp", *half])
    assert max(differences(ddp / "adapters.safetensors", other / "adapters.safetensors").values()) > 0.1
    groups.run(2, example.train, ["--parallel", "fsdp", "--resume", "--folder", str(other), *STEPS])
    found = differences(ddp / "adapters.safetensors", other / "adapters.safetensors")
    assert max(found.values()) < 0.01, found


@pytest.mark.slow  # the command line alone: the test before runs the same script
def test_torchrun(folder):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(example.PATH),
    ]
    command += ["--parallel", "fsdp", "--folder", str(folder / "out"), *STEPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(example.PATH.parent.parent)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    # Not the status: gloo may abort a process that has printed all its results (`distributed.worker` says why).
    assert "step    6  loss" in run.stdout, run.stderr
    differs = re.search(r"the answers differ by (\S+)$", run.stdout, re.MULTILINE)
    assert differs, run.stderr
    assert float(differs[1]) < 1e-4
    assert load_file(folder / "out" / "adapters.safetensors")
