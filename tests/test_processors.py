"""Results of two processors: each has tables, goals and a machine's number of its own, and nothing mixes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import render
from benchmarks.measuring import timing
from benchmarks.measuring.rows import HostRow, LayerRow, Table4Row
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import goals

from .test_render import ENVIRONMENT, FC2, GPU, SMALL, layer_rows, lora_rows, table4_row, table4_rows

INTEL = Environment(**{**ENVIRONMENT, "device": "An Intel", "capability": "AVX512", "driver": None})
AMD = Environment(**{**INTEL, "device": "AMD EPYC", "capability": "AVX2"})
STEPS = ("table4", "models", "accelerated", "layer", "host")


@pytest.fixture
def site(tmp_path: Path):
    """Pages with the markers of steps, the README's and the goals' beside; and a function that renders them."""
    pages = {page: "" for page in (render.README, render.RESULTS, render.GOALS)}
    for part in (*render.BLOCKS, *render.DIGESTS):
        if part.marker.partition(":")[2] in (*STEPS, "gpu", "machines", "summary", "goals"):
            pages[part.page] += f"<!-- {part.marker} -->\n<!-- /{part.marker} -->\n"
    for page, text in pages.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text, encoding="utf-8")

    results = tmp_path / "benchmarks" / "results"

    def publish(files: dict[str, tuple[Environment, list, type]], *options: str) -> int:
        for name, stored in files.items():
            timing.write_result(results / name, *stored)
        return render.main(["--root", str(tmp_path), "--results", str(results), *options])

    def block(marker: str, page: str = render.RESULTS) -> str:
        text = (tmp_path / page).read_text(encoding="utf-8")
        return text[text.index(f"<!-- measured:{marker} -->") : text.index(f"<!-- /measured:{marker} -->")]

    publish.results, publish.block = results, block
    return publish


def script_rows(ours: float) -> list[Table4Row]:
    """A PEFT script of two rounds, of which ours takes that share."""
    taken = {"naive_lora": 1.0, "peft_lora": 1.0, "accelerated_lora": ours}
    of_script = {"model": "Llama-shaped", "ranks": [16, 0], "sequence": 512}
    proof = {"loss": 1e-6, "gradient": ours / 1e6, "tensor": "A", "allowed": {"loss": 1e-5, "gradient": 0.2}}
    return [table4_row(name, step_seconds=[s, 2 * s], parity=proof, **of_script) for name, s in taken.items()]


def host_rows(ours: float) -> list[HostRow]:
    over = {name: [ours, ours, ours] for name in ("frozen", "naive_lora", "naive_hydra")}
    changes = {"M": 8, "K": 32, "N": 32, "device": "cpu", "dtype": "fp32", "method": "ours_hydra", "backend": "native"}
    return [HostRow(**{**dict.fromkeys(HostRow.__annotations__, 1), **changes, "over": over, "dry": False})]


def results_of(environment: Environment, folder: str, ours: float) -> dict[str, tuple[Environment, list, type]]:
    """One file of each benchmark, of which ours takes that share of its rivals' time."""
    llama = [Table4Row(**{**row, "model": "Llama-shaped"}) for row in table4_rows(ours)]
    files = {
        "table4-cpu-fp32": (table4_rows(ours), Table4Row),
        "table4-llama-cpu-fp32": (llama, Table4Row),
        "table4-llama-peft-cpu-fp32": (script_rows(ours), Table4Row),
        "layer-cpu-fp32": (layer_rows(ours=ours) + lora_rows((SMALL,), ours, ours), LayerRow),
        "host-cpu": (host_rows(ours), HostRow),
    }
    return {f"{folder}{name}.json": (environment, *stored) for name, stored in files.items()}


def titles(text: str) -> list[str]:
    return re.findall(r"^\*\*(.+)\*\*$", text, flags=re.MULTILINE)


def test_each_table_of_a_second_processor_stands_below_the_firsts_and_says_whose_it_is(site):
    assert site(results_of(INTEL, "", 0.9)) == 0
    alone = {marker: titles(site.block(marker)) for marker in STEPS}
    assert "Intel" not in str(alone)
    assert site(results_of(AMD, "zen3/", 0.5)) == 0
    assert site.block("machines").count("Machine") == 2
    for marker, of in alone.items():
        text = site.block(marker)
        if of:
            expected = [f"{title}; {device}" for device in ("An Intel", "AMD EPYC") for title in of]
        else:
            expected = ["An Intel", "AMD EPYC"]
        assert titles(text) == expected, marker
        first, second = text.split(f"{expected[len(expected) // 2]}**")
        assert ("Machine 1;" in first, "Machine 2;" in first) == (True, False), marker
        assert ("Machine 1;" in second, "Machine 2;" in second) == (False, True), marker
        # Naive Hydra takes twice as long as naive LoRA.
        shares = ("0.45 (", "0.25 (") if marker in ("table4", "models") else ("0.90", "0.50")
        assert [share in first for share in shares] == [True, False], marker
        assert [share in second for share in shares] == [False, True], marker
    # What was proved is each processor's own too.
    assert re.findall(r"by hand: within (\S+)", site.block("accelerated")) == ["9.0e-07", "5.0e-07"]
    for name in ("table4-cpu-fp32", "layer-cpu-fp32"):
        assert re.findall(rf"!\[(.*{name})\]\((.*)\)", site.block(name.partition("-")[0])) == [
            (name, f"../benchmarks/results/{name}.svg"),
            (f"zen3/{name}", f"../benchmarks/results/zen3/{name}.svg"),
        ]
        assert "AMD EPYC" in (site.results / "zen3" / f"{name}.svg").read_text(encoding="utf-8")
    assert site({}, "--check") == 0


