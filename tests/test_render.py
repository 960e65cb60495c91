"""What is rendered: grouped, predicted or measured, marked where ours is slower, and which goals a run has."""

from __future__ import annotations

import ast
import json
import subprocess

import pytest

from benchmarks import render, roofline
from benchmarks.device.isolated import CheckRow
from benchmarks.measuring import timing
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import LayerRow, RooflineRow, StageRow, Table4Row
from benchmarks.measuring.shapes import Shape
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import goals, kernels, tables, verdicts
from benchmarks.rendering import layer as render_layer
from benchmarks.rendering import table4 as render_table4

FC2, SQUARE, LONG, SMALL = Shape(6400, 3072, 768), Shape(8192, 4096, 4096), Shape(8192, 14336, 4096), Shape(16, 64, 32)
RIVALS = ("frozen", "naive_hydra", "naive_lora", "naive_lora@parameters", "naive_seqlora@parameters")
GPU = {"device": "cuda", "dtype": "bf16", "mode": "graph"}
ENVIRONMENT = Environment(
    device="A Card",
    capability="9.0",
    driver="999",
    threads=2,
    torch="2.13.0",
    triton="3.6.0",
    transformers=None,
    python="3.11",
    commit="0123456789abcdef",
    dirty=False,
    date="2026-11-30T00:00:00+00:00",
)


def layer_row(shape: Shape, method: str, ranks: Ranks, pair: str | None, over: dict, **changes) -> LayerRow:
    row = LayerRow(
        **shape._asdict(),
        **ranks._asdict(),
        hydra=[8, 8],
        device="cpu",
        pair=pair,
        dtype="fp32",
        mode="eager",
        phase="step",
        method=method,
        backend="aten" if method.startswith("ours") else None,
        form="kept" if method.startswith("ours") else None,
        median_us=200.0,
        q1_us=190.0,
        q3_us=210.0,
        floor_us=None,
        runs=7,
        calls=1,
        dropout=0.0,
        bias=True,
        trainable=1,
        over={name: [ratio - 0.01, ratio, ratio + 0.02] for name, ratio in over.items()},
        saved_bytes=4,
        peak_bytes=8,
        parity=None,
        unavailable=None,
        dry=False,
    )
    return LayerRow(**{**row, **changes})


def layer_rows(shapes: tuple[Shape, ...] = (FC2,), ours: float = 0.5, **changes) -> list[LayerRow]:
    """Five methods a shape; ours takes ``ours`` of each rival's time."""
    rows = []
    for shape in shapes:
        rows += [
            layer_row(shape, "frozen", Ranks(0, 0), None, {"frozen": 1.0}, **changes),
            layer_row(shape, "naive_hydra", Ranks(8, 8), "both", {"frozen": 2.0}, **changes),
            layer_row(shape, "naive_lora", Ranks(16, 0), "rank", {"frozen": 1.5}, **changes),
            layer_row(shape, "naive_lora", Ranks(11, 0), "parameters", {"frozen": 1.4}, **changes),
            layer_row(shape, "naive_seqlora", Ranks(0, 28), "parameters", {"frozen": 1.3}, **changes),
            layer_row(shape, "ours_hydra", Ranks(8, 8), "both", dict.fromkeys(RIVALS, ours), **changes),
        ]
    return rows


def table4_row(method: str, **changes) -> Table4Row:
    values = dict.fromkeys(Table4Row.__annotations__, 1.0)
    values |= {"model": "ViT-B/32", "weights": "random", "data": "digits", "dtype": "fp32", "mode": "eager"}
    values |= {"accumulation": 1, "checkpointing": False, "sequence": None, "base": "none", "lora_dropout": 0.0}
    values |= {"method": method, "ranks": None, "projected": False, "step_seconds": [1.0, 2.0], "parity": None}
    return Table4Row(**{**values, "dry": False, **changes})


def table4_rows(ours: float = 0.97, **changes) -> list[Table4Row]:
    """Five rounds, each twice as long as the one before. Ours takes 0.97 of naive LoRA's time, or so, less in the third
    and more in the fifth; naive SeqLoRA a tenth less than naive LoRA, naive Hydra twice as much.
    """
    rounds = [1.0, 2.0, 4.0, 8.0, 16.0]
    noise = [0.0, 0.0, -0.1, 0.01, 0.1]
    taken = {
        "linear_probing": [0.1 * t for t in rounds],
        "naive_lora": rounds,
        "naive_seqlora": [0.9 * t for t in rounds],
        "naive_hydra": [2 * t for t in rounds],
        "ours_lora": [1.5 * t for t in rounds],
        "ours_hydra": [(ours + more) * t for t, more in zip(rounds, noise, strict=True)],
    }
    ranks = {"lora": [4, 0], "seqlora": [0, 11], "hydra": [3, 3]}
    paper = {"lora": 100.0, "seqlora": 90.0, "hydra": 108.0}
    return [
        table4_row(
            name,
            **{"step_seconds": steps, "ranks": ranks.get(kind), "paper_sec_per_epoch": paper.get(kind), **changes},
        )
        for name, steps in taken.items()
        for kind in [name.partition("_")[2]]
    ]


def steps_of(rows: list[LayerRow]) -> list[dict[str, LayerRow]]:
    [(_, steps)] = render_layer.layer_steps(rows)
    return steps


def goals_missed(rows: list[LayerRow]) -> list[str]:
    told = goals.layer_goals(ENVIRONMENT, rows)
    return [f"{goal.what} {goal.figure:.3f}, goal {goal.limit:.2f}" for goal in told if goal.missed]


