"""The pictures: what they plot is what is stored, slower is red, layers have names, and everything can be read."""

from __future__ import annotations

import itertools
import math
import re
from functools import cache
from pathlib import Path

import numpy
import pytest
from matplotlib import colors, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks import render
from benchmarks.measuring.methods import Ranks
from benchmarks.measuring.rows import Table4Row
from benchmarks.measuring.shapes import CPU_SHAPES, CUDA_SHAPES, layer_name
from benchmarks.measuring.timing import Environment
from benchmarks.rendering import kernels, palette, pictures
from benchmarks.rendering.kernels import Kernels
from benchmarks.rendering.layer_chart import layer_chart
from benchmarks.rendering.learn_chart import differences, learn_chart
from benchmarks.rendering.overview import overview_chart
from benchmarks.rendering.steps_chart import table4_chart
from benchmarks.rendering.tables import Stored

from .test_render import (
    ENVIRONMENT,
    FC2,
    GPU,
    SMALL,
    SQUARE,
    layer_row,
    layer_rows,
    lora_rows,
    table4_rows,
)

RESULTS = render.ROOT / "benchmarks" / "results"
CPU = Environment(**{**ENVIRONMENT, "device": "A Processor", "capability": "AVX2", "driver": None})


def stored(rows: list, environment: Environment = CPU, short: str = "") -> Stored:
    return Stored(Path("results") / "layer-cpu-fp32.json", environment, rows, Kernels(short))


def dots_of(axes: Axes) -> dict[str, list[tuple[float, str]]]:
    """What each mark plots: values and colours, from the top."""
    found: dict[str, list[tuple[float, float, str]]] = {}
    for dots in axes.collections:
        if isinstance(dots, PathCollection):
            edges = itertools.cycle(map(colors.to_hex, dots.get_edgecolors()))
            for (x, y), colour in zip(dots.get_offsets().tolist(), edges, strict=False):
                found.setdefault(dots.get_label(), []).append((y, x, colour))
    return {name: [(x, colour) for _, x, colour in sorted(points)] for name, points in found.items()}


def lines_of(axes: Axes, colour: str) -> list[list[float]]:
    """The ends of the horizontal lines of a colour, from the top."""
    found = []
    for lines in axes.collections:
        if isinstance(lines, LineCollection):
            edges = itertools.cycle(map(colors.to_hex, lines.get_edgecolors()))
            found += [
                (s[0][1], s[0][0], s[1][0]) for s, c in zip(lines.get_segments(), edges, strict=False) if c == colour
            ]
    return [[left, right] for _, left, right in sorted(found) if left != right]


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts if text.get_text()]


def test_the_readmes_picture_has_the_stored_ratios_a_line_a_layer_and_slower_is_red():
    """By hand: ours takes 0.8 of PEFT's time, and 0.9 or 1.02 of plain PyTorch's."""
    fp32 = [
        *lora_rows((FC2,), 0.9, 0.8),
        *lora_rows((SQUARE,), 1.02, 0.8),
        *lora_rows((FC2,), 0.5, 0.5, mode="compile"),
    ]
    bf16 = [*lora_rows((FC2,), 0.3, 0.3, dtype="bf16", dropout=0.1), *lora_rows((SMALL,), 1.0, 0.7, dtype="bf16")]
    card = stored(lora_rows((SQUARE,), 0.95, 1.01, **GPU), ENVIRONMENT, "older kernels")
    figure = overview_chart([stored(fp32), stored(bf16)], [card])
    peft, plain = figure.axes
    blue, red = palette.OURS, palette.SLOWER
    assert dots_of(peft) == {"ours": [(0.8, blue), (0.8, blue), (0.7, blue), (1.01, red)]}
    assert dots_of(plain) == {"ours": [(0.9, blue), (1.02, red), (1.0, blue), (0.95, blue)]}
    assert numpy.allclose(lines_of(plain, red), [[1.01, 1.04]])
    assert numpy.allclose(lines_of(plain, blue), [[0.89, 0.92], [0.99, 1.02], [0.94, 0.97]])
    assert (peft.get_title(loc="left"), plain.get_title(loc="left")) == (
        "time over PEFT's LoRA",
        "time over plain PyTorch's LoRA",
    )
    assert words_of(figure)[:-1] == [
        *("CPU, float32: A Processor, 2 threads", "ViT-B fc2", "6,400 rows", "Llama-8B attention", "8,192 rows"),
        *("CPU, bfloat16: A Processor, 2 threads", "64 to 32", "16 rows"),
        *("GPU, bfloat16, CUDA graphs (older kernels): A Card", "Llama-8B attention", "8,192 rows"),
    ]
    assert [text.get_text() for text in plain.texts] == ["0.90", "1.02", "1.00", "0.95"]
    assert [colors.to_hex(text.get_color()) for text in plain.texts] == [palette.INK, red, palette.INK, palette.INK]
    for axes in figure.axes:
        ones = [
            s for c in axes.collections if isinstance(c, LineCollection) for s in c.get_segments() if s[0][0] == s[1][0]
        ]
        assert [[x for x, _ in segment] for segment in ones] == [[1.0, 1.0]] * 3
        assert axes.get_xlim() == peft.get_xlim()


