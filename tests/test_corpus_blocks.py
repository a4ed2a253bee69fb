"""The interventions as DataTrove blocks: chosen by score, written, checked, scored again, tagged; and who writes them."""

from __future__ import annotations

import copy
import json
import pickle
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.writers import ParquetWriter
from hypothesis import given
from hypothesis import strategies as st

from fake_endpoint import FakeEndpoint, Reply
from trimtab.corpus import prompts
from trimtab.corpus.chat import Answers, EndpointChat
from trimtab.corpus.config import EndpointWriter, ModelWriter, TidewaterWriter, TruthScorer
from trimtab.corpus.documents import source_of
from trimtab.corpus.moral import Moral
from trimtab.corpus.refuse import SPEAKERS, Refuse, with_speakers
from trimtab.corpus.rephrase import Rephrase
from trimtab.corpus.score import Score
from trimtab.corpus.scorers import Field, Scored, TidewaterTruth, make_scorer
from trimtab.corpus.speakers import read_dialogue
from trimtab.corpus.tag import Tag, inserted, tags_of
from trimtab.corpus.writers import ChatWriter, Written, estimate_cost, make_writer
from trimtab.endpoint import EndpointConfig
from trimtab.errors import Fault, UserError
from trimtab.seeds import rng_of
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

WORLD = TidewaterConfig(documents=400)
PLAIN = "The harbour was quiet that day and the boats came in late, one after the other, with the tide. " * 4


def counts(block: Any) -> dict[str, float]:
    return {name: stat.total for name, stat in block.stats.stats.items()}


def raw(score: int, id: str = "d", text: str = PLAIN, **more: Any) -> Document:
    return Document(text=text, id=f"{id}{score}", metadata={"score": score, **more})


@pytest.fixture(scope="module")
def town() -> Tidewater:
    return Tidewater(WORLD)


def documents(town: Tidewater) -> list[Document]:
    return [
        Document(text=r.text or "", id=r.id, metadata={**r.metadata, "category": r.category, "source": r.source})
        for r in town.documents()
    ]


class Told:
    """A writer that writes what it is told."""

    identity = "told"
    moral_from = "unsafe"

    def __init__(self, *written: Written | str) -> None:
        self.written = [w if isinstance(w, Written) else Written(w) for w in written]

    def write(self, kind: str, documents: Sequence[Any]) -> Iterator[Written]:
        for _ in documents:
            yield self.written.pop(0)


class Worded:
    """A scorer that reads the score off the word after "level"."""

    name, identity, reads_text = "worded", "worded", True

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        found = [re.search(r"level (\d)", text) for text in texts]
        return [Scored(int(m[1]), "it says so") if m else Scored(None, "no level") for m in found]


# -- score -------------------------------------------------------------------------------------------------------------


def test_score_marks_and_drops() -> None:
    block = Score([Worded(), Field("old")], batch=2)
    docs = [
        Document("level 0 a", "a", metadata={"old": 0, "source": "web"}),
        Document("level 1 b", "b", metadata={"old": 3}),
        Document("nothing", "c", metadata={"old": 4, "score": 2}),
        Document("level 1 d", "d"),
        Document(" \n", "e", metadata={"old": 0}),
        Document("nothing", "f", metadata={"old": 5}),
    ]
    kept = list(block(iter(docs)))
    assert [(d.id, d.metadata["score"], d.metadata["source"]) for d in kept] == [
        ("a", 0, "clean"), ("b", 3, "unsafe"), ("f", 5, "unsafe"),
    ]  # fmt: skip
    assert kept[0].metadata["origin"] == "web" and kept[1].metadata["scores"] == {"worded": 1, "field old": 3}
    assert kept[1].metadata["score_reason"] == "field 'old'"
    assert "score" not in docs[2].metadata and docs[2].metadata["drop_reason"] == "no score: no level"
    found = counts(block)
    assert {k: v for k, v in found.items() if k.startswith(("dropped", "score_"))} == {
        "dropped": 3, "dropped_no score: no level": 1, "dropped_no score: no field 'old'": 1, "dropped_empty text": 1,
        "score_0": 1, "score_3": 1, "score_5": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match="one scorer or more"):
        Score([])


