"""What this device reaches at best: a large copy and large matrix products. ``python -m benchmarks.ceilings``

The inputs are random: a GPU that multiplies zeros draws less power, keeps a higher clock and shows a rate that no real
matrix reaches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measuring import modes, timing
from benchmarks.measuring.rows import CeilingRow
from benchmarks.rendering.tables import Table, environment_note, show

UNCOUNTED_CALLS = 3


class Sizes(NamedTuple):
    """Elements of a copy in bf16, the side of square products, and timed calls of each."""

    elements: int
    side: int
    runs: int


# A GPU's copy is far larger than any L2.
GPU, CPU, DRY = Sizes(1 << 29, 8192, 30), Sizes(1 << 26, 1024, 10), Sizes(1 << 12, 64, 3)


def copy_row(new: Callable[..., torch.Tensor], device: torch.device, sizes: Sizes, dry: bool) -> CeilingRow:
    source = new(sizes.elements, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return row_of("copy", "bf16", "GB/s", 1e9, moved, times(lambda: target.copy_(source), device, sizes.runs), dry)


def product_row(
    new: Callable[..., torch.Tensor], dtype: str, device: torch.device, sizes: Sizes, dry: bool
) -> CeilingRow:
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    left, right = (new(sizes.side, sizes.side, dtype=stored) for _ in range(2))
    out = torch.empty_like(left)
    with modes.fp32_products("tf32" if dtype == "tf32" else "ieee"):
        taken = times(lambda: torch.mm(left, right, out=out), device, sizes.runs)
    return row_of("product", dtype, "TFLOP/s", 1e12, 2 * sizes.side**3, taken, dry)


def times(run: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    """Seconds of each call, one after the other without a pause."""
    for _ in range(UNCOUNTED_CALLS):
        run()
    watch = timing.Stopwatch(device)
    watch.mark()
    for _ in range(runs):
        run()
        watch.mark()
    return watch.laps()


def row_of(what: str, dtype: str, unit: str, scale: float, count: int, taken: list[float], dry: bool) -> CeilingRow:
    fast, median, slow = timing.quartiles(taken)
    value, q1, q3 = (float(f"{count / seconds / scale:.5g}") for seconds in (median, slow, fast))
    return CeilingRow(
        what=what,
        dtype=dtype,
        value=value,
        q1=q1,
        q3=q3,
        unit=unit,
        bytes_or_operations=count,
        runs=len(taken),
        dry=dry,
    )


def measure(device: torch.device, dry: bool) -> list[CeilingRow]:
    """The copy, then the products: tf32 only where there is such a thing."""
    on_gpu = device.type == "cuda"
    sizes = DRY if dry else GPU if on_gpu else CPU
    dtypes = ("bf16", "tf32", "fp32") if on_gpu else ("bf16", "fp32")
    new = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    return [
        copy_row(new, device, sizes, dry),
        *(product_row(new, dtype, device, sizes, dry) for dtype in dtypes),
    ]


def table(rows: Sequence[CeilingRow]) -> Table:
    cells = [
        [f"{row['what']}, {row['dtype']}", f"{row['value']:g}", f"{row['q1']:g} to {row['q3']:g}", row["unit"]]
        for row in rows
    ]
    headings = ["what", "median", "quartiles", "unit"]
    return Table("Ceilings, random data", headings, cells)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON")
    options = parser.parse_args(arguments)
    try:
        device = modes.device_option(options.device)
    except ValueError as error:
        print(f"ceilings: {error}", file=sys.stderr)
        return 1
    rows = measure(device, options.dry)
    path = options.out / f"ceilings-{'dry-' if options.dry else ''}{device.type}.json"
    environment = timing.environment(device)
    timing.write_result(path, environment, rows, CeilingRow)
    show(140, [table(rows), environment_note(environment), f"Stored: {path}"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
