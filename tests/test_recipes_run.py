"""The large recipes, cut down until they run here. By hand: minutes each (`pytest -m slow`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "recipe",
    ["timing-1.7b", "prefix-r1", "modes-qwen3-8b", pytest.param("timing-real-text", marks=pytest.mark.network)],
)
def test_the_smoke_scale_runs_to_its_report(recipe: str, tmp_path: Path) -> None:
    words = ["run", str(ROOT / "recipes" / f"{recipe}.yaml"), "--set", "scale=smoke", "--out", str(tmp_path / "run")]
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert results["claims"] and (results["results"] or results["mode_figures"])
    assert len({place["model"] for place in results["places"]}) >= 2 or results["ratios"]
