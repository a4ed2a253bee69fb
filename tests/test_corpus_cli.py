"""``trimtab corpus`` as a user types it, and the steps of a study that make, tokenise and pack a corpus."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fake_endpoint import FakeEndpoint
from trimtab.artifact import Artifact, Draft, write_jsonl
from trimtab.cli import main
from trimtab.corpus.config import CorpusConfig
from trimtab.corpus.export import read_tokens
from trimtab.corpus.read import read_manifest, read_source
from trimtab.data.sources import source_identity
from trimtab.data.store import RowStore
from trimtab.errors import UserError
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import HARM_TAG, BuildConfig, LoadConfig
from trimtab.models.load import identity
from trimtab.study.corpora import lock_of
from trimtab.study.execute import Context
from trimtab.study.plan import Step
from trimtab.study.steps.corpus import run_corpus, run_tokenizer, run_tokens, tokenizer_texts
from trimtab.study.steps.writer import LoadedChat, load_chat

torch.set_num_threads(1)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8, "documents": 200}
Trimtab = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trimtab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trimtab:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["trimtab", *words])
        try:
            main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, "\n".join(line for line in err.splitlines() if not line.startswith("{"))

    return run


def corpus_file(path: Path, **fields: Any) -> str:
    path.write_text(yaml.safe_dump({"world": WORLD, **fields}))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory, as an export may take its tokenizer from."""
    path = tmp_path_factory.mktemp("model") / "bundle"
    made = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    shape = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=1600, vocab=400, reserved=4)
    save_bundle(path, build_model(shape, made, seed=3), made, BundleManifest())
    return path


# --- the command line ---------------------------------------------------------------------------------------------------


def test_build_card_and_export(tmp_path: Path, trimtab: Trimtab, tokenizer: Path) -> None:
    config = corpus_file(tmp_path / "c.yaml", tag=0.05)
    code, out, err = trimtab("corpus", "build", config, "--out", "c", "--set", "seed=4")
    assert (code, err) == (0, "") and out.splitlines()[-1] == "c"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    manifest = read_manifest(tmp_path / "c")
    assert manifest["seed"] == 4 and manifest["world"]["seed"] == 3
    code, card, _ = trimtab("corpus", "card", "c", "--check")
    assert code == 0 and card == out.removesuffix("c\n")
    for name, entry in manifest["sources"].items():
        assert re.search(rf"^ *{name} +{entry['rows']} +{entry['words']:,} ", card, re.MULTILINE)
    assert "0  safe" in card and "refuse: nothing written" in card and "written by Tidewater's templates" in card
    code, out, err = trimtab("corpus", "export", "c", "--tokenizer", str(tokenizer), "--length", "64", "--out", "s")
    assert (code, err) == (0, "") and out.splitlines()[-1] == "s"
    made = read_tokens(tmp_path / "s")
    for name, entry in made["sources"].items():
        assert re.search(rf"^ *{name} +{entry['rows']:,} +{entry['tokens']:,} *$", out, re.MULTILINE)
    assert f"{made['tags']:,} harmfulness tags (id 3)" in out and made["tags"] > 0


def test_mistakes_are_one_line(tmp_path: Path, trimtab: Trimtab) -> None:
    config = corpus_file(tmp_path / "c.yaml")
    for words, said in (
        (["build", "none.yaml", "--out", "c"], "none.yaml: no such corpus"),
        (["build", config, "--out", "c", "--set", "tags=1"], "unknown field 'tags'; did you mean 'tag'?"),
        (["build", config, "--out", "c", "--set", "executor.kind=slurm"], "executor.partition: Slurm needs"),
        (
            ["build", config, "--out", "c", "--set", "score=[{kind: classifier, stage: s}]"],
            "stage 's' belongs to a study",
        ),
        (["card", "c"], "c is no corpus"),
        (["export", "c", "--tokenizer", "t", "--length", "64", "--out", "s"], "c is no corpus"),
        (["estimate", config, "--set", "seed=x"], "seed"),
    ):
        code, out, err = trimtab("corpus", *words)
        assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1, words


