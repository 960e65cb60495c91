"""Draws the figures of `backward.md` as SVG files beside it: ``python -m docs.figures``; ``--check`` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.rendering.palette import BORDER, CARD, INK, MUTED

FOLDER = Path(__file__).parent
SMALL = 12  # letters of remarks and shapes
# What a colour means in every figure.
PLAIN, FROZEN, ADAPTER, SAVED, NEVER = "#ffffff", "#d7dbe0", "#ffe3b0", "#bfe5c8", CARD


class Figure:
    """Boxes, arrows and words on the card of every picture, in the order in which they were added."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self, x: int, y: int, w: int, h: int, text: str, fill: str = PLAIN, below: str = "", size: int = 15
    ) -> None:
        """A box with its corner at (x, y): a name, and its shape in small letters under it."""
        dashes = ' stroke-dasharray="4 3"' if fill == NEVER else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="4" fill="{fill}" stroke="{MUTED}"{dashes}/>'
        )
        self.text(x + w // 2, y + h // 2 + (0 if below else 5), text, "middle", size)
        if below:
            self.text(x + w // 2, y + h // 2 + 15, below, "middle", SMALL)

    def text(self, x: int, y: int, text: str, anchor: str = "start", size: int = 15) -> None:
        fill = MUTED if size == SMALL else INK
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{text}</text>'
        )

    def arrow(self, *points: tuple[int, int]) -> None:
        line = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(f'<polyline points="{line}" fill="none" stroke="{MUTED}" marker-end="url(#head)"/>')

    def legend(self, y: int, *colours: tuple[str, str]) -> None:
        x = 20
        for fill, meaning in colours:
            self.parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{fill}" stroke="{MUTED}"/>')
            self.text(x + 20, y, meaning, size=SMALL)
            x += 46 + 6 * len(meaning)

    def svg(self) -> str:
        head = '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" font-family="sans-serif">',
                f'<defs>{head}<path d="M0,0 L8,4 L0,8 z" fill="{MUTED}"/></marker></defs>',
                f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="8" fill="{CARD}" '
                f'stroke="{BORDER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


def branches() -> Figure:
    """Eq. 9-10 as they are written, and the same in composed form."""
    f = Figure(760, 395)
    f.text(20, 28, "As Eq. 9-10 say it")
    f.box(20, 75, 60, 50, "x", below="M x K")
    f.box(180, 75, 90, 50, "W0, b0", FROZEN, "N x K")
    f.box(350, 75, 60, 50, "y0", below="M x N")
    f.box(180, 140, 90, 40, "A_down", ADAPTER)
    f.box(345, 140, 70, 40, "A_up", ADAPTER)
    f.box(470, 20, 90, 40, "B_down", ADAPTER)
    f.box(590, 20, 70, 40, "B_up", ADAPTER)
    f.box(690, 75, 50, 50, "h", below="M x N")
    f.arrow((80, 100), (180, 100))
    f.arrow((270, 100), (350, 100))
    f.arrow((410, 100), (690, 100))
    f.arrow((130, 100), (130, 160), (180, 160))
    f.arrow((270, 160), (345, 160))
    f.arrow((415, 160), (715, 160), (715, 125))
    f.text(425, 154, "times s_a", size=SMALL)
    f.arrow((440, 100), (440, 40), (470, 40))
    f.arrow((560, 40), (590, 40))
    f.arrow((660, 40), (715, 40), (715, 75))
    f.text(668, 34, "times s_b", size=SMALL)

    f.text(20, 225, "Composed: y0 never exists")
    f.box(20, 255, 60, 50, "x", SAVED, "M x K")
    f.box(180, 255, 160, 50, "W0, b0 + u", FROZEN, "N x K")
    f.box(180, 315, 160, 40, "D = [A_down; C]", ADAPTER, "R x K")
    f.box(400, 315, 60, 40, "Z", SAVED, "M x R")
    f.box(520, 315, 90, 40, "U^T", ADAPTER, "R x N")
    f.box(690, 255, 50, 50, "h", below="M x N")
    f.arrow((80, 280), (180, 280))
    f.arrow((340, 280), (690, 280))
    f.arrow((130, 280), (130, 335), (180, 335))
    f.arrow((340, 335), (400, 335))
    f.arrow((460, 335), (520, 335))
    f.arrow((610, 335), (715, 335), (715, 305))
    f.text(360, 270, "C = B_down W0: once a pass, without a row of x", size=SMALL)
    f.legend(382, (FROZEN, "frozen"), (ADAPTER, "rank R"), (SAVED, "saved for the backward"))
    return f


def forms() -> Figure:
    """What each form computes in the forward, what it saves, and what never exists."""
    f = Figure(760, 300)
    titles = ("composed", "kept", "effective")
    steps = (
        (("C = B_down W0", ADAPTER), ("Z = x D^T + d", SAVED), ("h = x W0^T + Z U^T + b0 + u", PLAIN), ("y0", NEVER)),
        (("y0 = x W0^T + b0", SAVED), ("Z_b = y0 B_down^T + b_d", SAVED), ("h = y0 + Z U^T + u", PLAIN), ("C", NEVER)),
        (("C = B_down W0", ADAPTER), ("W = W0 + U D", ADAPTER), ("h = x W^T + b", PLAIN), ("Z, y0", NEVER)),
    )
    saved = ("saves x, Z, D: (1 + R/K + R/M) x", "saves y0, Z; x only where r_a > 0", "saves x and D")
    for i, title in enumerate(titles):
        x = 20 + 245 * i
        f.text(x, 28, title)
        for j, (text, fill) in enumerate(steps[i]):
            y = 45 + 52 * j
            f.box(x, y, 215, 36, text + (" never exists" if fill == NEVER else ""), fill, size=13)
            if 0 < j < 3:
                f.arrow((x + 107, y - 16), (x + 107, y))
        f.text(x, 262, saved[i], size=SMALL)
    f.legend(288, (SAVED, "saved, M rows"), (ADAPTER, "without M: small where M is large"), (NEVER, "never exists"))
    return f


def passes() -> Figure:
    """The large tensors that each pass of the composed form reads and writes."""
    f = Figure(760, 410)
    columns = ("x [M, K]", "W0 [N, K]", "G or h [M, N]", "dx [M, K]")
    rows = (
        ("C", "C = B_down W0, then D, U, d, u", (1,), ""),
        ("Z", "Z = x D^T + d", (0,), ""),
        ("forward", "h = x W0^T + Z U^T + b0 + u", (0, 1), "2"),
        ("dZ", "dZ = G U, sum of G", (2,), ""),
        ("dU", "dU = G^T Z", (2,), ""),
        ("dx", "dx = G W0 + dZ D", (1, 2), "3"),
        ("dD", "dD = dZ^T x, sum of dZ", (0,), ""),
        ("dB_down", "T W0^T + (sum of dZ_b) b0^T", (1,), ""),
    )
    for j, title in enumerate(columns):
        f.text(435 + 90 * j, 30, title, "middle", size=SMALL)
    for i, (name, formula, reads, writes) in enumerate(rows):
        y = 48 + 40 * i
        f.text(20, y + 18, name)
        f.text(100, y + 18, formula, size=13)
        for j in range(4):
            word, fill = ("read", FROZEN) if j in reads else ("written", SAVED) if str(j) == writes else ("", PLAIN)
            f.box(400 + 90 * j, y, 70, 28, word, fill)
    f.text(20, 395, "The frozen layer's step alone: x and W0 read, h written; G and W0 read, dx written.", size=SMALL)
    return f


FIGURES = {"branches.svg": branches, "forms.svg": forms, "passes.svg": passes}


def main(arguments: list[str]) -> int:
    """Writes the files, or with ``--check`` says which differ; the exit status."""
    stale = [name for name, draw in FIGURES.items() if not _is(FOLDER / name, draw().svg())]
    for name in stale:
        if "--check" in arguments:
            print(f"docs/{name} is not what docs/figures.py draws; run python -m docs.figures")
        else:
            (FOLDER / name).write_text(FIGURES[name]().svg(), encoding="utf-8")
    return 1 if stale and "--check" in arguments else 0


def _is(path: Path, content: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