def test_every_layer_that_is_measured_has_a_name():
    named = {shape: layer_name(shape.K, shape.N) for shape in (*CPU_SHAPES, *CUDA_SHAPES)}
    assert not [name for name in named.values() if " to " in name]
    assert layer_name(768, 3072) == "ViT-B fc1"
    assert layer_name(24, 16) == "24 to 16"


def test_the_picture_of_a_layer_has_the_stored_ratios_a_panel_a_kind():
    rows = layer_rows((FC2, SMALL), ours=0.75) + layer_rows((FC2,), ours=0.9, mode="compile")
    figure = layer_chart(stored(rows, ENVIRONMENT, "older kernels"))
    [hydra] = figure.axes
    assert hydra.get_title(loc="left") == "Hydra"
    naive, blue = palette.NAIVE, palette.OURS
    assert dots_of(hydra) == {
        "plain PyTorch": [(2.0, naive)] * 3,
        "ours": [(0.75, blue), (0.75, blue), (0.9, blue)],
    }
    headings = [words for words in words_of(figure) if words.startswith("Hydra")]
    assert headings == [
        "Hydra 8+8, fp32, eager, ours: aten; A Card (older kernels)",
        "Hydra 8+8, fp32, compile, ours: aten; A Card (older kernels)",
    ]
    hybrid = [{**row, "backend": row["backend"] and "hybrid"} for row in layer_rows()]
    told = [words for words in words_of(layer_chart(stored([*layer_rows(), *hybrid]))) if words.startswith("Hydra")]
    assert [words.split("ours: ")[1] for words in told] == ["aten; A Processor", "hybrid; A Processor"]


def test_our_layer_is_red_where_another_of_its_kind_that_does_the_same_is_faster():
    def drawn(over: dict, **changes) -> list[tuple[float, str]]:
        rows = [
            layer_row(FC2, "naive_lora", Ranks(16, 0), "rank", {"frozen": 1.1}, **changes),
            layer_row(FC2, "peft_lora", Ranks(16, 0), "rank", {"frozen": 1.2}, **changes),
            layer_row(FC2, "ours_lora", Ranks(16, 0), "rank", {"frozen": 1.15, **over}, **changes),
        ]
        return dots_of(layer_chart(stored(rows)).axes[0])["ours"]

    blue, red = [(1.15, palette.OURS)], [(1.15, palette.SLOWER)]
    assert drawn({"naive_lora": 1.0, "peft_lora": 0.9}) == blue
    assert drawn({"naive_lora": 1.01, "peft_lora": 0.9}) == red
    assert drawn({"naive_lora": 0.9, "peft_lora": 1.01}) == red
    assert drawn({"naive_lora": 0.9, "naive_hydra": 1.5}) == blue
    # Plain PyTorch drops nothing.
    assert drawn({"naive_lora": 1.5, "peft_lora": 0.9}, dropout=0.1) == blue
    assert drawn({"naive_lora": 0.9, "peft_lora": 1.01}, dropout=0.1) == red


