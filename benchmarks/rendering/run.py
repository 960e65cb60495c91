"""The last lines of a run on a GPU: twelve, made of what it has stored, whether it came to its end or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import timing
from benchmarks.measuring.rows import StageRow
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import goals
from benchmarks.rendering.goals import Goal
from benchmarks.rendering.layer import layer_groups, layer_steps
from benchmarks.rendering.models import runs
from benchmarks.rendering.tables import Stored, commit_note, label

# What each line of the layer's says: (method, over what, R).
HEADLINE_GOALS = (("ours_hydra", "frozen", 16), ("ours_hydra", "naive_lora", 16), ("ours_lora", "peft_lora", 16))
OTHER_GOAL = ("ours_hydra", "frozen", 32)


class Found(NamedTuple):
    """What a run stored: its stages' rows, and of each file those that it wrote."""

    stages: Mapping[str, StageRow]
    files: Mapping[str, tuple[Environment, list[Any]]]

    def rows(self, file: str) -> list[Any]:
        return self.files[file][1] if file in self.files else []


def summary(path: Callable[[str], Path], files: Mapping[str, Mapping[str, type]], began: str) -> list[str]:
    """``files`` has each stage's, with their schemas; what another run left there, before ``began``, is not told."""
    schemas = {"run": StageRow} | {file: schema for found in files.values() for file, schema in found.items()}
    stored = {file: timing.read_result(path(file), schema) for file, schema in schemas.items() if path(file).exists()}
    fresh = {file: made for file, made in stored.items() if made[0]["date"] >= began}
    stages = {row["stage"]: row for row in (fresh["run"][1] if "run" in fresh else [])}
    found = Found(stages, fresh)

    def line(stage: str, *told: str) -> str:
        row = stages.get(stage)
        begun = any(file in fresh for file in files[stage])
        status = f"{row['status']}, {row['seconds']:.0f} s" if row else "cut off" if begun else "not reached"
        return f"{stage}: {'; '.join([status, *filter(None, told)])}"

    layer = [over_shapes(found.rows("layer"), goal) for goal in HEADLINE_GOALS]
    return [
        headline(found, path("").parent),
        line("doctor", checks(found.rows("doctor-quick"))),
        line("table4", *table4(found, path("table4"))),
        line("layer", layer[0]),
        f"layer: {layer[1] or 'nothing measured'}",
        f"layer: {layer[2] or 'nothing measured'}",
        line("host", *(goal_text(goal) for goal in goals.host_goals(found.rows("host")))),
        line("llama", *table4(found, path("table4-llama"))),
        line("all-checks", checks(found.rows("doctor"))),
        line("tune", winners(found.rows("tune"))),
        line("shapes", over_shapes(found.rows("layer-shapes"), OTHER_GOAL)),
        skipped(found, files),
    ]


def headline(found: Found, folder: Path) -> str:
    environments = [environment for environment, _ in found.files.values()]
    where = f"{environments[0]['device']}, {commit_note(environments[0])}; " if environments else "nothing stored; "
    taken = sum(row["seconds"] for row in found.stages.values())
    ok = sum(row["status"] == "ok" for row in found.stages.values())
    return f"run: {where}{ok} of {len(found.stages)} stages ok, {taken:.0f} s; {folder}"


def checks(rows: Sequence[Any]) -> str:
    count = Counter(row["status"] for row in rows)
    return f"{count['pass']} passed, {count['fail']} failed, {count['skip']} cannot run here" if rows else ""


def table4(found: Found, path: Path) -> Iterator[str]:
    """Each run's goals."""
    file = "table4-llama" if "llama" in path.name else "table4"
    if file in found.files:
        environment, rows = found.files[file]
        for of, run, _ in runs([Stored(path, environment, rows)]):
            about = f"{run[0]['dtype']} {run[0]['mode']}"
            yield f"{about}: {', '.join([*map(goal_text, goals.table4_goals(of, run)), *over_peft(run)])}"


def over_peft(rows: Sequence[Any]) -> Iterator[str]:
    """Our LoRA's steps over PEFT's, which have no goal."""
    by_method = {row["method"]: row for row in rows}
    if {"ours_lora", "peft_lora"} <= by_method.keys():
        ours, peft = by_method["ours_lora"], by_method["peft_lora"]
        ratio = timing.paired_ratios(ours["step_seconds"], peft["step_seconds"]).median
        yield f"{label(ours)} over {label(peft)} {ratio:.3f}"


def over_shapes(rows: Sequence[Any], which: tuple[str, str, int]) -> str:
    """One kind of goal at every shape that has it."""
    told = [
        goal_text(goal)
        for group in layer_groups(rows)
        for _, steps in layer_steps(group)
        for goal in goals.shape_goals(steps, [which])
    ]
    return ", ".join(dict.fromkeys(told))


def goal_text(goal: Goal) -> str:
    return f"{goal.what} {goal.figure:.3f} (goal {goal.limit:g}{', MISSED' if goal.missed else ''})"


def winners(rows: Sequence[Any]) -> str:
    if not rows:
        return ""
    won = Counter(f"{row['backend']} {row['form']}" for row in rows)
    failed = sum(len(row["failed"]) for row in rows)
    return f"{', '.join(f'{name} won {number}' for name, number in won.most_common())}; {failed} candidates were wrong"


def skipped(found: Found, files: Mapping[str, object]) -> str:
    left = [stage for stage in files if stage not in found.stages or found.stages[stage]["status"] == "skipped"]
    late = Counter(row["stage"] for row in found.stages.values() for _ in row["late"])
    about = ", ".join(f"{number} in {stage}" for stage, number in late.items()) or "nothing"
    return f"skipped: {', '.join(left) or 'nothing'}; compiled after a clock had started: {about}"