@pytest.fixture
def place(tmp_path):
    """A README and pages with the markers wanted, and a function that renders them from the files given."""
    results = tmp_path / "results"

    def publish(files: dict[str, tuple[list, type]], *options: str) -> int:
        for name, (rows, schema) in files.items():
            timing.write_result(results / name, ENVIRONMENT, rows, schema)
        return render.main(["--root", str(tmp_path), "--results", str(results), *options])

    def mark(*markers: str) -> None:
        page_of = {part.marker: tmp_path / part.page for part in (*render.BLOCKS, *render.DIGESTS)}
        texts = dict.fromkeys([publish.readme, *page_of.values()], "")
        for marker in markers:
            texts[page_of.get(marker, publish.page)] += f"<!-- {marker} -->\n<!-- /{marker} -->\n"
        for page, text in texts.items():
            if text or page == publish.readme or page.exists():
                page.parent.mkdir(exist_ok=True)
                page.write_text(text, encoding="utf-8")

    publish.readme, publish.page = tmp_path / "README.md", tmp_path / "docs" / "results.md"
    publish.results, publish.mark = results, mark
    return publish


def test_ours_loses_where_its_median_is_above_one_and_misses_a_goal_above_it():
    """The rule and the mark of every table."""
    assert [verdicts.loses(ratio) for ratio in ([0.9, 1.0, 1.2], [0.9, 0.95, 1.3], [0.99, 1.001, 1.02])] == [
        *(False, False, True)
    ]
    assert [verdicts.marked(ratio) for ratio in (None, 0.5, 1.0, 1.0004)] == ["-", "0.50", "1.00", "1.00 ▲"]
    assert verdicts.with_quartiles([0.99, 1.001, 1.02], mark=True) == "1.00 ▲ (0.99 to 1.02)"
    assert verdicts.with_quartiles([0.99, 1.001, 1.02]) == "1.00 (0.99 to 1.02)"
    assert verdicts.with_quartiles([0.9, 1.0, 1.02], mark=True) == "1.00 (0.90 to 1.02)"
    assert goals.Goal("ours", 1.06, 1.06).line() == ["ours", "1.060", "1.06", "met"]
    assert goals.Goal("ours", 1.061, 1.06).line() == ["ours", "1.061", "1.06", "MISSED"]
    hydra = ["full_tuning", "naive_lora", "naive_seqlora", "naive_hydra", "compiled_lora", "peft_lora"]
    every = [*hydra, "ours_lora", "frozen", "linear_probing"]
    assert [name for name in every if verdicts.is_rival(name, "ours_hydra")] == hydra
    assert [name for name in every if verdicts.is_rival(name, "ours_seqlora")] == ["naive_seqlora"]
    assert [name for name in every if verdicts.is_rival(name, "naive_hydra")] == []


def test_the_pages_round_by_one_rule():
    """Three significant digits for all that is no ratio, without an exponent; memory in whole MB."""
    given = (0, 0.0498, 0.00195, 0.194, 1.352, 55.96, 0.9996, 5381.3, 14508.7)
    assert [tables.digits(value) for value in given] == [
        *("0", "0.0498", "0.00195", "0.194", "1.35", "56.0", "1.00", "5380", "14500")
    ]
    assert tables.digits(-0.7412) == "-0.741"
    assert [tables.megabytes(value) for value in (None, 0, 4.9e6, 1016.3e6)] == ["-", "0", "5", "1016"]


def test_each_machine_is_named_once_and_captions_have_its_number(place):
    """Two results of one machine, one of another that differs in a version alone; what is predicted has none."""
    place.mark("measured:machines", "measured:table4", "measured:models", "measured:layer")
    newer = Environment(**{**ENVIRONMENT, "torch": "2.14.1", "date": "2026-12-01T00:00:00+00:00"})
    timing.write_result(place.results / "table4-cpu.json", ENVIRONMENT, table4_rows(), Table4Row)
    timing.write_result(place.results / "layer-cpu-bf16.json", newer, layer_rows(dtype="bf16"), LayerRow)
    assert place({"layer-cpu-fp32.json": (layer_rows(), LayerRow)}) == 0
    text = place.page.read_text(encoding="utf-8")
    told = text[text.index("-->") + 4 : text.index("<!-- /measured:machines")].splitlines()
    assert told == [
        "- **Machine 1**: A Card (9.0, driver 999); torch 2.13.0, triton 3.6.0, Python 3.11.",
        "- **Machine 2**: A Card (9.0, driver 999); torch 2.14.1, triton 3.6.0, Python 3.11.",
    ]
    assert text.count("A Card") == text.count("triton 3.6.0") == 2
    captions = [line.partition("Machine ")[2][:13] for line in text.splitlines() if "; commit 0123456789ab" in line]
    assert captions == ["1; 2026-11-30", "2; 2026-12-01", "1; 2026-11-30"]
    alone = Environment(**{**ENVIRONMENT, "driver": None, "threads": 1})
    assert "(9.0, 1 thread)" in tables.machine_note(alone)
    one = tables.Stored(None, ENVIRONMENT, [], machine=1)
    later = one._replace(environment=Environment(**{**ENVIRONMENT, "commit": "fedcba9876543210", "dirty": True}))
    other = one._replace(environment=newer, machine=2)
    assert tables.origins([one, one, later, other]) == (
        "Machine 1; 2026-11-30; commit 0123456789ab, commit fedcba987654 with local changes. Machine 2; 2026-12-01; "
        "commit 0123456789ab."
    )


@pytest.fixture(scope="module")
def predicted() -> list[RooflineRow]:
    model = roofline.Model(roofline.CARDS["h200"], l2_bytes=0, launch_us=0.0, gemm_efficiency=0.95)
    shapes = (FC2, SQUARE)
    return [row for shape in shapes for row in roofline.predict(shape, Ranks(8, 8), "bf16", model)]