def test_the_picture_of_table_4_has_ratios_with_the_papers_and_memory():
    """By hand: ours over naive LoRA, SeqLoRA, Hydra is 0.97, 0.97 / 0.9, 0.97 / 2; our LoRA over naive LoRA 1.5."""
    ratios = {"linear_probing": 0.1, "naive_lora": 1.0, "naive_seqlora": 0.9, "naive_hydra": 2.0, "ours_lora": 1.5}
    rows = [
        Table4Row(**{**row, "ratio": ratio, "ratio_q1": ratio - 0.02, "ratio_q3": ratio + 0.01, "paper_ratio": 1.034,
                     "held_bytes": 1e6, "saved_bytes": None, "peak_bytes": 3e6})
        for row in table4_rows()
        for ratio in [ratios.get(row["method"], 0.97)]
    ]  # fmt: skip
    figure = table4_chart(stored(rows, ENVIRONMENT, "older kernels"))
    times, rivals, memory = figure.axes
    assert times.get_xlim() == rivals.get_xlim() == (0.8, 1.2)
    marks = dots_of(times)
    assert marks["plain PyTorch"] == [(1.0, palette.NAIVE), (0.9, palette.NAIVE)]
    assert marks["ours"] == [(0.97, palette.OURS)]
    assert numpy.allclose(lines_of(times, palette.OURS), [[0.95, 0.98]])
    assert marks["the paper's"] == [(1.034, palette.MUTED)] * 6
    # Outside the axis: linear probing on the left; naive Hydra and our LoRA, which is slower, on the right.
    assert marks["below the axis"] == [(0.8, palette.NAIVE)]
    assert marks["above the axis"] == [(1.2, palette.NAIVE), (1.2, palette.SLOWER)]
    assert [text.get_text() for text in times.texts][-2:] == ["1.50 (1.03)", "0.97 (1.03)"]
    assert dots_of(rivals) == {
        "above the axis": [(1.2, palette.SLOWER)],
        "ours": [(pytest.approx(0.97 / 0.9), palette.SLOWER)],
    }
    assert [text.get_text() for text in rivals.texts] == ["1.50 LoRA", "1.08 SeqLoRA"]
    assert dots_of(memory) == {"parameters and optimizer": [(1.0, palette.INK)] * 6, "peak": [(3.0, palette.INK)] * 6}
    assert "ViT-B/32, fp32, eager, batch 1.0 (older kernels)" in words_of(figure)
    assert "A Card." in words_of(figure)[-1]


def test_learning_is_drawn_as_differences():
    """By hand: distances of 3 and 4, of 0 and 0, in two seeds."""
    runs = [({"losses": [5.0, 1.0]}, {"losses": [2.0, 1.0]}), ({"losses": [1.0, 2.0]}, {"losses": [5.0, 2.0]})]
    first, second = differences(runs)
    assert first == math.sqrt((9 + 16) / 2)
    assert math.isnan(second)
    losses = {"naive": [1.0, 2.0], "again": [1.1, 2.0], "ours": [1.0, 2.3]}
    rows = [
        {"experiment": "equal", "dtype": "fp32", "method": f"{owner}_{kind}", "seed": seed, "form": form,
         "losses": [loss + 4 * seed for loss in losses[owner]]}
        for kind in ("lora", "seqlora", "hydra") for owner in losses for seed in (0, 1)
        for form in ["kept" if owner == "ours" else None]
    ]  # fmt: skip
    axes = learn_chart(stored(rows)).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    expected = {
        "plain PyTorch, another seed": [4.0, 4.0],
        "plain PyTorch, batches in another order": [0.1, math.nan],
        "ours, kept": [math.nan, 0.3],
    }
    assert drawn.keys() == expected.keys()
    for name, values in expected.items():
        assert numpy.allclose(drawn[name], values, equal_nan=True)
    assert axes.get_yscale() == "log"


def test_a_picture_brings_its_card_and_is_drawn_alike_again():
    draw = pictures.svg(layer_chart, stored(layer_rows()))
    assert draw == pictures.svg(layer_chart, stored(layer_rows()))
    assert '<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="600pt"' in draw
    # Nothing is drawn before the card, which fills the picture but for its edge.
    before, card = draw.split(f"fill: {palette.CARD}", 1)[0], draw.index(f"fill: {palette.CARD}")
    assert re.findall(r"fill: (#\w+|none)", before) == ["none"]
    assert card < draw.index("<text")


def test_the_parts_of_a_picture_stand_at_rounded_places():
    """The last digits of the layout's solver reach the names in the file."""
    figure = pictures.canvas(200.0)
    figure.subplots(1, 2)
    pictures.svg(lambda: figure)
    bounds = [value for axes in figure.axes for value in axes.get_position().bounds]
    assert numpy.abs(numpy.array(bounds) - numpy.round(bounds, 4)).max() < 1e-12


