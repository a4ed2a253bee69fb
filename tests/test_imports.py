"""The direction of import, and what must not be imported at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

ROOT = Path(trimtab.__file__).parent
FLOORS = [
    "cli", "report", "serve", "study", "recipe", "analyze", "evaluate", "generate", "train", "models",
    "levers", "corpus", "data", "world",
]  # fmt: skip
GROUND = ["artifact", "endpoint", "types", "config", "seeds", "errors", "progress", "machine", "settings"]


def floor_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # confine is imported by an interpreter that has no Trimtab, so its modules name each other relatively
            assert node.level == 0 or path.parent.name == "confine", f"{path}: relative import"
            found.append(node.module or "")
    return found


def test_a_lower_floor_never_imports_a_higher_one() -> None:
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        assert here in FLOORS + GROUND, f"{path}: not on the plan of the house"
        rank = FLOORS.index(here) if here in FLOORS else len(FLOORS)
        for name in imports(path):
            there = floor_of(name) if name.startswith("trimtab.") else ""
            if there in FLOORS:
                assert FLOORS.index(there) >= rank, f"{path} imports {name}, a higher floor"


def test_ground_floor_imports_only_the_ground_floor() -> None:
    for name in GROUND:
        for used in imports(ROOT / f"{name}.py"):
            if used.startswith("trimtab."):
                assert floor_of(used) in GROUND


@pytest.mark.parametrize(
    "modules",
    [
        "trimtab.levers.timing, trimtab.levers.prefix, trimtab.levers.modes",
        "trimtab.corpus.config, trimtab.corpus.scorers, trimtab.corpus.writers, trimtab.corpus.scorecard, trimtab.corpus.read",
        "trimtab.data.sources, trimtab.data.mixture, trimtab.data.pack, trimtab.data.store, trimtab.data.render",
        "trimtab.world.tidewater",
        "trimtab.recipe.load, trimtab.study.plan, trimtab.study.execute, trimtab.report.gather",
    ],
)
def test_no_torch_below_models_nor_for_planning(modules: str) -> None:
    code = f"import sys, {modules}; sys.exit(sorted(m for m in ('torch', 'transformers', 'datatrove') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
