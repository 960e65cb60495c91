"""What this project set itself, beside what was measured: for benchmarks/GOALS.md and the terminal, not for users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.measuring import timing
from benchmarks.measuring.rows import HostRow, LayerRow, Table4Row
from benchmarks.measuring.shapes import HEADLINE, Shape, has_bias
from benchmarks.measuring.timing import Environment
from benchmarks.rendering.layer import LARGE, SMALL, layer_groups, layer_means, layer_steps, saved_over_x, shape_of
from benchmarks.rendering.models import runs
from benchmarks.rendering.table4 import title
from benchmarks.rendering.tables import Stored, Table, is_gpu, label, what_ran
from benchmarks.rendering.verdicts import with_quartiles

# What a step of our Hydra should be at most over a rival's; set for the paper's model, held against every model.
TABLE4_CPU = {"fp32": {"naive_lora": 0.98, "naive_seqlora": 0.98}, "bf16": {"naive_lora": 0.95, "naive_seqlora": 0.95}}
# A PEFT LoRA script's whole step, accelerated, over PEFT's own, by dtype and whether it has lora_dropout.
ACCELERATED_CPU = {("fp32", False): 0.88, ("bf16", False): 0.72, ("bf16", True): 0.55}
# In place of those of fp32 on AMD's processors. They were set on a Zen 5: ours calls oneDNN there, and plain PyTorch
# MKL, which is half as fast. On a Zen 3 MKL is as fast for many rows.
TABLE4_AMD = {"fp32": {"naive_lora": 0.87, "naive_seqlora": 0.88}}
ACCELERATED_AMD = {("fp32", False): 0.65}
# Accelerated over PEFT's LoRA on the same NF4 base: peak memory by whether activations are recomputed, a step's time, a
# token's.
NF4_CPU = {"peak": {False: 0.90, True: 1.00}, "step": 0.95, "token": 1.00}
TABLE4_GPU = {"naive_lora": 0.95, "naive_seqlora": 0.97}
# What our geometric means should be at most on a CPU, by (dtype, mode, backend) and (method, sizes, over what).
# DROPPING: of a run with lora_dropout.
COMPILED = {("ours_hydra", LARGE, "naive_hydra"): 0.95, ("ours_lora", SMALL, "peft_lora"): 1.00}
LAYER_CPU = {
    ("fp32", "eager", "aten"): {
        ("ours_hydra", LARGE, "naive_hydra"): 0.80,
        ("ours_hydra", LARGE, "naive_lora"): 1.00,
        ("ours_hydra", SMALL, "naive_hydra"): 0.95,
    },
    ("fp32", "eager", "native"): {
        ("ours_hydra", LARGE, "naive_hydra"): 0.76,
        ("ours_hydra", LARGE, "naive_lora"): 0.93,
        ("ours_hydra", LARGE, "frozen"): 1.06,
        ("ours_hydra", SMALL, "naive_hydra"): 0.80,
        ("ours_lora", SMALL, "peft_lora"): 0.85,
    },
    ("bf16", "eager", "native"): {
        ("ours_hydra", LARGE, "naive_hydra"): 0.80,
        ("ours_hydra", LARGE, "naive_lora"): 0.88,
        ("ours_hydra", LARGE, "frozen"): 1.08,
        ("ours_lora", LARGE, "peft_lora"): 0.70,
    },
    ("fp32", "compile", "aten"): COMPILED,
    ("fp32", "compile", "native"): COMPILED,
}
DROPPING = {("bf16", "eager", "native"): {("ours_lora", LARGE, "peft_lora"): 0.55}}
# In place of some of those, on AMD's processors.
LAYER_AMD = {
    ("fp32", "eager", "native"): {
        ("ours_hydra", LARGE, "naive_lora"): 0.53,
        ("ours_hydra", LARGE, "frozen"): 0.58,
        ("ours_lora", SMALL, "peft_lora"): 0.70,
    }
}
# On a GPU (Hopper) in bf16 and CUDA graphs, by (method, over what, R): at most this at each shape of HEADLINE, of which
# the first two are with b0.
LAYER_GPU = {
    ("ours_hydra", "frozen", 16): (1.52, 1.27, 1.15, 1.11),
    ("ours_hydra", "frozen", 32): (1.65, 1.35, 1.22, 1.15),
    ("ours_hydra", "naive_lora", 16): (0.72, 0.74, 0.87, 0.95),
    ("ours_lora", "peft_lora", 16): (0.72, 0.74, 0.86, 0.92),
}
# What the host time of our Hydra should be at most over the naive one's, by backend.
RIVAL_NAMES = {
    "frozen": "the frozen layer",
    "naive_hydra": "naive Hydra",
    "naive_lora": "naive LoRA of equal R",
    "peft_lora": "PEFT's LoRA of equal R",
}
HOST = {"native": 0.60, "aten": 1.05}


class Goal(NamedTuple):
    what: str
    figure: float
    limit: float
    # The figure with its quartiles, where it has some.
    text: str = ""

    @property
    def missed(self) -> bool:
        return self.figure > self.limit

    def line(self) -> list[str]:
        return [self.what, self.text or f"{self.figure:.3f}", f"{self.limit:.3g}", "MISSED" if self.missed else "met"]


HEADINGS = ("what", "measured (quartiles)", "goal", "")


def exactly(ratio: Sequence[float]) -> str:
    """A decimal more than elsewhere: what a goal's own decimals would hide decides it."""
    return with_quartiles(ratio, form=".3f")


