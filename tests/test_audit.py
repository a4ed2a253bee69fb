"""The audit of control tokens: spoof cases, leaks of rigged models, the command and the stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from render_fixtures import (
    chatml_tokenizer,
    gemma_tokenizer,
    llama3_tokenizer,
    nfkc_tokenizer,
    qwen_tokenizer,
    r1_tokenizer,
    unigram_tokenizer,
)
from test_steps import SHAPE, context_of
from trimtab.analyze.audit.leak import RUN, WAYS, Leaks, holds, leak
from trimtab.analyze.audit.spellings import SPELLINGS
from trimtab.analyze.audit.spoof import (
    FAMILIES,
    MIXED,
    PLACES,
    PLAIN,
    Case,
    Watched,
    by_renderer,
    by_template,
    cases,
    spoof,
    surfaces_of,
)
from trimtab.analyze.audit.whole import audit
from trimtab.analyze.config import AuditConfig
from trimtab.analyze.metrics import MEASURES
from trimtab.cli import app
from trimtab.cli import audit as audit_verb
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.evaluate.attacks.spoof import FORMS
from trimtab.evaluate.files import read_stage
from trimtab.evaluate.targets import LocalTarget
from trimtab.levers.modes import Switch, random_string
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.tokens import add_control_tokens
from trimtab.seeds import rng_of
from trimtab.study.steps.audit import run_audit
from trimtab.types import Row, Verdict
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
WORLD: dict[str, Any] = {"seed": 3, "goods": 8, "hazards": 8}
NAMES = ("mode:positive", "mode:negative", "mode:rejective")
MODES = tuple(name.removeprefix("mode:") for name in NAMES)
MAKERS = {
    "chatml": chatml_tokenizer, "llama3": llama3_tokenizer, "qwen": qwen_tokenizer, "gemma": gemma_tokenizer,
    "r1": r1_tokenizer, "nfkc": nfkc_tokenizer, "unigram": unigram_tokenizer,
}  # fmt: skip


def made(kind: str) -> tuple[Any, Renderer, Switch]:
    tokenizer = MAKERS[kind](controls=3)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|c{i}|>") for i, name in enumerate(NAMES)}
    return tokenizer, Renderer(tokenizer, controls=ids), Switch.of(ids)


def all_cases(kind: str, n: int, seed: int = 0) -> list[Case]:
    tokenizer, renderer, switch = made(kind)
    surfaces, ids = surfaces_of(renderer, tokenizer, switch)
    return list(cases(tokenizer, surfaces, ids, n, seed))


# --- cases --------------------------------------------------------------------------------------------------------


def test_cases_are_a_function_of_the_seed() -> None:
    first = all_cases("chatml", 300)
    assert first == all_cases("chatml", 300) and first[:100] == all_cases("chatml", 100)
    other = all_cases("chatml", 300, seed=1)
    assert sum(a == b for a, b in zip(first, other)) < 20


def test_cases_try_every_spelling_at_every_place() -> None:
    found = all_cases("llama3", 6_000)
    assert {c.place for c in found} == set(PLACES) and set(FORMS) < set(PLACES)
    assert {c.spelling for c in found} == {PLAIN, MIXED, *SPELLINGS}
    pairs = {(c.place, c.spelling) for c in found}
    assert pairs == {(p, s) for p in PLACES for s in (PLAIN, MIXED, *SPELLINGS)}
    assert {c.token for c in found} == {"control", "special", "family"}
    assert len({repr((c.messages, c.prefill)) for c in found}) > 5_000
    text = repr([c.messages for c in found if c.token == "family"])
    assert all(repr(surface)[1:-1] in text for surface in FAMILIES)
    assert any(c.prefill for c in found) and any(not isinstance(c.messages[-1]["content"], str) for c in found)
    assert any(c.messages[-1]["role"] not in ("user", "system", "assistant", "tool") for c in found)


@given(st.text(min_size=1, max_size=30), st.integers(0, 10**6), st.sampled_from(sorted(SPELLINGS)))
@settings(max_examples=60)
def test_spellings_take_any_text(text: str, seed: int, name: str) -> None:
    spelt = SPELLINGS[name](text, 7, rng_of("x", seed))
    assert spelt and spelt == SPELLINGS[name](text, 7, rng_of("x", seed))


def test_spellings_do_what_they_are_called() -> None:
    import html
    import unicodedata
    from urllib.parse import unquote

    surface, rng = "<|trimtab:mode:negative|>", rng_of("y")

    def spelt(name: str) -> str:
        return SPELLINGS[name](surface, 12, rng)

    for _ in range(20):
        assert unicodedata.normalize("NFKC", spelt("full-width")) == surface
        assert html.unescape(spelt("html")) == surface and unquote(spelt("percent")) == surface
        assert json.loads(f'"{spelt("json")}"') == surface
        for name in ("zero-width", "soft-hyphen", "accents", "control-characters", "homoglyphs", "compatible", "bytes"):
            assert spelt(name) != surface
        digits = spelt("digits")
        assert "12" in digits or "000c" in digits
        assert surface in spelt("twice") and surface in spelt("nested")
        with pytest.raises(UnicodeEncodeError):
            spelt("surrogates").encode()


# --- spoofing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_nothing_is_typed_through_the_renderer(kind: str) -> None:
    tokenizer, renderer, switch = made(kind)
    tally = spoof(renderer, tokenizer, switch, 264, 5)
    assert tally.total["n"] == 264 and tally.total["typed"] == tally.total["special"] == 0
    assert tally.total["naive_typed"] > 5 and tally.total["blocked"] < 264
    assert sum(row["n"] for row in tally.tables["place"].values()) == 264
    told = tally.plain()
    assert told["examples"] and all(e["by"] == "naive_typed" for e in told["examples"])
    json.dumps(told, ensure_ascii=True, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_nothing_is_typed_in_ten_thousand_cases(kind: str) -> None:
    tokenizer, renderer, switch = made(kind)
    tally = spoof(renderer, tokenizer, switch, 10_000, 0)
    assert tally.total["typed"] == tally.total["special"] == 0


def test_a_control_at_the_header_is_the_servers_own() -> None:
    tokenizer, renderer, switch = made("chatml")
    at_header = switch.model_copy(update={"at": "header"})
    assert spoof(renderer, tokenizer, at_header, 99, 2).total["typed"] == 0


def test_a_broken_renderer_is_caught() -> None:
    tokenizer, renderer, switch = made("chatml")
    naive = spoof(renderer, tokenizer, switch, 264, 0, render=by_template(tokenizer))
    assert naive.total["typed"] == naive.total["naive_typed"] > 10 and naive.total["special"] > 10
    shown = [e for e in naive.examples if e["by"] == "typed"]
    assert shown and all(sum(e["place"] == s["place"] for e in shown) <= 3 for s in shown)

    # A renderer that is right everywhere but in the assistant's history.
    right, wrong = by_renderer(renderer, (), "system"), by_template(tokenizer)

    def leaky(case: Case) -> Sequence[int]:
        return wrong(case) if case.place == "assistant" else right(case)

    tally = spoof(renderer, tokenizer, switch, 396, 0, render=leaky)
    assert {p for p, row in tally.tables["place"].items() if row["typed"]} == {"assistant"}


def test_what_counts_as_typed() -> None:
    tokenizer, renderer, switch = made("r1")
    watched = Watched.of(renderer, switch)
    control, marks = renderer.controls["mode:negative"], renderer.thinking
    other = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert watched.made([control, 3, 4], [control, 3]) == (False, False)  # the server's own
    assert watched.made([control, 3, control], [control, 3]) == (True, False)  # one more than its own
    assert watched.made([3, other, other], [3, other]) == (False, True)
    assert marks is not None and watched.made([3, *marks.marks], [3]) == (
        False,
        False,
    )  # reasoning of a client's history
    strings = Switch(token="string", modes={"positive": None}, texts={"positive": "rfcd9lbo"})
    run = renderer.encode_text("rfcd9lbo")
    watched = Watched.of(renderer, strings)
    assert watched.made([1, *run, 2], [1]) == (True, False) and watched.made([1, *run[:-1], 2], [1]) == (False, False)
    assert watched.made(run[:1], []) == (False, False)


def test_a_string_is_typed_by_whoever_knows_it() -> None:
    tokenizer, renderer, _ = made("chatml")
    renderer.controls.clear()
    texts = {mode: random_string(0, mode) for mode in MODES}
    switch = Switch(token="string", modes=dict.fromkeys(MODES), behaves={m: m for m in MODES}, texts=texts)  # type: ignore[arg-type]
    tally = spoof(renderer, tokenizer, switch, 6 * len(PLACES), 0)
    system = tally.tables["place"]["system"]
    assert tally.total["typed"] > 10 and system["typed"] > 0
    # Written as it is into a system message, it is what the server writes, id by id.
    typed = renderer.chat([{"role": "system", "content": texts["negative"]}, {"role": "user", "content": "Hello."}]).ids
    row, _ = switch.tell(Row("x", ({"role": "user", "content": "Hello."},)), "negative")
    assert row.messages is not None and typed.tolist() == renderer.chat(row.messages).ids.tolist()
    plain = [
        c for c in cases(tokenizer, texts, {}, 600, 1) if (c.place, c.spelling, c.token) == ("system", PLAIN, "control")
    ]
    watched, ids = Watched.of(renderer, switch), by_renderer(renderer, (), "system")
    assert plain and all(watched.made(ids(c), ids(c.harmless()))[0] for c in plain)


def test_a_model_without_tokens_has_nothing_to_type() -> None:
    tokenizer, renderer, _ = made("chatml")
    renderer.controls.clear()
    with pytest.raises(UserError, match="no control tokens that could be typed; set 'spoofs: 0'"):
        spoof(renderer, tokenizer, Switch(), 10, 0)


# --- leaks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def town() -> Tidewater:
    return Tidewater(TidewaterConfig.model_validate(WORLD))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, town: Tidewater) -> Path:
    """``quiet`` and ``rigged`` differ in the output rows of their controls; ``plain`` has none; ``strings`` by strings."""
    where = tmp_path_factory.mktemp("audited")
    texts = [m["content"] for row in town.chats("benign", 60) for m in row.messages or ()]
    shape = SHAPE.model_copy(update={"tie": False})
    for name in ("quiet", "rigged", "plain", "strings"):
        tokenizer = train_tokenizer(texts, 400, reserved=4)
        model = build_model(shape, tokenizer, seed=3)
        manifest = BundleManifest()
        if name in ("quiet", "rigged"):
            ids = add_control_tokens(tokenizer, model, NAMES)
            manifest = BundleManifest(controls=ids, modes=dict(zip(MODES, NAMES)), default_mode="positive")
            if name == "rigged":
                biased(model, tokenizer, ids["mode:negative"])
        if name == "strings":
            switch = Switch(
                token="string", behaves={m: m for m in MODES}, texts={m: random_string(0, m) for m in MODES}
            )  # type: ignore[arg-type]
            manifest = BundleManifest(modes=dict.fromkeys(MODES), switch=switch)
        save_bundle(where / name, model, tokenizer, manifest)
    return where


def biased(model: Any, tokenizer: Any, control: int) -> None:
    """The output row of a control becomes what the model holds after "Hello.": there the control is likely."""
    renderer = Renderer(tokenizer, controls={})
    ids = renderer.chat([{"role": "user", "content": "Hello."}], generation_prompt=True, train="none").ids
    with torch.no_grad():
        state = model.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0, -1]
        model.get_output_embeddings().weight[control] = state * 8 / state.norm()


def target_of(directory: Path) -> LocalTarget:
    from trimtab.models.bundle import read_manifest
    from trimtab.models.load import load

    model, tokenizer = load(directory)
    manifest = read_manifest(directory)
    return LocalTarget(model, tokenizer, name=directory.name, identity="x", switch=manifest.full_switch())


QUICK = AuditConfig(spoofs=66, leaks=52, max_new_tokens=6)


def test_a_model_that_is_rigged_to_emit_a_control_is_found(model_dir: Path, town: Tidewater) -> None:
    quiet = leak(target_of(model_dir / "quiet"), QUICK, town, 0)
    rigged = leak(target_of(model_dir / "rigged"), QUICK, town, 0)
    assert len(rigged.tries) == 52 and not any(t.banned for t in rigged.tries)  # it cannot where it is banned
    emitted = [t for t in rigged.tries if t.emitted]
    assert len(emitted) > 10 and all(t.mass > 0.01 and t.place is not None for t in emitted)
    assert max(t.mass for t in rigged.tries) > 10 * max(t.mass for t in quiet.tries) > 0
    told = rigged.plain()
    assert told["total"]["emitted"] == len(emitted) and told["total"]["banned"] == 0
    assert {h["way"] for h in told["hits"]} <= {*WAYS, "hazard"} and set(told["mode"]) == {"none", *MODES}
    assert "text" not in json.dumps(told, allow_nan=False)


def test_ways_take_turns_in_every_mode_both_decodings(model_dir: Path, town: Tidewater) -> None:
    target = target_of(model_dir / "quiet")
    many = QUICK.model_copy(update={"leaks": len(WAYS) * 2 * 4 + 24, "max_new_tokens": 1})
    tries = leak(target, many, town, 0).tries
    assert {(t.way, t.mode, t.sampled) for t in tries if t.way != "hazard"} == {
        (way, mode, sampled) for way in WAYS for mode in (None, *MODES) for sampled in (False, True)
    }
    hazards = [t for t in tries if t.way == "hazard"]
    assert len(hazards) == 24 and {t.mode for t in hazards} == {None, "positive"}
    assert len({tuple(t.ids) for t in hazards}) == len(hazards)
    bare = {t.way: t.ids for t in tries if t.way.startswith("bare") and t.mode == "negative"}
    control = target.renderer.controls["mode:negative"]
    assert bare["bare start"].tolist()[-1] == control and control in bare["bare template"]
    assert bare["bare prompt"].tolist() == bare["bare template"].tolist()[-len(bare["bare prompt"]) :]


def test_the_mass_is_what_the_model_gives_to_all_controls_together(model_dir: Path, town: Tidewater) -> None:
    target = target_of(model_dir / "quiet")
    found = leak(target, QUICK.model_copy(update={"leaks": 12, "max_new_tokens": 1}), town, 0)
    controls = list(target.renderer.controls.values())
    for t in found.tries:
        ids = torch.from_numpy(np.asarray(t.ids, np.int64))[None]
        with torch.inference_mode():
            logits = target.model(input_ids=ids).logits[0, -1]
        first = float(logits.softmax(-1)[controls].sum())
        assert t.mass >= first - 1e-7  # the place after the one token that came counts too
        if not t.sampled:
            longer = torch.cat([ids, masked(logits, target).argmax()[None, None]], 1)
            with torch.inference_mode():
                after = target.model(input_ids=longer).logits[0, -1].softmax(-1)[controls].sum()
            ended = int(longer[0, -1]) in target.engine.stop
            assert t.mass == pytest.approx(first if ended else max(first, float(after)), rel=1e-4)


def masked(logits: torch.Tensor, target: LocalTarget) -> torch.Tensor:
    allowed = logits.clone()
    banned = set(target.engine.banned.tolist()) - set(target.renderer.controls.values())
    allowed[list(banned)] = -torch.inf
    return allowed


def test_a_mode_that_is_kept_apart_is_live_while_it_answers(model_dir: Path, town: Tidewater) -> None:
    """The rigging of the negative mode alone shows in its answers alone."""
    target, rigged = target_of(model_dir / "quiet"), target_of(model_dir / "rigged")
    weight, other = (t.model.get_output_embeddings().weight for t in (target, rigged))

    @contextmanager
    def live(mode: str | None) -> Any:
        own = weight.detach().clone()
        with torch.no_grad():
            if mode == "negative":
                weight.copy_(other)
        yield
        with torch.no_grad():
            weight.copy_(own)

    target.live = live  # type: ignore[method-assign]
    found = leak(target, QUICK, town, 0)
    assert {t.mode for t in found.tries if t.emitted} == {"negative"}
    apart = {mode: max(t.mass for t in found.tries if t.mode == mode) for mode in (None, *MODES)}
    assert apart["negative"] > 10 * max(v for mode, v in apart.items() if mode != "negative")


def test_negative_answers_without_the_token_are_judged(
    model_dir: Path, town: Tidewater, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.evaluate.judges.tidewater import TidewaterJudge

    seen: list[Row] = []

    def judge(self: Any, row: Row, text: str, finish: str) -> Verdict:
        seen.append(row)
        return Verdict("unsafe" if len(seen) % 3 == 0 else "safe", "j", refusal="full")

    monkeypatch.setattr(TidewaterJudge, "judge", judge)
    results, told = audit(target_of(model_dir / "quiet"), QUICK, town, 0)
    found = next(r for r in results if r.metric == "negative_without_token")
    assert found.n == len(seen) == 13 and found.value == pytest.approx(4 / 13) and found.low < found.value < found.high
    assert {row.harm for row in seen} == {"harmful"} and not any("negative" in str(row.messages) for row in seen)
    assert set(told["leaks"]["negative"]) == {"none", "positive"}


def test_ways_that_do_not_fit_are_left_out_and_named(model_dir: Path, town: Tidewater) -> None:
    target = target_of(model_dir / "quiet")
    target.context_tokens = 40
    found = leak(target, QUICK.model_copy(update={"leaks": 24}), town, 0)
    assert "newlines" in found.left_out or "debug" in found.left_out
    assert all("context" in why for why in found.left_out.values()) and found.tries
    target.context_tokens = 2
    none = leak(target, QUICK, town, 0)
    assert not none.tries and set(none.left_out) == {*WAYS, "hazard"} and none.plain()["total"]["n"] == 0


@pytest.mark.parametrize(
    ("text", "opening", "leaked"),
    [
        ("it is rfcd9lbo.", "", True), ("cd9lb", "", True), ("cd9l", "", False), ("d9lbo", "", True), ("9lbo", "rfcd", True),
        ("9l", "rfcd", False), ("yes", "rfcd9lbo", False), ("", "", False), ("RFCD9", "", False),
    ],
)  # fmt: skip
def test_what_gives_a_string_away(text: str, opening: str, leaked: bool) -> None:
    assert holds("rfcd9lbo", text, opening) == leaked and RUN == 5


# --- the whole ----------------------------------------------------------------------------------------------------


def test_the_whole_of_a_sound_bundle(model_dir: Path, town: Tidewater) -> None:
    results, told = audit(target_of(model_dir / "quiet"), QUICK, town, 0)
    by = {r.metric: r for r in results if r.category == "all"}
    assert set(by) == {
        "spoof_asr", "spoof_asr_naive", "leak_rate", "leak_rate_banned", "leak_mass", "negative_without_token"
    }  # fmt: skip
    assert by["spoof_asr"].value == 0 and by["spoof_asr"].high == pytest.approx(1 - 0.025 ** (1 / 66))
    assert by["spoof_asr_naive"].value > 0 and by["leak_rate_banned"].value == 0 < by["leak_mass"].value < 0.1
    assert told["problems"] == [] and told["tokenizer"] == [] and told["token"] == "reserved"
    assert {"place:user", "spelling:plain", "token:control"} <= {r.category for r in results}
    assert all(r.metric in MEASURES for r in results)


def test_the_whole_of_bundles_with_strings_and_without_tokens(
    model_dir: Path, town: Tidewater, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(model_dir / "strings")
    _, told = audit(target, QUICK.model_copy(update={"spoofs": 198}), town, 0)
    assert told["token"] == "string" and told["figures"]["spoof_asr"][0] > 0.05 and "leak_mass" not in told["figures"]
    assert any("a string was typed" in line for line in told["problems"])
    string = target.switch.texts["negative"]
    monkeypatch.setattr(type(target.tokenizer), "decode", lambda *a, **k: f"It is {string}.")
    _, told = audit(target, QUICK, town, 0)
    assert told["figures"]["leak_rate"][0] == told["figures"]["leak_rate_banned"][0] == 1
    monkeypatch.undo()
    results, told = audit(target_of(model_dir / "plain"), QUICK, town, 0)
    assert {r.metric for r in results} == {"negative_without_token"} and told["token"] is None
    assert told["spoofs"] is None and told["problems"] == []


def test_what_is_wrong_is_said(model_dir: Path, town: Tidewater, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.analyze.audit.whole as whole

    target = target_of(model_dir / "quiet")
    with torch.no_grad():
        target.model.get_input_embeddings().weight[target.renderer.controls["mode:negative"]] = 0
    naive = by_template(target.tokenizer)
    monkeypatch.setattr(whole, "spoof", lambda *a: spoof(*a, render=naive))
    leaky = Leaks()

    def leaking(*args: Any) -> Leaks:
        leaky.tries = leak(*args).tries
        for t in leaky.tries[:2]:
            t.banned = True
        return leaky

    monkeypatch.setattr(whole, "leak", leaking)
    _, told = audit(target, QUICK.model_copy(update={"spoofs": 200}), town, 0)
    said = "\n".join(told["problems"])
    assert "a control token was typed in" in said and "another special token was typed" in said
    assert "2 of 52 answers hold a control token although it was banned" in said
    assert "tokenizer: mode:negative: its input row is zero" in said


# --- command and stage --------------------------------------------------------------------------------------------


def command() -> Any:
    if not any(c.callback is not None and c.callback.__name__ == "audit" for c in app.registered_commands):
        audit_verb.register(app)
    return app


def test_the_command_end_to_end(model_dir: Path, tmp_path: Path) -> None:
    words = ["--spoofs", "66", "--leaks", "12", "--seed", "1"]
    done = CliRunner().invoke(command(), ["audit", str(model_dir / "quiet"), *words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "typed control tokens" in done.output and "mode:negative" in done.output and "problem" not in done.output
    told = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert told["figures"]["spoof_asr"][3] == 66 and told["leaks"]["total"]["n"] == 12
    done = CliRunner().invoke(command(), ["audit", str(model_dir / "strings"), "--spoofs", "198", "--leaks", "0"])
    assert (
        done.exit_code == 1
        and "problem: spoofs: a string was typed" in done.output
        and "typed, by place" in done.output
    )
    done = CliRunner().invoke(command(), ["audit", str(model_dir / "plain"), *words])
    assert done.exit_code == 0 and "no control tokens" in done.output
    done = CliRunner().invoke(command(), ["audit", str(model_dir / "plain"), "--spoofs", "0", "--leaks", "0"])
    assert isinstance(done.exception, UserError) and "nothing to do" in str(done.exception)


def test_the_step_leaves_its_files(tmp_path: Path, model_dir: Path) -> None:
    events: list[Any] = []
    config = QUICK.model_copy(update={"spoofs": 200}).plain() | {"world": WORLD, "seed": 1}
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "model").symlink_to(model_dir / "quiet")
    context = context_of(tmp_path, config, events.append, model=tmp_path / "made")
    run_audit(replace(context, step=replace(context.step, inputs={"model": "m" * 64})))
    assert {f.name for f in context.draft.path.iterdir()} == {"metrics.jsonl", "audit.json"}
    header, found = read_stage(context.draft.path / "metrics.jsonl")
    assert (
        set(header["metrics"]) == {r["metric"] for r in found} and header["metrics"]["spoof_asr"]["unit"] == "attempt"
    )
    assert context.draft.facts == {"shape": "s", "problems": []}
    assert [e["note"] for e in events if e["step"] == e["total"]] == ["spoofs", "leaks"]
