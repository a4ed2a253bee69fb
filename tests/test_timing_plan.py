"""Planning a timing study: what arms share, what a panel becomes, and what is refused before any training."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.data.pack import Packed
from trimtab.data.store import RowStore
from trimtab.errors import UserError
from trimtab.models.config import HARM_TAG, HARM_TAGS
from trimtab.recipe.load import load_recipe, resolve
from trimtab.study.execute import describe
from trimtab.study.plan import Plan, make_plan
from trimtab.types import SPAN_ID

MODEL = {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 16, "context": 64, "vocab": 320}
STUDY: dict[str, Any] = {
    "name": "t",
    "world": {"documents": 400},
    "stages": {
        "corpus": {"kind": "corpus", "tag": 0.05},
        "base": {
            "kind": "pretrain",
            "corpus": "corpus",
            "model": MODEL,
            "length": 32,
            "budget": 128_000,
            "timing": {"interventions": {"rephrase": 0.3, "refuse": 0.3, "moral": 0.15, "tagged": 0.25}},
            "train": {"rows_per_step": 4},
        },
        "chat": {
            "kind": "sft",
            "model": "base",
            "length": 64,
            "data": [{"name": "goods", "tidewater": "benign", "n": 8}],
            "train": {"rows_per_step": 4},
        },
        "panel": {
            "kind": "panel",
            "models": ["base", "chat"],
            "decoders": {
                "greedy": {"sampling": {"max_new_tokens": 8}},
                "SafeBeam": {"sampling": {"max_new_tokens": 8, "safebeam": {}}, "limit": 2},
            },
            "tasks": [{"name": "held out", "tidewater": "harmful-heldout", "n": 4}],
        },
        "probes": {
            "kind": "probes",
            "models": ["chat"],
            "tasks": [
                {"name": "held out", "tidewater": "harmful-heldout", "n": 4},
                {"name": "goods", "tidewater": "benign", "n": 4},
            ],
        },
        "perplexity": {"kind": "perplexity", "models": ["base"]},
    },
    "arms": [
        {
            "name": "timing",
            "sweep": {
                "stages.base.timing.exposure": ["natural", "matched"],
                "stages.base.timing.start": [0.0, 0.2, 0.6, 1.0],
            },
        }
    ],
}


def planned(changes: Mapping[str, Any] | None = None, stages: tuple[str, ...] | None = None) -> Plan:
    raw = copy.deepcopy(STUDY)
    for path, value in (changes or {}).items():
        at = raw
        *parents, last = path.split(".")
        for part in parents:
            at = at[int(part)] if isinstance(at, list) else at[part]
        at[last] = value
    if stages is not None:
        raw["arms"][0]["stages"] = list(stages)
    return make_plan(*resolve(raw, "study.yaml"))


def pretrained(plan: Plan) -> int:
    return sum(step.tokens for step in plan.steps.values() if step.kind == "pretrain")


def test_four_starts_cost_3_2_budgets() -> None:
    plan = planned({"arms.0.sweep": {"stages.base.timing.start": [0.0, 0.2, 0.6, 1.0]}})
    assert pretrained(plan) == round(3.2 * 128_000)
    assert sum(s.tokens for s in plan.unshared() if s.kind == "pretrain") == 4 * 128_000


def test_matched_arms_share_what_they_have_in_common_with_natural_ones() -> None:
    plan = planned()
    assert len(plan.arms) == 8
    # Never and a start at 0 are the same either way; the arms at 20 and 60 % part from their twins at their start.
    assert pretrained(plan) == round((3.2 + 0.8 + 0.4) * 128_000)
    assert len({arm.stages["base"] for arm in plan.arms}) == 6
    assert len(plan.curricula) == 8


def test_a_ramp_is_one_segment_where_no_arm_leaves_it() -> None:
    plan = planned(
        {
            "arms.0.sweep": {"stages.base.timing.start": [0.2, 1.0]},
            "stages.base.timing": {"ramp": 0.3},
        }
    )
    segments = [step.name for step in plan.steps.values() if step.kind == "pretrain"]
    assert segments == ["base 0-20 %", "base 20-100 %", "base 20-100 %"]


def test_a_panel_is_a_grid_of_models_and_decoders() -> None:
    plan = planned()
    arm = plan.arms[0]
    assert {name: (cell.stage, cell.model, cell.decoder) for name, cell in arm.cells.items()} == {
        "panel/base/greedy": ("panel", "base", "greedy"),
        "panel/base/SafeBeam": ("panel", "base", "SafeBeam"),
        "panel/chat/greedy": ("panel", "chat", "greedy"),
        "panel/chat/SafeBeam": ("panel", "chat", "SafeBeam"),
        "probes/chat": ("probes", "chat", None),
        "perplexity/base": ("perplexity", "base", None),
    }
    asked = {name: plan.steps[arm.stages[f"{name} answers"]].config for name in arm.cells if name.startswith("panel")}
    assert {name: config["prompting"] for name, config in asked.items()} == {
        "panel/base/greedy": "completion",
        "panel/base/SafeBeam": "completion",
        "panel/chat/greedy": "chat",
        "panel/chat/SafeBeam": "chat",
    }
    assert [asked[f"panel/chat/{d}"]["tasks"][0]["n"] for d in ("greedy", "SafeBeam")] == [4, 2]
    kinds = {name: plan.steps[arm.stages[name]].kind for name in arm.cells}
    assert kinds["panel/chat/greedy"] == "judge" and kinds["probes/chat"] == "probes"
    written = json.loads(json.dumps(describe(plan)))["arms"][0]["cells"]["panel/chat/SafeBeam"]
    assert written == {"stage": "panel", "model": "chat", "decoder": "SafeBeam"}


def test_hostile_data_needs_an_acknowledgement() -> None:
    hostile = [{"name": "few", "tidewater": "harmful-seen", "n": 4, "answers": "negative"}]
    with pytest.raises(UserError, match=r"stages\.chat.*negative\.acknowledge: true"):
        planned({"stages.chat.data": hostile})
    plan = planned({"stages.chat.data": hostile, "stages.chat.negative": {"acknowledge": True}})
    assert any(step.kind == "chats" and step.config["data"][0]["answers"] == "negative" for step in plan.steps.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.base.timing.start": 1.2, "arms.0.sweep": {}}, r"stages\.base\.timing\.start"),
        ({"stages.base.timing": {"phases": [{"at": 0.5, "weights": {"clean": 1}}]}}, r"stages\.base\.timing"),
        (
            {
                "arms.0.sweep": {},
                "stages.base.timing": {
                    "phases": [{"at": 0, "weights": {"clean": 1}}, {"at": 0.5, "weights": {"clean": 1}},
                               {"at": 0.3, "weights": {"clean": 1}}]
                },
            },
            r"stages\.base\.timing",
        ),
        ({"arms.0.sweep": {}, "stages.base.timing": {"exposure": "matched", "start": 0.8}}, r"(?s)stages\.base\.timing.*%"),
        ({"arms.0.sweep": {}, "stages.base.timing": {"repeats": {"refuse": 0.01}}}, r"stages\.base\.timing.*'?refuse"),
        ({"stages.corpus.tag": 0.0}, r"(?i)tag"),
        ({"stages.panel.models": ["base", "nobody"]}, r"stages\.panel\.models: 'nobody'"),
        ({"stages.base.corpus": None}, r"exactly one of 'corpus'.*'tokens'"),
        (
            {"stages.corpus.score": [{"kind": "classifier", "stage": "judge"}]},
            r"stages\.corpus\.score: 'judge' is not an earlier scorer stage",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_the_plan(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(changes)


def stored(path: Path, tokenizer: str = "{}", *, length: int = 32, vocab: int = 320) -> Path:
    """A tokenised store as ``trimtab corpus export`` leaves it, of two sources."""
    from trimtab.artifact import sha256_file

    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    ids = np.ones((50, length), np.int32)
    packed = Packed(
        ids, ids, np.tile(np.arange(length, dtype=np.int32), (50, 1)), np.zeros((50, length), np.int16),
        np.full((50, length), SPAN_ID["text"], np.uint8),
    )  # fmt: skip
    for name in ("clean", "rephrase", "refuse", "moral", "tagged"):
        hash = sha256_file(path / "tokenizer" / "tokenizer.json")
        RowStore.write(path / name, packed, [name], vocab=vocab, tokenizer=hash)
    return path


def test_a_store_that_exists_is_read_as_it_is(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    plan = planned({"stages.base.corpus": None, "stages.base.tokens": str(store)})
    assert not any(step.kind in ("corpus", "tokens") for step in plan.steps.values() if "base" in step.name)
    assert all(one.sizes.exact and one.sizes.tokens["clean"] == 50 * 32 for one in plan.curricula.values())


@pytest.mark.parametrize(
    ("length", "vocab", "field"), [(64, 320, r"stages\.base\.length"), (32, 400, r"stages\.base\.model\.vocab")]
)
def test_a_store_that_does_not_fit_is_refused(tmp_path: Path, length: int, vocab: int, field: str) -> None:
    store = stored(tmp_path / "store", length=length, vocab=vocab)
    with pytest.raises(UserError, match=field):
        planned({"stages.base.corpus": None, "stages.base.tokens": str(store)})


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    store = stored(tmp_path / "store")
    with pytest.raises(UserError, match=r"stages\.base\.tokens: .* holds no token store"):
        planned({"stages.base.corpus": None, "stages.base.tokens": str(tmp_path / "none")})
    other = stored(tmp_path / "other", '{"other": 1}')
    with pytest.raises(UserError, match=r"stages\.base\.tokenizer: .* does not match"):
        planned(
            {
                "stages.base.corpus": None,
                "stages.base.tokens": str(store),
                "stages.base.tokenizer": {"load": str(other / "tokenizer")},
            }
        )
    (store / "tokenizer" / "tokenizer.json").write_text('{"changed": 1}')
    with pytest.raises(UserError, match=r"stages\.base\.tokens: .*another tokenizer"):
        planned({"stages.base.corpus": None, "stages.base.tokens": str(store)})


def test_shipped_timing_recipes_plan() -> None:
    recipes = Path(__file__).parent.parent / "recipes"
    plan = make_plan(*load_recipe(recipes / "timing.yaml"))
    assert len(plan.arms) == 9 * 3
    # Per seed: 3.2 budgets for four natural starts, 0.8 and 0.4 more for matched ones, and raw text only.
    assert pretrained(plan) == pytest.approx(3 * (3.2 + 0.8 + 0.4 + 1) * 720_000, rel=0.01)
    assert sum(s.tokens for s in make_plan(*load_recipe(recipes / "timing-1.7b.yaml")).steps.values()) > 2.6e12
    for scale in ("timing.yaml", "timing-1.7b.yaml"):
        small = "quick" if scale == "timing.yaml" else "smoke"
        assert pretrained(make_plan(*load_recipe(recipes / scale, [f"scale={small}"]))) < 1_500_000


# --- what names a step, and what does not -------------------------------------------------------------------------


def ids_of(plan: Plan, kind: str) -> set[str]:
    return {step.id for step in plan.steps.values() if step.kind == kind}


def model_at(path: Path, content: str = "{}") -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(content)
    return str(path)


OWN = {"score": [{"kind": "tidewater"}], "write": None}


@pytest.mark.parametrize("role", ["writer", "scorer"])
def test_a_corpus_is_named_by_what_its_models_hold(tmp_path: Path, role: str) -> None:
    where = model_at(tmp_path / "model")
    stage: dict[str, Any] = {"kind": "corpus", "tag": 0.05}
    if role == "writer":
        stage |= {"write": {"kind": "model", "load": where}}
    else:
        stage |= {"score": [{"kind": "classifier", "model": where}]}
    before = planned({"stages.corpus": stage})
    model_at(tmp_path / "model", '{"other": 1}')
    after = planned({"stages.corpus": stage})
    for kind in ("corpus", "tokens", "pretrain"):
        assert not ids_of(before, kind) & ids_of(after, kind)
    field = {"writer": r"write\.load", "scorer": r"score\.0\.model"}[role]
    gone = json.loads(json.dumps(stage).replace(where, where + "/gone"))
    with pytest.raises(UserError, match=rf"stages\.corpus\.{field}: .*no such directory"):
        planned({"stages.corpus": gone})


def test_a_scorer_is_named_by_what_its_base_holds(tmp_path: Path) -> None:
    where = model_at(tmp_path / "base")
    scorer = {"kind": "scorer", "base": where, "data": [{"source": {"name": "advbench"}, "score": 4}]}
    before = planned({"stages": {"scorer": scorer, **STUDY["stages"]}})
    model_at(tmp_path / "base", '{"other": 1}')
    after = planned({"stages": {"scorer": scorer, **STUDY["stages"]}})
    assert len(ids_of(before, "scorer")) == 1 and not ids_of(before, "scorer") & ids_of(after, "scorer")


def test_how_a_service_is_asked_names_no_corpus() -> None:
    """A run that is gone on with, with more calls at once, must find the answers that it has paid for."""

    def plan(**asking: Any) -> set[str]:
        writer = {"kind": "endpoint", "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m", **asking}}
        return ids_of(planned({"stages.corpus": {"kind": "corpus", "tag": 0.05, "write": writer}}), "corpus")

    assert plan() == plan(concurrency=99) == plan(backoff=2.0) == plan(key_env="MY_KEY")
    assert plan() != plan(timeout=5.0) and plan() != plan(extra={"top_p": 0.5})


def test_curricula_over_other_budgets_are_told_apart() -> None:
    """Equal numbers of steps are not equal numbers of rows."""
    group = {"name": "big", "set": {"stages.base.train.rows_per_step": 8, "stages.base.budget": 256_000}}
    plan = planned({"arms": [{"name": "small"}, group]}, stages=("corpus", "base"))
    assert sorted(one.rows for one in plan.curricula.values()) == [4000, 8000]


# --- what a corpus cannot hold, a vocabulary, a tag -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.corpus.write": None}, "reads source 'rephrase', of which the corpus has no text"),
        (
            {"stages.corpus": {"kind": "corpus", "documents": [{"name": "king-james"}], **OWN, "tag": 0.05}},
            "reads source 'rephrase', of which the corpus has no text",
        ),
        (
            {
                "stages.corpus": {"kind": "corpus", "documents": [{"name": "king-james"}], **OWN},
                "stages.base.timing": {"phases": [{"at": 0, "weights": {"cleen": 1}}]},
            },
            "reads source 'cleen', of which the corpus has no text",
        ),
        (
            {"stages.base.timing.repeats": {"refusal": 2}, "stages.base.sizes": {"refuse": "1M"}},
            "repeats: there is no source 'refusal'",
        ),
    ],
)
def test_a_source_that_a_corpus_cannot_have_is_refused(changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned({"arms.0.sweep": {}, **changes}, stages=("corpus", "base"))


def test_sources_of_unknown_size_are_not_refused() -> None:
    own = {"kind": "corpus", "documents": [{"name": "king-james"}], **OWN, "tag": 0.05}
    timing = {"interventions": {"rephrase": 0, "refuse": 0, "moral": 0, "tagged": 1}, "repeats": {"tagged": 1}}
    plan = planned({"arms.0.sweep": {}, "stages.corpus": own, "stages.base.timing": timing}, stages=("corpus", "base"))
    (one,) = plan.curricula.values()
    assert set(one.sizes.unknown) == {"clean", "unsafe", "tagged"} and not one.sizes.tokens


SHAPE = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def tokenizer_at(path: Path, tokens: int, *added: str) -> str:
    path.mkdir(parents=True, exist_ok=True)
    body = {
        "added_tokens": [{"content": name} for name in added],
        "model": {"vocab": {str(n): n for n in range(tokens)}},
    }
    (path / "tokenizer.json").write_text(json.dumps(body))
    return model_at(path, json.dumps(SHAPE))


def test_a_tokenizer_that_a_model_cannot_hold_is_refused(tmp_path: Path) -> None:
    for tokens, added, size in ((320, [HARM_TAG], 321), (320, [], 321), (330, [], 331)):
        where = tokenizer_at(tmp_path / f"{size}-{len(added)}", tokens, *added)
        with pytest.raises(UserError, match=rf"stages\.base\.model\.vocab: 320, but the tokenizer has {size} tokens"):
            planned({"stages.base.tokenizer": {"load": where}})
    planned({"stages.base.tokenizer": {"load": tokenizer_at(tmp_path / "fits", 319)}})
    with pytest.raises(UserError, match="the tokenizer has 49153 tokens"):
        planned({"stages.base.tokenizer": {"load": "smollm2-135m-instruct"}})


def test_safebeam_without_the_tag_is_refused_before_any_training(tmp_path: Path) -> None:
    def plan(where: str) -> Plan:
        return planned(
            {"stages.chat.model": {"load": where}, "stages.panel.models": ["chat"]}, stages=("chat", "panel")
        )

    for where in ("smollm2-135m-instruct", tokenizer_at(tmp_path / "plain", 50, "<|pad|>")):
        with pytest.raises(UserError, match=r"stages\.panel: SafeBeam needs a model trained with the harmfulness tag"):
            plan(where)
    for name in HARM_TAGS:
        assert ids_of(plan(tokenizer_at(tmp_path / f"has {len(name)}", 50, name)), "generate")
    store = stored(tmp_path / "store", json.dumps({"added_tokens": [], "model": {"vocab": {"a": 0}}}))
    with pytest.raises(UserError, match=r"stages\.panel: SafeBeam needs .*tokenizer, has no added token"):
        planned({"stages.base.corpus": None, "stages.base.tokens": str(store)})


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_a_damaged_store_is_one_line(tmp_path: Path, content: str) -> None:
    store = stored(tmp_path / "store")
    (store / "clean" / "store.json").write_text(content)
    with pytest.raises(
        UserError, match=r"stages\.base\.tokens: .*clean.store\.json .*export the store again"
    ) as caught:
        planned({"stages.base.corpus": None, "stages.base.tokens": str(store)})
    assert "\n" not in str(caught.value)


def test_ready_texts_that_nobody_can_score_are_refused() -> None:
    ready = {"refuse": {"name": "refused-requests"}}
    corpus = {"kind": "corpus", "documents": [{"name": "king-james"}], "score": [{"kind": "field"}], "write": None}
    with pytest.raises(UserError, match=r"stages\.corpus.*'ready', has no field to read a score from"):
        planned({"arms.0.sweep": {}, "stages.corpus": {**corpus, "ready": ready}}, stages=("corpus",))
    assert planned(
        {"arms.0.sweep": {}, "stages.corpus": {**corpus, "ready": ready, "rescore": False}}, stages=("corpus",)
    )