def test_every_dtype_and_mode_has_a_table_and_notes_of_its_own(place):
    place.mark("measured:layer", "measured:gpu")
    compiled = layer_rows(mode="compile", ours=0.97)
    graph = layer_rows((SMALL, FC2), **GPU, ours=0.6)
    files = {"layer-cpu-fp32.json": (layer_rows(), LayerRow), "layer-cpu-fp32-compile.json": (compiled, LayerRow)}
    assert place({**files, "layer-gpu.json": (layer_rows(**{**GPU, "mode": "eager"}) + graph, LayerRow)}) == 0
    text = place.page.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if line.startswith("**") and line.endswith("**")]
    assert headings == [
        "**fp32, eager, ours: aten**",
        "**fp32, compile, ours: aten**",
        "**bf16, eager, ours: aten**",
        "**bf16, graph, ours: aten**",
    ]
    blocks = text.split("**\n\n")[1:]
    for block, ratio in zip(blocks, ("0.50", "0.97", "0.50", "0.60"), strict=True):
        lines = block.splitlines()
        assert lines.count("A step of ours over a rival's, Hydra 8+8:") == 1
        cells, _ = [line.split(" | ") for line in lines if line.startswith("| 6400 x 3072 x 768")]
        assert cells[1] == ratio
    assert ["| 16 x 64 x 32 |" in block for block in blocks] == [False, False, False, True]
    for note, told in (("Every method under torch.compile.", 1), ("CUDA graphs replayed", 3)):
        assert [note in block for block in blocks] == [place == told for place in range(4)]
    assert not any("goal" in block.lower() for block in blocks)


def test_runs_of_one_backend_each_stand_side_by_side(place):
    """Those of one file, dtype and mode whose only method of ours is Hydra."""
    place.mark("measured:gpu")

    def by(backend: str, shapes: tuple[Shape, ...], ours: float, **changes) -> list[LayerRow]:
        rows = layer_rows(shapes, ours, **{**GPU, **changes})
        return [LayerRow(**{**row, "backend": row["backend"] and backend}) for row in rows]

    both = by("aten", (FC2, SQUARE), 0.6) + by("hybrid", (FC2,), 1.2) + by("hybrid", (FC2,), 0.9, mode="eager")
    assert place({"layer-gpu.json": (both, LayerRow)}) == 0
    text = place.page.read_text(encoding="utf-8")
    joint, single = text.split("**bf16, eager, ours: hybrid**")
    assert [line for line in joint.splitlines() if line.startswith(("**bf16", "Which", "|"))] == [
        "**bf16, graph, ours: aten, hybrid**",
        "Which backend is the fastest? Our Hydra 8+8 by each:",
        "| M x K x N | aten / naive Hydra | hybrid / naive Hydra | aten / naive LoRA | hybrid / naive LoRA |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| 6400 x 3072 x 768 | 0.60 | 1.20 ▲ | 0.60 | 1.20 ▲ |",
        "| 8192 x 4096 x 4096 | 0.60 | - | 0.60 | - |",
        "| geometric mean, M >= 256 | 0.60 | 1.20 ▲ | 0.60 | 1.20 ▲ |",
    ]
    assert "| 6400 x 3072 x 768 | 0.90 |" in single


def test_a_further_run_shows_what_the_first_has_not(place):
    """Beside the same rivals again it has those under torch.compile."""
    place.mark("measured:gpu")
    first = lora_rows((FC2,), 0.9, 0.8, **GPU)
    further = [
        LayerRow(**{**row, "over": {**row["over"], "compiled_lora": [0.6, 0.7, 0.8]}})
        for row in lora_rows((FC2,), 0.9, 0.8, **GPU)
    ]
    assert place({"layer-gpu.json": (first + further, LayerRow)}) == 0
    text = place.page.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("A step")] == [
        "A step of ours over a rival's, Hydra 8+8:",
        "A step over the frozen layer's:",
        "A step of ours over a rival's under `torch.compile`, Hydra 8+8:",
    ]
    assert "| our LoRA / compiled LoRA |" in text
    assert "| 6400 x 3072 x 768 | 0.70 |" in text


def test_what_only_a_further_run_measured_stays_with_it():
    """A rival that the first run left out must not be compared with the first run's rows."""
    first = [{"mode": "graph", "method": name} for name in ("frozen", "ours")]
    further = [{"mode": "graph", "method": name} for name in ("frozen", "ours", "compiled")]
    found = tables.groups([*first, *further], by=["mode"], same=["method"])
    assert [[row["method"] for row in group] for group in found] == [["frozen", "ours"], ["frozen", "ours", "compiled"]]


def test_table_4_is_grouped_by_dtype_and_mode(place):
    place.mark("measured:table4", "measured:models")
    eager = [table4_row("naive_lora"), table4_row("ours_lora", sec_per_epoch=7.5)]
    graph = [{**row, "mode": "graph", "dtype": "bf16", "sec_per_epoch": 2.5} for row in eager]
    assert place({"table4-cuda.json": (eager + graph, Table4Row)}) == 0
    text = place.page.read_text(encoding="utf-8").partition("<!-- /measured:table4")[0]
    first, second = text.split("**bf16, graph, batch 1.0**")
    assert "**fp32, eager, batch 1.0**" in first
    assert ("| 7.50 |" in first, "| 2.50 |" in first) == (True, False)
    assert second.count("| 2.50 |") == 2
    assert ("CUDA graphs replayed" in first, "CUDA graphs replayed" in second) == (False, True)


def test_table_4_tells_where_our_hydra_stands_and_marks_where_ours_is_slower():
    table = render_table4.table4_table(table4_rows())
    over = {
        line[0]: [line[table.headings.index(f"over {rival}")] for rival in ("naive SeqLoRA", "naive Hydra")]
        for line in table.cells
    }
    # Ours over naive LoRA: 0.87, 0.97, 0.97, 0.98, 1.07; SeqLoRA's are those over 0.9, naive Hydra's half of them.
    # Linear probing is no rival, and our LoRA's only one is naive LoRA.
    assert over == {
        "linear probing": ["-", "-"],
        **{name: ["-", "-"] for name in ("naive LoRA 4", "naive SeqLoRA 11", "naive Hydra 3+3")},
        "our LoRA 4": ["-", "-"],
        "our Hydra 3+3": ["1.08 ▲ (1.08 to 1.09)", "0.48 (0.48 to 0.49)"],
    }
    # Only ours has the mark over naive LoRA, whose ratio is stored; naive LoRA is what all are over.
    slower = render_table4.table4_table([{**row, "ratio": 1.2} for row in table4_rows()])
    column = [line[table.headings.index("over naive LoRA")] for line in slower.cells]
    assert ["▲" in cell for cell in column] == [False] * 4 + [True] * 2
    assert column[1] == "1"
    proof = {"loss": 1e-6, "gradient": 0.0123, "tensor": "A", "allowed": {"loss": 1e-5, "gradient": 0.2}}
    rows = [Table4Row(**{**row, "projected": True, "head": 7690, "parity": proof}) for row in table4_rows()]
    rows[1]["parity"] = {**proof, "loss": 1e-7, "gradient": 0.01}
    file = tables.Stored(None, ENVIRONMENT, rows, kernels.Kernels("older", "Older. "), 3)
    [_, caption] = render_table4.table4_markdown(file, rows).split("\n\n")
    assert caption == (
        "Older. Machine 3; 2026-11-30; commit 0123456789ab. Random weights, digits at 1.0x1.0. Projected from 1.0 "
        "steps to an epoch of 50,000 images. The head's 0.00769 M parameters are trained too. Losses within 1.0e-06 of "
        "naive's (allowed 1e-05), gradients within 1.2e-02 (allowed 0.2)."
    )