def goal_tables(goals: Sequence[Goal]) -> list[Table]:
    """One table for the terminal, or none where a run has no goals."""
    cells = [goal.line() for goal in goals]
    return [Table("Our goals", HEADINGS, cells, [goal.missed for goal in goals])] if goals else []


def is_amd(environment: Environment) -> bool:
    """Whether it is a processor of AMD's; its graphics cards have no goals of their own."""
    return "AMD" in environment["device"] and not is_gpu(environment)


def table4_goals(environment: Environment, rows: Sequence[Table4Row]) -> list[Goal]:
    """Our Hydra's paired steps over those of naive LoRA and naive SeqLoRA, where both ran."""
    if rows[0]["base"] != "none":
        return list(quantised_goals(rows))
    by_method, goals = {row["method"]: row for row in rows}, []
    dtype = rows[0]["dtype"]
    hydra = TABLE4_CPU | TABLE4_AMD if is_amd(environment) else TABLE4_CPU
    accelerated = ACCELERATED_CPU | ACCELERATED_AMD if is_amd(environment) else ACCELERATED_CPU
    limits = TABLE4_GPU if is_gpu(environment) else hydra.get(dtype, {})
    pairs = [("ours_hydra", name, limit) for name, limit in limits.items()]
    script = (dtype, rows[0]["lora_dropout"] > 0)
    if not is_gpu(environment) and script in accelerated:
        pairs.append(("accelerated_lora", "peft_lora", accelerated[script]))
    for method, name, limit in pairs:
        ours, rival = by_method.get(method), by_method.get(name)
        if ours is None or rival is None:
            continue
        ratio = timing.paired_ratios(ours["step_seconds"], rival["step_seconds"])
        goals.append(Goal(f"{label(ours)} over {label(rival)}", ratio.median, limit, exactly(ratio)))
    return goals


def quantised_goals(rows: Sequence[Table4Row]) -> Iterator[Goal]:
    by_method = {row["method"]: row for row in rows}
    ours, rival = by_method.get("accelerated_lora"), by_method.get("peft_lora")
    if ours is None or rival is None or ours["base"] != "nf4":
        return
    over = f"{label(ours)} over {label(rival)}"
    step = timing.paired_ratios(ours["step_seconds"], rival["step_seconds"])
    yield Goal(f"{over}, a step", step.median, NF4_CPU["step"], exactly(step))
    yield Goal(f"{over}, peak", ours["peak_bytes"] / rival["peak_bytes"], NF4_CPU["peak"][ours["checkpointing"]])
    if ours["token_seconds"] is not None and rival["token_seconds"] is not None:
        token = timing.paired_ratios(ours["token_seconds"], rival["token_seconds"])
        yield Goal(f"{over}, a token", token.median, NF4_CPU["token"], exactly(token))


def layer_goals(environment: Environment, rows: Sequence[LayerRow]) -> list[Goal]:
    """Those of every Hydra: of the means on a CPU, of each shape on a GPU, and of what is saved."""
    return [
        goal
        for _, steps in layer_steps(rows)
        for goals in (mean_goals(environment, steps), shape_goals(steps), saved_goals(steps))
        for goal in goals
    ]


