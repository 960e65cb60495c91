"""The colours of every picture, those of the documentation too.

A picture brings its own light card, so that it reads the same on a white page and on a dark one. On the card letters
have a contrast of at least 4.5 and marks of at least 3, and colour-blind readers can tell the marks apart.
"""

from __future__ import annotations

CARD, BORDER, GRID = "#f6f8fa", "#d0d7de", "#d8dee4"
# Letters and the line at 1.0; then what matters less.
INK, MUTED = "#1f2328", "#59636e"
# Marks: ours, ours where it is slower, plain PyTorch, PEFT, and plain PyTorch under torch.compile.
OURS, SLOWER, NAIVE, PEFT, COMPILED = "#0077bb", "#cc3311", "#57606a", "#603020", "#781ed2"
MARKS = (OURS, SLOWER, NAIVE, PEFT, COMPILED)
