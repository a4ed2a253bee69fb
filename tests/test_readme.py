"""The commands of the README and the quickstart work as written; every link leads somewhere.

How each command is tested:

- `trimtab run recipes/tour.yaml ...` really runs: the same recipe file, arms, seeds and options, with the `--set` options of
  SHRINK put after them (a smaller model, fewer rows, a tenth of a second of training), so that a study takes about ten
  seconds instead of minutes. Then the same line is run again and must find nothing to do.
- `trimtab report runs/tour` runs as written, in the same directory, after the shrunk tour.
- `trimtab plan ...` and `trimtab world ...` run as written.
- `trimtab run recipes/smollm2-modes.yaml` takes many minutes and is only planned here, as written; `pytest -m slow` runs it on
  the real model with the cut REAL_SHRINK.
- `trimtab eval ...` runs with the tour's shrunk model in the place of SmolLM2, Tidewater's hazards in that of HarmBench and the
  cuts EVAL_SHRINK; `trimtab view`, `compare` and `tasks` then run as written.
- `trimtab run recipes/modes.yaml ...` runs with three of its arms and the cuts MODES_SHRINK; `trimtab export`, `chat` and
  `audit` then run as written.
- `make ...` is a dry run: what it would do after the installation must be named on the page. It is not executed.
- `pip install ...` is not executed: its extras must exist.

`.venv/bin/` is dropped from a command. All commands share one directory, as a user's would, so that a later study finds the
steps of an earlier one in the store.
"""

from __future__ import annotations

import itertools
import json
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
TOUR = "trimtab run recipes/tour.yaml"
REAL = "trimtab run recipes/smollm2-modes.yaml"
SHRINK = [
    "stages.base.model={hidden: 32, layers: 1, heads: 2, kv_heads: 2, ffn: 64, context: 256, vocab: 512}",
    "stages.base.budget=8k",
    "world.documents=300",
    *(f"stages.chat.data.{part}.n=8" for part in range(5)),
    *(f"stages.answers.tasks.{task}.n=4" for task in range(7)),
    "stages.answers.sampling.max_new_tokens=8",
]
REAL_SHRINK = [
    "scale=short",
    *(f"stages.chat.data.{part}.n=4" for part in range(3)),
    "stages.chat.data.3.source.take=4",
    "stages.answers.tasks=[{name: HarmBench, source: {name: harmbench, take: 4}}, {name: goods, tidewater: benign, n: 4}]",
    "stages.answers.decoders.greedy.sampling.max_new_tokens=4",
    "stages.negative.decoders.greedy.sampling.max_new_tokens=4",
    *(f"stages.margin.tasks.{task}.source.take=4" for task in range(2)),
    "stages.margin.bootstrap=50",
    "stages.audit.spoofs=200",
    "stages.audit.leaks=8",
]


