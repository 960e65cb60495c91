"""Small updates: how much of the adapters' signal a rounded output keeps. ``python -m benchmarks.rounding``

A bf16 output y0 + delta that is rounded twice loses a delta below half a unit of y0's last place; one that is added in
fp32 and rounded once keeps it in the mean. The share kept is the component of h - y0 along delta, both exact:
``<h - y0, delta> / |delta|^2``, 1 where nothing is lost. On a CPU the Triton kernels run in Triton's interpreter, which
rounds as the hardware does.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import hydra_kernels as hk
from benchmarks.measuring import timing
from benchmarks.measuring.rows import RoundingRow
from benchmarks.rendering.rounding import rounding_markdown
from benchmarks.rendering.tables import Stored

RATIOS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SIZES = {"M": 256, "K": 128, "N": 256}
RANK, SEEDS = 8, 5


def draw(sizes: dict[str, int], seed: int, bias: bool = True) -> dict[str, Tensor | None]:
    """x, W0, b0 (None without ``bias``) and the adapters, Gaussian, of the size that layers have, exact in bf16."""
    g = torch.Generator().manual_seed(seed)
    M, K, N = sizes["M"], sizes["K"], sizes["N"]
    shapes = {
        "x": (M, K),
        "weight": (N, K),
        "bias": (N,),
        "A_down": (RANK, K),
        "A_up": (N, RANK),
        "B_down": (RANK, N),
        "B_up": (N, RANK),
    }
    drawn = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    fan_in = {"weight": K, "A_down": K, "B_down": N}
    operands = {name: (t / fan_in.get(name, 1) ** 0.5).bfloat16() for name, t in drawn.items()}
    return operands if bias else {**operands, "bias": None}


def kept(operands: dict[str, Tensor | None], backend: str, ratio: float, device: torch.device) -> float:
    """The share of the adapters' signal in the output of a backend, at scales that give delta that ratio to y0."""
    exact = {name: None if t is None else t.double() for name, t in operands.items()}
    y0 = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"])
    delta = hk.reference.hydra_linear(**exact) - y0
    scale = (ratio * y0.norm() / delta.norm()).item()
    on_device = {name: None if t is None else t.to(device) for name, t in operands.items()}
    with torch.no_grad():
        form = "composed" if backend == "native" else "auto"  # what auto takes at larger sizes
        h = hk.hydra_linear(**on_device, scale_a=scale, scale_b=scale, form=form, backend=backend)
    delta = scale * delta
    return ((h.cpu().double() - y0) * delta).sum().item() / delta.square().sum().item()


def run(device: torch.device, sizes: dict[str, int], seeds: int, dry: bool) -> list[RoundingRow]:
    """Every backend that takes bf16 on the device, with a bias and without, at every ratio."""
    rows = []
    usable = [name for name, reason in hk.backends().items() if reason is None and _takes(name, device)]
    for backend, bias, ratio in itertools.product(usable, (True, False), RATIOS):
        shares = [kept(draw(sizes, seed, bias), backend, ratio, device) for seed in range(seeds)]
        quartiles = timing.quartiles(shares)
        rows.append(
            RoundingRow(
                backend=backend,
                dtype="bf16",
                bias=bias,
                ratio=ratio,
                kept=round(quartiles.median, 4),
                q1=round(quartiles.q1, 4),
                q3=round(quartiles.q3, 4),
                interpreted=device.type == "cpu" and backend in ("hybrid", "triton"),
                **sizes,
                r_a=RANK,
                r_b=RANK,
                dry=dry,
            )
        )
    return rows


def _takes(backend: str, device: torch.device) -> bool:
    try:
        kept(draw({"M": 16, "K": 16, "N": 16}, 0), backend, 0.1, device)
    except ValueError:  # the backend refuses the dtype here, and says so
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the result (default: out)")
    parser.add_argument("--dry-run", action="store_true", help="small sizes and two seeds: does it run at all")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at the first use of a kernel
    sizes = {"M": 32, "K": 32, "N": 32} if options.dry_run else SIZES
    rows = run(device, sizes, 2 if options.dry_run else SEEDS, options.dry_run)
    path = options.out / f"rounding-{device.type}.json"
    environment = timing.environment(device)
    timing.write_result(path, environment, rows, RoundingRow)
    print(rounding_markdown(Stored(path, environment, rows)))
    print(f"Stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