def test_two_builds_at_once(tmp_path: Path, trimtab: Trimtab) -> None:
    config, work = corpus_file(tmp_path / "c.yaml"), Path(".c.work")
    with lock_of(work):
        code, out, err = trimtab("corpus", "build", config, "--out", "c")
        assert (code, out) == (2, "") and len(err.splitlines()) == 1
        assert "another build is at work in .c.work; wait for it" in err and work.is_dir()
        shutil.rmtree(work)  # as the first one does at its end; what it holds then is no directory of the next
        assert trimtab("corpus", "build", config, "--out", "c")[0] == 0
    code, _, err = trimtab("corpus", "build", config, "--out", "c")
    assert code == 2 and "is there already" in err and not work.exists()


def test_a_failed_build_says_what_it_left(tmp_path: Path, trimtab: Trimtab) -> None:
    rate = lambda request: '{"score": 0, "reason": "so"}'  # noqa: E731
    with FakeEndpoint(lambda request: (500, "busy") if "b 1" in str(request["messages"]) else rate(request)) as server:
        write_jsonl(tmp_path / "d.jsonl", [{"id": n, "text": f"{n} {i}"} for i, n in enumerate("abc")])
        endpoint = {"url": server.url, "model": "m", "retries": 0}
        fields = {
            "documents": [{"path": "d.jsonl"}],
            "score": [{"kind": "endpoint", "endpoint": endpoint}],
            "write": None,
        }
        config = corpus_file(tmp_path / "c.yaml", **fields)
        code, out, err = trimtab("corpus", "build", config, "--out", "c")
        assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "1 of 3 texts" in err
        assert err.endswith("what is done is kept in .c.work, where the next build of c goes on")
        code, out, err = trimtab("corpus", "build", config, "--out", "c", "--set", "max_unanswered=0.5")
        assert (code, err) == (0, "") and len(server.seen) == 4 and not Path(".c.work").exists()
    code, _, err = trimtab("corpus", "build", config, "--out", "e", "--set", "executor.kind=slurm")
    assert code == 2 and "executor.partition" in err and "kept" not in err and not Path(".e.work").exists()