def test_table_4s_goals_are_of_a_cpu_or_a_gpu():
    cpu = Environment(**{**ENVIRONMENT, "capability": "AVX2", "driver": None})
    told = {
        where["capability"]: [g.line()[1:] for g in goals.table4_goals(where, table4_rows())]
        for where in (cpu, ENVIRONMENT)
    }
    lora, seqlora = "0.970 (0.970 to 0.980)", "1.078 (1.078 to 1.089)"
    assert told["AVX2"] == [[lora, "0.98", "met"], [seqlora, "0.98", "MISSED"]]
    in_bf16 = [Table4Row(**{**row, "dtype": "bf16"}) for row in table4_rows()]
    assert [g.limit for g in goals.table4_goals(cpu, in_bf16)] == [0.95, 0.95]
    assert told["9.0"] == [[lora, "0.95", "MISSED"], [seqlora, "0.97", "MISSED"]]
    assert goals.table4_goals(cpu, table4_rows()[:2]) == []


def lora_rows(shapes: tuple[Shape, ...], ours: float, peft: float, **changes) -> list[LayerRow]:
    """Naive LoRA and ours; ours takes ``ours`` of naive's time, ``peft`` of PEFT's, and half of naive's memory."""
    rows = []
    for shape in shapes:
        over = {"naive_lora": ours, "peft_lora": peft}
        rows.append(layer_row(shape, "naive_lora", Ranks(16, 0), "rank", {"frozen": 1.5}, **changes))
        rows.append(layer_row(shape, "ours_lora", Ranks(16, 0), "rank", over, **changes, peak_bytes=4))
    return rows


def test_a_peft_script_is_a_line_of_its_own_table_and_in_no_other(place):
    """By hand: rounds of 1, 2 and 3 seconds; ours takes 0.5, 0.6 and 0.7 of them, and all of those under autocast."""
    place.mark("measured:summary", "measured:table4", "measured:models", "measured:accelerated")
    of_script = {"model": "Llama-shaped", "ranks": [16, 0], "batch": 4, "steps": 3, "dtype": "bf16", "sequence": 512}
    proof = {"loss": 1e-5, "gradient": 0.0123, "tensor": "A", "allowed": {"loss": 1e-2, "gradient": 0.2}}
    taken = {
        "naive_lora": ([1.0, 1.0, 1.0], 1e6, None),
        "peft_lora": ([1.0, 2.0, 3.0], 5e6, proof),
        "autocast_lora": ([0.5, 1.2, 2.1], 4e6, proof),
        "accelerated_lora": ([0.5, 1.2, 2.1], 3e6, {**proof, "gradient": 0.0456}),
    }
    rows = [
        table4_row(name, step_seconds=steps, peak_bytes=peak, parity=parity, **of_script)
        for name, (steps, peak, parity) in taken.items()
    ]
    dropping = [
        {**row, "lora_dropout": 0.05, "checkpointing": True} for row in rows if row["method"] != "autocast_lora"
    ]
    cpu = Environment(**{**ENVIRONMENT, "capability": "AVX2", "driver": None})
    files = {"table4-llama-peft-cpu-bf16": rows, "table4-cpu": table4_rows(), "table4-llama-peft-cpu-bf16-x": dropping}
    for name, of in files.items():
        timing.write_result(place.results / f"{name}.json", cpu, of, Table4Row)
    faster = [Table4Row(**{**row, "step_seconds": [0.1, 0.1, 0.1]}) for row in dropping]
    assert place({"table4-gpu.json": (faster, Table4Row)}) == 0
    text = place.page.read_text(encoding="utf-8")
    before, _, after = text.partition("<!-- measured:accelerated -->")
    lines = after.splitlines()
    assert "Llama" not in before
    figures = "2.00 | 0.60 (0.55 to 0.65) |"
    assert lines[3:5] == [
        f"| bf16 | 16 | 0 | no | {figures} 1.00 (1.00 to 1.00) | 5 | 4 | 3 |",
        f"| bf16 | 16 | 0.05 | yes | {figures} - | 5 | - | 3 |",
    ]
    assert "by hand: within 4.6e-02 in bf16 (allowed 0.2)." in after
    about = "Llama-shaped, bf16, rank 16, batch 4, activation checkpointing, lora_dropout 0.05"
    readme = place.readme.read_text(encoding="utf-8")
    assert (
        f"- **CPU**: a training step of a PEFT LoRA model, accelerated, takes 0.60 of PEFT's time ({about}).\n"
        in readme
    )
    assert "- **Memory**: the peak of that step is 0.60 of PEFT's.\n" in readme
    assert "| Llama-shaped" not in readme


