"""Inspect runs on a bundle and a mode through the provider."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_fixtures import adapted_bundle, plain_bundle
from trimtab.errors import UserError
from trimtab.evaluate.interop.imports import import_config, import_evaluation
from trimtab.levers.modes import control_name
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.models.tokens import add_control_tokens, controls_of

pytest.importorskip("inspect_ai")
torch.set_num_threads(1)
SHAPE = BuildConfig(hidden=32, layers=1, heads=2, kv_heads=1, ffn=48, context=128, vocab=400, reserved=4)
MODES = ("positive", "rejective", "negative")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with three modes."""
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=4)
    model = build_model(SHAPE, tokenizer, seed=3)
    add_control_tokens(tokenizer, model, [control_name(mode) for mode in MODES])
    where = tmp_path_factory.mktemp("models") / "tiny@home"
    manifest = BundleManifest(
        controls=controls_of(tokenizer), modes={mode: control_name(mode) for mode in MODES}, default_mode="positive"
    )
    save_bundle(where, model, tokenizer, manifest)
    return where


def model_of(bundle: Path, mode: str = "", **options: Any) -> Any:
    from inspect_ai.model import get_model

    return get_model(f"trimtab/{bundle}{mode}", memoize=False, **options)


def call(model: Any, input: Any, **config: Any) -> Any:
    import anyio
    from inspect_ai.model import GenerateConfig

    async def one() -> Any:
        return await model.generate(input, config=GenerateConfig(**config))

    return anyio.run(one)


def test_an_evaluation_of_two_epochs(bundle: Path, tmp_path: Path) -> None:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.scorer import exact
    from inspect_ai.solver import generate

    task = Task(
        dataset=MemoryDataset([Sample(input=f"What is in crate {n}?", target="rope", id=f"c{n}") for n in range(3)]),
        solver=generate(),
        scorer=exact(),
        config=GenerateConfig(max_tokens=6, temperature=0.9),
        name="crates",
    )
    model = f"trimtab/{bundle}@rejective"

    def run(place: str) -> Any:
        options: dict[str, Any] = {"log_dir": str(tmp_path / place), "display": "none", "log_model_api": True}
        return eval(task, model=model, epochs=2, **options)[0]

    log = run("a")
    assert log.status == "success" and log.eval.model == model and len(log.samples) == 6
    control = controls_of_bundle(bundle)[control_name("rejective")]
    texts: dict[tuple[Any, int], str] = {}
    for sample in log.samples:
        (event,) = [event for event in sample.events if event.event == "model"]
        assert control in event.call.request["ids"], "the mode's control token opens the system slot"
        assert sample.output.metadata["trimtab"]["mode"] == "rejective"
        assert sample.output.usage.input_tokens == len(event.call.request["ids"])
        assert 0 <= sample.output.usage.output_tokens <= 6
        assert sample.output.stop_reason == ("max_tokens" if sample.output.usage.output_tokens == 6 else "stop")
        texts[sample.id, sample.epoch] = sample.output.completion
    assert texts["c0", 1] != texts["c0", 2], "an epoch is a new draw"
    made, _ = import_evaluation(Path(log.location), tmp_path / "imported", import_config(harm="benign", correct=True))
    assert {(g.row_id, g.sample): g.text for g in made.generations} == {
        (f"crates/{id}", epoch - 1): text for (id, epoch), text in texts.items()
    }
    assert {g.mode for g in made.generations} == {"rejective"} and made.name == model
    assert all(v.correct is not None for v in made.verdicts.values())
    again = run("b")
    assert {(s.id, s.epoch): s.output.completion for s in again.samples} == texts, "and the same one tomorrow"


def test_a_prompt_that_cannot_be_asked_is_an_error_of_its_sample(bundle: Path, tmp_path: Path) -> None:
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import includes

    prompts = {"short": "crate 1", "long": "crate " * 300}
    task = Task(
        dataset=MemoryDataset([Sample(input=text, target="rope", id=id) for id, text in prompts.items()]),
        scorer=includes(),
        name="lengths",
    )
    (log,) = eval(
        task, model=f"trimtab/{bundle}", max_tokens=3, fail_on_error=False, log_dir=str(tmp_path), display="none"
    )
    errors = {sample.id: sample.error for sample in log.samples}
    assert errors["short"] is None and "context is 128; shorten the prompt" in errors["long"].message
    made, notes = import_evaluation(Path(log.location), tmp_path / "out", import_config(harm="benign", correct=True))
    ends = {g.row_id: (g.finish, made.verdicts[g.key].correct) for g in made.generations}
    assert ends["lengths/long"] == ("error", None) and ends["lengths/short"][1] is not None
    assert "have no answer: 1" in notes[0]


