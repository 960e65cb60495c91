"""When ours loses and when it misses a goal, and the words for both: one rule for every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Of a whole model what the frozen layer is of one: no adapter to compare ours with.
WITHOUT_ADAPTERS = ("frozen", "linear_probing")


def is_rival(name: str, method: str) -> bool:
    """Whether ours must not be slower than the other: our Hydra than any, our LoRA and SeqLoRA than their own kind."""
    owner, _, kind = method.partition("_")
    return (
        owner == "ours"
        and not name.startswith(("ours_", *WITHOUT_ADAPTERS))
        and (kind == "hydra" or name.endswith(f"_{kind}"))
    )


def with_quartiles(ratio: Sequence[float], goal: float | None = None) -> str:
    """[q1, median, q3] as text."""
    q1, median, q3 = ratio
    return f"{median:.3f} ({q1:.3f} to {q3:.3f}{'' if goal is None else f'; goal {goal:.2f}'})"


def loses(ratio: Sequence[float]) -> bool:
    """Whether the median step of ours is slower: [q1, median, q3] of ours over a rival."""
    return ratio[1] > 1


def losses(found: Mapping[str, Mapping[str, Sequence[float]]], place: str = "") -> list[str]:
    """A line for each of ours whose median step is slower than a rival's: [q1, median, q3] by ours and by rival."""
    lines = []
    for ours, rivals in found.items():
        slower = [f"{rival} {with_quartiles(ratio)}" for rival, ratio in rivals.items() if loses(ratio)]
        if slower:
            lines.append(f"LOSS{place}: {ours} over {', '.join(slower)}")
    return lines


def misses(figure: float, goal: float) -> bool:
    return figure > goal


def missed(what: str, figure: float, goal: float, place: str = "", form: str = ".2f") -> list[str]:
    """A line where the figure is above its goal."""
    return [f"GOAL MISSED: {what} {figure:.3f}{place}, goal {goal:{form}}"] if misses(figure, goal) else []


def verdict(lines: Sequence[str], place: str = "") -> list[str]:
    """The lines of losses and missed goals, or one that says that there are none."""
    return list(lines) or [f"No loss: {place}ours is no slower than any rival, and no goal is missed"]