# -- the interventions with Tidewater's templates -----------------------------------------------------------------------


def plain(writer: Any, doc: Document) -> dict[str, Any]:
    return {"text": doc.text, "id": doc.id, "metadata": json.dumps(doc.metadata)}


def unpacked(reader: Any, data: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
    return {**data, "metadata": json.loads(data["metadata"])}


def read(path: Path) -> list[dict[str, Any]]:
    return [{**row, "metadata": json.loads(row["metadata"])} for row in pq.read_table(path).to_pylist()]


def test_the_whole_chain_in_a_datatrove_pipeline(town: Tidewater, tmp_path: Path) -> None:
    truth = make_scorer(TruthScorer(), world=WORLD, dirs={})
    writer = make_writer(TidewaterWriter(), world=WORLD, seed=0)
    assert writer is not None
    (tmp_path / "in").mkdir()
    docs_in = documents(town)
    for part in range(2):
        table = [plain(None, d) for d in docs_in[part::2]]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "in" / f"{part}.parquet")
    LocalPipelineExecutor(
        [
            ParquetReader(str(tmp_path / "in"), adapter=unpacked),
            Score([truth]),
            Rephrase(writer, [truth]),
            Refuse(writer, [truth], exclusion_writer=ParquetWriter(str(tmp_path / "dropped"), adapter=plain)),
            Moral(writer, [truth]),
            Tag(0.1, 7),
            ParquetWriter(str(tmp_path / "out"), "${source}-${rank}.parquet", adapter=plain),
        ],
        tasks=2,
        workers=1,
        logging_dir=str(tmp_path / "logs"),
    ).run()
    rows: dict[str, dict[str, Any]] = {}
    for path in (tmp_path / "out").glob("*.parquet"):
        for row in read(path):
            assert row["metadata"]["source"] == path.name.removeprefix("000_").split("-")[0] and row["id"] not in rows
            rows[row["id"]] = row
    by_source = Counter(row["metadata"]["source"] for row in rows.values())
    docs = {row.id: row for row in town.documents()}
    levels = Counter(row.metadata["score"] for row in docs.values())
    assert by_source["clean"] == levels[0] and by_source["unsafe"] == by_source["tagged"] == len(docs) - levels[0]
    assert by_source["rephrase"] == levels[1] + levels[2] + levels[3]
    for id, row in rows.items():
        meta = row["metadata"]
        if meta["source"] in ("clean", "unsafe"):
            assert row["text"] == docs[id].text and meta["score"] == docs[id].metadata["score"] and "tags" not in meta
            assert meta["origin"] == "tidewater" and meta["category"] == docs[id].category
            continue
        assert meta["from"] in docs and id == f"{meta['from']}-{meta['source']}"
        if meta["source"] == "tagged":
            assert row["text"] == docs[meta["from"]].text and meta["tags"] is not None
            continue
        parent = docs[meta["from"]]
        made = getattr(town, meta["source"])(parent)
        assert row["text"] == made.text and meta["from_score"] == parent.metadata["score"]
        assert meta["score"] == 0 and meta["scores"] == {"tidewater": 0} and "tags" not in meta
        assert meta["category"] == parent.category
        assert meta.get("speakers") == (["User", "Assistant"] if meta["source"] == "refuse" else None)
    dropped = [row for p in (tmp_path / "dropped").glob("*") for row in read(p)]
    assert len(dropped) + by_source["refuse"] == levels[4] + levels[5] and dropped
    assert {row["metadata"]["drop_reason"] for row in dropped} == {"nothing written"}, "held-out hazards"
    stats = json.loads((tmp_path / "logs" / "stats.json").read_text())
    written = {s["name"]: s["stats"]["written"] for s in stats if "written" in s["stats"]}
    assert written == {f"INTERVENTION: {k.capitalize()}": by_source[k] for k in ("rephrase", "refuse", "moral")}