def test_the_readme_and_the_pictures_of_many_runs_keep_to_the_first_processor(site):
    """Also where the first has no such run."""
    card = {"layer-cuda.json": (ENVIRONMENT, lora_rows((FC2,), 0.9, 0.8, **GPU), LayerRow)}
    assert site(results_of(INTEL, "", 0.9) | card) == 0
    pictures = [site.results / "overview.svg", site.results / "models.svg"]
    before = [path.read_bytes() for path in pictures], site.block("summary", render.README)
    bf16 = {"zen3/layer-cpu-bf16.json": (AMD, lora_rows((FC2,), 0.5, 0.5, dtype="bf16"), LayerRow)}
    assert site(results_of(AMD, "zen3/", 0.5) | bf16) == 0
    assert "AMD EPYC" in site.block("layer")
    assert ([path.read_bytes() for path in pictures], site.block("summary", render.README)) == before
    assert "A Card" in before[1]
    for path in site.results.glob("*.json"):
        path.unlink()
    assert site({}) == 0
    assert "AMD" not in site.block("summary", render.README)


def test_each_processor_is_held_to_its_own_goals_by_its_own_rows(site):
    assert site(results_of(INTEL, "", 0.9) | results_of(AMD, "zen3/", 0.6)) == 0
    lines = [line.split(" | ") for line in site.block("goals", render.GOALS).splitlines() if "over" in line]
    told = {
        device: [[figure.partition(" ")[0], goal] for run, what, figure, goal, _ in lines if run.endswith(device)]
        for device in ("An Intel", "AMD EPYC")
    }
    # Two models over naive LoRA and over naive SeqLoRA, which takes 0.9 of that; the script; the layer; the host.
    assert told["An Intel"] == [
        *[["0.900", "0.98"], ["1.000", "0.98"]] * 2,
        ["0.900", "0.88"],
        *[["0.900", "0.8"], ["0.900", "1"]],
        ["0.900", "0.6"],
    ]
    assert told["AMD EPYC"] == [
        *[["0.600", "0.87"], ["0.667", "0.88"]] * 2,
        ["0.600", "0.65"],
        *[["0.600", "0.8"], ["0.600", "1"]],
        ["0.600", "0.6"],
    ]


def test_the_layers_goals_are_of_the_processors_maker_and_of_what_it_multiplies():
    def limits(environment: Environment, **changes) -> list[str]:
        rows = layer_rows((FC2, SMALL), **changes) + lora_rows((FC2, SMALL), 0.5, 0.5, **changes)
        native = [LayerRow(**{**row, "backend": row["backend"] and "native"}) for row in rows]
        return [f"{goal.what.partition(',')[0]} {goal.limit:g}" for goal in goals.layer_goals(environment, native)]

    assert limits(INTEL) == [
        "our Hydra 8+8 over naive Hydra 0.76",
        "our Hydra 8+8 over naive LoRA of equal R 0.93",
        "our Hydra 8+8 over the frozen layer 1.06",
        "our Hydra 8+8 over naive Hydra 0.8",
        "our LoRA 16 over PEFT's LoRA of equal R 0.85",
    ]
    assert limits(AMD) == [
        "our Hydra 8+8 over naive Hydra 0.76",
        "our Hydra 8+8 over naive LoRA of equal R 0.53",
        "our Hydra 8+8 over the frozen layer 0.58",
        "our Hydra 8+8 over naive Hydra 0.8",
        "our LoRA 16 over PEFT's LoRA of equal R 0.7",
    ]
    assert limits(AMD, mode="compile") == limits(INTEL, mode="compile")
    # Those of Hydra in bf16 are for AVX512-BF16 and AMX.
    newer = Environment(**{**AMD, "capability": "AVX512"})
    assert limits(INTEL, dtype="bf16") == limits(newer, dtype="bf16")
    assert len(limits(INTEL, dtype="bf16")) == 4
    assert limits(AMD, dtype="bf16") == ["our LoRA 16 over PEFT's LoRA of equal R 0.7"]
    assert limits(AMD, dtype="bf16", dropout=0.1) == limits(INTEL, dtype="bf16", dropout=0.1)
    card = Environment(**{**ENVIRONMENT, "device": "AMD Instinct"})
    assert [goal.limit for goal in goals.table4_goals(card, table4_rows())] == [0.95, 0.97]


def test_one_folder_is_of_one_processor(site, capsys):
    """Else chance would decide which of them the README shows."""
    assert site(results_of(INTEL, "", 0.9)) == 0
    before = site.block("layer")
    assert site({"layer-cpu-fp32-zen3.json": (AMD, layer_rows(), LayerRow)}) == 2
    told = capsys.readouterr().err
    assert "layer-cpu-fp32-zen3.json is of AMD EPYC, table4-cpu-fp32.json beside it of An Intel: a further" in told
    assert site.block("layer") == before
    (site.results / "layer-cpu-fp32-zen3.json").unlink()
    # A GPU is beside every processor.
    card = {"layer-cuda.json": (ENVIRONMENT, layer_rows(**GPU), LayerRow)}
    assert site(card | {"zen3/layer-cpu-fp32.json": (AMD, layer_rows(), LayerRow)}) == 0
    assert site({"zen3/host-cpu.json": (INTEL, host_rows(0.9), HostRow)}) == 2
