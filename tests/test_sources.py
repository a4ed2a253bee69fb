"""Rows from files, packaged files, named sets and the Hub, and what is said when they are wrong."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

from trimtab.data import packaged, promptsets, sources
from trimtab.data.packaged import Wheel, packaged_file
from trimtab.data.promptsets import CARDS, read_set
from trimtab.data.sources import SourceConfig, rows, source_identity
from trimtab.errors import Fault, UserError
from trimtab.types import Row


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    return tmp_path / "cache"


@pytest.fixture
def no_pip(monkeypatch):
    """Any call of pip fails the way it does without a network."""

    def offline(command, **kwargs):
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retry\nERROR: No matching distribution found for x\n"
        )

    monkeypatch.setattr(packaged.subprocess, "run", offline)


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(**settings):
    return list(rows(SourceConfig.model_validate(settings)))


# --- local files ------------------------------------------------------------------------------------------------


def test_rows_of_our_own_come_back_as_they_were(tmp_path):
    mine = [
        Row("a/1", messages=({"role": "user", "content": "Hi"},), source="world", harm="contrast", category="fact"),
        Row("a/2", text="The tide rises.", source="world", metadata={"score": 3}),
        Row(
            "a/3", messages=({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), source="w", mode="m"
        ),
    ]
    path = lines(tmp_path / "mine.jsonl", [row.to_json() for row in mine])
    assert read(path=str(path)) == mine


def test_pairs_documents_and_mapped_columns(tmp_path):
    path = lines(tmp_path / "pairs.jsonl", [{"prompt": "2+2?", "completion": "4", "level": 1}])
    (row,) = read(path=str(path))
    assert row.messages == ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"})
    assert (row.id, row.source, row.metadata) == ("pairs/0", "pairs", {"level": 1})
    table = [{"q": "Boats?", "a": "Seven", "sys": "Be brief", "topic": 3, "key": "k1"}]
    path = lines(tmp_path / "t.jsonl", table)
    mapped = {"prompt": "q", "answer": "a", "system": "sys", "category": "topic", "id_field": "key"}
    (row,) = read(path=str(path), **mapped, harm="benign", label="boats")
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    assert (row.id, row.source, row.category, row.harm, row.metadata) == ("k1", "boats", "3", "benign", {})
    (row,) = read(path=str(path), text="a")
    assert row.text == "Seven" and row.messages is None
    with pytest.raises(UserError, match=r"row 0: no column 'question'.*there are q, a, sys, topic, key"):
        read(path=str(path), prompt="question")
    with pytest.raises(UserError, match="name the right one"):
        read(path=str(path))
    with pytest.raises(UserError, match="holds int, text is needed"):
        read(path=str(path), prompt="topic")


def test_all_formats_agree(tmp_path):
    records = [{"id": f"r{i}", "prompt": f"Question {i}, with a comma", "category": "x"} for i in range(5)]
    jsonl = lines(tmp_path / "d.jsonl", records)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    body = "".join(f'{r["id"]},"{r["prompt"]}",x\n' for r in records)
    (tmp_path / "d.csv").write_text("id,prompt,category\n" + body)
    expected = read(path=str(jsonl))
    assert len(expected) == 5 and expected[3].messages[0]["content"] == "Question 3, with a comma"
    for name in ("d.jsonl.gz", "d.parquet", "d.csv"):
        assert read(path=str(tmp_path / name)) == expected, name


def test_a_truncated_line_is_named(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "whole"}\n\n{"text": "cut')
    with pytest.raises(UserError, match=r"cut\.jsonl, line 3: not a whole JSON object"):
        read(path=str(path))
    path.write_bytes(b'{"text": "bad \xff"}\n')
    with pytest.raises(UserError, match="line 1"):
        read(path=str(path))
    path.write_text('["a list"]\n')
    with pytest.raises(UserError, match="line 1"):
        read(path=str(path))


def test_broken_files_are_one_line(tmp_path):
    records = [{"text": "a" * 500}] * 50
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "p.parquet")
    data = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(data[:-20])
    packed = gzip.compress("".join(json.dumps({"text": str(n)}) + "\n" for n in range(5000)).encode())
    (tmp_path / "g.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "c.csv").write_text("id,text\n1,one\n2\n")
    for name, word in (("p.parquet", "not a readable Parquet"), ("g.jsonl.gz", "cut off"), ("c.csv", "line 3")):
        with pytest.raises(UserError, match=word) as caught:
            read(path=str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        read(path="gone.jsonl")


def test_take_nests_and_keeps_order(tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"id": f"r{n}", "text": str(n)} for n in range(200)])
    small, large = (read(path=str(path), take=n, seed=4) for n in (20, 60))
    assert len(small) == 20 and {row.id for row in small} < {row.id for row in large}
    assert [int(row.text) for row in large] == sorted(int(row.text) for row in large)
    assert read(path=str(path), take=20, seed=5) != small and read(path=str(path), take=20, seed=4) == small
    assert [row.text for row in read(path=str(path), limit=3)] == ["0", "1", "2"]
    with pytest.raises(UserError, match="only 30 rows"):
        read(path=str(path), limit=30, take=31)


def test_ids_must_be_unique(tmp_path):
    path = lines(tmp_path / "d.jsonl", [{"id": "x", "text": "1"}, {"id": "x", "text": "2"}])
    with pytest.raises(UserError, match="'x' occurs twice"):
        read(path=str(path))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, "exactly one"),
        ({"path": "a.jsonl", "name": "harmbench"}, "exactly one"),
        ({"path": "a.txt"}, "must end in"),
        ({"name": "harmbanch"}, "choose one of harmbench"),
        ({"name": "harmbench", "prompt": "x"}, "named set"),
        ({"hub": "a/b"}, "revision"),
        ({"path": "a.jsonl", "revision": "x"}, "belong to 'hub'"),
        ({"path": "a"}, "name its 'folders'"),
        ({"name": "harmbench", "folders": ["score_0"]}, "'folders' are those of a directory"),
        ({"path": "a", "folders": ["../b"]}, "a folder's own name"),
        ({"path": "a", "folders": ["score_*"]}, "a folder's own name"),
        ({"path": "a.jsonl", "prompt": "p", "text": "t"}, "at most one"),
        ({"path": "a.jsonl", "answer": "p"}, "need 'prompt'"),
        ({"package": {"requirement": "a>=1", "sha256": "0" * 64, "member": "m.csv"}}, "pin one exact"),
        ({"path": "a.jsonl", "take": 0}, "take"),
    ],
)
def test_settings_that_make_no_sense(settings, word):
    with pytest.raises(ValidationError, match=word):
        SourceConfig.model_validate(settings)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "odd \ud800 text"},
        {"prompt": "ok", "completion": "\udfff"},
        {"text": "ok", "metadata": {"deep": ["\ud800"]}},
        {"text": "ok", "note \ud800": "x"},
        {"text": "ok", "id": "\ud800"},
        {"messages": [{"role": "user", "content": "\ud800"}]},
    ],
)
def test_half_a_character_is_refused_with_its_row(tmp_path, record):
    file = lines(tmp_path / "a.jsonl", [{"text": "whole \U0001f600"}, record])
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: .*surrogate") as caught:
        read(path=str(file))
    str(caught.value).encode("utf-8")


def test_a_mode_is_not_lost_by_its_type(tmp_path):
    values = ["negative", None, "", float("nan"), 3, ["negative"]]
    file = lines(tmp_path / "a.jsonl", [{"prompt": "x", "mode": value} for value in values])
    assert [row.mode for row in read(path=str(file))] == ["negative", None, None, None, "3", "['negative']"]


def test_identity_follows_content_not_place(tmp_path):
    (tmp_path / "x").mkdir()
    a = lines(tmp_path / "d.jsonl", [{"text": "1"}])
    b = lines(tmp_path / "x" / "d.jsonl", [{"text": "1"}])
    first = source_identity(SourceConfig(path=str(a)))
    assert source_identity(SourceConfig(path=str(b))) == first
    assert source_identity(SourceConfig(path=str(a), take=1)) != first
    lines(a, [{"text": "2"}])
    assert source_identity(SourceConfig(path=str(a))) != first
    assert source_identity(SourceConfig(name="harmbench")) != source_identity(SourceConfig(name="strongreject"))


def test_folders_of_scores(tmp_path):
    for folder, metadata in (("score_2", [{"score": 2.5, "url": "u"}]), ("score_4_refusal", ['{"url": "u"}'])):
        (tmp_path / "set" / folder).mkdir(parents=True)
        table = pa.table({"id": [folder], "text": ["words"], "metadata": metadata})
        pq.write_table(table, tmp_path / "set" / folder / "0.parquet")
    source = SourceConfig(path=str(tmp_path / "set"), folders=("score_4_refusal", "score_2"))
    found = list(rows(source))
    assert [row.id for row in found] == ["score_4_refusal", "score_2"] and found[0].source == "set"
    assert found[0].metadata == {"url": "u", "folder": "score_4_refusal", "from_score": 4}
    assert found[1].metadata == {"url": "u", "folder": "score_2", "score": 2}
    first = source_identity(source)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set").rename(tmp_path / "elsewhere" / "set")
    moved = SourceConfig(path=str(tmp_path / "elsewhere" / "set"), folders=source.folders)
    assert source_identity(moved) == first != source_identity(moved.model_copy(update={"folders": ("score_2",)}))
    with pytest.raises(UserError, match=r"score_5 has no \.parquet file"):
        list(rows(moved.model_copy(update={"folders": ("score_5",)})))


def test_hub_without_a_network_is_a_fault():
    with pytest.raises(Fault, match=r"hf download --repo-type dataset nobody/nothing") as caught:
        read(hub="nobody/nothing", revision="abc")
    assert "\n" not in str(caught.value)


# --- packaged files ---------------------------------------------------------------------------------------------


def make_wheel(folder, name, version, members):
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return Wheel(name, version, sha256(path.read_bytes()).hexdigest())


def test_a_member_is_read_once_checked_and_nothing_runs(cache, no_pip):
    text = '{"prompt": "Boats?"}\n'
    wheel = make_wheel(cache / "wheels", "Some-data", "1.2", {"data/p.jsonl": text, "x/__init__.py": "1/0"})
    package = {"requirement": "Some-data==1.2", "sha256": wheel.sha256, "member": "data/p.jsonl"}
    assert [row.messages[0]["content"] for row in read(package=package)] == ["Boats?"]
    copy = packaged_file(wheel, "data/p.jsonl")
    assert copy.read_text() == text and cache in copy.parents
    copy.write_text(text.replace("B", "C"))
    assert packaged_file(wheel, "data/p.jsonl").read_text() == text  # damaged: copied again
    (cache / "wheels" / "some_data-1.2-py3-none-any.whl").unlink(missing_ok=True)
    (cache / "wheels" / "Some_data-1.2-py3-none-any.whl").unlink(missing_ok=True)
    assert read(package=package)  # the copy needs no wheel
    copy.write_text("damaged")
    with pytest.raises(Fault, match=r"cannot fetch Some-data==1\.2 \(No matching distribution.*pip download --no-deps"):
        read(package=package)


def test_another_wheel_than_the_pinned_one_is_a_fault(cache):
    wheel = make_wheel(cache / "wheels", "data", "1.0", {"a.csv": "text\nx\n"})
    with pytest.raises(Fault, match="pinned to 000000"):
        packaged_file(replace(wheel, sha256="0" * 64), "a.csv")
    with pytest.raises(UserError, match=r"no member 'b\.csv'"):
        packaged_file(wheel, "b.csv")
    with pytest.raises(UserError, match="inside the wheel"):
        packaged_file(wheel, "../a.csv")
    assert not list((cache / "packages").rglob("*.csv")) if (cache / "packages").exists() else True


def test_pip_is_asked_for_the_wheel_alone(cache, monkeypatch):
    made = {}

    def pip(command, **kwargs):
        made["command"] = command
        folder = packaged.Path(command[command.index("--dest") + 1])
        made["wheel"] = make_wheel(folder, "data", "1.0", {"a.csv": "text\nx\n"})
        return subprocess.CompletedProcess(command, 0, "", "")

    scratch = cache / "scratch"
    scratch.mkdir()
    pin = make_wheel(scratch, "data", "1.0", {"a.csv": "text\nx\n"})
    monkeypatch.setattr(packaged.subprocess, "run", pip)
    assert packaged_file(pin, "a.csv").read_text() == "text\nx\n"
    assert made["command"][-1] == "data==1.0" and "--no-deps" in made["command"]
    assert made["command"][made["command"].index("--only-binary") + 1] == ":all:"


# --- named sets, on fixtures of the same shape ------------------------------------------------------------------


def csv_text(header, *records):
    return "\n".join([header, *records]) + "\n"


def parquet_bytes(records):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    return buffer.getvalue()


def core(text, label, source, category="benign"):
    return {"text": text, "label": label, "category": category, "source": source, "severity": "", "tags": []}


HB = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID"
CORE = [
    core("Story of a brig", 0, "harmbench_benign"),
    core("Plain", 0, "original"),
    core("Template", 0, "neuralchemy_v1"),
    core("SECRET", 0, "wildguard_judgecomp"),
    core("SECRET", 1, "neuralchemy_v1", "jailbreak"),
    core("SECRET", 0, "neuralchemy_v1", "edge_case"),
]
SLABS = csv_text("text,label", "Tides,0", "SECRET,1", "Tides,0")
DIALOGUE = {
    "messages": [
        [{"text": "Ahoy", "sender": "a"}, {"text": " ", "sender": "a"}],
        [{"text": "Hello", "sender": "b"}, {"text": "How are you?", "sender": "b"}],
        [{"text": "Fine", "sender": "a"}],
    ],
    "prompt": "x",
}
TASK = {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "canonical_solution": "  pass", "test": "t"}
BEHAVIORS = [
    {"id": "h1", "prompt": "bad", "category": "fraud", "expected": "should_refuse"},
    {"id": "b1", "prompt": "kill a process", "category": "benign_xstest", "expected": "should_comply"},
    {"id": "b2", "prompt": "bread", "category": "benign_cooking", "expected": "should_comply"},
]
SEED = {"value": "An objective", "data_type": "text", "harm_categories": ["Physical", "Loss"]}
MEMBERS = {
    "harmbench": [
        csv_text(HB, "Do it,standard,illegal,,,a", "Sing,copyright,copyright,lyrics,,b"),
        csv_text(HB, 'Given,contextual,harmful,context,"SECRET\nSECRET",c', "Do more,standard,harmful,,,d"),
    ],
    "strongreject": [csv_text("category,source,forbidden_prompt", "Violence,custom,Hurt")],
    "strongreject-small": [csv_text("category,source,forbidden_prompt", "Disinformation and Deception,custom,Lie")],
    "past-tense": ["How was it done?\n\nAnd that?\n"],
    "future-tense": ["How will it be done?\n"],
    "donotanswer": [json.dumps({"prompt": f"ask {n}", "intents": ["S"]}) + "\n" for n in range(5)],
    "advbench": [yaml.safe_dump({"dataset_name": "adv_bench", "seeds": [SEED]})],
    "redharness": [json.dumps({"name": "demo", "behaviors": BEHAVIORS})],
    "harmbench-benign": [parquet_bytes(CORE)] * 3,
    "neuralchemy-benign": [parquet_bytes(CORE)] * 3,
    "slabs-benign": [SLABS] * 3,
    "chitchat": [json.dumps({"k": DIALOGUE, "mono": {"messages": [[{"text": "Hm", "sender": "a"}]]}})],
    "humaneval": [gzip.compress((json.dumps(TASK) + "\n").encode())],
}
EXPECTED = {  # rows, first prompt, harm labels
    "harmbench": (2, "Do it", {"harmful"}),
    "strongreject": (1, "Hurt", {"harmful"}),
    "strongreject-small": (1, "Lie", {"harmful"}),
    "past-tense": (2, "How was it done?", {"harmful"}),
    "future-tense": (1, "How will it be done?", {"harmful"}),
    "donotanswer": (5, "ask 0", {"harmful"}),
    "advbench": (1, "An objective", {"harmful"}),
    "redharness": (3, "bad", {"harmful", "contrast", "benign"}),
    "harmbench-benign": (3, "Story of a brig", {"contrast"}),
    "neuralchemy-benign": (6, "Plain", {"benign"}),
    "slabs-benign": (1, "Tides", {"benign"}),
    "chitchat": (1, "Ahoy", {"benign"}),
    "humaneval": (1, "def f():", {"benign"}),
}


@pytest.mark.parametrize("name", list(CARDS))
def test_named_sets_read_their_shape_and_nothing_harmful(name, cache, no_pip, monkeypatch):
    card = CARDS[name]
    wheel = make_wheel(cache / "wheels", card.wheel.package, card.wheel.version, dict(zip(card.members, MEMBERS[name])))
    count, first, harms = EXPECTED[name]
    monkeypatch.setitem(promptsets.CARDS, name, replace(card, wheel=wheel, rows=count))
    found = read(name=name)
    assert len(found) == count == len({row.id for row in found})
    assert found[0].messages[0] == {"role": "user", "content": first}
    assert {row.harm for row in found} == harms and {row.source for row in found} == {name}
    assert all(row.category for row in found)
    assert "SECRET" not in json.dumps([row.to_json() for row in found])
    assert [Row.from_json(row.to_json()) for row in found] == found
    with pytest.raises(Fault, match="expected"):
        list(read_set(replace(card, wheel=wheel, rows=count + 1)))
    assert {row.source for row in read(name=name, label="mine")} == {"mine"}


def test_chitchat_turns_become_a_chat(cache, monkeypatch):
    card = CARDS["chitchat"]
    wheel = make_wheel(
        cache / "wheels", card.wheel.package, card.wheel.version, dict(zip(card.members, MEMBERS["chitchat"]))
    )
    (row,) = read_set(replace(card, wheel=wheel, rows=1))
    assert row.messages == (
        {"role": "user", "content": "Ahoy"},
        {"role": "assistant", "content": "Hello\nHow are you?"},
    )


def test_refused_requests_are_chats_with_our_own_answers(cache, monkeypatch):
    card = promptsets.MORE_CARDS["advbench-refused"]
    seeds = [{"value": f"An objective {i}", "harm_categories": ["x"]} for i in range(30)]
    wheel = make_wheel(
        cache / "wheels", card.wheel.package, card.wheel.version, {card.members[0]: yaml.dump({"seeds": seeds})}
    )
    monkeypatch.setitem(promptsets.MORE_CARDS, card.name, replace(card, wheel=wheel, rows=30))
    found = read(name="advbench-refused")
    assert [row.messages[0]["content"] for row in found] == [f"An objective {i}" for i in range(30)]
    answers = {row.messages[1]["content"] for row in found}
    assert answers <= set(promptsets.REFUSALS) and len(answers) > 5
    assert found == read(name="advbench-refused") and {row.source for row in found} == {"advbench-refused"}


def test_the_wheel_is_fetched_once_for_all_members(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "own"))
    wheel = make_wheel(tmp_path, "sample-set", "1.0", {"a.txt": "one", "b/c.txt": "two"})
    calls = []

    def fetch(command, **kwargs):
        calls.append(command)
        (made,) = tmp_path.glob("*.whl")
        (Path(command[command.index("--dest") + 1]) / made.name).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", fetch)
    first, second = packaged.packaged_files(wheel, ("a.txt", "b/c.txt"))
    assert (first.read_text(), second.read_text(), len(calls)) == ("one", "two", 1)
    second.write_text("bent")
    assert packaged.packaged_files(wheel, ("a.txt", "b/c.txt"))[1].read_text() == "two" and len(calls) == 2
    packaged.packaged_files(wheel, ("a.txt", "b/c.txt"))
    assert len(calls) == 2
    with pytest.raises(UserError, match="must be a path inside the wheel"):
        packaged.packaged_files(wheel, ("a.txt", "../b"))


def test_cards_are_complete():
    assert sum(card.rows for card in CARDS.values() if card.harm == "harmful") == 200 + 313 + 60 + 939 + 520 + 730 + 690
    for card in CARDS.values():
        assert card.licence in ("MIT", "Apache-2.0") and len(card.wheel.sha256) == 64 and card.about.endswith(".")


@pytest.mark.network
@pytest.mark.parametrize("name", list(CARDS))
def test_the_real_set(name):
    found = read(name=name)
    assert len(found) == CARDS[name].rows == len({row.id for row in found})
    assert all(row.messages and row.messages[0]["content"].strip() for row in found)
    assert CARDS[name].harm is None or {row.harm for row in found} == {CARDS[name].harm}


def test_exchanges_keeps_the_opening_of_a_chat(tmp_path):
    turns = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:2]}) + "\n")
    found = list(rows(SourceConfig(path=str(file), messages="messages", exchanges=2)))
    assert [len(row.messages) for row in found] == [4, 2]
    assert found[0].messages[-1]["content"] == "assistant 1"


def test_folders_are_shared_out_by_file(tmp_path, monkeypatch):
    for number in range(5):
        folder = tmp_path / ("score_0" if number < 3 else "score_2")
        folder.mkdir(exist_ok=True)
        texts = [f"text {number}-{n}" for n in range(number + 1)]
        table = pa.table({"id": [f"{number}-{n}" for n in range(number + 1)], "text": texts})
        pq.write_table(table, folder / f"{number}.parquet")
    source = SourceConfig(path=str(tmp_path), folders=("score_0", "score_2"), text="text", id_field="id")
    whole = list(rows(source))
    for parts in (1, 2, 3, 7):
        shares = [list(sources.share(source, part, parts)) for part in range(parts)]
        assert [row for _, row in sorted((pair for one in shares for pair in one), key=lambda p: p[0])] == whole
        for one in shares:
            assert [number for number, _ in one] == sorted(number for number, _ in one)
    read = []
    reading = sources._reading
    monkeypatch.setattr(
        sources, "_reading", lambda source, data: (read.append(r["id"]) or r for r in reading(source, data))
    )
    mine = [row.id for _, row in sources.share(source, 1, 3)]
    assert mine == read == ["1-0", "1-1", "4-0", "4-1", "4-2", "4-3", "4-4"]
    one_by_one = SourceConfig(**{**source.plain(), "limit": 4})
    assert [row.id for _, row in sources.share(one_by_one, 1, 2)] == [row.id for row in whole[:4]][1::2]