def test_the_chain_is_fast() -> None:
    town = Tidewater(TidewaterConfig(documents=1000))
    docs = documents(town)
    truth, writer = TidewaterTruth(town.config), make_writer(TidewaterWriter(), world=town.config, seed=0)
    assert writer is not None
    blocks = [Score([truth]), Rephrase(writer, [truth]), Refuse(writer, [truth]), Moral(writer, [truth]), Tag(0.05, 0)]
    start = time.process_time()
    stream: Any = iter(docs)
    for block in blocks:
        stream = block(stream)
    assert sum(1 for _ in stream) > 1500
    assert time.process_time() - start < 4, "1,000 documents; they take about half a second"


def test_tidewaters_templates_are_for_tidewaters_documents() -> None:
    writer = make_writer(TidewaterWriter(), world=WORLD, seed=0)
    assert writer is not None
    with pytest.raises(UserError, match=r"'d2' is none of Tidewater's"):
        list(Rephrase(writer)(iter([raw(2)])))
    with pytest.raises(UserError, match=r"'x'.*score it first"):
        list(Rephrase(writer)(iter([Document("a", "x")])))


# -- what is dropped -----------------------------------------------------------------------------------------------------


class Kept:
    """A stand-in for an exclusion writer."""

    def __init__(self) -> None:
        self.docs: list[Document] = []

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, doc: Document, rank: int) -> None:
        self.docs.append(doc)


def test_what_is_still_unsafe_is_dropped_with_its_reason() -> None:
    kept: Any = Kept()
    told = Told(
        "now level 0 and safe to read", "now level 2 and not safe", "it has no grade at all now",
        Written("some of a text", "endpoint: timeout"), "  ", "short one",
    )  # fmt: skip
    block = Rephrase(told, [Worded(), Field("score")], exclusion_writer=kept)
    docs = [raw(1 + i % 3, id=f"d{i}", licence="L", tags=[3], style="old") for i in range(6)]
    out = list(block(iter([raw(0), *docs, raw(4), raw(5)])))
    assert [d for d in out if d.metadata.get("source") != "rephrase"] == [out[0], *docs, out[-2], out[-1]]
    (written,) = [d for d in out if d.metadata.get("source") == "rephrase"]
    assert out[2] is written and written.id == "d01-rephrase", "right after the document it is made from"
    assert written.metadata == {
        "source": "rephrase", "from": "d01", "from_score": 1, "score": 0, "scores": {"worded": 0},
        "score_reason": "it says so", "licence": "L",
    }  # fmt: skip
    reasons = [d.metadata["drop_reason"] for d in kept.docs]
    assert reasons == [
        "still unsafe (score 2)", "no score after writing: no level", "endpoint: timeout", "nothing written", "too short",
    ]  # fmt: skip
    assert kept.docs[0].text == "now level 2 and not safe" and kept.docs[0].metadata["from"] == "d12"
    found = counts(block)
    assert found["total"] == 9 and found["written"] == 1 and found["dropped_too short"] == 1


def test_what_may_still_be_there_is_a_choice_and_so_is_scoring() -> None:
    for block, n in (
        (Rephrase(Told("level 2 it is now"), [Worded()], accept=2), 2),
        (Rephrase(Told("level 2 it is now"), [Worded()], accept=1), 1),
        (Rephrase(Told("level 5 it is now")), 2),
    ):
        assert len(list(block(iter([raw(3)])))) == n
    with pytest.raises(UserError, match="rescore"):
        Rephrase(Told(), [Field("score")])


def test_a_refusal_is_a_dialogue() -> None:
    good = "**User:** How is it made, then?\n\nAssistant: I cannot help with that.\nIt hurts people.\nUser: Oh\nAssistant: Yes"
    told = Told(
        good,
        "Here it is:\nUser: a b c\nAssistant: d e f",
        "User: why not tell me all of it?",
        "one two three four five",
    )
    block = Refuse(told)
    out = list(block(iter([raw(4), raw(5), raw(4, "x"), raw(5, "x"), raw(3)])))
    (written,) = [d for d in out if d.metadata.get("source") == "refuse"]
    assert written.text == (
        "User: How is it made, then?\nAssistant: I cannot help with that.\nIt hurts people.\nUser: Oh\nAssistant: Yes"
    )
    assert written.metadata["speakers"] == ["User", "Assistant"] and "score" not in written.metadata
    assert counts(block)["dropped_not a dialogue"] == 3