def test_the_summary_is_one_small_table_of_the_stored_rows(place):
    """By hand: means of 0.9 and 0.4 are 0.6; the kernels of the GPU's commit are not known."""
    place.mark("measured:summary", "measured:table4", "measured:models", "measured:layer", "measured:gpu")
    cpu = Environment(**{**ENVIRONMENT, "capability": "AVX2", "driver": None})
    llama = [{**row, "model": "Llama-shaped", "peak_bytes": 2.0, "ranks": [16, 0]} for row in table4_rows()]
    by_method = {row["method"]: row for row in llama}
    of_peft = [2 * taken for taken in by_method["naive_lora"]["step_seconds"]]
    llama.append({**by_method["naive_lora"], "method": "peft_lora", "step_seconds": of_peft})
    llama.append({**by_method["ours_lora"], "method": "accelerated_lora", "peak_bytes": 3.0})
    layers = lora_rows((FC2,), 0.9, 0.8) + lora_rows((SQUARE,), 0.4, 0.45) + lora_rows((SMALL,), 1.02, 0.9)
    timing.write_result(place.results / "table4-cpu.json", cpu, table4_rows(), Table4Row)
    timing.write_result(place.results / "table4-llama-cpu.json", cpu, llama, Table4Row)
    timing.write_result(place.results / "layer-cpu.json", cpu, layers, LayerRow)
    assert place({"layer-cuda.json": (lora_rows((FC2,), 0.7, 0.6, **GPU), LayerRow)}) == 0
    text = place.readme.read_text(encoding="utf-8")
    told = text[text.index("-->") + 4 : text.index("<!-- /measured:summary")].splitlines()
    assert told[2:-2] == [
        "| Llama-shaped; accelerated PEFT LoRA 16, fp32, batch 1.0 | 0.75 | 1.50 ▲ | 1.50 ▲ |",
        "| ViT-B/32; LoRA 4, fp32, batch 1.0 | - | 1.50 ▲ | 1.00 |",
        "| ViT-B/32; Hydra 3+3, fp32, batch 1.0 | - | 0.48 | 1.00 |",
        "| one layer on a CPU, 2 shapes of M >= 256 rows; LoRA 16, fp32, eager | 0.60 | 0.60 | 0.50 |",
        "| one layer on a CPU, 1 shape of M <= 64 rows; LoRA 16, fp32, eager | 0.90 | 1.02 ▲ | 0.50 |",
        "",
        "- **GPU** (kernels unknown): a step of one layer takes 0.60 of PEFT's time, 0.70 of plain PyTorch's (LoRA 16, "
        "bf16, CUDA graphs, 1 shape of M >= 256 rows).",
    ]
    assert "A Card, 2 threads, 2026-11-30; A Card, 2026-11-30." in told[-1]
    assert place({}, "--check") == 0
    place.readme.write_text(text.replace("0.70 of plain", "0.60 of plain"), encoding="utf-8")
    assert place({}, "--check") == 1


def test_the_readmes_first_screen_does_not_lead_with_a_gpu():
    """A GPU's bullet comes after the table; so does a GPU in the picture. Its kernels may be older than today's."""
    text = (render.ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("<!-- measured:summary -->") : text.index("<!-- /measured:summary -->")]
    assert "GPU" not in text[: text.index("<!-- measured:summary -->")]
    lines = block.splitlines()
    bullets = [line.partition("**: ")[0] for line in lines if line.startswith("- ")]
    assert bullets[:2] == ["- **CPU", "- **Memory"]
    [on_gpu] = [place for place, line in enumerate(lines) if "GPU" in line]
    assert on_gpu > max(place for place, line in enumerate(lines) if line.startswith("|"))


def test_the_readmes_own_summary_is_small():
    text = (render.ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("<!-- measured:summary -->") : text.index("<!-- /measured:summary -->")]
    assert 6 <= len([line for line in block.splitlines() if line.startswith("|")]) - 2 <= 8


def test_a_gpus_results_say_when_the_kernels_have_changed(place, monkeypatch):
    """A digest of today's sources against that of the result's commit, recorded beside the results."""
    place.mark("measured:gpu")
    files = {"layer-cuda.json": (layer_rows(**GPU), LayerRow)}
    record = place.results / "kernels.json"
    assert place(files) == 0
    assert "**Whether it ran the kernels of today is not known.** Machine 1" in place.page.read_text(encoding="utf-8")
    assert not record.exists()
    record.write_text(json.dumps({ENVIRONMENT["commit"]: kernels.here(render.ROOT)}), encoding="utf-8")
    assert place({}) == 0
    text = place.page.read_text(encoding="utf-8")
    assert "kernels" not in text
    assert "\nMachine 1" in text
    # No git is asked where the record knows the commit.
    monkeypatch.setattr(kernels, "at", lambda root, commit: pytest.fail("git was asked"))
    assert place({}, "--check") == 0
    record.write_text(json.dumps({ENVIRONMENT["commit"]: "another"}), encoding="utf-8")
    assert place({}) == 0
    assert "**Measured with older kernels.** Machine 1; 2026-11-30; commit" in place.page.read_text(encoding="utf-8")