def linear(colour: str) -> numpy.ndarray:
    values = numpy.array(colors.to_rgb(colour))
    return numpy.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(colour: str) -> float:
    """With the card, as WCAG has it."""
    own, card = (float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (colour, palette.CARD))
    return (card + 0.05) / (own + 0.05)


# What eyes without one kind of cones see of linear RGB (Machado et al., 2009), and all eyes.
EYES = (
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
)


def lab(colour: str, eyes: list[list[float]]) -> numpy.ndarray:
    seen = numpy.clip(numpy.array(eyes) @ linear(colour), 0, 1)
    to_xyz = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]
    x, y, z = numpy.cbrt(numpy.array(to_xyz) @ seen)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_letters_and_marks_can_be_read_and_told_apart_by_everyone():
    assert min(map(contrast, (palette.INK, palette.MUTED, palette.SLOWER))) >= 4.5
    assert min(map(contrast, palette.MARKS)) >= 3
    for eyes in EYES:
        for one, other in itertools.combinations(palette.MARKS, 2):
            assert numpy.linalg.norm(lab(one, eyes) - lab(other, eyes)) >= 20, (one, other)


@cache
def found() -> dict[str, list[Stored]]:
    read = {
        block.marker: render.stored_results(RESULTS, block) for block in render.BLOCKS if block.chart or block.overview
    }
    return render.with_kernels(read, kernels.recorded(render.ROOT, RESULTS, []))


def name_of(path: Path) -> str:
    """A file of results without its suffix; a further processor's with its folder."""
    return path.relative_to(RESULTS).with_suffix("").as_posix()


def published() -> dict[str, tuple]:
    """What draws each picture of the stored results, and of what."""
    first = {marker: render.of_first(files, RESULTS) for marker, files in found().items()}
    made = {Path(picture.name).stem: (picture.chart, [first[of] for of in picture.of]) for picture in render.PICTURES}
    for block in render.BLOCKS:
        made |= {name_of(file.path): (block.chart, [file]) for file in found().get(block.marker, []) if block.chart}
        made |= {block.marker.partition(":")[2]: (block.overview, [first[block.marker]])} if block.overview else {}
    return made


def check_layout(figure: Figure) -> None:
    """No words leave the card, and no legend covers what is drawn."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    inner = figure.bbox.padded(-3 * figure.dpi / pictures.POINTS)
    # Numbers of an axis stand there beyond its ends too, undrawn.
    ticks = {text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())}
    for text in figure.findobj(Text):
        if text.get_text() and text.get_visible() and text not in ticks:
            box = text.get_window_extent(renderer)
            assert inner.x0 <= box.x0 < box.x1 <= inner.x1, text
            assert inner.y0 <= box.y0 < box.y1 <= inner.y1, text
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for legend, axes in itertools.product(legends, figure.axes):
        assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))


@pytest.mark.parametrize("draw", [layer_chart, table4_chart])
def test_words_stay_on_the_card_and_the_legend_is_clear_of_the_dots(draw):
    rows = layer_rows((FC2, SMALL)) if draw is layer_chart else table4_rows()
    with rc_context(pictures.STYLE):
        check_layout(draw(stored(rows)))


# One of each kind; the others differ in their rows alone.
QUICK = ("overview", "table4-cpu-bf16", "layer-cpu-bf16-dropout0.05", "learn-cpu-digits")
NAMES = sorted(name_of(path) for path in RESULTS.rglob("*.svg"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_words_stay_on_the_card_of_every_stored_picture(name):
    draw, given = published()[name]
    with rc_context(pictures.STYLE):
        check_layout(draw(*given))


def test_the_documentations_pictures_have_the_same_card():
    for path in (render.ROOT / "docs").glob("*.svg"):
        first = path.read_text(encoding="utf-8").index("<rect")
        assert f'rx="8" fill="{palette.CARD}"' in path.read_text(encoding="utf-8")[first:].partition("/>")[0], path


def test_every_stored_picture_stands_in_a_page():
    pages = [render.ROOT / "README.md", *(render.ROOT / "docs").glob("*.md")]
    linked = {
        (page.parent / target).resolve()
        for page in pages
        for target in re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", page.read_text(encoding="utf-8"))
    }
    drawn = {
        path.resolve() for folder in ("docs", "benchmarks/results") for path in (render.ROOT / folder).rglob("*.svg")
    }
    assert linked == drawn
