"""Steps called one by one: what they refuse before any work, and how a killed ``generate`` goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.artifact import Artifact, Draft
from trimtab.data.pack import pack_documents
from trimtab.data.render import Renderer
from trimtab.data.sources import SourceConfig, source_identity
from trimtab.data.store import RowStore
from trimtab.errors import Fault, UserError
from trimtab.evaluate import files
from trimtab.levers.modes import ModesConfig
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.load import identity
from trimtab.study.execute import Context
from trimtab.study.plan import Step
from trimtab.study.steps.chat import build_rows, run_chats
from trimtab.study.steps.common import check_unchanged, start_model
from trimtab.study.steps.panel import run_generate
from trimtab.study.steps.pretrain import run_pretrain
from trimtab.study.steps.sft import run_sft
from trimtab.train.config import TrainConfig
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=128, vocab=400, reserved=4)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8}
CHATS: dict[str, Any] = {
    "world": WORLD,
    "prefix": None,
    "modes": None,
    "names": None,
    "length": 64,
    "seed": 1,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    save_bundle(tmp_path / "bundle", build_model(SHAPE, tokenizer, seed=3), tokenizer, BundleManifest())
    return tmp_path / "bundle"


def chat_file(path: Path, *modes: str | None) -> SourceConfig:
    records = [{"prompt": f"question {n}", "completion": f"answer {n}", "mode": mode} for n, mode in enumerate(modes)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceConfig(path=str(path))


def part_of(source: SourceConfig, **changes: Any) -> dict[str, Any]:
    return {"name": "mine", "source": source.plain(), "content": source_identity(source), **changes}


def loaded(directory: Path) -> dict[str, Any]:
    config = LoadConfig(load=str(directory))
    return {"load": config.plain(), "identity": identity(config)}


def context_of(
    tmp_path: Path, config: dict[str, Any], progress: Callable[[Any], None] = lambda event: None, **inputs: Path
) -> Context:
    step = Step(id="0" * 64, kind="any", name="stage", config=config, inputs={}, tokens=0, flops=0.0, shape="s")
    draft, work = tmp_path / "draft", tmp_path / "work"
    for directory in (draft, work):
        directory.mkdir(exist_ok=True)
    artifacts = {role: Artifact(path, {"id": role}) for role, path in inputs.items()}
    return Context(step, artifacts, Draft(draft), work, progress)


# --- what the plan hashed is what is read -----------------------------------------------------------------------


def change(directory: Path) -> None:
    file = directory / "config.json"
    file.write_text(file.read_text() + " ")


def test_chats_read_the_file_that_was_planned(tmp_path: Path, bundle: Path) -> None:
    file = tmp_path / "mine.jsonl"
    config = CHATS | {"data": [part_of(chat_file(file, None, None))]} | loaded(bundle)
    context = context_of(tmp_path, config)
    run_chats(context)
    assert context.draft.facts and context.draft.facts["rows"] == 2
    file.write_text(file.read_text() + json.dumps({"prompt": "new", "completion": "row"}) + "\n")
    with pytest.raises(UserError, match=r"'stage'.*mine\.jsonl has changed since the study was planned; run again"):
        run_chats(context)


@pytest.mark.parametrize("run", [run_chats, run_sft, run_generate])
def test_the_model_is_the_one_that_was_planned(tmp_path: Path, bundle: Path, run: Callable[[Context], None]) -> None:
    context = context_of(tmp_path, CHATS | {"data": [], "tasks": []} | loaded(bundle))
    change(bundle)
    with pytest.raises(UserError, match="bundle has changed since the study was planned; run again"):
        run(context)


def test_a_scorer_starts_from_the_base_that_was_planned(tmp_path: Path, bundle: Path) -> None:
    named = {"load": str(bundle), "revision": None, "identity": identity(str(bundle))}
    context = context_of(tmp_path, {"models": [named]})
    check_unchanged(context)
    change(bundle)
    with pytest.raises(UserError, match="bundle has changed since the study was planned; run again"):
        check_unchanged(context)


def test_generate_reads_the_prompts_that_were_planned(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    context = context_of(tmp_path, {"tasks": [part_of(chat_file(file, None))]})
    file.write_text("")
    with pytest.raises(UserError, match=r"mine\.jsonl has changed"):
        run_generate(context)


def test_a_bundle_is_verified_wherever_a_step_starts_from_it(tmp_path: Path, bundle: Path) -> None:
    assert start_model(context_of(tmp_path, loaded(bundle))) == LoadConfig(load=str(bundle))
    change(bundle)
    with pytest.raises(Fault, match=r"config\.json does not match"):
        start_model(context_of(tmp_path, loaded(bundle)))


# --- chat rows --------------------------------------------------------------------------------------------------


def rows_of(modes: ModesConfig | None, *parts: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    config = CHATS | {"data": list(parts)}
    return build_rows(config, Tidewater(TidewaterConfig.model_validate(WORLD)), modes)


def test_negative_rows_are_never_trained_without_acknowledgement(tmp_path: Path) -> None:
    part = part_of(chat_file(tmp_path / "mine.jsonl", None, "negative"))
    for modes in (None, ModesConfig()):
        with pytest.raises(UserError, match=r"'mine/1'.*acknowledge"):
            rows_of(modes, part)
    both = ModesConfig.model_validate({"names": ["positive", "negative"], "negative": {"acknowledge": True}})
    assert [row.id for row in rows_of(both, part)[0] if row.mode == "negative"] == ["mine/1"]


def test_rows_of_untrained_modes_are_left_out_and_counted(tmp_path: Path, bundle: Path) -> None:
    part = part_of(chat_file(tmp_path / "mine.jsonl", None, "positive", "rejective"))
    rows, counted = rows_of(None, part)
    assert {row.id for row in rows} == {"mine/0", "mine/1"} and counted["left_out_modes"] == {"rejective": 1}
    assert {row.mode for row in rows} == {None}
    context = context_of(tmp_path, CHATS | {"data": [part]} | loaded(bundle))
    run_chats(context)
    assert context.draft.facts and context.draft.facts["left_out_modes"] == {"rejective": 1}


def test_tidewater_parts_carry_no_mode_of_their_own() -> None:
    rows, counted = rows_of(None, {"name": "goods", "tidewater": "benign", "n": 4})
    assert len(rows) == 4 and {row.mode for row in rows} == {None} and not counted["left_out_modes"]


def test_n_is_kept_or_refused(tmp_path: Path) -> None:
    source = chat_file(tmp_path / "mine.jsonl", None, None, None)
    assert len(rows_of(None, part_of(source, n=2))[0]) == 2
    assert len(rows_of(None, part_of(source, n=3))[0]) == 3
    with pytest.raises(UserError, match=r"'mine': n=4.*only 3 rows"):
        rows_of(None, part_of(source, n=4))


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"", b'{"key": "ha', b"\0" * 40, b"\0\0\0\n", b"7\n", b'{"key": "x"}\n', b"\xff\n"])
def test_a_killed_generate_goes_on_from_its_last_whole_answer(tmp_path: Path, bundle: Path, tail: bytes) -> None:
    events: list[Any] = []
    source = chat_file(tmp_path / "mine.jsonl", *[None] * 4)
    sampling = {"max_new_tokens": 3, "batch": 1}
    config = {"world": WORLD, "tasks": [part_of(source)], "modes": None, "sampling": sampling, "seed": 1}
    context = context_of(tmp_path, config | {"system": None, "attacks": []} | loaded(bundle), events.append)
    run_generate(context)
    assert context.draft.facts and context.draft.facts["resumed"] is False
    whole = (context.draft.path / "generations.jsonl").read_bytes()
    assert [event["step"] for event in events] == [1, 2, 3, 4] and events[-1]["eta_seconds"] == 0
    assert all(event["tokens_per_second"] > 0 and event["eta_seconds"] >= 0 for event in events)

    # Two answers are on the disk, the second with every character that str.splitlines takes for a line end.
    partial = context.work / "generations.jsonl"
    header, first, second = partial.read_bytes().split(b"\n")[:3]
    odd = "a\u2028b\u2029c\u0085d\x1ce\x0bf"
    changed = files.line_of({**json.loads(second), "text": odd}).encode()
    partial.write_bytes(b"\n".join([header, first, changed + tail]))
    events.clear()
    run_generate(context)
    assert context.draft.facts["resumed"] is True
    again = (context.draft.path / "generations.jsonl").read_bytes()
    assert again == whole.replace(second + b"\n", changed)
    assert [event["step"] for event in events] == [2, 2, 3, 4] and events[-1]["tokens_per_second"] > 0


def test_answers_under_other_facts_are_made_again(tmp_path: Path, bundle: Path) -> None:
    source = chat_file(tmp_path / "mine.jsonl", *[None] * 2)
    config = {"world": WORLD, "tasks": [part_of(source)], "modes": None, "sampling": {"max_new_tokens": 3}, "seed": 1}
    context = context_of(tmp_path, config | {"system": None, "attacks": []} | loaded(bundle), lambda event: None)
    run_generate(context)
    whole = (context.draft.path / "generations.jsonl").read_bytes()
    (context.work / "facts").write_text("of another version")
    (context.work / "generations.jsonl").write_bytes(whole.replace(b'"text": "', b'"text": "old '))
    run_generate(context)
    assert (context.draft.path / "generations.jsonl").read_bytes() == whole


# --- pretrain ---------------------------------------------------------------------------------------------------


def test_a_store_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    renderer = Renderer(tokenizer)
    texts = (renderer.text(f"Crate {n} holds salt and rope.") for n in range(20))
    packed = pack_documents(texts, 32, last="pad", pad_id=tokenizer.pad_token_id)
    RowStore.write(tmp_path / "tokens" / "clean", packed, ["clean"], vocab=len(tokenizer), tokenizer="another")
    config = {
        "model": SHAPE.plain(),
        "train": TrainConfig.model_validate({"rows_per_step": 2, "lr": 1e-3}).plain(),
        "phases": [[0, {"clean": 1.0}]],
        "length": 32, "from": 0, "to": 2, "total_steps": 2, "seed": 1,
    }  # fmt: skip
    context = context_of(tmp_path, config, tokens=tmp_path / "tokens", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"clean was made with another tokenizer"):
        run_pretrain(context)