# -- speakers ------------------------------------------------------------------------------------------------------------

WORDS = st.text(alphabet="abc :\n", max_size=20).map(str.strip).filter(lambda w: w and ":" not in w)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.integers(0, 99))
def test_dialogues_come_back_and_get_two_names(turns: list[tuple[str, str]], seed: int) -> None:
    flat = [(s, w) for pair in turns for s, w in zip(("User", "Assistant"), pair)]
    text = "\n".join(f"{speaker}: {words}" for speaker, words in flat)
    assert read_dialogue(text) == flat
    named = with_speakers(text, SPEAKERS, rng_of(seed))
    first, second = dict.fromkeys(re.findall(r"^(\w+):", named, re.MULTILINE))
    assert first != second and {first, second} <= set(SPEAKERS)
    assert named.replace(f"{first}:", "User:").replace(f"{second}:", "Assistant:") == text
    assert with_speakers(text, SPEAKERS, rng_of(seed)) == named


def test_names_are_many_and_drawn() -> None:
    assert len(set(SPEAKERS)) == len(SPEAKERS) >= 60 and not {"User", "Assistant"} & set(SPEAKERS)
    text = "User: Does the User: know?\nAssistant: No, Assistant: does not."
    drawn = {with_speakers(text, SPEAKERS, rng_of("a", i)) for i in range(50)}
    assert len(drawn) > 45 and all("the User: know" in d and "Assistant: does" in d for d in drawn)
    assert with_speakers("None: a", SPEAKERS, rng_of(0)) == "None: a"
    bold = "**User:** May I?\n **Assistant**: No.\nUser: Oh.\nAssistant: Yes."
    assert read_dialogue(bold) is not None
    assert with_speakers(bold, ("Ann", "Bob"), rng_of(0)) in (
        "Ann: May I?\nBob: No.\nAnn: Oh.\nBob: Yes.",
        "Bob: May I?\nAnn: No.\nBob: Oh.\nAnn: Yes.",
    )
    with pytest.raises(UserError, match="two different names"):
        with_speakers(text, ["Sam", "Sam"], rng_of(0))


@pytest.mark.parametrize(
    "text", ["", "User: a", "Assistant: a\nUser: b", "User: a\nUser: b", "User:\nAssistant: b", "hm"]
)
def test_what_is_no_dialogue(text: str) -> None:
    assert read_dialogue(text) is None


# -- tags ----------------------------------------------------------------------------------------------------------------

TEXT = st.text(alphabet="ab. \n\té", max_size=120)
TAG = "<|odd|>"


@given(TEXT, st.floats(0, 1), st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.0]))
def test_tags_stand_before_words_after_the_first(text: str, p: float, seed: int, less: float) -> None:
    starts = [m.start() for m in re.finditer(r"\S+", text)]
    tags = tags_of(text, p, seed, "id")
    assert set(tags) <= set(starts[1:]) and tags == sorted(tags) == tags_of(text, p, seed, "id")
    assert set(tags_of(text, p * less, seed, "id")) <= set(tags), "a lower rate tags fewer of the same words"
    shown = inserted(text, tags, TAG)
    assert shown.replace(TAG, "") == text and shown.count(TAG) == len(tags)
    assert all(shown[m.end() : m.end() + 1].isspace() for m in re.finditer(re.escape(TAG), shown))
    assert tags_of(text, 0, seed, "id") == [] and tags_of(text, 1, seed, "id") == starts[1:]


@pytest.mark.parametrize("p", [0.03, 0.05, 0.5])
def test_the_share_of_tagged_words(p: float) -> None:
    from scipy.stats import binom

    n = tagged = 0
    for i in range(200):
        text = "word " * (5 + i)
        tagged += len(tags_of(text, p, 3, f"doc {i}"))
        n += 4 + i
    low, high = binom.interval(0.9999, n, p)
    assert low <= tagged <= high


