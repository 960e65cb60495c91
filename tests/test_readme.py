"""The README's code runs as it stands, and what it says about the project is so."""

import re
from pathlib import Path

import pytest
import tomllib

import hydra_kernels as hk

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1][:30])
def test_every_python_block_runs(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "tuned"))
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    if "plain" in names:
        assert not [m for m in names["plain"].modules() if isinstance(m, hk.HydraLinear)]
    if "loss" in names:
        assert out.startswith("trainable parameters: 3,210 of ")
        assert names["loss"].item() > 0
    if "hk.tune" in block:
        assert "runs      hybrid, composed form" in out
        assert [path.name.endswith("float32-256-64-48-4-4.json") for path in (tmp_path / "tuned").iterdir()] == [True]
    assert "plain" in names or "hk.tune" in block


def test_the_two_commands_and_the_license_are_there():
    for command in ("make table4", "make test"):
        assert f"`{command}`" in README
    assert {"table4", "test", "mutate", "lint"} <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_number_of_mutations_is_the_files():
    groups = tomllib.loads((ROOT / "tests" / "mutations.toml").read_text())["group"]
    assert f"puts {sum(len(g['mutations']) for g in groups)} named defects" in README


def test_the_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hk.__version__
    assert f"## {hk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_everything_public_is_documented():
    for name in hk.__all__:
        assert getattr(hk, name).__doc__, name
    assert sorted(hk.__all__) == hk.__all__


def test_the_measured_tables_are_those_of_the_stored_results():
    from benchmarks import render

    assert render.main(["--check"]) == 0
