"""examples/train_torchrun.py in a group that is there already."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).parent.parent.parent / "examples" / "train_torchrun.py"


def train(options: list[str]) -> float:
    """By how much the answers of an unsharded model with the adapter file differ."""
    spec = importlib.util.spec_from_file_location("train_torchrun", PATH)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.train(example.arguments(options))