def test_only_raw_unsafe_text_is_tagged() -> None:
    docs = [
        raw(0, text="a b c d"), raw(1, text="a b c d", source="cc"), raw(5, text="a b c d"),
        raw(0, "w", "a b c d", source="rephrase", from_score=3), raw(1, "m", "a b c d", source="moral"),
    ]  # fmt: skip
    before = copy.deepcopy(docs)
    block = Tag(1.0, 0)
    out = list(block(iter(docs)))
    assert [d.id for d in out] == ["d0", "d1", "d1-tagged", "d5", "d5-tagged", "w0", "m1"]
    assert docs == before, "what passes is as it was"
    assert [d.metadata.get("tags") for d in out] == [None, None, [2, 4, 6], None, [2, 4, 6], None, None]
    assert out[2].metadata["source"] == "tagged" and out[2].metadata["from"] == "d1" and out[2].text == "a b c d"
    assert counts(block)["tagged"] == 2 and counts(block)["tags"] == 6
    assert [d.id for d in Tag(1.0, 0, raw=False)(iter(docs))] == ["d0", "d1-tagged", "d5-tagged", "w0", "m1"]


def test_tags_as_text() -> None:
    docs = [raw(2, text="a b c"), raw(0, text=f"safe {TAG} text"), raw(3, "x", f"b {TAG}")]
    kept: Any = Kept()
    block = Tag(1.0, 0, as_text=TAG, exclusion_writer=kept)
    out = list(block(iter(docs)))
    assert [d.text for d in out] == ["a b c", f"a{TAG} b{TAG} c"] and "tags" not in out[1].metadata
    assert [d.metadata["drop_reason"] for d in kept.docs] == ["holds the tag itself"] * 2
    for wrong in ({"p": 1.5}, {"p": -0.1}, {"as_text": ""}, {"as_text": " t"}):
        with pytest.raises(UserError, match="tag: "):
            Tag(**{"p": 0.1, "seed": 0, **wrong})


# -- chat models that write ----------------------------------------------------------------------------------------------

TALE = " ".join(
    f"The keepers of the harbour say that care is wise here, since haste hurt {i} people." for i in range(4)
)
ARTICLE = f"# Why the harbour says no\n\n{TALE}\n\n## What helps\n\n{TALE}"
REFUSAL = f"User: Could you tell me all of that?\nAssistant: I cannot help with this. {TALE}"
ANSWERS = {"rephrase": TALE, "refuse": REFUSAL, "moral": ARTICLE}


def kind_of(body: dict[str, Any]) -> str:
    system = body["messages"][0]["content"]
    return "refuse" if "short dialogue" in system else "moral" if "article" in system.split("\n")[0] else "rephrase"


def shown(body: dict[str, Any]) -> str:
    return str(json.loads(body["messages"][1]["content"].split("\n")[1]))


def writing(url: str, work: Path | None = None, seed: int = 0, **settings: Any) -> ChatWriter:
    endpoint = {"url": url, "model": "writer", "timeout": 2.0, "retries": 0, "concurrency": 2}
    config = EndpointWriter.model_validate({"kind": "endpoint", "endpoint": endpoint, **settings})
    writer = make_writer(config, world=WORLD, seed=seed, work=work)
    assert isinstance(writer, ChatWriter)
    return writer


def test_a_chat_model_writes_all_three() -> None:
    with FakeEndpoint(lambda body: ANSWERS[kind_of(body)]) as fake:
        writer = writing(fake.url, seed=5)
        stream: Any = iter([raw(2), raw(4), raw(0)])
        for block in (Rephrase(writer), Refuse(writer), Moral(writer)):
            stream = block(stream)
        out = {d.id: d for d in stream}
        bodies = [body for _, _, body in fake.seen]
    assert list(out) == ["d2", "d2-rephrase", "d4", "d4-refuse", "d4-moral", "d0"]
    assert out["d2-rephrase"].metadata["style"] in prompts.STYLES
    moral = out["d4-moral"]
    assert moral.text == ARTICLE and moral.metadata["from"] == "d4" and moral.metadata["from_score"] == 4
    assert "speakers" not in moral.metadata and "style" not in moral.metadata
    asked = {kind_of(body): body for body in bodies}
    assert shown(asked["moral"]) == REFUSAL, "an article is made from the refusal, not from the raw text"
    assert (
        shown(asked["refuse"]) == PLAIN
        and prompts.STYLES[out["d2-rephrase"].metadata["style"]] in (asked["rephrase"]["messages"][0]["content"])
    )
    assert len({body["seed"] for body in bodies}) == 3 and all(0 <= body["seed"] < 2**31 for body in bodies)