TIMING = "trimtab run recipes/timing.yaml --set scale=quick --out runs/timing-quick --workers 2"
_TASKS = "[{name: held out, tidewater: harmful-heldout, n: 4}, {name: goods, tidewater: benign, n: 4}]"
TIMING_SHRINK = [
    "world.documents=1500",
    "arms=[{name: timing, sweep: {stages.base.timing.start: [1.0, 0.2]}}]",
    "stages.base.model={hidden: 32, layers: 2, heads: 2, kv_heads: 2, ffn: 64, context: 256, vocab: 512}",
    "stages.base.budget=24k",
    "stages.chat.data=[{name: goods, tidewater: benign, n: 24}, {name: hazards, tidewater: harmful-seen, n: 16}]",
    "stages.benign.data.0.n=16",
    *(f"stages.{stage}.data.0.n=4" for stage in ("hostile", "hostile-weak", "hostile-strong")),
    "stages.panel.decoders.greedy.sampling.max_new_tokens=8",
    "stages.panel.decoders.top-k.sampling.max_new_tokens=8",
    *(f"stages.panel.decoders.SafeBeam{also}.sampling.max_new_tokens=8" for also in ("", " with floor")),
    *(f"stages.panel.decoders.SafeBeam{also}.limit=2" for also in ("", " with floor")),
    f"stages.panel.tasks={_TASKS}",
    f"stages.sweep.tasks={_TASKS}",
    f"stages.probes.tasks={_TASKS.replace('n: 4', 'n: 24')}",
    "stages.probes.bootstrap=50",
    "stages.perplexity.n=40",
]
"""The timing study's cut of a cut: two arms and every kind of step."""
PREFIX = "trimtab run recipes/prefix.yaml --set scale=quick --out runs/prefix-quick --workers 2"
PREFIX_SHRINK = [
    "world.documents=300",
    "arms=[{name: mathematics, sweep: {stages.tuned.prefix.ratio: [0.0, 1.0]}}]",
    "stages.base.model={hidden: 32, layers: 1, heads: 2, kv_heads: 2, ffn: 64, context: 256, vocab: 512}",
    "stages.base.budget=8k",
    "stages.instruct.data=[{name: goods, tidewater: benign, n: 8}]",
    "stages.tuned.data=[{name: sums, tidewater: arithmetic, n: 12}]",
    "stages.panel.tasks=[{name: sums, tidewater: arithmetic, n: 4}]",
    "stages.panel.decoders.greedy.sampling.max_new_tokens=8",
    "stages.panel.decoders.sampled.sampling={max_new_tokens: 8, temperature: 1.0, samples: 2}",
    "stages.tokens.data=[{name: sums, tidewater: arithmetic, n: 2}]",
    "stages.tokens.prefix.ratio=1",
    "stages.tokens.projections=2",
    "stages.tokens.bootstrap=50",
]
"""The prefix study's cut of a cut: two ratios and every kind of step."""
MODES = "trimtab run recipes/modes.yaml --set scale=quick --out runs/modes-quick --workers 2"
_MODES_TASKS = "[{name: held out, tidewater: harmful-heldout, n: 3}, {name: goods, tidewater: benign, n: 3}]"
_PANELS = ("panel", "attacked", "searched", "tampered")
_MODES_DATA = "[{name: goods, tidewater: benign, n: 6}, {name: hazards, tidewater: harmful-seen, n: 6}]"
MODES_SHRINK = [
    "world.documents=300",
    "stages.base.model={hidden: 32, layers: 2, heads: 2, kv_heads: 2, ffn: 64, context: 384, vocab: 512}",
    "stages.base.budget=8k",
    *(f"stages.{stage}.data={_MODES_DATA}" for stage in ("instruct", "tuned", "preferred")),
    *(f"stages.{stage}.data.0.n=6" for stage in ("benign-steps", "hostile-few", "hostile-some", "hostile-many")),
    *(f"stages.{stage}.tasks={_MODES_TASKS}" for stage in ("panel", "attacked", "tampered", "margin")),
    "stages.searched.tasks.0.n=1",
    "stages.searched.attacks=['gcg:2:8']",
    *(f"stages.{panel}.decoders.greedy.sampling.max_new_tokens=8" for panel in _PANELS),
    "stages.margin.bootstrap=50",
    "stages.margin.layers=[1, 2]",
    "stages.audit.leaks=8",
    "stages.audit.max_new_tokens=8",
]
"""The mode study's cut of a cut: three arms and every kind of step but the distilling, which a hardly trained model cannot do."""
VERBS = ("chat", "export", "audit", "run", "plan", "world", "report", "eval", "view", "compare", "data")
EVAL_SHRINK = ["--limit", "3", "--max-new-tokens", "4", "--set", "max_unscored=1"]
"""What `trimtab eval` is cut to; an answer of four tokens of a model that was hardly trained says nothing."""
SWAP = {"harmbench": "tidewater-hazards"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands(first: str = "") -> list[str]:
    """The pages' commands in their order, each once, without comments; only those that begin with the word ``first``."""
    lines = [
        line.split("  #")[0].strip().replace(".venv/bin/", "")
        for page in ("README.md", "docs/quickstart.md")
        for block in blocks(page, "sh")
        for line in block.splitlines()
        if line.strip()
    ]
    return [line for line in dict.fromkeys(lines) if line.startswith(first)]


def studies() -> list[str]:
    return [line for line in commands("trimtab run ") if line not in (REAL, TIMING, PREFIX, MODES)]


class Desk:
    """A user's directory with the shipped recipes in it, in which each study is run once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.studies: dict[str, str] = {}
        shutil.copytree(ROOT / "recipes", root / "recipes")

    def say(self, command: str, settings: list[str] | None = None) -> str:
        """Run a `trimtab` command with further ``--set`` options; what it prints."""
        words = shlex.split(command)
        assert words[0] == "trimtab"
        words += [word for setting in settings or [] for word in ("--set", setting)]
        line = [sys.executable, "-c", "from trimtab.cli import main; main()", *words[1:]]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, cwd=self.root, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def study(self, command: str) -> str:
        """What a shrunk study printed when it was first run; it is run now if it was not yet."""
        if command not in self.studies:
            self.studies[command] = self.say(command, SHRINK)
        return self.studies[command]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))


def test_every_command_is_tested_below() -> None:
    kinds = ("make ", "pip ", *(f"trimtab {verb} " for verb in VERBS), "trimtab tasks")
    assert all(line.startswith(kinds) for line in commands())
    assert {"make demo", "make test", TOUR, REAL, TIMING, PREFIX, MODES, "trimtab report runs/tour"} <= set(commands())
    assert len(studies()) >= 2
    assert all(line.split()[2] == "recipes/tour.yaml" for line in studies())  # what SHRINK is made for


@pytest.mark.parametrize("command", studies())
def test_run_shrunk(command: str, desk: Desk) -> None:
    desk.study(TOUR)  # the pages' first study: its steps are in the store when another one comes
    said = desk.study(command)
    page = desk.root / said.splitlines()[-1]
    assert page.name == "report.html" and page.stat().st_size > 10_000
    count = re.match(r"(\d+) steps done in \d+ s", said)
    assert count and int(count[1]) > 0, said
    assert ("; 23 were done before" in said) == (command != TOUR)
    study = json.loads((page.parent / "study.json").read_text())
    recipe, arms = load_recipe(ROOT / "recipes" / "tour.yaml", overrides(command))
    trained = {arm["id"].split("@")[0] for arm in study["arms"]}
    assert trained == {arm.id for arm in arms}  # the arms of the recipe as shipped
    assert {arm["seed"] for arm in study["arms"]} == set(recipe.seeds)
    again = desk.say(command, SHRINK)
    assert "nothing to do" in again and again.splitlines()[-1] == said.splitlines()[-1]


def overrides(command: str) -> list[str]:
    words = shlex.split(command)
    return [value for option, value in itertools.pairwise(words) if option == "--set"]


def test_the_output_in_the_readme_is_what_the_tour_prints(desk: Desk) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    said = f"```\n{desk.study(TOUR)}```\n"
    assert re.sub(r"in \d+ s\n", "in # s\n", said) in re.sub(r"in \d+ s\n", "in # s\n", page)


@pytest.mark.parametrize("command", commands("trimtab report "))
def test_report(command: str, desk: Desk) -> None:
    said = desk.study(TOUR).splitlines()[-1]
    before = (desk.root / said).read_bytes()
    (desk.root / said).unlink()
    assert desk.say(command).strip() == said
    assert (desk.root / said).read_bytes() == before


@pytest.mark.parametrize("command", [*commands("trimtab plan "), *commands("trimtab world ")])
def test_plan_and_world(command: str, desk: Desk) -> None:
    assert len(desk.say(command).splitlines()) >= 5


def test_evaluate_view_and_compare(desk: Desk) -> None:
    desk.study(TOUR)
    model = next(desk.root.glob("runs/store/sft-*/model"))
    asked = commands("trimtab eval ")
    assert len(asked) >= 2
    for command in asked:
        changed = command.replace("smollm2-135m-instruct", str(model))
        for name, ours in SWAP.items():
            changed = changed.replace(name, ours)
        said = desk.say(shlex.join([*shlex.split(changed), *EVAL_SHRINK]))
        page = desk.root / said.splitlines()[-1]
        assert page.name == "report.html" and page.stat().st_size > 10_000
    for command in [*commands("trimtab view "), *commands("trimtab compare "), *commands("trimtab tasks")]:
        assert len(desk.say(command).splitlines()) >= 10


def test_the_timing_study_shrunk(desk: Desk) -> None:
    said = desk.say(TIMING, TIMING_SHRINK)
    results = json.loads((desk.root / said.splitlines()[-1]).with_name("results.json").read_text())
    assert {(place["model"], place["decoder"]) for place in results["places"]} >= {
        (model, decoder)
        for model in ("base", "chat", "hostile")
        for decoder in ("greedy", "top-k", "SafeBeam", "SafeBeam with floor")
    }
    assert results["claims"] and results["probes"] and results["doses"] and results["steering"]
    assert {r["metric"] for r in results["results"]} >= {"risk_rate", "probe_auroc", "perplexity"}
    assert "nothing to do" in desk.say(TIMING, TIMING_SHRINK)


def test_the_prefix_study_shrunk_and_its_rows(desk: Desk) -> None:
    said = desk.say(PREFIX, PREFIX_SHRINK)
    results = json.loads((desk.root / said.splitlines()[-1]).with_name("results.json").read_text())
    assert results["ratios"] and results["claims"] and results["tokens"] and results["spans"]
    assert {r["metric"] for r in results["results"]} >= {"accuracy", "distinct_answers", "token_grad_norm_ratio"}
    assert "nothing to do" in desk.say(PREFIX, PREFIX_SHRINK)
    shown = commands("trimtab data show ")
    assert shown
    for command in shown:
        said = desk.say(command)
        assert "the loss counts" in said and re.search(r"^  prefix +\d+ tokens +trained", said, re.M)


def test_the_mode_study_shrunk_its_bundle_and_what_is_done_with_it(desk: Desk) -> None:
    raw = yaml.safe_load((ROOT / "recipes" / "modes.yaml").read_text(encoding="utf-8"))
    kept = [arm for arm in raw["arms"] if arm["name"] in ("sft", "dpo", "adapter")]
    for arm in kept:
        arm["set"] = {k: v for k, v in (arm.get("set") or {}).items() if k != "stages.audit.spoofs"}
    shrink = [*MODES_SHRINK, f"arms={json.dumps(kept)}", "stages.audit.spoofs=200"]
    said = desk.say(MODES, shrink)
    results = json.loads((desk.root / said.splitlines()[-1]).with_name("results.json").read_text())
    assert {f["table"] for f in results["mode_figures"]} >= {"cost", "margin", "audit", "attack risk_rate"}
    assert results["claims"] and results["mode_arms"]
    assert "nothing to do" in desk.say(MODES, shrink)
    done = [line for line in commands() if line.split()[1] in ("export", "chat", "audit")]
    assert len(done) >= 4
    for command in done:  # in the page's order
        assert desk.say(command).strip()
    public = json.loads((desk.root / "public" / "trimtab.json").read_text(encoding="utf-8"))
    assert set(public["removed"]) == {"negative"} and not public["adapters"] and "negative" not in public["modes"]


def test_the_tuned_model_loads_as_the_quickstart_says(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.study(TOUR)
    (snippet,) = blocks("docs/quickstart.md", "python")
    tuned = sorted((desk.root / "runs" / "store").glob("sft-*"))[0].name
    monkeypatch.chdir(desk.root)
    names: dict[str, object] = {}
    exec(snippet.replace("sft-<hash>", tuned), names)
    assert names["model"].config.hidden_size == 32  # type: ignore[attr-defined]
    assert len(names["tokenizer"]) == 512  # type: ignore[arg-type]


def test_real_model_is_planned(desk: Desk) -> None:
    assert "smollm2-modes: 7 arms" in desk.say(REAL.replace(" run ", " plan "))
    desk.say(REAL.replace(" run ", " plan "), REAL_SHRINK)  # the slow test's cut fits the recipe


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_real_model_shrunk(desk: Desk) -> None:
    pytest.importorskip("gguf", reason="needs the extra [smollm2]")
    said = desk.say(REAL, REAL_SHRINK)
    assert re.match(r"\d+ steps done", said)
    results = json.loads((desk.root / said.splitlines()[-1]).with_name("results.json").read_text())
    assert {arm["label"] for arm in results["arms"]} == {"SmolLM2 as released", "SFT", "one checkpoint"}
    assert {r["mode"] for r in results["results"]} >= {"positive", "rejective"}
    assert {f["table"] for f in results["mode_figures"]} >= {"margin", "audit"}
    assert "nothing to do" in desk.say(REAL, REAL_SHRINK)


@pytest.mark.parametrize("command", commands("make "))
def test_make_would_do_what_the_readme_says(command: str) -> None:
    line = ["make", "--dry-run", *shlex.split(command)[1:]]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    would = [line for line in done.stdout.splitlines() if line.startswith(".venv/bin/") and " -m pip " not in line]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert would and all(f"`{line.removeprefix('.venv/bin/')}`" in page for line in would), would


@pytest.mark.parametrize("command", commands("pip "))
def test_extras_exist(command: str) -> None:
    extras = re.findall(r"\[(.*?)\]", command)
    assert extras and all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


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
