"""What people read: its code runs and prints what it says, its links lead somewhere, its tables are what was stored."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tomllib
import torch
import yaml

import hydra_kernels as hk
from hydra_kernels import private
from hydra_kernels.choose import machine

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
]
# Their links are checked too; they hold no code that runs.
MORE_PAGES = [ROOT / name for name in ("CHANGELOG.md", "csrc/README.md", "benchmarks/NOTES.md", "benchmarks/GOALS.md")]
README = (ROOT / "README.md").read_text()
README_LINES = 130  # what a reader takes in at once; all else is a page of docs
CHEAP = {"python -m hydra_kernels"}
_FENCE = re.compile(r"^```(\w*)([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Run(NamedTuple):
    """Blocks that share their names: one and those that continue it. ``source`` has them at their lines of the page."""

    page: Path
    line: int
    source: str
    printed: list[list[str]]  # lines that must be printed, each list's in its order


def text_of(page: Path) -> str:
    return page.read_text() if page.exists() else ""


def runs(page: Path) -> Iterator[Run]:
    text = text_of(page)
    run: Run | None = None
    after = ""  # the language of the block before
    for block in _FENCE.finditer(text):
        language, options, code = block[1], block[2].split(), block[3]
        line = text.count("\n", 0, block.start()) + 2
        if language == "python" and options not in ([], ["continues"], ["notest"]):
            raise ValueError(f"{page}:{line}: unknown option {options}")
        if language == "python" and "notest" not in options:
            if run is not None and "continues" not in options:
                yield run
                run = None
            if run is None:
                run = Run(page, line, "\n" * (line - 1), [])
            run.printed.append(re.findall(r"^ *print\(.*\)  # (.+)$", code, re.MULTILINE))
            source = run.source + "\n" * (line - 1 - run.source.count("\n")) + code
            run = run._replace(source=source)
        elif language == "text" and after == "python" and run is not None:
            run.printed.append(code.splitlines())
        after = language
    if run is not None:
        yield run


RUNS = [run for page in PAGES for run in runs(page)]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A folder, a cache and an environment that nothing outlives."""
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_KERNELS_CACHE", str(tmp_path / "tuned"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    machine.forget()
    yield tmp_path
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)
    machine.forget()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 reads it
@pytest.mark.parametrize(
    "run",
    # Inductor compiles C++ for a page that shows torch.compile.
    [pytest.param(run, marks=[pytest.mark.slow] if "torch.compile(" in run.source else []) for run in RUNS],
    ids=lambda run: f"{run.page.relative_to(ROOT)}:{run.line}",
)
def test_the_code_runs_and_prints_what_the_page_says(run, alone, capsys):
    exec(compile(run.source, str(run.page), "exec"), {"__name__": "__page__"})
    out = capsys.readouterr().out
    for block in run.printed:
        lines = iter(out.splitlines())
        for expected in block:
            assert expected in lines, f"not printed, or not in this order: {expected}\n{out}"


def test_every_page_is_run():
    found = {str(run.page.relative_to(ROOT)) for run in RUNS}
    assert found >= {
        "README.md",
        *(f"docs/{name}.md" for name in ("swap-it-in", "which-backend", "backward", "migrate")),
    }


def test_the_cheap_commands_run_and_the_others_are_of_what_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set()
    for page in PAGES:
        text = text_of(page)
        commands |= {
            line.strip() for block in _FENCE.finditer(text) if block[1] == "bash" for line in block[3].splitlines()
        }
        commands |= set(re.findall(r"`((?:make|python|torchrun) [^`]+)`", text))
    assert commands >= CHEAP
    for command in commands:
        for target in re.findall(r"\bmake (\w+)", command):
            assert target in targets, command
        for module in re.findall(r"python -m ([\w.]+)", command):
            assert importlib.util.find_spec(module), command
        for script in re.findall(r"\b((?:docs|examples)/\w+\.py)", command):
            assert (ROOT / script).exists(), command
    for command in sorted(CHEAP):
        words = [sys.executable, *command.split()[1:]]
        assert subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stderr == ""


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_readme_is_read_at_once():
    assert len(README.splitlines()) <= README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_speaks_of_our_own_goals(page):
    """They are of no use to a reader, and stand in `benchmarks`; where ours is slower, a table marks it."""
    assert re.findall(r"\bMISSED\b|\bLOSS\b|\bgoals?\b", _FENCE.sub("", page.read_text())) == []


@pytest.mark.parametrize("page", PAGES + MORE_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _FENCE.sub("", page.read_text())):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@pytest.mark.parametrize("script", ["generate_api.py", "figures.py"])
def test_what_a_script_writes_is_what_is_committed(script, capsys):
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--check"]) == 0, capsys.readouterr().out