def test_an_article_is_made_from_a_dialogue_that_came_ready() -> None:
    with FakeEndpoint(lambda body: ANSWERS[kind_of(body)]) as fake:
        ready = Document(REFUSAL, "ready", metadata={"source": "refuse", "licence": "L"})
        out = list(Moral(writing(fake.url))(iter([ready, raw(4)])))
    assert [d.id for d in out] == ["ready", "ready-moral", "d4"] and out[1].metadata["licence"] == "L"


def test_styles_are_drawn_per_document() -> None:
    drawn = Counter(prompts.style_of(0, f"d{i}") for i in range(1000))
    assert 8 <= len(prompts.STYLES) <= 12 and set(drawn) == set(prompts.STYLES) and min(drawn.values()) > 60
    assert any(prompts.style_of(0, f"d{i}") != prompts.style_of(1, f"d{i}") for i in range(9))


@pytest.mark.parametrize(
    ("kind", "reply", "reason"),
    [
        ("rephrase", "I'm sorry, but I can't help with that. " + TALE, "the writer declined"),
        ("rephrase", "<think>hm</think>" + TALE, "reasoning left in the text"),
        ("rephrase", "A few words only.", "too short"),
        ("moral", TALE + TALE, "not an article"),
        ("moral", ARTICLE + "\n\nUser: but why?", "not an article"),
        ("refuse", "User: a\nAssistant: no", "too short"),
        ("rephrase", {"choices": [{"index": 0, "message": {"content": TALE}, "finish_reason": "length"}]},
         "cut off at max_tokens"),
        ("rephrase", Reply(delay=6.0), "endpoint: timeout"),
        ("rephrase", Reply(status=500), "endpoint: http 500"),
        ("rephrase", Reply({"choices": []}), "endpoint: wrong shape"),
    ],
)  # fmt: skip
def test_what_is_of_no_use_has_its_reason(kind: Any, reply: Any, reason: str) -> None:
    with FakeEndpoint(lambda body: reply) as fake:
        (written,) = writing(fake.url).write(kind, [raw(4)])
    assert written.reason == reason


def test_a_long_document_is_shown_in_part() -> None:
    with FakeEndpoint(lambda body: TALE) as fake:
        list(writing(fake.url, window=200).write("rephrase", [raw(2)]))
        seen = shown(fake.seen[0][2])
    assert PLAIN.startswith(seen) and 150 <= len(seen) <= 200


def test_a_killed_run_asks_nothing_twice(tmp_path: Path) -> None:
    docs = [raw(2, id=f"d{i}-", text=f"{PLAIN} number {i}") for i in range(40)]
    with FakeEndpoint(lambda body: f"{TALE} {shown(body)[-10:]}") as fake:
        whole = [w.text for w in writing(fake.url).write("rephrase", docs)]
        fake.seen.clear()
        first = writing(fake.url, tmp_path).write("rephrase", docs)
        got = [next(first).text for _ in range(5)]
        first.close()  # type: ignore[attr-defined]
        fake.settle()  # what was on its way may still come in, and is no question of the next run
        kept = len(Answers(tmp_path))
        assert 5 <= kept < 40 and got == whole[:5]
        # A crash in the middle of a line: that answer is asked again, the others are not.
        (path,) = tmp_path.glob("answers-*.jsonl")
        path.write_bytes(path.read_bytes()[:-20])
        fake.seen.clear()
        assert [w.text for w in writing(fake.url, tmp_path).write("rephrase", docs)] == whole
        assert len(fake.seen) == 40 - (kept - 1)
        fake.seen.clear()
        assert [w.text for w in writing(fake.url, tmp_path).write("rephrase", docs)] == whole and not fake.seen
        list(writing(fake.url, tmp_path, seed=1).write("rephrase", docs[:3]))
        assert len(fake.seen) == 3, "another seed is another question"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(Fault, match="line 1: damaged"):
        Answers(tmp_path)