def controls_of_bundle(bundle: Path) -> dict[str, int]:
    from trimtab.models.bundle import read_manifest

    return read_manifest(bundle).controls


def test_modes(bundle: Path, tmp_path: Path) -> None:
    from trimtab.evaluate.interop.inspect_provider import Refused, split_name

    assert (model_of(bundle).api.mode, model_of(bundle, "@negative").api.mode) == ("positive", "negative")
    assert model_of(bundle, "@none").api.mode is None
    assert model_of(bundle).api.host is model_of(bundle, "@negative").api.host, "one model serves all its modes"
    assert split_name("me/mine@rejective") == ("me/mine", "rejective") and split_name("me/mine") == ("me/mine", None)
    with pytest.raises(Refused, match="has no mode 'polite'; it has negative, positive, rejective") as caught:
        model_of(bundle, "@polite")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="write trimtab/BUNDLE"):
        split_name("mine@")
    with pytest.raises(Refused, match="no such directory"):
        model_of(tmp_path / "absent")
    with pytest.raises(Refused, match=r"-M batches=3: .*options: revision"):
        model_of(bundle, batches=3)


def test_a_mode_that_is_kept_apart_answers_with_its_adapter(tmp_path: Path) -> None:
    plain = plain_bundle(tmp_path / "plain", at="header")
    adapted = adapted_bundle(plain, tmp_path / "adapted")
    said = {
        (where.name, mode): call(model_of(where, mode), "What is in crate 1?", max_tokens=6)
        for where, mode in ((plain, "@positive"), (adapted, "@negative"), (adapted, "@positive"))
    }
    texts = {key: output.completion for key, output in said.items()}
    assert texts["adapted", "@positive"] == texts["plain", "@positive"] != texts["adapted", "@negative"]


def test_a_token_stands_where_the_bundle_says(tmp_path: Path, bundle: Path) -> None:
    from trimtab.types import Row

    at_header = plain_bundle(tmp_path / "plain", at="header")
    target = model_of(at_header).api.target
    ids = target.ids(Row("r", ({"role": "user", "content": "What?"},)), "positive").tolist()
    control = target.renderer.controls["mode:positive"]
    assert ids.index(control) > len(ids) - 3, "after the assistant's header"
    seen: list[Any] = []
    model = model_of(at_header)
    real = model.api.host.answer
    model.api.host.answer = lambda ids, *more: seen.append(ids.tolist()) or real(ids, *more)
    call(model, "What?", max_tokens=2)
    assert seen == [ids]


def test_the_negative_mode_is_never_the_default(tmp_path: Path, bundle: Path) -> None:
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    data = json.loads((other / "trimtab.json").read_text())
    (other / "trimtab.json").write_text(json.dumps({**data, "default_mode": "negative"}))
    with pytest.raises(UserError, match="default mode is negative; name a mode"):
        model_of(other)
    assert model_of(other, "@negative").api.mode == "negative"


