"""Writes `api.md` from the package's docstrings: ``python docs/generate_api.py``; ``--check`` only compares."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import hydra_kernels

PAGE = Path(__file__).with_name("api.md")
PACKAGE = hydra_kernels.__name__
# Documented after the package's own names, each where it exists.
MODULES = ("convert", "peft", "parallel", "analysis", "reference")
HEAD = """# API

Every public name, from the docstrings. `python docs/generate_api.py` writes this page.

Symbols: x is [M, K], with leading dimensions flattened; the weight W0 is [N, K]; the ranks are r_a and r_b, and
R = r_a + r_b; [*] stands for any leading dimensions. "Eq. n" is an equation of
[arXiv 2309.06922](https://arxiv.org/abs/2309.06922).
"""
SECTIONS = ("Args:", "Returns:", "Raises:", "Parameters:")


def public(module: ModuleType) -> dict[str, Any]:
    """A module's documented objects by name: those of its ``__all__``, else what it defines without an underscore."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [n for n, o in vars(module).items() if not n.startswith("_") and _defined_in(o, module)]
    return {name: getattr(module, name) for name in names if not inspect.ismodule(getattr(module, name))}


def _defined_in(item: object, module: ModuleType) -> bool:
    return (inspect.isclass(item) or inspect.isfunction(item)) and item.__module__ == module.__name__


def members(of: type) -> dict[str, Any]:
    """Public methods and properties of a class that this package documents, by name; not those of a public base."""
    shown = {id(base) for base in public(hydra_kernels).values() if inspect.isclass(base) and base is not of}
    found: dict[str, Any] = {}
    for base in of.__mro__:
        if id(base) in shown:
            break
        if base.__module__.startswith(PACKAGE):
            found |= {n: m for n, m in vars(base).items() if n not in found and n[0] != "_" and _documented(m)}
    return found


def _documented(member: object) -> bool:
    kinds = (FunctionType, classmethod, staticmethod, property)
    return isinstance(member, kinds) and bool(member.__doc__)  # not one that nn.Module wrote


def signature(name: str, item: Any) -> str:
    """One line where it fits into a hundred letters, else an argument a line."""
    called = inspect.signature(item)
    parts = [_parameter(p) for p in called.parameters.values() if p.name not in ("self", "cls")]
    kinds = [p.kind for p in called.parameters.values() if p.name not in ("self", "cls")]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    returns = called.return_annotation
    end = f" -> {_type(returns)}" if returns is not inspect.Signature.empty and not inspect.isclass(item) else ""
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(parts) + f",\n){end}"


def _parameter(p: inspect.Parameter) -> str:
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    known = p.annotation is not p.empty
    text = f"{star}{p.name}" + (f": {_type(p.annotation)}" if known else "")
    if p.default is p.empty:
        return text
    default = p.default.__name__ if inspect.isfunction(p.default) or inspect.isbuiltin(p.default) else repr(p.default)
    return f"{text} = {default}" if known else f"{text}={default}"


def _type(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def markdown(docstring: str) -> str:
    """A docstring as Markdown: its sections' titles bold, their entries a list."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(docstring).splitlines():
        word = line.strip()
        if line and not line.startswith(" "):
            section = word if word in SECTIONS else ""
        if word in SECTIONS and section:
            lines += [f"**{section}**", ""]
        elif section and re.match(r"    \S", line):
            entry = re.match(r"    ([\w*, ]+): (.*)", line)
            start = f"- `{entry[1]}`: {entry[2]}" if entry else word
            lines.append(start if entry or section in ("Returns:", "Raises:") else f"  {word}")
        else:
            lines.append(f"  {word}" if section and word else word)
    text = re.sub(r":(?:func|class|meth|mod):`~?([^`]+)`", r"`\1`", "\n".join(lines))
    return text.replace("``", "`").strip()


def document(name: str, item: Any, level: str) -> Iterator[str]:
    yield f"{level} {name}"
    if not isinstance(item, property):
        called = item.__func__ if isinstance(item, (classmethod, staticmethod)) else item
        line = signature(name.rpartition(".")[2], called)
        if "(*args, **kwargs)" not in line:
            yield f"```py\n{line}\n```"
    doc = inspect.getdoc(item)
    if not doc:
        raise ValueError(f"{name} has no docstring")
    yield markdown(doc)
    if inspect.isclass(item):
        for member_name, member in members(item).items():
            yield from document(f"{name}.{member_name}", member, level + "#")


def page() -> str:
    parts = [HEAD.strip()]
    present = [f"{PACKAGE}.{name}" for name in MODULES if importlib.util.find_spec(f"{PACKAGE}.{name}")]
    for module in (hydra_kernels, *map(importlib.import_module, present)):
        items = public(module)
        prefix = f"{module.__name__}.".removeprefix(f"{PACKAGE}.")
        links = ", ".join(f"[{name}](#{(prefix + name).lower().replace('.', '')})" for name in items)
        parts += [f"## {module.__name__}", markdown(module.__doc__ or ""), links]
        for name, item in items.items():
            parts += document(prefix + name, item, "###")
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the page, or with ``--check`` says whether it is stale; the exit status."""
    text = page()
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    if "--check" in arguments:
        print("docs/api.md is not what the docstrings say; run python docs/generate_api.py")
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
