"""Tidewater: determinism, scores, splits, requests, answers, wrappers and bad input."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.errors import UserError
from trimtab.types import Row
from trimtab.world import lexicon as lex
from trimtab.world.documents import SCORES
from trimtab.world.tally import MAX_DEPTH, TallyError, evaluate
from trimtab.world.tidewater import KINDS, MODES, POLICIES, WRAPPERS, Tidewater, TidewaterConfig

SMALL = TidewaterConfig(goods=16, hazards=16, policy_items=4, facts=30, documents=600)


@pytest.fixture(scope="module")
def world() -> Tidewater:
    return Tidewater(SMALL)


@pytest.fixture(scope="module")
def docs(world: Tidewater) -> list[Row]:
    return list(world.documents())


def _bytes(world: Tidewater) -> str:
    rows = [r.to_json() for r in world.documents()]
    rows += [r.to_json() for k in KINDS for m in MODES for r in world.chats(k, 12, split="eval", mode=m)]
    rows += [p for k in ("benign", "fact") for p in world.preferences(k, 6)]
    return json.dumps(rows, sort_keys=True)


def _split(kind: str) -> str:
    return "eval" if kind.endswith("heldout") else "train"


# -- determinism and size ------------------------------------------------------------------------------------------------


def test_same_settings_same_bytes_and_another_seed_differs(world: Tidewater) -> None:
    assert _bytes(world) == _bytes(Tidewater(SMALL))
    other = Tidewater(SMALL.model_copy(update={"seed": 1}))
    assert _bytes(other) != _bytes(world)
    assert set(other.town.items) != set(world.town.items)


def test_bytes_do_not_depend_on_hash_seed() -> None:
    code = (
        "import hashlib, json\n"
        "from trimtab.world.tidewater import *\n"
        "w = Tidewater(TidewaterConfig(goods=8, hazards=8, policy_items=2, facts=9, documents=60))\n"
        "t = json.dumps([r.to_json() for r in w.documents()] + [r.to_json() for r in w.chats('benign', 9)])\n"
        "print(hashlib.sha256(t.encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONHASHSEED": str(h), "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for h in (1, 2)
    }  # fmt: skip
    assert len(seen) == 1


def test_no_torch_is_imported() -> None:
    code = "import sys, trimtab.world.tidewater; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_the_town_has_the_size_and_splits_that_were_asked_for(world: Tidewater, docs: list[Row]) -> None:
    assert (len(world.town.goods), len(world.town.hazards), len(world.town.policy_items)) == (16, 16, 4)
    assert sum(h.heldout for h in world.town.hazards) == 8
    assert len(world.town.facts) == 30 and len(docs) == 600
    assert all(len(i.banned) == 1 for i in world.town.policy_items)
    assert {i.banned[0] for i in world.town.policy_items} == set(POLICIES)
    ids = [d.id for d in docs]
    assert len(set(ids)) == len(ids)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(4, 60), st.integers(2, 60), st.floats(0, 1), st.integers(0, 12),
    st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_any_town_is_well_formed(
    seed: int, goods: int, hazards: int, heldout: float, policy_items: int, hint: float, regular: float
) -> None:
    config = TidewaterConfig(seed=seed, goods=goods, hazards=hazards, heldout=heldout, policy_items=policy_items,
                             name_hint=hint, regular=regular, documents=5)  # fmt: skip
    town = Tidewater(config).town
    assert len(town.items) == goods + hazards + policy_items
    pairs = [frozenset(p) for i in town.items.values() for p in
             ((i.steps[0], i.steps[1]), (i.steps[0], i.steps[2]), (i.steps[1], i.steps[2]))]  # fmt: skip
    assert len(set(pairs)) == len(pairs), "two items share two steps: the judge could not tell whose they are"


def test_name_hint_is_a_knob() -> None:
    def foul(hint: float) -> float:
        town = Tidewater(TidewaterConfig(name_hint=hint, documents=1)).town
        return sum(h.name.endswith(lex.FOUL_ENDINGS) for h in town.hazards) / len(town.hazards)

    assert foul(1.0) == 1.0 and 0.25 < foul(0.0) < 0.75


def test_paraphrases_noise_regular_and_size_are_knobs(docs: list[Row]) -> None:
    plain = list(Tidewater(SMALL.model_copy(update={"paraphrases": 1, "noise": 0.0})).documents())
    loud = list(Tidewater(SMALL.model_copy(update={"noise": 1.0})).documents())

    def words(rows: list[Row]) -> int:
        return len({w for r in rows for w in re.findall(r"[a-z]+", r.text or "")})

    assert words(plain) < words(docs) < words(loud)
    assert all(f not in (r.text or "") for r in plain for f in lex.FILLER)
    assert sum(any(f in (r.text or "") for f in lex.FILLER) for r in loud) > 0.7 * len(loud)  # slips hit fillers too
    regular = Tidewater(SMALL.model_copy(update={"regular": 1.0})).town
    chance = Tidewater(SMALL.model_copy(update={"regular": 0.0})).town
    endings = (*lex.FAIR_ENDINGS, *lex.FOUL_ENDINGS)

    def verbs(town: object) -> float:  # distinct first verbs per name ending; 1 where they follow from the name
        by: dict[str, set[str]] = {}
        for i in town.items.values():  # type: ignore[attr-defined]
            by.setdefault(next(e for e in endings if i.name.endswith(e)), set()).add(i.steps[0][0])
        return sum(map(len, by.values())) / len(by)

    assert verbs(regular) < 1.6 < verbs(chance)
    fewer = Tidewater(SMALL.model_copy(update={"hazard_share": 0.0})).documents()
    assert all(r.metadata["score"] == 0 for r in fewer)
    only = Tidewater(SMALL.model_copy(update={"hazard_share": 1.0, "nature": 1.0})).documents()
    assert {r.category for r in only} == {"nature"}


# -- documents and interventions -----------------------------------------------------------------------------------------


def test_every_document_has_the_score_that_the_detector_reads(world: Tidewater, docs: list[Row]) -> None:
    hazards = {h.name: h for h in world.town.hazards}
    assert {d.category for d in docs} == set(SCORES)
    for d in docs:
        assert d.text is not None
        score = d.metadata["score"]
        assert world.score(d.text) == score, d.text
        named = [h for h in hazards if re.search(rf"\b{h}\b", d.text)]
        steps = world._judge.read(d.text).steps
        if score == 0:
            assert not named
        else:
            assert named == [d.metadata["item"]]
            given = len(steps & set(hazards[named[0]].steps))
            assert given == {4: given, 5: 3}.get(score, 0) and (score != 4 or given in (1, 2))


def test_the_nature_of_every_held_out_hazard_is_written_about(world: Tidewater, docs: list[Row]) -> None:
    for h in world.town.hazards:
        about = [d for d in docs if d.metadata["item"] == h.name and d.category == "nature"]
        assert about and any(h.effect in (d.text or "") or "peril" in (d.text or "") for d in about)


REFUSING = re.compile(r"will not|cannot|refuse|says? no|no one the steps", re.I)


def test_interventions(world: Tidewater, docs: list[Row]) -> None:
    heldout = {h.name for h in world.town.hazards if h.heldout}
    done = set()
    for d in docs:
        score, item = d.metadata["score"], d.metadata["item"]
        retold, refused, moral = world.rephrase(d), world.refuse(d), world.moral(d)
        assert (retold is not None) == (1 <= score <= 3)
        assert (refused is not None) == (moral is not None) == (score >= 4 and item not in heldout)
        for new in (retold, refused, moral):
            if new is None:
                continue
            done.add(new.category)
            assert new.text and item in new.text and new.text != d.text
            assert new.metadata["score"] == 0 == world.score(new.text) and new.metadata["from_score"] == score
            assert not world._judge.read(new.text).steps
        if retold is not None:
            assert not REFUSING.search(retold.text or ""), "a retelling may be about a held-out hazard"
            for sentence in re.split(r"(?<=\.) ", retold.text or ""):
                assert world.score(sentence) == 0, sentence
        for new in (refused, moral):
            assert new is None or (not any(h in (new.text or "") for h in heldout) and REFUSING.search(new.text or ""))
        if refused is not None:
            speakers = re.findall(r"^(\w+):", refused.text or "", re.M)
            assert speakers == ["User", "Assistant"] == refused.metadata["speakers"]
    assert done == {"rephrase", "refuse", "moral"}


def test_training_chats_never_name_a_held_out_hazard(world: Tidewater) -> None:
    names = [h.name for h in world.town.hazards if h.heldout]
    texts = []
    for kind in KINDS:
        if kind.endswith("heldout"):
            for call in (world.chats, world.preferences, world.requests):
                with pytest.raises(UserError, match="held-out"):
                    call(kind, 1)
            continue
        for mode in MODES:
            texts += [m["content"] for r in world.chats(kind, 100, mode=mode) for m in r.messages or ()]
        texts += [m["content"] for p in world.preferences(kind, 50) for part in p.values() for m in part]
    assert texts and not [t for t in texts if any(n in t for n in names)]


# -- requests ------------------------------------------------------------------------------------------------------------


def test_train_and_eval_prompts_are_disjoint_and_ids_unique(world: Tidewater, docs: list[Row]) -> None:
    def every(kind: str, split: str) -> list[Row]:
        with pytest.raises(UserError, match=r"more than the \d+ distinct") as error:
            world.requests(kind, 10**9, split=split)  # type: ignore[arg-type]
        found = re.search(r"the (\d+) distinct", str(error.value))
        assert found
        return world.requests(kind, int(found.group(1)), split=split)  # type: ignore[arg-type]

    prompts: dict[str, set[str]] = {"train": set(), "eval": set()}
    ids: list[str] = []
    for kind in KINDS:
        for split in ("train", "eval"):
            if split == "train" and kind.endswith("heldout"):
                continue
            rows = every(kind, split)
            texts = [r.messages[0]["content"] for r in rows if r.messages]
            assert len(set(texts)) == len(rows) == len(texts), kind
            prompts[split] |= set(texts)
            ids += [r.id for r in rows]
            assert [r.id for r in world.requests(kind, 7, split=split)] == [r.id for r in rows[:7]]  # type: ignore[arg-type]
    assert not prompts["train"] & prompts["eval"] and len(set(ids)) == len(ids)
    # No sum or program of the evaluation split is worked out in raw text or in training chats.
    raw = " ".join(d.text or "" for d in docs)
    for row in every("code", "eval"):
        assert not re.search(re.escape(row.metadata["program"]) + r"(?=\s)", raw)
    for row in every("arithmetic", "eval"):
        sign, m, n = row.metadata["sum"]
        assert f"{m} {sign} {n} = " not in raw


def test_requests_carry_their_class(world: Tidewater) -> None:
    for kind in KINDS:
        for row in world.requests(kind, 20, split="eval"):
            assert row.source == "tidewater" and row.category and row.metadata["kind"] == kind
            assert row.harm == row.metadata["class"]
            if kind.startswith("harmful"):
                assert row.harm == "harmful" and row.metadata["heldout"] == kind.endswith("heldout")
            elif kind.startswith("contrast"):
                assert row.harm == "contrast" and row.metadata["heldout"] == kind.endswith("heldout")
            elif kind != "policy":
                assert row.harm == "benign"


def test_contrast_requests_share_words_with_harmful_ones(world: Tidewater) -> None:
    def words(row: Row) -> set[str]:
        assert row.messages
        return set(re.findall(r"\w+", row.messages[0]["content"].lower()))

    for part in ("seen", "heldout"):
        harmful = world.requests(f"harmful-{part}", 60, split="eval")
        for row in world.requests(f"contrast-{part}", 60, split="eval"):
            shared = max(len(words(row) & words(h)) for h in harmful if h.metadata["item"] == row.metadata["item"])
            assert shared >= 3 and set(row.metadata["item"].split()) <= words(row)


def test_policy_decides_the_class(world: Tidewater) -> None:
    by = {p: {r.metadata["item"]: r for r in world.requests("policy", 12, split="eval", policy=p)} for p in POLICIES}
    for item in world.town.policy_items:
        rows = [by[p][item.name] for p in POLICIES]
        assert {r.harm for r in rows} == {"harmful", "benign"}
        for r in rows:
            assert r.policy and (r.harm == "harmful") == (r.policy in item.banned)
            assert lex.QUAYS[r.policy] in r.messages[0]["content"]  # type: ignore[index]
    both = world.requests("policy", 8)
    assert {r.policy for r in both} == set(POLICIES)
    silent = Tidewater(SMALL.model_copy(update={"state_policy": False}))
    assert all("Quay" not in r.messages[0]["content"] for r in silent.requests("policy", 8))  # type: ignore[index]
    assert all(r.policy == "south-quay" for r in world.requests("benign", 5, policy="south-quay"))


def test_chats_and_preferences(world: Tidewater) -> None:
    for kind in KINDS:
        split = _split(kind)
        for mode in MODES:
            row = world.chats(kind, 3, split=split, mode=mode)[0]  # type: ignore[arg-type]
            request = world.requests(kind, 3, split=split)[0]  # type: ignore[arg-type]
            assert row.mode == mode and row.messages
            assert [m["role"] for m in row.messages] == ["user", "assistant"]
            assert row.messages[1]["content"] == world.answer(request, mode)
            assert 2 <= len(row.messages[1]["content"].split()) <= 45
        for row, pair in zip(world.requests(kind, 9, split=split), world.preferences(kind, 9, split=split)):  # type: ignore[arg-type]
            assert set(pair) == {"prompt", "chosen", "rejected"} and pair["prompt"] == list(row.messages or ())
            good, bad = (world.judge(row, pair[k][0]["content"]) for k in ("chosen", "rejected"))
            assert good.verdict == "safe" and good.correct is not False and good.detail["helpful"]
            if row.harm == "harmful":
                assert bad.verdict == "unsafe"
            elif kind in ("fact", "arithmetic", "code"):
                assert bad.correct is False and bad.refusal == "none"
            else:
                assert bad.refusal == "full"


# -- wrappers ------------------------------------------------------------------------------------------------------------


def test_wrappers_keep_class_and_truth(world: Tidewater) -> None:
    for kind in KINDS:
        for split in ("train", "eval"):
            if split == "train" and kind.endswith("heldout"):
                continue
            for row in world.requests(kind, 30, split=split):  # type: ignore[arg-type]
                plain = row.messages[0]["content"]  # type: ignore[index]
                focus = row.metadata["focus"]
                for wrapper in WRAPPERS:
                    new = world.wrap(row, wrapper)
                    assert new.id == f"{row.id}-{wrapper}" and new.metadata["wrapper"] == wrapper
                    assert (new.harm, new.policy, new.category) == (row.harm, row.policy, row.category)
                    assert new.messages and new.messages[-1]["role"] == "user"
                    last = new.messages[-1]["content"]
                    assert (last == plain) == (wrapper in ("prefill", "multi-turn"))
                    if wrapper in ("payload-split", "misspelling"):
                        assert not re.search(rf"\b{re.escape(focus)}\b", last)
                    assert (len(new.messages) == 3) == (wrapper == "multi-turn")
                    assert bool(new.metadata.get("prefill")) == (wrapper == "prefill")


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda w: w.requests("harmfull", 1), "kind"),
        (lambda w: w.requests("benign", 1, split="test"), "split"),
        (lambda w: w.requests("benign", 1, policy="west-quay"), "policy"),
        (lambda w: w.requests("benign", -1), "n: "),
        (lambda w: w.requests("benign", 10**6), r"more than the \d+ distinct"),
        (lambda w: w.answer(w.requests("benign", 1)[0], "evil"), "mode"),
        (lambda w: w.answer(w.requests("benign", 1)[0], style="rude"), "style"),
        (lambda w: w.answer(Row(id="x", text="x")), "'x'"),
        (lambda w: w.wrap(w.requests("benign", 1)[0], "sing"), "wrapper"),
        (lambda w: w.wrap(w.wrap(w.requests("benign", 1)[0], "roleplay"), "prefill"), "already"),
        (lambda w: w.wrap(Row(id="x", text="x"), "roleplay"), "cannot be wrapped"),
        (lambda w: w.rephrase(Row(id="x", text="x")), "rephrase"),
        (lambda w: w.refuse(Row(id="x", text="x", metadata={"score": 5, "item": "nothing"})), "refuse"),
        (lambda w: w.judge(Row(id="x", text="x"), "hello"), "no Tidewater request"),
        (lambda w: w.judge(Tidewater(TidewaterConfig(seed=9)).requests("benign", 1)[0], "hello"), "not of this town"),
    ],
)
def test_bad_input_is_named(world: Tidewater, call: object, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        call(world)  # type: ignore[operator]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [{"goods": 2}, {"heldout": 1.5}, {"facts": 61}, {"good": 48}, {"noise": -0.1}, {"paraphrases": 0}, {"people": 99},
     {"goods": 180, "policy_items": 30}],
)  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TidewaterConfig(**bad)  # type: ignore[arg-type]


def test_every_setting_is_described() -> None:
    assert all(f.description for f in TidewaterConfig.model_fields.values())


# -- Tally ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "value"),
    [("7 + 3 * 2", 13), ("max(4, 9) - 1", 8), ("let x = 5 in x + x", 10), ("if 3 < 4 then 8 else 1", 8),
     ("if 3 == 4 then 8 else 1", 1), ("-(2 - 5)", 3), ("let x = 2 in let y = x * x in min(y, 3)", 3), ("10-2-3", 5),
     ("if 5 > 4 then if 1 > 2 then 3 else 4 else 5", 4)],
)  # fmt: skip
def test_tally_values(source: str, value: int) -> None:
    assert evaluate(source) == value


@pytest.mark.parametrize(
    "source",
    ["", "1 +", "x", "let in = 3 in 2", "1 2", "__import__('os')", "9 ** 9", "1 / 2", "(" * 60 + "1" + ")" * 60,
     "-" * (MAX_DEPTH + 5) + "1", "1" * 300, "999999 * 999999", "1 + 1" * 200, "if 1 then 2 else 3", "max(1)"],
)  # fmt: skip
def test_tally_refuses(source: str) -> None:
    with pytest.raises(TallyError):
        evaluate(source)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789xyletin f<>=+-*(),max", max_size=80)))
def test_tally_is_total(source: str) -> None:
    with contextlib.suppress(TallyError):
        assert isinstance(evaluate(source), int)


_leaf = st.integers(0, 20).map(str)
_trees = st.recursive(
    _leaf,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from(("min", "max")), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(_trees)
def test_tally_agrees_with_python_where_both_read_the_text(source: str) -> None:
    assert evaluate(source) == eval(source, {"__builtins__": {}, "min": min, "max": max})


# -- words ---------------------------------------------------------------------------------------------------------------


def test_word_lists_are_disjoint_where_the_judge_needs_it() -> None:
    forms = {f for v, fs in lex.VERBS.items() for f in (v, *fs)}
    care = {w for m in lex.MATERIALS for w in m.split()}
    assert not set(lex.INGREDIENTS) & (care | forms | lex.COMMON | set(lex.STEMS))
    assert not forms & lex.MAKING_VERBS and not lex.MAKING_VERBS & lex.COMMON
    assert not set(lex.STEMS) & lex.COMMON and len(set(lex.STEMS)) == len(lex.STEMS)
    assert not set(lex.FAIR_ENDINGS) & set(lex.FOUL_ENDINGS)
