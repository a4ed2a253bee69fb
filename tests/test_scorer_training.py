"""A safety scorer trained on labelled texts: who is held out, what is learned, and that ``corpus`` opens what comes out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.artifact import Draft
from trimtab.corpus.classifier import Classifier
from trimtab.corpus.config import ClassifierScorer, ScorerTraining
from trimtab.data.sources import source_identity
from trimtab.errors import Fault, UserError
from trimtab.models import minilm
from trimtab.models.minilm import encoder_identity, minilm_directory
from trimtab.seeds import rng_of
from trimtab.study.steps.scorer import run_scorer
from trimtab.train.scorer import batches, labelled_texts, load_encoder, train_scorer

SAFE = "the boat lies in the harbour and the nets dry on the quay".split()
BAD = "zorp blag krun".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT with random weights that knows a dozen words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    out = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*SAFE, *BAD])]
    (out / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(vocab=str(out / "vocab.txt"), model_max_length=64).save_pretrained(out)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(out)
    return out


def sentence(*key: str | int, bad: str | None = None, words: int = 8) -> str:
    rng = rng_of("sentence", *key)
    chosen = [SAFE[int(i)] for i in rng.integers(len(SAFE), size=words)]
    if bad is not None:
        for i in rng.permutation(words)[: words // 2].tolist():
            chosen[i] = bad
    return " ".join(chosen)


def labelled(folder: Path, n: int = 60) -> list[dict]:
    """Score 0: harmless words; 2, 3 and 5: one of three made-up words among them."""
    files = []
    for score, bad in ((0, None), (2, BAD[0]), (3, BAD[1]), (5, BAD[2])):
        path = folder / f"level{score}.jsonl"
        many = n * 3 if score == 0 else n
        path.write_text("".join(json.dumps({"text": sentence(score, i, bad=bad)}) + "\n" for i in range(many)))
        files.append({"source": {"path": str(path)}, "score": score})
    return files


def training(encoder: Path, data: list[dict], **settings) -> ScorerTraining:
    usual = {"length": 16, "batch": 16, "lr": 3e-3, "epochs": 3, "holdout": 0.25}
    return ScorerTraining.model_validate({"base": str(encoder), "data": data} | usual | settings)


def test_it_learns_the_levels_and_leaves_a_classifier_that_opens_unchanged(encoder, tmp_path):
    config = training(encoder, labelled(tmp_path), epochs=10, lr=5e-3)
    told: list[dict] = []
    done = train_scorer(config, tmp_path / "out", progress=told.append)
    assert told[-1]["step"] == told[-1]["total"] == done["facts"]["steps"] == len(told)
    assert told[-1]["loss"] < 0.5 < told[0]["loss"]
    card = done["card"]
    held = sum(done["facts"]["holdout"].values())
    assert card["n"] == held == sum(map(sum, card["confusion"])) and card["at"]["1"]["recall"]["value"] > 0.95
    scorer = Classifier(ClassifierScorer(kind="classifier", model=str(tmp_path / "out"), window=16))
    for level, bad in ((0, None), (2, BAD[0]), (3, BAD[1]), (5, BAD[2])):
        said = scorer.score([sentence("new", i, bad=bad) for i in range(20)])
        assert sum(scored.score == level for scored in said) >= 15, level
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["id2label"] == {str(level): f"score_{level}" for level in range(6)}


def test_equal_settings_give_equal_weights_and_the_seed_matters(encoder, tmp_path):
    data = labelled(tmp_path, 20)
    for name, settings in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"unsafe_weight": 30.0})):
        train_scorer(training(encoder, data, epochs=0.5, **settings), tmp_path / name)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"}
    assert weights["a"] == weights["b"] and len(set(weights.values())) == 3


def test_unsafe_texts_can_weigh_more(encoder, tmp_path):
    """Words that say nothing, one in five labelled unsafe: with equal weights the safe level wins, with weight 30 never."""
    for score, n in ((0, 120), (4, 30)):
        rows = [json.dumps({"text": sentence("same", score, i)}) + "\n" for i in range(n)]
        (tmp_path / f"s{score}.jsonl").write_text("".join(rows))
    data = [{"source": {"path": str(tmp_path / f"s{score}.jsonl")}, "score": score} for score in (0, 4)]
    cards = [
        train_scorer(training(encoder, data, unsafe_weight=weight, lr=1e-3), tmp_path / f"w{weight}")["card"]
        for weight in (1.0, 30.0)
    ]
    said = [sum(row[4] for row in card["confusion"]) / card["n"] for card in cards]
    assert said[0] < 0.2 and said[1] > 0.8


def test_the_head_alone_first_leaves_the_encoder_as_it_is(encoder, tmp_path):
    from safetensors.torch import load_file

    config = training(encoder, labelled(tmp_path, 10), head_epochs=2, head_lr=1e-2, epochs=1e-9, lr=1e-12)
    done = train_scorer(config, tmp_path / "out")
    before, after = load_file(encoder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert done["facts"]["steps"] > 1
    moved = {
        name
        for name, value in after.items()
        if (value - before.get(name.removeprefix("bert."), value)).abs().max() > 1e-6
    }
    assert not moved and after["classifier.weight"].abs().max() > 0.05


def test_who_is_held_out_depends_on_the_text_and_the_seed_alone(encoder, tmp_path):
    data = labelled(tmp_path)
    one = labelled_texts(training(encoder, data))
    assert {row.id for row in one.train} & {row.id for row in one.holdout} == set()
    assert 0.15 < len(one.holdout) / (len(one.train) + len(one.holdout)) < 0.35
    other = labelled_texts(training(encoder, list(reversed(data))))
    assert {row.text for row in other.holdout} == {row.text for row in one.holdout}
    assert {r.text for r in labelled_texts(training(encoder, data, seed=1)).holdout} != {r.text for r in one.holdout}
    fewer = [{**part, "n": 30} for part in data]
    assert {r.text for r in labelled_texts(training(encoder, fewer)).holdout} <= {row.text for row in one.holdout}
    assert Counter(r.metadata["score"] for r in labelled_texts(training(encoder, fewer)).train).total() < 120


def test_prompts_own_scores_and_repeats(encoder, tmp_path):
    records = [
        {"messages": [{"role": "user", "content": "first"}, {"role": "assistant", "content": "no"},
                      {"role": "user", "content": f"last {i}"}], "score": i % 6}
        for i in range(60)
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "last 6"}) + "\n")
    data = [
        {"source": {"path": str(tmp_path / "p.jsonl")}},
        {"source": {"path": str(tmp_path / "q.jsonl")}, "score": 5},
    ]
    found = labelled_texts(training(encoder, data))
    scores = {row.text: row.metadata["score"] for row in (*found.train, *found.holdout)}
    assert len(scores) == 60 and scores["last 5"] == 5 and scores["last 12"] == 0
    assert scores["last 6"] == 5 and found.repeats == 1  # it was 0 in the first: the highest level wins


@pytest.mark.parametrize(
    ("records", "part", "said"),
    [
        ([{"text": "a", "score": 6}], {}, "has score 6"),
        ([{"text": "a", "score": True}], {}, "has score True"),
        ([{"text": "a"}], {}, "set 'score' for the whole source"),
        ([{"text": " "}], {"score": 1}, "has no text"),
        ([{"text": "a"}, {"text": "b"}], {"score": 0}, "scored above 0"),
        ([{"text": "a"}], {"score": 0, "n": 2}, "has only 1 rows"),
    ],
)
def test_labels_that_will_not_do(encoder, tmp_path, records, part, said):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match=said):
        labelled_texts(training(encoder, [{"source": {"path": str(tmp_path / "d.jsonl")}} | part]))


def test_n_and_take_together_are_refused(encoder, tmp_path):
    (part, *_) = labelled(tmp_path, 5)
    part = {"source": part["source"] | {"take": 3}, "score": 0, "n": 2}
    with pytest.raises(UserError, match="both 'n' and the source's 'take'"):
        labelled_texts(training(encoder, [part]))


def test_a_base_that_will_not_do(encoder, tmp_path):
    data = labelled(tmp_path, 5)
    with pytest.raises(UserError, match="length=65 is more than the 64 tokens"):
        load_encoder(training(encoder, data, length=65))
    with pytest.raises(UserError, match="takes no 'revision'"):
        load_encoder(training(encoder, data, base="minilm-l6", revision="main"))
    with pytest.raises(UserError, match="no such directory"):
        load_encoder(training(tmp_path / "absent", data))
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in encoder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(encoder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Fault, match="no whole encoder"):
        load_encoder(training(broken, data))


def test_a_loss_that_is_not_finite_is_a_fault(encoder, tmp_path):
    with pytest.raises(Fault, match="not finite; lower 'lr'"):
        train_scorer(training(encoder, labelled(tmp_path, 20), lr=1e38, epochs=5), tmp_path / "out")


def test_a_scorer_is_trained_further(encoder, tmp_path):
    """A finished scorer is a base like another; a head of another size is replaced."""
    data = labelled(tmp_path, 10)
    train_scorer(training(encoder, data, epochs=0.1), tmp_path / "one")
    done = train_scorer(training(tmp_path / "one", data, epochs=0.1), tmp_path / "two")
    assert done["facts"]["steps"] >= 1
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).save_pretrained(tmp_path / "binary")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (encoder / name).is_file():
            (tmp_path / "binary" / name).write_bytes((encoder / name).read_bytes())
    assert load_encoder(training(tmp_path / "binary", data))[0].config.num_labels == 6


@given(st.lists(st.integers(1, 128), min_size=1, max_size=400), st.integers(1, 9), st.integers(0, 3))
def test_a_pass_has_every_text_once(lengths, size, seed):
    found = batches(lengths, size, seed, "all 0")
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in found) and found == batches(lengths, size, seed, "all 0")


def test_the_step_leaves_a_model_and_its_card(encoder, tmp_path):
    config = training(encoder, labelled(tmp_path, 20), epochs=1)
    content = [source_identity(part.source) for part in config.data]
    step = SimpleNamespace(name="scorer", config={"config": config.plain(), "content": content})
    draft = Draft(tmp_path / "draft")
    draft.path.mkdir()
    context = SimpleNamespace(step=step, inputs={}, draft=draft, work=tmp_path, progress=lambda event: None)
    run_scorer(context)
    card = json.loads((draft.path / "score_card.json").read_text())
    assert card["n"] == sum(draft.facts["holdout"].values()) and draft.facts["at"] == card["at"]
    assert Classifier(ClassifierScorer(kind="classifier", model=str(draft.path / "model"), window=16)).score(
        ["the boat"]
    )
    assert draft.tokens == draft.facts["tokens"] > 0
    step.config["content"][0] = "moved"
    with pytest.raises(UserError, match="has changed since the study was planned"):
        run_scorer(context)


def test_identities_tell_bases_apart(encoder, tmp_path):
    names = ["minilm-l6", "minilm-l3", str(encoder), "owner/name"]
    found = [encoder_identity(name) for name in names]
    assert len(set(found)) == 4 and found == [encoder_identity(name) for name in names]
    assert encoder_identity("owner/name", "abc") != encoder_identity("owner/name")


@pytest.mark.network
@pytest.mark.parametrize(("base", "layers"), minilm.LAYERS.items())
def test_the_packaged_encoder_is_whole(base, layers, tmp_path):
    config = training(Path(base), labelled(tmp_path, 5), length=128)
    model, tokenizer = load_encoder(config)
    assert len(model.bert.encoder.layer) == layers == model.config.num_hidden_layers
    assert (
        model.config.max_position_embeddings == 512
        and tokenizer("the harbour")["input_ids"][0] == tokenizer.cls_token_id
    )
    from safetensors.torch import load_file

    weights = load_file(minilm_directory() / "model.safetensors")
    assert torch.equal(
        model.bert.encoder.layer[layers - 1].output.dense.weight,
        weights[f"encoder.layer.{layers - 1}.output.dense.weight"],
    )