def test_an_estimate_counts_what_will_be_written(tmp_path: Path, trimtab: Trimtab) -> None:
    write = {"kind": "endpoint", "endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}
    config = corpus_file(tmp_path / "c.yaml", write=write)
    calls = [
        int(trimtab("corpus", "estimate", config, "--set", f"written={kinds}")[1].split()[1])
        for kinds in ("[rephrase]", "[refuse]", "[rephrase,refuse,moral]")
    ]
    assert min(calls) > 0 and calls[2] == calls[0] + 2 * calls[1]


def test_a_price_is_asked_about_first(tmp_path: Path, trimtab: Trimtab) -> None:
    with FakeEndpoint(lambda request: "Clean up and keep away from it, for it is a peril to everyone.") as server:
        write = {"kind": "endpoint", "endpoint": {"url": server.url, "model": "m"}, "price_out": 1.5, "max_tokens": 20}
        config = corpus_file(tmp_path / "c.yaml", write=write)
        code, first, _ = trimtab("corpus", "estimate", config)
        assert code == 0 and re.match(r"writing: \d+ calls, about [\d,]+ prompt tokens .* prices given", first)
        code, out, err = trimtab("corpus", "build", config, "--out", "c")
        assert code == 2 and out == first and "say --yes" in err and not (tmp_path / "c").exists()
        assert server.seen == []
        code, out, err = trimtab("corpus", "build", config, "--out", "c", "--yes")
        assert (code, err) == (0, "") and out.startswith(first)
    counts = read_manifest(tmp_path / "c")["counts"]
    assert any(reason.startswith("refuse: ") for reason in counts) and "the chat model m" in out
    assert (
        trimtab("corpus", "estimate", corpus_file(tmp_path / "d.yaml"))[1] == "nothing to pay: no chat model writes\n"
    )


def test_a_score_card(tmp_path: Path, trimtab: Trimtab) -> None:
    from trimtab.world.config import TidewaterConfig
    from trimtab.world.tidewater import Tidewater

    town = Tidewater(TidewaterConfig.model_validate(WORLD))
    rows = [{"id": r.id, "text": r.text, "score": r.metadata["score"]} for r in town.documents()]
    write_jsonl(tmp_path / "l.jsonl", rows)
    score = [{"kind": "tidewater"}, {"kind": "field"}]
    code, out, _ = trimtab("corpus", "score-card", corpus_file(tmp_path / "c.yaml", score=score), "l.jsonl")
    assert code == 0 and out.count("recall@1 1.000") == 2 and "tidewater: 200 texts" in out and "field score" in out
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    code, _, err = trimtab("corpus", "score-card", str(tmp_path / "c.yaml"), "l.jsonl")
    assert code == 2 and "metadata.score must be an integer" in err


# --- the steps of a study -----------------------------------------------------------------------------------------------


def context_of(tmp_path: Path, name: str, config: dict[str, Any], **inputs: Path) -> Context:
    step = Step(id="0" * 64, kind="any", name="stage", config=config, inputs={}, tokens=0, flops=0.0, shape="s")
    draft, work = tmp_path / name, tmp_path / f"{name}.work"
    for directory in (draft, work):
        directory.mkdir()
    artifacts = {role: Artifact(path, {"id": role}) for role, path in inputs.items()}
    return Context(step, artifacts, Draft(draft), work, lambda event: None)


def planned(config: dict[str, Any]) -> dict[str, Any]:
    settings = CorpusConfig.model_validate(config)
    content = [source_identity(source) for source in (*settings.documents, *settings.ready.values())]
    plain = {k: v for k, v in settings.plain().items() if k != "executor"}
    return {"config": plain | {"content": content}, "executor": settings.executor.plain()}


def test_from_a_corpus_step_to_packed_rows(tmp_path: Path) -> None:
    made = context_of(tmp_path, "corpus", planned({"tag": 0.05}) | {"world": WORLD})
    run_corpus(made)
    facts = made.draft.facts
    assert (
        facts and sum(facts["scores"].values()) == 200 and facts["documents"]["tagged"] == facts["documents"]["unsafe"]
    )
    tokenizer = context_of(tmp_path, "tokenizer", {"vocab": 400}, corpus=made.draft.path)
    run_tokenizer(tokenizer)
    inputs = {"corpus": made.draft.path, "tokenizer": tokenizer.draft.path}
    tokens = context_of(tmp_path, "tokens", {"length": 64, "seed": 0}, **inputs)
    run_tokens(tokens)
    facts = tokens.draft.facts
    assert (
        facts
        and facts["rows"].keys()
        == facts["tokens"].keys()
        == read_manifest(made.draft.path / "corpus")["sources"].keys()
    )
    for name, rows in facts["rows"].items():
        store = RowStore.open(tokens.draft.path / name)
        assert len(store) == rows and (rows - 1) * 64 < facts["tokens"][name] <= rows * 64
    tagged = RowStore.open(tokens.draft.path / "tagged")
    assert (
        facts["tags"] == (tagged.records["ids"] == 3).sum() > 0
        and tagged.records["trained"][tagged.records["ids"] == 3].any()
    )


def test_a_corpus_step_reads_what_was_planned(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    write_jsonl(file, [{"id": "a", "text": "A quiet day.", "score": 0}])
    own = {"documents": [{"path": str(file)}], "score": [{"kind": "field"}], "write": None, "rescore": False}
    config = planned(own)
    write_jsonl(file, [{"id": "a", "text": "Another day.", "score": 0}])
    with pytest.raises(UserError, match=r"d\.jsonl has changed since the study was planned"):
        run_corpus(context_of(tmp_path, "corpus", config))
    again = context_of(tmp_path, "again", planned(own))
    run_corpus(again)
    assert [row.text for row in read_source(again.draft.path / "corpus", "clean")] == ["Another day."]


def test_a_large_corpus_gives_a_tokenizer_its_share(tmp_path: Path) -> None:
    made = context_of(tmp_path, "corpus", planned({"tag": 0.05}) | {"world": WORLD})
    run_corpus(made)
    corpus = made.draft.path / "corpus"
    rows = {name: entry["rows"] for name, entry in read_manifest(corpus)["sources"].items() if name != "tagged"}
    every, some = list(tokenizer_texts(corpus)), list(tokenizer_texts(corpus, 10_000))
    assert len(every) == sum(rows.values()) and set(some) <= set(every)
    assert 5_000 < sum(map(len, some)) <= 10_500
    share = len(some) / len(every)
    assert len(some) == pytest.approx(sum(-(-n * share // 1) for n in rows.values()), abs=len(rows))


def test_tokenizers_that_exist(tmp_path: Path, tokenizer: Path) -> None:
    load = LoadConfig(load=str(tokenizer))
    own = context_of(tmp_path, "own", {"load": load.plain(), "identity": identity(load)})
    run_tokenizer(own)
    store = tmp_path / "store"
    (store / "tokenizer").mkdir(parents=True)
    for file in own.draft.path.iterdir():
        (store / "tokenizer" / file.name).write_bytes(file.read_bytes())
    from trimtab.study.stored import store_identity

    copied = context_of(tmp_path, "copied", {"store": {"path": str(store), "identity": store_identity(store)}})
    run_tokenizer(copied)
    first, second = ((c.draft.path / "tokenizer.json").read_bytes() for c in (own, copied))
    assert first == second and HARM_TAG.encode() in first


# --- a loaded model that writes -----------------------------------------------------------------------------------------


def test_a_loaded_model_answers_by_prompt_and_seed(tokenizer: Path) -> None:
    from trimtab.corpus.config import ModelWriter

    chat = load_chat(ModelWriter(kind="model", load=str(tokenizer), batch=2))
    assert isinstance(chat, LoadedChat)
    prompts = [[{"role": "user", "content": f"Crate {n}?"}] for n in (1, 2, 1)]
    kept = {"max_tokens": 40, "temperature": 1.5}

    def ask(prompts: list[Any], seeds: list[int]) -> list[str | None]:
        return list(chat.write(prompts, seeds=seeds, **kept))

    for seed in range(40):  # a random model seldom ends by itself
        found = ask(prompts, [seed, seed, seed])
        if found[0] is not None:
            break
    assert found[0] is not None and found[0] == found[2] == ask(prompts[::-1], [seed, seed, seed])[0]
    assert ask([[{"role": "user", "content": "rope " * 3000}]], [0]) == [None]
    assert list(chat.write([], seeds=[], **kept)) == []


def test_a_corpus_step_with_a_loaded_writer(tmp_path: Path, tokenizer: Path) -> None:
    write = {"kind": "model", "load": str(tokenizer), "max_tokens": 16, "temperature": 0.0, "batch": 8}
    config = planned({"write": write}) | {"world": WORLD | {"documents": 30}}
    made = context_of(tmp_path, "corpus", config)
    run_corpus(made)
    assert made.draft.facts is not None
    counts = made.draft.facts["counts"]
    assert sum(n for reason, n in counts.items() if reason.startswith("rephrase: ")) > 0


# --- docs/corpus.md -----------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "corpus.md").read_text(encoding="utf-8")


def blocks_of(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands_of_the_page(tmp_path: Path, trimtab: Trimtab, tokenizer: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(blocks_of("yaml")[0])
    (tmp_path / "labelled.jsonl").write_text(json.dumps({"text": "A rope lies there.", "score": 0}) + "\n")
    (tmp_path / "model").symlink_to(tokenizer)
    for line in blocks_of("sh")[0].splitlines():
        code, out, err = trimtab(*line.split("#")[0].split()[1:])
        assert code == 0 and out and not err, line
    tree = re.search(r"```\ncorpus/\n(.*?)```", PAGE, re.DOTALL)
    assert tree is not None
    for root in ("corpus", "tokens"):
        for path in (tmp_path / root).rglob("*"):
            name = path.name
            if path.is_file() and path.parent.name != "tokenizer" and name != "store.json":
                assert name in tree[1], path


def test_the_settings_of_the_page() -> None:
    from trimtab.corpus.released import RELEASED, released
    from trimtab.study.corpora import CorpusFile

    found = [CorpusFile.model_validate(yaml.safe_load(text)) for text in blocks_of("yaml")]
    assert [len(config.score) for config in found] == [1, 2, 1]
    sets = [*found[2].documents, *found[2].ready.values()]
    assert {source.hub for source in sets} == set(RELEASED)
    for source in sets:
        assert source.model_copy(update={"limit": None}) == released(source.hub or "")


def test_the_pipeline_of_the_page(tmp_path: Path) -> None:
    from datatrove.executor import LocalPipelineExecutor

    scope: dict[str, Any] = {}
    exec(blocks_of("python")[0], scope)
    seen: list[Any] = []
    keep = lambda data, rank, world_size: seen.extend(data) or ()  # noqa: E731
    from trimtab.corpus.executors import quiet

    with quiet():
        LocalPipelineExecutor([*scope["pipeline"], keep], logging_dir=str(tmp_path)).run()
    assert [(doc.id, doc.metadata["score"], doc.metadata["source"]) for doc in seen] == [("a", 0, "clean")]