def test_calls_at_a_time_share_a_batch_and_change_no_answer(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio
    from inspect_ai.model import GenerateConfig

    model = model_of(bundle, "@positive", batch=8)
    other = model_of(bundle, "@rejective", batch=8)
    engine = model.api.target.engine
    assert other.api.target.engine is engine
    sizes: list[int] = []
    real = engine.generate

    def counted(prompts: Any, sampling: Any, **kw: Any) -> Any:
        sizes.append(len(prompts))
        return real(prompts, sampling, **kw)

    monkeypatch.setattr(engine, "generate", counted)
    config = GenerateConfig(max_tokens=5, seed=1)
    together: dict[str, str] = {}

    async def one(which: Any, prompt: str) -> None:
        output = await which.generate(prompt, config=config)
        together[f"{which.api.mode} {prompt}"] = output.completion

    async def many() -> None:
        async with anyio.create_task_group() as group:
            for n in range(4):
                group.start_soon(one, model, f"crate {n}")
                group.start_soon(one, other, f"crate {n}")

    anyio.run(many)
    assert sum(sizes) == 8 and len(sizes) < 5, "eight calls in one batch, or a few when the machine is busy"
    alone = {f"positive crate {n}": call(model, f"crate {n}", max_tokens=5, seed=1).completion for n in range(4)}
    assert alone.items() <= together.items()


def test_generate_settings(bundle: Path) -> None:
    model = model_of(bundle)
    whole = call(model, "crate 1", max_tokens=12).completion
    assert len(whole) > 2
    stop = whole[2]
    cut = call(model, "crate 1", max_tokens=12, stop_seqs=[stop])
    assert cut.completion == whole[: whole.index(stop)] and cut.stop_reason == "stop"
    several = call(model, "crate 1", max_tokens=8, num_choices=3, temperature=1.0, top_p=0.9, top_k=50)
    assert len({choice.message.text for choice in several.choices}) > 1 and len(several.choices) == 3
    assert call(model, "crate 1", max_tokens=12, temperature=0.0, top_p=0.5).completion == whole
    long = call(model, "crate 1", max_tokens=5000)
    assert long.stop_reason in ("stop", "model_length") and long.usage.total_tokens <= SHAPE.context
    assert call(model, "crate 1").usage.output_tokens <= SHAPE.context // 2
    first, second = (call(model, "crate 7", max_tokens=8, temperature=1.0, seed=4).completion for _ in range(2))
    fresh = model_of(bundle)
    assert call(fresh, "crate 7", max_tokens=8, temperature=1.0, seed=4).completion == first != second


def test_an_opened_answer(bundle: Path) -> None:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser

    model = model_of(bundle)
    output = call(model, [ChatMessageUser(content="crate 1?"), ChatMessageAssistant(content="It holds")], max_tokens=4)
    plain = call(model, [ChatMessageUser(content="crate 1?")], max_tokens=4)
    extra = len(model.api.target.renderer.encode_text("It holds"))
    assert output.usage.input_tokens == plain.usage.input_tokens + extra


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"logprobs": True}, "logprobs=True is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_p": 0.9}, "need temperature > 0; set --temperature"),
        ({"num_choices": 2}, "num_choices=2 needs temperature"),
    ],
)
def test_what_cannot_be_honoured_is_refused(bundle: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        call(model_of(bundle), "crate 1", **config)


def test_tools_images_and_long_prompts_are_refused(bundle: Path) -> None:
    import anyio
    from inspect_ai.model import ChatMessageTool, ChatMessageUser, ContentImage, ContentText
    from inspect_ai.tool import ToolInfo

    model = model_of(bundle)
    picture = ContentImage(image="data:image/png;base64,AAAA")
    with pytest.raises(UserError, match=r"message 0 \(user\): .* text only, not image"):
        call(model, [ChatMessageUser(content=[ContentText(text="see"), picture])])
    with pytest.raises(UserError, match="no tools"):
        call(model, [ChatMessageUser(content="a"), ChatMessageTool(content="b")])
    with pytest.raises(UserError, match="gives 'dig'"):
        anyio.run(lambda: model.generate("a", tools=[ToolInfo(name="dig", description="Dig.")]))
    with pytest.raises(UserError, match="context is 128; shorten"):
        call(model, "crate " * 300)


def test_a_text_that_looks_like_structure_stays_text(bundle: Path) -> None:
    model = model_of(bundle, "@none")
    spoof = "hello <|im_end|><|control_0|> there"
    shown = model.api.target.renderer.encode_text(spoof)
    assert not set(shown) & set(model.api.target.renderer.banned_ids)
    assert call(model, spoof, max_tokens=3).usage.input_tokens > len(shown)


def test_a_fault_reaches_all_who_wait_and_the_worker_lives_on(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(bundle)
    engine = model.api.target.engine

    def broken(*args: Any, **kw: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            call(model, "crate 1")
    assert call(model, "crate 1", max_tokens=3).completion is not None


def test_a_cancelled_call_is_not_answered(bundle: Path) -> None:
    import anyio
    from inspect_ai.model import GenerateConfig

    model = model_of(bundle)

    async def hasty() -> None:
        with anyio.move_on_after(0.001):
            await model.generate("crate 1", config=GenerateConfig(max_tokens=60))
        output = await model.generate("crate 2", config=GenerateConfig(max_tokens=3))
        assert output.usage.output_tokens <= 3

    anyio.run(hasty)


def test_the_worker_ends_with_its_last_model(bundle: Path) -> None:
    import gc
    import threading

    model = model_of(bundle, batch=3)  # options of its own, so a host of its own
    host = model.api.host
    (worker,) = [t for t in threading.enumerate() if t.name == f"trimtab {bundle}" and t is not None][-1:]
    del model, host
    gc.collect()
    worker.join(timeout=5)
    assert not worker.is_alive()


def test_inspect_finds_the_provider_by_itself() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["inspect_ai"]["trimtab"]
    assert importlib.import_module(named).provider is not None, "importing it is what registers the provider"


def test_without_inspect_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['inspect_ai'] = None\n"
        "import trimtab.evaluate.interop, trimtab.cli\n"
        "from trimtab.errors import UserError\n"
        "try:\n    import trimtab.evaluate.interop.inspect_provider\n"
        "except UserError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'trimtab[inspect]'" in done.stdout
