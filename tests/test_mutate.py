"""`python -m tests.mutate` itself: what it runs, in which order, and which mutations a change touches."""

import pytest

from . import mutate
from .mutate import Mutation, Order, Selection, union


def test_a_selection_leaves_slow_tests_out_unless_it_asks_for_them():
    plain = Selection.of("tests/a.py tests/b.py -k 'x and not y'")
    assert plain == Selection(("tests/a.py", "tests/b.py"), "x and not y", "not slow")
    assert plain.arguments == ["tests/a.py", "tests/b.py", "-m", "not slow", "-k", "x and not y"]
    assert Selection.of("tests/a.py -m slow").arguments == ["tests/a.py", "-m", "slow"]


def test_the_union_runs_each_file_once():
    made = union([Selection.of(s) for s in ("a.py b.py -k x", "a.py -k y", "b.py", "c.py -m slow", "c.py -k z")])
    assert made == [
        Selection(("a.py",), "(x) or (y)", "not slow"),
        Selection(("b.py",), "", "not slow"),
        Selection(("c.py",), "", "slow"),
        Selection(("c.py",), "(z)", "not slow"),
    ]


class Item:
    """Of pytest's items what the order asks for."""

    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_one_case_of_each_test_comes_first_and_cheap_ones_before_dear_ones():
    seconds = {f"dear[{i}]": 10.0 for i in range(3)} | {f"cheap[{i}]": 1.0 for i in range(30)} | {"single": 2.0}
    items = [Item(name) for name in seconds]
    Order(seconds).pytest_collection_modifyitems(items)
    tests = [item.nodeid.partition("[")[0] for item in items]
    assert tests[0] == "cheap"
    assert tests.index("single") < 3
    assert 8 <= tests.index("dear") <= 11
    assert sorted(item.nodeid for item in items) == sorted(seconds)


A = Mutation("a", "hydra_kernels/a.py", "x", "y", "tests/test_a.py -k one")
B = Mutation("b", "hydra_kernels/b.py", "x", "y", "tests/test_b.py")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], []),
        (["README.md", "tests/mutate.py"], []),
        (["hydra_kernels/a.py"], [A]),
        (["tests/test_b.py"], [B]),
        (["tests/cases.py"], [A, B]),
        (["tests/mutations.toml"], [B]),
    ],
    ids=str,
)
def test_a_change_touches_mutations_of_its_files_and_tests(changed, expected, monkeypatch):
    """Against a revision whose mutation b replaced another text."""
    before = f'[[group]]\nfile = "{A.file}"\ntests = "{A.tests}"\n[group.mutations]\na = ["x", "y"]\n'
    before += f'[[group]]\nfile = "{B.file}"\ntests = "{B.tests}"\n[group.mutations]\nb = ["z", "y"]\n'
    said = {"diff": "\n".join(changed), "show": before}
    monkeypatch.setattr(mutate, "git", lambda command, *rest: said[command])
    assert mutate.touched([A, B], "REVISION") == expected
