"""Names that torch does not promise: looked up in one place, and a torch without one is refused with a word of help."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import hydra_kernels as hk
from hydra_kernels import private

PACKAGE = Path(hk.__file__).parent
# Where torch keeps what the package reads of it.
NAMES = [
    *(("torch._C", name) for name in ("_are_functorch_transforms_active", "_len_torch_dispatch_stack")),
    *(("torch._C", "_current_graph_task_id"), ("torch._C._functorch", "is_legacy_batchedtensor")),
    *(("torch._subclasses.fake_tensor", "FakeTensor"), ("torch.autograd.variable.Variable", "_execution_engine")),
    *(("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack"), ("torch.compiler", "_is_exporting_flag")),
    *(("torch.autograd.forward_ad", "_current_level"), ("torch.nn.Module", "_load_from_state_dict")),
]


def private_names(source: str) -> Iterator[str]:
    """What a file reads of torch under a name that begins with an underscore."""
    tree, roots = ast.parse(source), {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("torch.")]
        elif isinstance(node, ast.Attribute) and ast.unparse(node).partition(".")[0] in roots:
            names = [ast.unparse(node)]
        else:
            continue
        yield from (name for name in names if re.search(r"\._(?!_)", name))


def test_names_that_torch_does_not_promise_are_read_in_one_file():
    read = {path.name for path in PACKAGE.rglob("*.py") if any(private_names(path.read_text()))}
    assert read == {"private.py"}


def test_such_names_are_seen():
    source = "import torch\nfrom torch.autograd import forward_ad\ntorch._C.f()\nforward_ad._x\nfrom torch._a import b"
    assert set(private_names(source)) == {"torch._C", "torch._C.f", "forward_ad._x", "torch._a.b"}


def loaded() -> None:
    """Reads private.py once more, as at the start of a process."""
    spec = importlib.util.spec_from_file_location("read_again", private.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def owner(path: str) -> object:
    """A module, or a class in one."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name) if name[0].isupper() and name != "_C" else None


@pytest.mark.parametrize(("where", "name"), NAMES, ids=lambda value: value)
def test_a_torch_without_the_name_is_refused_with_what_to_do(monkeypatch, where, name):
    loaded()
    monkeypatch.delattr(owner(where) or importlib.import_module(where), name)
    with pytest.raises(ImportError) as error:
        loaded()
    assert name in str(error.value)
    assert f"which torch {torch.__version__} does not have" in str(error.value)
    assert "was tested with torch 2.11 to 2.14: install one of these, or a newer hydra_kernels" in str(error.value)


def test_modules_that_keep_their_hooks_elsewhere_are_refused(monkeypatch):
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            del self.__dict__["_forward_pre_hooks"]

    monkeypatch.setattr(nn, "Module", Module)
    with pytest.raises(ImportError, match=r"needs torch\.nn\.Module\._forward_pre_hooks"):
        loaded()


def test_the_mark_that_torch_compile_obeys_is_torchs():
    """`machine.here` carries it without importing the compiler."""
    marked = torch.compiler.assume_constant_result(lambda: 0)
    assert vars(marked).keys() & vars(hk.choose.machine.here).keys() == {"_dynamo_marked_constant"}
