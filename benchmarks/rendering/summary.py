"""The README's first figures: a model's step and a layer's, wins and losses, in a sentence or two for each device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.measuring import timing
from benchmarks.measuring.rows import LayerRow, Table4Row
from benchmarks.measuring.timing import Environment, Quartiles
from benchmarks.rendering.layer import LARGE, layer_goals, layer_groups, layer_means, layer_steps, shape_goals
from benchmarks.rendering.table4 import CPU_GOALS, table4_groups
from benchmarks.rendering.tables import Stored, is_gpu, label
from benchmarks.rendering.verdicts import loses, misses

Steps = Sequence[Mapping[str, LayerRow]]


def summary(table4: Sequence[Stored], cpu: Sequence[Stored], gpu: Sequence[Stored]) -> str:
    """A point for the first run of each that has one: Table 4 on a CPU, the layer on a CPU, the layer on a GPU."""
    models = [(s.environment, g) for s in table4 if not is_gpu(s.environment) for g in table4_groups(s.rows)]
    eager = [(s.environment, g) for s in cpu for g in layer_groups(s.rows) if g[0]["mode"] == "eager"]
    graph = [(s.environment, g) for s in gpu for g in layer_groups(s.rows) if g[0]["mode"] == "graph"]
    points = [model_point(*found) for found in models[:1]]
    points += [large_layers_point(environment, steps) for environment, steps in first_steps(eager)]
    points += [gpu_point(environment, steps) for environment, steps in first_steps(graph)]
    return "\n".join(f"- {point}" for point in points)


def first_steps(found: Sequence[tuple[Environment, Sequence[LayerRow]]]) -> list[tuple[Environment, Steps]]:
    return [(environment, steps) for environment, rows in found[:1] for _, steps in list(layer_steps(rows))[:1]]


def model_point(environment: Environment, rows: Sequence[Table4Row]) -> str:
    """Our Hydra's step over each naive method's, and whether it is more than noise."""
    by_method = {row["method"]: row for row in rows}
    ours, parts = by_method["ours_hydra"], []
    for name in ("naive_hydra", "naive_lora", "naive_seqlora"):
        ratio = timing.paired_ratios(ours["step_seconds"], by_method[name]["step_seconds"])
        goal = CPU_GOALS.get(name)
        parts.append(f"{ratio.median:.2f} of {label(by_method[name])}'s time ({remark(ratio, goal)})")
    return (
        f"**A model on a CPU** ({environment['threads']} threads), {rows[0]['model']}, {rows[0]['dtype']}: a step of "
        f"{label(ours)} takes {', '.join(parts[:-1])} and {parts[-1]}."
    )


def remark(ratio: Quartiles, goal: float | None) -> str:
    """Quartiles, noise and goal."""
    words = [f"quartiles {ratio.q1:.2f} to {ratio.q3:.2f}"]
    words += ["within noise"] if ratio.q1 <= 1 <= ratio.q3 else []
    return ", ".join([*words, *([] if goal is None else [f"goal {goal:.2f} {outcome(ratio.median, goal)}"])])


def outcome(figure: float, goal: float) -> str:
    return "MISSED" if misses(figure, goal) else "met"


def large_layers_point(environment: Environment, steps: Steps) -> str:
    """Means over the larger shapes of what the adapters add to the frozen layer, ours beside naive."""
    mean = {name: layer_means(steps, name, "frozen")[LARGE] for name in ("ours_hydra", "naive_hydra", "naive_lora")}
    goal = layer_goals(steps).get((LARGE, "frozen"))
    told = "" if goal is None else f" (goal {goal:.2f} {outcome(mean['ours_hydra'], goal)})"
    return (
        f"**A layer on a CPU** ({environment['threads']} threads), {LARGE} rows: a step of our Hydra takes "
        f"{mean['ours_hydra']:.2f} of the frozen layer's time{told}, naive Hydra {mean['naive_hydra']:.2f}, naive LoRA "
        f"of equal R {mean['naive_lora']:.2f} (geometric means)."
    )


def gpu_point(environment: Environment, steps: Steps) -> str:
    """The range over all shapes of our Hydra over the frozen layer, naive Hydra and naive LoRA."""
    made = [shape for shape in steps if "ours_hydra" in shape]
    over = {
        name: [shape["ours_hydra"]["over"][name][1] for shape in made]
        for name in ("frozen", "naive_hydra", "naive_lora")
    }
    slower = sum(loses(shape["ours_hydra"]["over"]["naive_lora"]) for shape in made)
    return (
        f"**A layer on a GPU** ({environment['device']}), {made[0]['ours_hydra']['dtype']}, CUDA graphs: a step of our "
        f"Hydra takes {span(over['frozen'])} of the frozen layer's time ({goals_missed(made, 'frozen')}), "
        f"{span(over['naive_hydra'])} of naive Hydra's ({goals_missed(made, 'naive_hydra')}), "
        f"{span(over['naive_lora'])} of naive LoRA's of equal R: slower at {slower} of {len(made)} shapes."
    )


def span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def goals_missed(made: Steps, name: str) -> str:
    """How many of the shapes that have a goal miss it, and what the goals are."""
    pairs = [(shape["ours_hydra"]["over"][name][1], goal) for shape in made if (goal := shape_goals(shape).get(name))]
    if not pairs:
        return "no goal"
    missed = sum(misses(ratio, goal) for ratio, goal in pairs)
    return f"goals {span([goal for _, goal in pairs])}, {missed} of {len(pairs)} MISSED"