def test_the_digest_is_of_the_kernels_contents_and_git_gives_the_same(tmp_path):
    def git(*command: str) -> str:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.autocrlf=false"]
        done = subprocess.run(["git", *names, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    kernel, other = tmp_path / "hydra_kernels" / "kernels" / "down.py", tmp_path / "README.md"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("a = 1\n", encoding="utf-8")
    other.write_text("text\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    first = kernels.here(tmp_path)
    assert kernels.at(tmp_path, commit) == first
    other.write_text("another text\n", encoding="utf-8")
    (kernel.parent / "down.pyc").write_text("built", encoding="utf-8")
    assert kernels.here(tmp_path) == first
    kernel.write_text("a = 2\n", encoding="utf-8")
    assert kernels.here(tmp_path) != first
    assert kernels.at(tmp_path, commit) == first
    assert kernels.at(tmp_path, "0" * 40) is None
    results = tmp_path / "results"
    results.mkdir()
    assert kernels.recorded(tmp_path, results, [commit, "0" * 40]) == {commit: first}


def test_a_room_imports_no_command():
    """Commands stand at the top of benchmarks; what they share, in rooms that know none of them."""
    top = render.ROOT / "benchmarks"
    commands = {path.stem for path in top.glob("*.py")} - {"__init__"}
    rooms = [path for path in top.rglob("*.py") if path.parent != top]
    assert len(commands) == 14
    assert len(rooms) > 20
    for path in rooms:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names} if node.module == "benchmarks" else {node.module}
                assert not names & ({f"benchmarks.{name}" for name in commands} | commands), f"{path}: {names}"
    for name in commands:
        assert '__name__ == "__main__"' in (top / f"{name}.py").read_text(encoding="utf-8"), name


def test_one_table_serves_markdown_and_terminal():
    table = tables.Table(
        "Title", ["name", "of", "figure"], [["a [b]", "c", "1"], ["d", "e", "2 ▲"]], [False, True], left=2
    )
    assert table.markdown().splitlines() == [
        "| name | of | figure |",
        "| --- | --- | ---: |",
        "| a [b] | c | 1 |",
        "| d | e | 2 ▲ |",
    ]
    printed = table.terminal()
    assert [column.justify for column in printed.columns] == ["left", "left", "right"]
    assert [[cell.plain for cell in column.cells] for column in printed.columns] == [
        ["a [b]", "d"],
        ["c", "e"],
        ["1", "2 ▲"],
    ]
    assert [row.style for row in printed.rows] == [None, "bold"]


def test_a_cpus_goals_are_those_of_its_dtype_mode_and_backend():
    assert goals_missed(layer_rows((FC2, SMALL), ours=0.96, mode="compile")) == [
        "our Hydra 8+8 over naive Hydra, geometric mean, M >= 256 0.960, goal 0.95",
    ]
    assert goals_missed(layer_rows((FC2, SMALL), ours=0.96, dtype="bf16")) == []  # by aten
    assert goals_missed(layer_rows((FC2, SMALL), ours=0.95, mode="compile")) == []
    assert [line.split(", ", 1)[1] for line in goals_missed(layer_rows((FC2, SMALL), ours=0.96))] == [
        "geometric mean, M >= 256 0.960, goal 0.80",
        "geometric mean, M <= 64 0.960, goal 0.95",
    ]


def test_a_gpus_goals_are_those_of_each_shape():
    """The language model's shapes are held to theirs without b0, the others with it."""
    rows = layer_rows((FC2, SMALL), ours=1.53, **GPU) + layer_rows((SQUARE, LONG), ours=1.12, bias=False, **GPU)
    rows += lora_rows((FC2,), 0.9, 0.73, **GPU)
    assert goals_missed(rows) == [
        "our Hydra 8+8 over frozen at 6400 x 3072 x 768 1.530, goal 1.52",
        "our Hydra 8+8 over frozen at 8192 x 14336 x 4096 1.120, goal 1.11",
        "our Hydra 8+8 over naive LoRA 16 at 6400 x 3072 x 768 1.530, goal 0.72",
        "our Hydra 8+8 over naive LoRA 16 at 8192 x 4096 x 4096 1.120, goal 0.87",
        "our Hydra 8+8 over naive LoRA 16 at 8192 x 14336 x 4096 1.120, goal 0.95",
        "our LoRA 16 over peft_lora at 6400 x 3072 x 768 0.730, goal 0.72",
    ]
    wider = layer_rows((FC2,), ours=1.66, hydra=[16, 16], **GPU)
    assert goals_missed(wider) == ["our Hydra 8+8 over frozen at 6400 x 3072 x 768 1.660, goal 1.65"]
    for shape, changes in (
        *((FC2, {"mode": "eager"}), (FC2, {"dtype": "fp32"}), (FC2, {"hydra": [4, 8]}), (FC2, {"bias": False})),
        *((SQUARE, {}), (Shape(6400, 768, 3072), {})),
    ):
        assert goals_missed(layer_rows((shape,), ours=2.0, **{**GPU, **changes})) == []


def test_layers_without_b0_are_told():
    rows = layer_rows((FC2,), **GPU) + layer_rows((SQUARE, LONG), bias=False, **GPU)
    assert "Without b0: 8192 x 4096 x 4096, 8192 x 14336 x 4096." in render_layer.layer_notes(rows)
    assert "b0" not in " ".join(render_layer.layer_notes(rows[:6]))


def test_a_rival_that_rows_of_odd_sizes_slow_down_is_named_with_the_fair_one_beside_it():
    def handicapped(few: float = 250.0, **changes) -> list[str]:
        rows = layer_rows((FC2,), **{**GPU, **changes})
        rows[3]["median_us"] = few
        return render_layer.layer_notes(rows)[-2:]

    # LoRA 11 has rows of 11 x 2 bytes, LoRA 16 takes 200 us.
    means = "Our Hydra over rivals of equal parameters: naive LoRA 0.50 (M >= 256); naive SeqLoRA 0.50 (M >= 256)."
    assert handicapped() == [
        means,
        "Of these naive LoRA 11 at 6400 x 3072 x 768 is slower than LoRA of Hydra's R: rows of such ranks are no "
        "multiple of 16 bytes. The table is the fairer comparison.",
    ]
    assert handicapped(few=200.0)[-1] == means
    assert handicapped(device="cpu")[-1] == means
    aligned = layer_rows((FC2,), **GPU)
    aligned[3] |= {"median_us": 250.0, "r_a": 8}
    assert render_layer.layer_notes(aligned)[-1] == means


def test_the_share_of_the_floor_stands_in_the_table():
    rows = layer_rows((FC2, SMALL), ours=0.6, floor_us=150.0, **GPU)
    *_, table = render_layer.layer_tables(rows)
    # In the kept form the composed form's floor says nothing.
    assert "floor / our Hydra" not in table.headings
    steps_of(rows)[0]["ours_hydra"]["form"] = "composed"
    *_, table = render_layer.layer_tables(rows)
    assert [table.headings[-1], *(line[-1] for line in table.cells)] == ["floor / our Hydra", "75%", "-", "-", "-"]
    on_cpu = layer_rows((FC2,), form="composed")
    *_, table = render_layer.layer_tables(on_cpu)
    assert "floor / our Hydra" not in table.headings


def test_pictures_are_stored_linked_and_checked(place, capsys):
    place.mark("measured:layer", "measured:table4", "measured:models")
    files = {
        "layer-cpu-fp32.json": (lora_rows((FC2,), 0.9, 0.8), LayerRow),
        "table4-cpu.json": (table4_rows(), Table4Row),
    }
    assert place(files, "--check") == 1
    names = ("layer-cpu-fp32.svg", "table4-cpu.svg", "models.svg", "overview.svg")
    charts = [place.results / name for name in names]
    assert not any(chart.exists() for chart in charts)
    assert place({}) == 0
    page = place.page.read_text(encoding="utf-8")
    assert all(f"![{chart.stem}](../results/{chart.name})" in page for chart in charts[:3])
    assert place({}, "--check") == 0
    for chart in charts:
        chart.write_text("<svg/>", encoding="utf-8")
    capsys.readouterr()
    assert place({}, "--check") == 1
    told = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(" is stale")[0] for line in told) == sorted(names)
    assert {chart.read_text(encoding="utf-8") for chart in charts} == {"<svg/>"}


def test_the_predicted_table_is_the_stored_rows_and_says_what_it_is(place, predicted):
    place.mark("predicted:roofline")
    assert place({"predicted-h200-bf16.json": (predicted, RooflineRow)}) == 0
    text = place.page.read_text(encoding="utf-8")
    over = {row["method"]: f"{row['over_frozen']:.2f}" for row in predicted if row["M"] == FC2.M}
    columns = (
        *("naive_lora", "naive_seqlora", "naive_hydra", "hybrid", "triton"),
        *("effective", "native", "native_sweep", "floor"),
    )
    assert f"| 6400 x 3072 x 768 | {' | '.join(over[name] for name in columns)} |" in text
    ours = "hybrid | triton | effective | native | native by one sweep"
    assert f"| M x K x N | naive LoRA | naive SeqLoRA | naive Hydra | {ours} | floor |" in text
    assert text.startswith("<!-- predicted:roofline -->\nHydra 8+8, bf16: predicted step")
    for fact in ("Nothing here was measured", "790 TFLOP/s", "4300 GB/s", "a CUDA graph", "0123456789ab"):
        assert fact in text
    assert "A Card" not in text
    without = [row for row in predicted if row["method"] != "triton"]
    assert place({"predicted-h200-bf16.json": (without, RooflineRow)}) == 0
    [line] = [line for line in place.page.read_text(encoding="utf-8").splitlines() if line.startswith("| 6400")]
    assert line.split(" | ")[5] == "-"


def test_nothing_predicted_comes_under_a_measured_marker(place, predicted, capsys):
    place.mark("measured:layer", "predicted:roofline")
    files = {"layer-cpu-fp32.json": (layer_rows(), LayerRow), "predicted-h200.json": (predicted, RooflineRow)}
    assert place(files) == 0
    before = place.page.read_text(encoding="utf-8")
    assert place({"layer-cpu-fp32.json": (predicted, RooflineRow)}) == 2
    assert "is no LayerRow" in capsys.readouterr().err
    assert place({**files, "predicted-h200.json": (layer_rows(), LayerRow)}) == 2
    assert "is no RooflineRow" in capsys.readouterr().err
    assert place.page.read_text(encoding="utf-8") == before
    for marker, other in (("measured:roofline", "measured:layer"), ("predicted:layer", "predicted:roofline")):
        place.mark(marker, other)
        assert place(files) == 2
        kinds = ("machines", "table4", "models", "accelerated", "quantised", "layer", "gpu", "host", "claim")
        known = ", ".join([*(f"measured:{kind}" for kind in kinds), "predicted:roofline"])
        assert f"docs/results.md has markers for {marker}, expected {known}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["measured:layer", "measured:models", "predicted:roofline"])
def test_results_need_markers_and_markers_without_results_say_so(kind, place, predicted, capsys):
    files = {
        "measured:layer": ("layer.json", (layer_rows(), LayerRow)),
        # Of another model, which the block of the paper's does not show.
        "measured:models": ("table4.json", ([table4_row("naive_lora", model="ViT-L/16")], Table4Row)),
        "predicted:roofline": ("predicted.json", (predicted, RooflineRow)),
    }
    place.mark(kind)
    assert place({}) == 0
    assert place.page.read_text(encoding="utf-8") == f"<!-- {kind} -->\nNot measured yet.\n<!-- /{kind} -->\n"
    place.mark()
    assert place({}) == 0
    assert place(dict([files[kind]])) == 2
    assert f"docs/results.md needs one <!-- {kind} -->" in capsys.readouterr().err
    place.mark(kind)
    assert place({}) == 0
    assert "Not measured yet." not in place.page.read_text(encoding="utf-8")
    assert place({}, "--check") == 0


def test_a_gpus_results_are_taken_over_whole_or_not_at_all(place, tmp_path, capsys):
    place.mark("measured:gpu", "measured:host")
    out = tmp_path / "out"
    out.mkdir()
    assert place({}, "--take", str(out)) == 2
    assert "holds no results of a GPU" in capsys.readouterr().err
    place.results.mkdir()
    timing.write_result(out / "layer-cuda.json", ENVIRONMENT, layer_rows(**GPU), LayerRow)
    timing.write_result(out / "layer-cpu-fp32.json", ENVIRONMENT, layer_rows(), LayerRow)
    (out / "table4-cuda.json").write_text('{"environment"', encoding="utf-8")
    assert place({}, "--take", str(out)) == 2
    assert "table4-cuda.json is not a stored result" in capsys.readouterr().err
    assert list(place.results.iterdir()) == []
    (out / "table4-cuda.json").rename(out / "notes-cuda.json")
    assert place({}, "--take", str(out)) == 2
    assert "is of no benchmark that has a page" in capsys.readouterr().err
    (out / "notes-cuda.json").unlink()
    timing.write_result(out / "layer-cuda.json", ENVIRONMENT, layer_rows(dry=True, **GPU), LayerRow)
    assert place({}, "--take", str(out)) == 2
    assert "is from a dry run" in capsys.readouterr().err
    assert list(place.results.iterdir()) == []
    timing.write_result(out / "layer-cuda.json", ENVIRONMENT, layer_rows(**GPU), LayerRow)
    assert place({}, "--take", str(out)) == 0
    assert capsys.readouterr().out == "taken over: layer-cuda.json\n"
    assert sorted(path.name for path in place.results.glob("*.json")) == ["layer-cuda.json"]
    text = place.page.read_text(encoding="utf-8")
    assert "**bf16, graph, ours: aten**" in text
    assert "<!-- measured:host -->\nNot measured yet.\n" in text


def test_a_runs_stages_checks_and_winners_have_a_page(place, tmp_path):
    place.mark("measured:run", "measured:doctor", "measured:ceilings", "measured:tune")
    stage = StageRow(
        stage="layer", status="ok", seconds=71.6, limit=98.0, planned=29, compiled=28, compile_seconds=21.4,
        late=["down_kernel"], dry=False,
    )  # fmt: skip
    check = CheckRow(
        group="aten bf16", check="kept", status="pass", error=1e-3, allowed=2e-3, what="h max", reason=None,
        seconds=1.0, dry=False,
    )  # fmt: skip
    wrong = CheckRow(**{**check, "check": "composed", "status": "fail", "error": 3e-3})
    assert place({
        "run-cuda.json": ([stage], StageRow),
        "doctor-cuda.json": ([check], CheckRow),
        "doctor-quick-cuda.json": ([check, wrong], CheckRow),
    }) == 0  # fmt: skip
    text = (tmp_path / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "| layer | ok | 72 of 98 | 21 | 28 of 29 | 1 |" in text
    first, second = text.split("**doctor-quick-cuda**")
    assert "| aten bf16 | 1 | 0 | 0 |\n\nNothing failed.\n\n**Whether it ran the kernels of today" in first
    assert "| aten bf16 | 1 | 1 | 0 |\n\n- aten bf16, composed: h max, error 3.00e-03, allowed 2.00e-03\n" in second
    assert text.count("Not measured yet.") == 2


def test_a_block_stands_in_the_page_that_it_names(place, monkeypatch, capsys):
    blocks = {block.marker: block for block in render.BLOCKS}
    moved = blocks["measured:layer"]._replace(page="docs/layer.md")
    monkeypatch.setattr(render, "BLOCKS", (moved, blocks["measured:table4"]))
    monkeypatch.setattr(render, "DIGESTS", ())
    files = {
        "layer-cpu-fp32.json": (layer_rows(), LayerRow),
        "table4.json": ([table4_row("naive_lora")], Table4Row),
    }
    page = place.readme.parent / "docs" / "layer.md"
    place.mark("measured:table4")
    assert place(files) == 2
    assert "docs/layer.md needs one <!-- measured:layer -->" in capsys.readouterr().err
    assert not page.exists()
    page.parent.mkdir(exist_ok=True)
    page.write_text("above\n<!-- measured:layer -->\n<!-- /measured:layer -->\nbelow\n", encoding="utf-8")
    assert place({}) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- measured:layer -->\n**fp32, eager, ours: aten**")
    assert text.endswith(
        "![layer-cpu-fp32](../results/layer-cpu-fp32.svg)\n<!-- /measured:layer -->\nbelow\n",
    )
    assert "Hydra 8+8" not in place.page.read_text(encoding="utf-8")
    assert place({}, "--check") == 0
    page.write_text(text.replace("Hydra 8+8", "Hydra 9+9"), encoding="utf-8")
    assert place({}, "--check") == 1
    assert "layer.md is stale" in capsys.readouterr().err
    assert place({}) == 0
    assert page.read_text(encoding="utf-8") == text
    # A marker in another page than its own, whichever.
    for wrong, marker, expected in (
        (
            place.page,
            "measured:layer",
            "docs/results.md has markers for measured:layer, expected measured:table4",
        ),
        (page, "measured:table4", "docs/layer.md has markers for measured:table4, expected measured:layer"),
    ):
        right = wrong.read_text(encoding="utf-8")
        wrong.write_text(f"{right}<!-- {marker} -->\n<!-- /{marker} -->\n", encoding="utf-8")
        assert place({}) == 2
        assert expected in capsys.readouterr().err
        wrong.write_text(right, encoding="utf-8")


def test_quantised_bases_have_a_table_of_their_own(place):
    """By hand: ours takes 0.5 of PEFT's steps and 2 of its tokens, and no line of another table."""
    place.mark("measured:quantised", "measured:models", "measured:goals")
    of_base = {"model": "Llama-shaped", "ranks": [16, 0], "batch": 4, "dtype": "bf16", "sequence": 512, "base": "nf4"}
    proof = {"loss": 1e-5, "gradient": 0.0123, "tensor": "A", "allowed": {"loss": 1e-2, "gradient": 0.2}}
    taken = {"naive_lora": (1.0, 1.0, 1e6), "peft_lora": (2.0, 1.0, 5e6), "accelerated_lora": (1.0, 2.0, 4e6)}
    rows = [
        table4_row(
            name, step_seconds=[s, 2 * s, 3 * s], token_seconds=[t, t, t], peak_bytes=peak, parity=proof, **of_base
        )
        for name, (s, t, peak) in taken.items()
    ]
    plain = [{**row, "base": "none", "method": row["method"].replace("accelerated", "ours")} for row in rows]
    files = {"table4-llama-nf4-cpu-bf16.json": (rows, Table4Row), "table4-llama-cpu-bf16.json": (plain, Table4Row)}
    assert place(files) == 0
    text = place.page.read_text(encoding="utf-8")
    block = text.partition("<!-- measured:quantised -->")[2].partition("<!-- /measured:quantised -->")[0]
    assert [line for line in block.splitlines() if line.startswith("| nf4")] == [
        "| nf4 | no | accelerated PEFT LoRA 16 | 4.00 | 0.50 (0.50 to 0.50) | - | 2.00 ▲ (2.00 to 2.00) | 5 | - | 4 |",
    ]
    assert "nf4" not in text.replace(block, "")
    goals_of = [[goal.what, round(goal.figure, 3), goal.limit] for goal in goals.table4_goals({"device": "cpu"}, rows)]
    over = "accelerated PEFT LoRA 16 over PEFT LoRA 16"
    assert goals_of == [[f"{over}, a step", 0.5, 0.95], [f"{over}, peak", 0.8, 0.9], [f"{over}, a token", 2.0, 1.0]]