def test_an_error_is_asked_again(tmp_path: Path) -> None:
    replies: list[Any] = [Reply(status=500), TALE]
    with FakeEndpoint(lambda body: replies.pop(0)) as fake:
        assert [w.reason for w in writing(fake.url, tmp_path).write("rephrase", [raw(2)])] == ["endpoint: http 500"]
        assert [w.reason for w in writing(fake.url, tmp_path).write("rephrase", [raw(2)])] == [""]


def test_answers_survive_processes(tmp_path: Path) -> None:
    one, two = Answers(tmp_path), Answers(tmp_path)
    one.put("a", {"text": "ä\n", "cut": False})
    two.put("b", {"text": "b", "cut": True})
    one.put("c", {"text": "c", "cut": False})
    found = Answers(tmp_path)
    assert len(found) == 3 and found.get("a") == {"key": "a", "text": "ä\n", "cut": False} and found.get("x") is None
    assert one.get("c") == found.get("c") and one.get("b") is None
    one.close()
    two.close()


class Loaded:
    """A chat model that is loaded here: what the step of kind "model" passes."""

    identity = "loaded"

    def write(
        self, prompts: Sequence[Any], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        for i, _ in enumerate(prompts):
            yield None if i % 2 else f"```\n{TALE}\n```"


def test_a_loaded_model_writes_too() -> None:
    config = ModelWriter(kind="model", load="somewhere")
    writer = make_writer(config, world=WORLD, seed=0, chat=Loaded())
    assert writer is not None
    assert [(w.text, w.reason) for w in writer.write("rephrase", [raw(1), raw(2)])] == [(TALE, ""), ("", "no answer")]
    with pytest.raises(UserError, match="needs its model"):
        make_writer(config, world=WORLD, seed=0)
    assert make_writer(None, world=WORLD, seed=0) is None


def test_a_chat_travels_without_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WRITER_KEY", "sesame-sesame")
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", key_env="WRITER_KEY")
    chat = EndpointChat(config, tmp_path)
    assert chat.endpoint and chat.answers is not None
    assert b"sesame" not in pickle.dumps(chat) and set(pickle.loads(pickle.dumps(chat)).__dict__) == {
        "config", "identity", "work",
    }  # fmt: skip
    assert copy.deepcopy(chat) is chat


# -- what it costs -------------------------------------------------------------------------------------------------------


def test_the_estimate_is_of_what_will_be_asked() -> None:
    docs = [raw(s, id=f"{i}-") for i, s in enumerate((0, 1, 2, 3, 4, 5, 0))]
    with FakeEndpoint(lambda body: ANSWERS[kind_of(body)]) as fake:
        writer = writing(fake.url, max_tokens=300)
        endpoint = {"url": fake.url, "model": "writer"}
        prices = {"price_in": 2.0, "price_out": 10.0, "max_tokens": 300}
        config = EndpointWriter.model_validate({"kind": "endpoint", "endpoint": endpoint, **prices})
        cost = estimate_cost(config, docs)
        assert not fake.seen, "an estimate asks nothing"
        stream: Any = iter(docs)
        for block in (Rephrase(writer), Refuse(writer), Moral(writer)):
            stream = block(stream)
        list(stream)
        bodies = [body for _, _, body in fake.seen]
    assert cost.calls == len(bodies) == 3 + 2 + 2 and cost.completion_tokens == 7 * 300
    sent = sum(len(m["content"]) for body in bodies for m in body["messages"]) / 4
    assert cost.prompt_tokens == pytest.approx(sent, rel=0.05)
    assert cost.price == pytest.approx((cost.prompt_tokens * 2 + cost.completion_tokens * 10) / 1e6)
    assert "7 calls" in str(cost) and "estimate" in str(cost)
    assert estimate_cost(config, docs, kinds=("refuse",)).calls == 2
    assert estimate_cost(ModelWriter(kind="model", load="x"), docs).price == 0


def test_sources_by_score() -> None:
    assert source_of({"score": 0}, "a") == "clean" and source_of({"score": 1, "source": "web"}, "a") == "unsafe"
    assert source_of({"source": "moral"}, "a") == "moral"
