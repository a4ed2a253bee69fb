"""Every command of the README and the quickstart works as written; every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trimtab.recipe.load import load_recipe
from trimtab.study.plan import make_plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    lines = [
        line
        for page in ("README.md", "docs/quickstart.md")
        for block in blocks(page, "sh")
        for line in block.splitlines()
    ]
    return list(dict.fromkeys(line.split("  #")[0].strip() for line in lines if line.strip()))


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_command(command: str, tmp_path: Path) -> None:
    """`trimtab` verbs run for real (studies at a cut so small that they take seconds); `make` and `pip` are looked up."""
    words = shlex.split(command.replace(".venv/bin/", ""))
    if words[0] == "make":
        done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if words[0] == "pip":
        extras = re.findall(r"\[(.*?)\]", command)
        assert all(f"{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        return
    assert words[0] == "trimtab"
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    if words[1] == "run":
        words[1] = "plan"  # tests/test_run.py runs a study; here the command line and the recipe are what is tested
    if words[1] == "report":
        pytest.skip("needs the tour's artefacts; `report` is run in tests/test_run.py")
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", *words[1:]]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_recipe_in_the_readme_plans(tmp_path: Path) -> None:
    (text,) = blocks("README.md", "yaml")
    (tmp_path / "when.yaml").write_text(text)
    recipe, arms = load_recipe(tmp_path / "when.yaml")
    plan = make_plan(recipe, arms)
    assert len(plan.arms) == 12
    shared = sum(s.tokens for s in plan.steps.values() if s.kind == "pretrain")
    assert shared / sum(s.tokens for s in plan.unshared() if s.kind == "pretrain") == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page}: {target}"


def test_snippets_of_the_docs_are_valid_yaml() -> None:
    for page in ("docs/levers/timing.md", "docs/levers/prefix.md", "docs/levers/modes.md"):
        for block in blocks(page, "yaml"):
            assert isinstance(yaml.safe_load(block), dict)