def public_callables():
    modules = [hk, *(getattr(hk, name) for name in hk.__all__ if inspect.ismodule(getattr(hk, name)))]
    for module in modules:
        names = getattr(
            module, "__all__", [n for n, o in vars(module).items() if getattr(o, "__module__", "") == module.__name__]
        )
        for name in names:
            if callable(item := getattr(module, name)) and not name.startswith("_"):
                yield pytest.param(item, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("item", list(public_callables()))
def test_everything_public_has_a_docstring_that_names_every_argument(item):
    doc = inspect.getdoc(item)
    assert doc
    if inspect.isclass(item) and issubclass(item, torch.autograd.Function):
        return
    referred = re.findall(r"Arguments are those of :func:`hydra_kernels\.(\w+)`", doc)
    doc += "".join(inspect.getdoc(getattr(hk, name)) for name in referred)
    for name in inspect.signature(item).parameters:
        assert re.search(rf"\b{name}\b", doc), name


def test_public_names_are_sorted():
    assert sorted(hk.__all__) == hk.__all__


def test_the_two_commands_and_the_license_are_there():
    for command in ("make table4", "make test"):
        assert f"`{command}`" in README
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


def minor(version: str) -> str:
    """Two of a version's numbers."""
    return ".".join(version.split(".")[:2])


def test_the_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hk.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"## {hk.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    # The versions that the pages call tested are those that the tests ran with.
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE))
    assert rows["torch"].startswith(f"{pins['torch']} on a CPU")
    assert rows["PEFT, transformers"] == f"{pins['peft']}, {pins['transformers']}"
    assert rows["Triton"].startswith(f"{pins['triton']}; ")
    ran = sorted(re.findall(r"\d+\.\d+\.\d+", rows["torch"]), key=lambda version: [*map(int, version.split("."))])
    assert f"{minor(ran[0])} to {minor(ran[-1])}" == private.TESTED
    assert f"torch=={ran[0]}/" in (ROOT / "Makefile").read_text()
    assert rows["Triton"].endswith(f"with torch {ran[-1]}")
    oldest = f"torch>={re.search(r'; ([0-9.]+) is the oldest', rows['torch'])[1]}"
    assert oldest in project["dependencies"]
    assert project["requires-python"] == f">={re.search(r'; ([0-9.]+) is the oldest', rows['Python'])[1]}"
    backends = text_of(ROOT / "docs" / "which-backend.md")
    assert f"transformers {minor(pins['transformers'])}, torch {minor(pins['torch'])} |" in backends
    assert f"Triton {minor(pins['triton'])}'s interpreter" in backends
    tested = f"Tested with peft {pins['peft']} and transformers {pins['transformers']}."
    assert tested in text_of(ROOT / "docs" / "peft.md")


def test_the_gpu_versions_are_those_of_the_stored_run():
    from benchmarks.measuring import timing
    from benchmarks.measuring.rows import LayerRow

    ran, _ = timing.read_result(ROOT / "benchmarks" / "results" / "layer-cuda.json", LayerRow)
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE))
    assert f"{ran['torch'].partition('+')[0]} on a GPU" in rows["torch"]
    assert f"{minor(ran['python'])} on a GPU" in rows["Python"]
    assert rows["GPU"].startswith(ran["device"])
    checks = json.loads((ROOT / "benchmarks" / "results" / "doctor-cuda.json").read_text())["rows"]
    assert {check["status"] for check in checks} == {"pass"}
    assert f"passed all of its {len(checks)} checks" in text_of(ROOT / "docs" / "gpu.md")


def test_the_measured_tables_are_those_of_the_stored_results():
    from benchmarks import render

    assert render.main(["--check"]) == 0


def test_the_gpu_pages_summary_is_of_the_stored_results():
    from benchmarks.measuring import timing
    from benchmarks.measuring.rows import LayerRow
    from benchmarks.rendering import layer as render_layer
    from benchmarks.rendering.verdicts import marked

    _, rows = timing.read_result(ROOT / "benchmarks" / "results" / "layer-cuda.json", LayerRow)
    [(_, steps)] = render_layer.layer_steps(render_layer.layer_groups(rows)[0])
    page = text_of(ROOT / "docs" / "gpu.md")
    summary = page[page.index("**The first run**") : page.index("**After the first run**")]
    ours = [made["ours_hydra"] for made in steps]
    rivals = ("naive_hydra", "naive_lora", "naive_seqlora")
    shown = re.findall(r"^\| (\d.*) \|$", summary, re.MULTILINE)
    assert shown == [
        " | ".join([f"{row['M']} x {row['K']} x {row['N']}", *(marked(row["over"][name][1]) for name in rivals)])
        for row in ours
    ]
    assert all(row["over"]["naive_hydra"][1] < 1 for row in ours)
    assert sum(row["over"]["naive_lora"][1] > 1 for row in ours) == 3
    few, many = (steps[0][name]["median_us"] for name in ("naive_lora@parameters", "naive_lora"))
    for figures in (
        "ours is {:.2f} and {:.2f} at ViT's shapes".format(
            *(row["over"]["naive_lora@parameters"][1] for row in ours[:2])
        ),
        f"it takes {few:.0f} us, naive LoRA 16 only {many:.0f} us",
    ):
        assert figures in " ".join(summary.split())
    assert all(made["naive_lora@parameters"]["r_a"] == 11 for made in steps[:2])


def test_the_workflow_runs_what_a_change_must_pass_and_both_ends_of_torch():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert commands == [".ci/run", "make test TORCH=${{ matrix.torch }}"]
    makefile = (ROOT / "Makefile").read_text()
    (torches,) = [job["strategy"]["matrix"]["torch"] for job in jobs if "strategy" in job]
    assert sorted(torches) == sorted(re.findall(r"^CHANGES_(\w+) :=", makefile, re.MULTILINE))
    assert all(job["timeout-minutes"] <= 60 for job in jobs)


def test_the_bug_template_asks_for_the_report():
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {field["id"]: field for field in template["body"] if "id" in field}
    assert "python -m hydra_kernels" in fields["report"]["attributes"]["description"]
    assert all(fields[name]["validations"]["required"] for name in ("what", "code", "report"))


def test_the_error_of_a_missing_import_is_explained_where_people_look(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")  # an optional extra
    from hydra_kernels.peft import HydraConfig

    HydraConfig().save_pretrained(tmp_path)
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "HYDRA")  # as without the import
    with pytest.raises(KeyError) as error:
        peft.PeftModel.from_pretrained(torch.nn.Linear(3, 3), tmp_path)
    for page in ("README.md", "docs/peft.md", "docs/swap-it-in.md"):
        text = (ROOT / page).read_text()
        assert f"`KeyError: {error.value}`" in text, page
        assert "import hydra_kernels.peft" in text, page
