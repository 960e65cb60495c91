"""Which methods ours must not be slower than, and how a table shows a ratio: one rule for all of them."""

from __future__ import annotations

from collections.abc import Sequence

# Of a whole model what the frozen layer is of one: no adapter to compare ours with.
WITHOUT_ADAPTERS = ("frozen", "linear_probing")
# What a cell has where ours is slower.
SLOWER = " ▲"


def is_rival(name: str, method: str) -> bool:
    """Whether ours must not be slower than the other: our Hydra than any, our LoRA and SeqLoRA than their own kind."""
    owner, _, kind = method.partition("_")
    return (
        owner == "ours"
        and not name.startswith(("ours_", *WITHOUT_ADAPTERS))
        and (kind == "hydra" or name.endswith(f"_{kind}"))
    )


def loses(ratio: Sequence[float]) -> bool:
    """Whether the median step of ours is slower: [q1, median, q3] of ours over a rival."""
    return ratio[1] > 1


def marked(ratio: float | None, form: str = ".2f") -> str:
    """Ours over a rival, with the mark where ours needs more, be it less than is shown; a dash: not measured."""
    return "-" if ratio is None else f"{ratio:{form}}{SLOWER if ratio > 1 else ''}"


def with_quartiles(ratio: Sequence[float], mark: bool = False, form: str = ".2f") -> str:
    """[q1, median, q3] as text, with the mark of a ratio of ours over a rival."""
    q1, median, q3 = ratio
    return f"{median:{form}}{SLOWER if mark and loses(ratio) else ''} ({q1:{form}} to {q3:{form}})"