def mean_goals(environment: Environment, steps: Sequence[Mapping[str, LayerRow]]) -> Iterator[Goal]:
    """Those of our means; none where another device, dtype, mode or backend ran."""
    ran = next((made[name] for made in steps for name in ("ours_hydra", "ours_lora") if name in made), None)
    if ran is None or ran["device"] != "cpu":
        return
    for (method, sizes, rival), limit in mean_limits(environment, ran).items():
        mean = layer_means(steps, method, rival).get(sizes)
        ours = next((made[method] for made in steps if method in made), None)
        if mean is not None and ours is not None:
            yield Goal(f"{label(ours)} over {RIVAL_NAMES[rival]}, geometric mean, {sizes}", mean, limit)


def mean_limits(environment: Environment, ran: LayerRow) -> dict[tuple[str, str, str], float]:
    """What the means of a run on that processor should be at most."""
    kind = ran["dtype"], ran["mode"], ran["backend"] or ""
    if ran["dropout"]:
        return DROPPING.get(kind, {})
    limits = LAYER_CPU.get(kind, {}) | (LAYER_AMD.get(kind, {}) if is_amd(environment) else {})
    if ran["dtype"] == "bf16" and environment["capability"] == "AVX2":
        # Hydra's are for processors that multiply bf16: with AVX512-BF16 or AMX.
        return {goal: limit for goal, limit in limits.items() if goal[0] != "ours_hydra"}
    return limits


def shape_goals(
    steps: Sequence[Mapping[str, LayerRow]], which: Iterable[tuple[str, str, int]] = tuple(LAYER_GPU)
) -> Iterator[Goal]:
    """Those at each shape, or ``which`` of them; none of another device, dtype, mode or rank, or with a b0 too many."""
    for method, rival, R in which:
        limits = LAYER_GPU[method, rival, R]
        for made in steps:
            ours = made.get(method)
            if ours is None or (ours["device"], ours["dtype"], ours["mode"]) != ("cuda", "bf16", "graph"):
                continue
            shape = Shape(ours["M"], ours["K"], ours["N"])
            known = shape in HEADLINE and ours["bias"] == has_bias(shape) and sum(ours["hydra"]) == R
            if known and (ratio := ours["over"].get(rival)):
                over, limit = label(made[rival]) if rival in made else rival, limits[HEADLINE.index(shape)]
                what = f"{label(ours)} over {over} at {shape_of(made)}"
                yield Goal(what, ratio[1], limit, exactly(ratio))


def saved_goals(steps: Sequence[Mapping[str, LayerRow]]) -> list[Goal]:
    """Bytes saved over x's in the forms without y0, at the worst shape of the worst of our methods."""
    found = []
    for made in steps:
        for row in made.values():
            if row["form"] in ("composed", "effective"):
                limit = 1.01 + (row["r_a"] + row["r_b"]) * (1 / row["K"] + 1 / row["M"])
                found.append(Goal(f"{label(row)}, saved over x at {shape_of(made)}", saved_over_x(row), limit))
    return [max(found, key=lambda goal: goal.figure - goal.limit)] if found else []


def host_goals(rows: Sequence[HostRow]) -> list[Goal]:
    goals = []
    for row in rows:
        limit = HOST.get(row["backend"] or "")
        if limit is not None:
            ratio = row["over"]["naive_hydra"]
            what = f"{label(row)}, {row['backend']}, over naive Hydra at {shape_of({'': row})}"
            goals.append(Goal(what, ratio[1], limit, exactly(ratio)))
    return goals


def goals_block(
    table4: Sequence[Stored],
    cpu: Sequence[Stored],
    gpu: Sequence[Stored],
    host: Sequence[Stored],
    quantised: Sequence[Stored],
) -> str:
    """One table: every run that has goals, a line a goal."""
    found = [(title(of, rows[0]), kernels, table4_goals(of, rows)) for of, rows, kernels in runs([*table4, *quantised])]
    for file in (*cpu, *gpu):
        for rows in layer_groups(file.rows):
            ran = f"layer, {what_ran(rows)}; {file.environment['device']}"
            found.append((ran, file.kernels, layer_goals(file.environment, rows)))
    found += [(f"host time; {file.environment['device']}", file.kernels, host_goals(file.rows)) for file in host]
    cells = [[ran + kernels.remark(), *goal.line()] for ran, kernels, goals in found for goal in goals]
    return Table("", ["run", *HEADINGS], cells, left=2).markdown()
