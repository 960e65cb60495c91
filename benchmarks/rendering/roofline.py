"""The table of predicted steps: never beside measured ones, and it says in every table what it is."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring.rows import RooflineRow
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.tables import Stored, Table, commit_note, groups

COLUMNS = {
    "naive_lora": "naive LoRA",
    "naive_seqlora": "naive SeqLoRA",
    "naive_hydra": "naive Hydra",
    "hybrid": "hybrid",
    "triton": "triton",
    "effective": "effective",
    "native": "native",
    "native_sweep": "native by one sweep",
    "floor": "floor",
}


def roofline_markdown(environment: Environment, rows: Sequence[RooflineRow]) -> str:
    """Every method's predicted step over the frozen layer's, a line a shape, and what it was predicted from."""
    shapes: dict[tuple[int, int, int], dict[str, float]] = {}
    for row in rows:
        shapes.setdefault((row["M"], row["K"], row["N"]), {})[row["method"]] = row["over_frozen"]
    cells = [
        [f"{M} x {K} x {N}", *(f"{over[method]:.2f}" if method in over else "-" for method in COLUMNS)]
        for (M, K, N), over in shapes.items()
    ]
    row = rows[0]
    gaps = f"{row['launch_us']:g} us a launch" if row["launch_us"] else "no gaps between launches (a CUDA graph)"
    cache = f"{row['l2_megabytes']:g} MB of L2 between kernels" if row["l2_megabytes"] else "nothing left in L2"
    return "\n\n".join(
        [
            f"Hydra {row['r_a']}+{row['r_b']}, {row['dtype']}: predicted step over the frozen layer's, LoRA and "
            f"SeqLoRA of rank {row['r_a'] + row['r_b']}:",
            Table("", ["M x K x N", *COLUMNS.values()], cells).markdown(),
            f"Nothing here was measured. Predicted from {row['tflops']:g} TFLOP/s and "
            f"{row['gigabytes_per_second']:g} GB/s, {gaps}, {cache}, `triton`'s GEMM at {row['gemm_efficiency']:g} of "
            f"cuBLAS (`python -m benchmarks.roofline`; {commit_note(environment)}).",
        ]
    )


def roofline_block(stored: Sequence[Stored]) -> str:
    return "\n\n".join(
        roofline_markdown(file.environment, group)
        for file in stored
        for group in groups(file.rows, by=("dtype", "r_a", "r_b"), same=("M", "K", "N", "method"))
    )
