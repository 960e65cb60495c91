"""Trains Hydra adapters on many processes: ``torchrun --nproc-per-node 2 examples/train_torchrun.py --parallel fsdp``

On GPUs with nccl where there are any, else on the CPU with gloo. ``ddp`` copies the model, ``fsdp`` shards every
parameter (FSDP2), ``tp`` shards the layers themselves (tensor parallelism): all three train the same model, step by
step. A small transformer with random weights stands in for a pretrained one; it reads scikit-learn's digits row by row.

Every ``--save-every`` steps what trains is written as a distributed checkpoint; ``--resume`` goes on from the last, on
any number of processes and under any of the three. At the end the adapters go into one file, which an unsharded model
loads and merges; exit status 1 where its answers differ.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import hydra_kernels as hk
from hydra_kernels.parallel import ColwiseHydra, RowwiseHydra

WIDTH, HEAD, TRAINING_IMAGES = 64, 16, 1500
ADAPTED = ["value", "fc1", "fc2"]
PLAN = {
    **{f"blocks.*.{name}": ColwiseParallel() for name in ("query", "key")},
    **{f"blocks.*.{name}": ColwiseHydra() for name in ("value", "fc1")},
    "blocks.*.out": RowwiseParallel(),
    "blocks.*.fc2": RowwiseHydra(),
}
ONLY_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        # -1: under tensor parallelism each process has some of the heads.
        heads = [f(normed).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(8, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def adapted_model(device: torch.device) -> Transformer:
    """The same on every process."""
    torch.manual_seed(0)
    model = Transformer()
    hk.inject(model, ADAPTED, r_a=4, r_b=4)
    hk.mark_only_adapters_trainable(model, keep=["head"])
    return model.to(device)


def spread(model: Transformer, parallel: str, device: torch.device) -> nn.Module:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "tp":
        return parallelize_module(model, mesh, PLAN)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(options: argparse.Namespace) -> float:
    """Trains, writes, and returns by how much the answers of an unsharded model that loads the file differ at most."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    rank, world = dist.get_rank(), dist.get_world_size()
    if options.parallel != "tp" and options.batch % world:
        raise SystemExit(f"--batch: expected a multiple of the {world} processes, got {options.batch}")
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target, device=device)

    model = spread(adapted_model(device), options.parallel, device)
    # foreach=False: under tensor parallelism the head is a plain tensor and the adapters are DTensors.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr, foreach=False)
    step, checkpoints = torch.zeros((), dtype=torch.int64), options.folder / "checkpoints"
    # A checkpoint is whole when its metadata are there, which are written last.
    whole = sorted(path.parent for path in checkpoints.glob("*/.metadata"))
    if options.resume != bool(whole):
        found = f"{len(whole)} checkpoints" if whole else "no checkpoint"
        raise SystemExit(
            f"{checkpoints} holds {found}: --resume goes on from the newest, without it --folder must be new"
        )
    if options.resume:
        weights, moments = get_state_dict(model, optimizer, options=ONLY_TRAINED)
        state = {"model": weights, "optimizer": moments, "step": step}
        dcp.load(state, checkpoint_id=whole[-1])
        set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state["optimizer"], options=ONLY_TRAINED
        )
    dist.barrier()

    while step < options.steps:
        # A batch follows from its step alone, so a resumed training goes on with the very batches.
        g = torch.Generator().manual_seed(int(step))
        rows = torch.randperm(TRAINING_IMAGES, generator=g)[: options.batch].to(device)
        if options.parallel != "tp":
            rows = rows.chunk(world)[rank]
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % options.save_every == 0 or step == options.steps:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            say(f"step {int(step):4d}  loss {mean.item():.4f}")
            weights, moments = get_state_dict(model, optimizer, options=ONLY_TRAINED)
            state = {"model": weights, "optimizer": moments, "step": step}
            dcp.save(state, checkpoint_id=checkpoints / f"{int(step):06d}")

    model.eval()
    with torch.no_grad():
        answers = model(images[TRAINING_IMAGES:]) + 0  # waits for what tensor parallelism still sends
    accuracy = (answers.argmax(1) == labels[TRAINING_IMAGES:]).float().mean().item()
    say(f"accuracy on {len(answers)} images it has not seen: {accuracy:.3f}")

    path = options.folder / "adapters.safetensors"
    inner = model.module if options.parallel == "ddp" else model
    hk.save_adapters(inner, path, include=["head"])  # by every rank: shards are gathered
    dist.barrier()  # until the first rank has written the file
    alone = adapted_model(device).eval()
    hk.load_adapters(alone, path)
    with torch.no_grad():
        difference = (hk.merge_and_unload(alone)(images[TRAINING_IMAGES:]) - answers).abs().max().item()
    say(f"{path}: {path.stat().st_size} bytes; merged into an unsharded model the answers differ by {difference:.1e}")
    return difference


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "tp"), default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="images a step, of all processes together")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--save-every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--folder", type=Path, default=Path("out/torchrun"), help="for checkpoints and adapters")
    return parser.parse_args(given)


def main() -> int:
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    difference = train(options)
    dist.barrier()  # a process that leaves while others still talk to it may end them too
    dist.destroy_process_group()
    return int(difference > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
