"""vLLM as the engine: what is asked of it (against a stand-in), and, where it is installed, what it answers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from adapter_fixtures import adapted_bundle, plain_bundle
from trimtab.errors import Fault, UserError
from trimtab.evaluate.attacks.choose import choose_attack
from trimtab.evaluate.targets import open_local
from trimtab.generate.config import Sampling
from trimtab.generate.engine import Engine, guard_ids
from trimtab.generate.schedule import Prompt
from trimtab.generate.vllm import CHUNK, VllmEngine, outline
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.models.load import load, stop_ids
from trimtab.models.tokens import add_control_tokens, controls_of
from trimtab.types import Row

torch.set_num_threads(1)
ROWS, STOP, WORST = 40, 3, 39
"""The stand-in's vocabulary, its end token, and the token that it likes best wherever it may say it."""


class Params:
    """SamplingParams, as far as it is asked."""

    def __init__(self, **settings) -> None:
        self.__dict__.update(settings)
        self.settings = settings
        if settings["temperature"] > 2:
            raise RuntimeError("temperature must be in [0, 2]\nand more")


class Processor:
    """vLLM's base class for logits processors."""


class SecondProcessor:
    """That of its second runner."""


class FakeLLM:
    """Scores depend on the prompt's sum and the place; the end token comes at place 5 of prompts with an even sum."""

    opened: ClassVar[list[FakeLLM]] = []
    breaks: BaseException | None = None
    leaks = False
    rows = ROWS

    def __init__(self, **settings) -> None:
        self.settings = settings
        self.calls: list[tuple[list, list]] = []
        self.live: list = []
        self.shut = False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: setattr(self, "shut", True)))
        self.processors = [p("config", torch.device("cpu"), False) for p in settings["logits_processors"] or ()]
        assert all(isinstance(p, Processor) for p in self.processors)
        FakeLLM.opened.append(self)
        torch.set_num_threads = lambda n: None  # as vLLM does without a GPU

    def generate(self, prompts, params, *, use_tqdm, lora_request=None):
        assert use_tqdm is False and len(prompts) == len(params)
        self.live.append(lora_request)
        self.calls.append((prompts, params))
        if FakeLLM.breaks is not None:
            raise FakeLLM.breaks
        return [
            SimpleNamespace(outputs=[self._answer(p["prompt_token_ids"], s)]) for p, s in zip(prompts, params)
        ]  # fmt: skip

    def _answer(self, prompt, params):
        assert isinstance(prompt, list) and all(type(token) is int for token in prompt)
        rng = np.random.default_rng([sum(prompt), (params.seed or 0) % 2**32])
        said: list[int] = []
        while len(said) < params.max_tokens:
            logits = torch.tensor(rng.random((1, FakeLLM.rows)))
            logits[0, WORST], logits[0, 4] = 9.0, -1.0
            logits[0, STOP] = 10.0 if len(said) == 5 and sum(prompt) % 2 == 0 else -1.0
            for processor in () if FakeLLM.leaks else self.processors:
                logits = processor.apply(logits)
            said.append(int(logits.argmax()))
            if said[-1] in params.stop_token_ids:
                return SimpleNamespace(token_ids=said, finish_reason="stop")
        return SimpleNamespace(token_ids=said, finish_reason="length")


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the module, and the models that were opened in it."""
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    made = {
        "vllm": {"LLM": FakeLLM, "SamplingParams": Params},
        "vllm.lora.request": {"LoRARequest": namedtuple("LoRARequest", "lora_name lora_int_id lora_path")},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: None},
        "vllm.v1.sample.logits_processor": {"LogitsProcessor": Processor},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": SecondProcessor},
    }
    for name, content in made.items():
        parts = name.split(".")
        for n in range(1, len(parts) + 1):
            parent = ".".join(parts[:n])
            if n == len(parts) or parent not in made:
                module = ModuleType(parent)
                module.__dict__.update(content if n == len(parts) else {})
                monkeypatch.setitem(sys.modules, parent, module)
    monkeypatch.setattr(FakeLLM, "opened", [])
    monkeypatch.setattr(FakeLLM, "breaks", None)
    monkeypatch.setattr(FakeLLM, "leaks", False)
    return FakeLLM.opened


def prompts_of(lengths):
    rng = np.random.default_rng(1)
    return [Prompt(rng.integers(5, 30, size=n), seed=i, key=f"p{i}") for i, n in enumerate(lengths)]


def engine_of(**changes):
    settings = {"rows": ROWS, "stop_ids": [STOP, 4], "banned_ids": [WORST, 38], "context": 3000, "dtype": "bfloat16"}
    return VllmEngine("some/model", **{**settings, **changes})


def run(engine, prompts, sampling, **more):
    return {(o.key, o.sample): o for some in engine.generate(prompts, sampling, **more) for o in some}


LENGTHS = [7, 3, 12, 5, 9, 4, 6, 8, 10, 2]


def test_what_vllm_is_asked(vllm):
    prompts = prompts_of(LENGTHS)
    engine = engine_of(revision="abc")
    assert not vllm, "the model is opened when something is generated, and not before"
    found = run(engine, prompts, Sampling(temperature=0.8, top_p=0.9, top_k=20, max_new_tokens=8, samples=2, batch=64))
    (llm,) = vllm
    assert llm.settings["model"] == "some/model" and llm.settings["revision"] == "abc"
    assert llm.settings["skip_tokenizer_init"] and llm.settings["enable_prefix_caching"]
    assert llm.settings["load_format"] == "safetensors" and llm.settings["dtype"] == "bfloat16"
    assert llm.settings["generation_config"] == "vllm" and llm.settings["max_num_seqs"] == 64
    ((inputs, params),) = llm.calls
    asked = {(tuple(i["prompt_token_ids"]), p.seed) for i, p in zip(inputs, params)}
    assert all(set(i) == {"prompt_token_ids"} for i in inputs), "ids, and never text"
    assert len(asked) == 20 and len({p.seed for p in params}) == 20
    for p in params:
        assert p.stop_token_ids == [STOP, 4] and p.ignore_eos and not p.detokenize
        assert (p.temperature, p.top_p, p.top_k, p.max_tokens) == (0.8, 0.9, 20, 8)
        assert 0 <= p.seed < 2**63
    assert set(found) == {(f"p{i}", s) for i in range(10) for s in (0, 1)}
    for (key, _), output in found.items():
        prompt = prompts[int(key[1:])]
        assert output.index == int(key[1:]) and {STOP, WORST, 38}.isdisjoint(output.ids)
        even = int(prompt.ids.sum()) % 2 == 0
        assert (len(output.ids), output.finish) == ((5, "stop") if even else (8, "length"))
    assert {o.finish for o in found.values()} == {"stop", "length"}


def test_greedy_asks_for_no_random_numbers(vllm):
    run(engine_of(), prompts_of([4]), Sampling(max_new_tokens=3))
    (params,) = vllm[0].calls[0][1]
    assert (params.temperature, params.seed, params.top_p, params.top_k) == (0.0, None, 1.0, 0)


def test_an_end_token_in_the_last_place_ends_the_answer(vllm):
    prompt = next(p for p in prompts_of(LENGTHS) if p.ids.sum() % 2 == 0)
    output = run(engine_of(), [prompt], Sampling(max_new_tokens=6))[prompt.key, 0]
    assert (len(output.ids), output.finish) == (5, "stop")
    output = run(engine_of(), [prompt], Sampling(max_new_tokens=5))[prompt.key, 0]
    assert (len(output.ids), output.finish) == (5, "length")


def test_an_answer_does_not_depend_on_its_neighbours(vllm):
    prompts = prompts_of(LENGTHS)
    sampling = Sampling(temperature=1.0, max_new_tokens=7, samples=2, batch=3)
    whole = run(engine_of(), prompts, sampling)
    alone = run(engine_of(), prompts[4:5], sampling.model_copy(update={"samples": 3, "batch": 1}))
    assert [alone["p4", s].ids for s in (0, 1)] == [whole["p4", s].ids for s in (0, 1)]
    assert len({alone["p4", s].ids for s in range(3)}) == 3
    same = run(engine_of(), [Prompt(prompts[4].ids, 4, "other")], sampling)
    assert same["other", 0].ids == whole["p4", 0].ids


def test_chunks_progress_and_what_is_done(vllm):
    prompts = prompts_of(LENGTHS)
    sampling = Sampling(max_new_tokens=8, batch=1)
    seen = []
    whole = run(engine_of(), prompts, sampling, progress=lambda *said: seen.append(said))
    assert [len(call[0]) for call in vllm[0].calls] == [CHUNK, CHUNK, 10 - 2 * CHUNK]
    assert [said[:2] for said in seen] == [(CHUNK, 10), (2 * CHUNK, 10), (10, 10)]
    assert seen[-1][2] == sum(len(o.ids) for o in whole.values())
    seen.clear()
    done = {("p0", 0), ("p3", 0), ("p9", 0), ("elsewhere", 0)}
    rest = run(engine_of(), prompts, sampling, done=done, progress=lambda *said: seen.append(said))
    assert rest == {slot: output for slot, output in whole.items() if slot not in done}
    assert seen[0] == (3, 10, 0) and [said[0] for said in seen] == [3, 3 + CHUNK, 10]
    seen.clear()
    assert run(engine_of(), prompts, sampling, done=set(whole), progress=lambda *said: seen.append(said)) == {}
    assert seen == [(10, 10, 0)] and len(vllm) == 2, "with nothing left to do, nothing is opened"


def test_prompts_that_share_their_start_stand_together(vllm):
    rng = np.random.default_rng(2)
    starts = [rng.integers(5, 30, size=20) for _ in range(2)]
    prompts = [Prompt(np.append(starts[n % 2], 5 + n), n, f"p{n}") for n in range(6)]
    run(engine_of(), prompts, Sampling(max_new_tokens=2))
    firsts = [i["prompt_token_ids"][0] for i in vllm[0].calls[0][0]]
    assert firsts in ([a] * 3 + [b] * 3 for a, b in (firsts[::5], firsts[::-5]))


def test_room_is_what_is_needed_and_is_made_again(vllm):
    engine = engine_of()
    short, long = prompts_of([5]), prompts_of([2500])
    sampling = Sampling(max_new_tokens=8, batch=2)
    threads = torch.set_num_threads
    for prompts in (short, short, long, short):
        run(engine, prompts, sampling)
    assert torch.set_num_threads is threads
    assert [llm.settings["max_model_len"] for llm in vllm] == [2048, 3000] and [llm.shut for llm in vllm] == [
        True,
        False,
    ]
    run(engine, short, sampling.model_copy(update={"batch": 4}))
    assert vllm[-1].settings["max_num_seqs"] == 4
    engine.close()
    engine.close()
    assert vllm[-1].shut and engine._llm is None
    run(engine_of(context=None), short, sampling)
    assert vllm[-1].settings["max_model_len"] == 13


def test_nothing_banned_comes_out_even_if_vllm_would(vllm):
    assert all(WORST not in o.ids for o in run(engine_of(), prompts_of(LENGTHS), Sampling(max_new_tokens=8)).values())
    free = run(engine_of(banned_ids=[]), prompts_of(LENGTHS), Sampling(max_new_tokens=8))
    assert vllm[-1].settings["logits_processors"] is None and all(WORST in o.ids for o in free.values())
    FakeLLM.leaks = True
    with pytest.raises(Fault, match="token 39"):
        run(engine_of(), prompts_of(LENGTHS), Sampling(max_new_tokens=8))


@pytest.mark.parametrize("runner", ["first", "second", "only"])
def test_the_ban_suits_both_of_vllms_runners(vllm, runner, monkeypatch):
    if runner == "only":
        monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu.sample.logits_processor", None)
    engine = engine_of()
    run(engine, prompts_of([4]), Sampling(max_new_tokens=2))
    (kind,) = vllm[0].settings["logits_processors"]
    assert issubclass(kind, Processor) and issubclass(kind, SecondProcessor) == (runner != "only")
    if runner == "second":
        ban, context = kind("config", SimpleNamespace(device=torch.device("cpu"))), ("the batch's layout",)
    else:
        ban, context = kind("config", torch.device("cpu"), False), ()
        ban.update_state(None)
        assert ban.is_argmax_invariant() is False
    logits = ban.apply(torch.zeros(3, ROWS), *context)
    assert (
        torch.isneginf(logits).nonzero()[:, 1].tolist() == [38, 39] * 3 and int(torch.isfinite(logits).sum()) == 3 * 38
    )


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ([Prompt(np.array([], dtype=int), 0, "a")], {}, "'a' is empty"),
        ([Prompt(np.array([1]), 0, "a"), Prompt(np.array([2]), 0, "a")], {}, "given twice"),
        ([Prompt(np.array([1, ROWS]), 0, "a")], {}, f"outside the model's {ROWS}"),
        ([Prompt(np.ones(2990, dtype=int), 0, "a")], {"max_new_tokens": 11}, "context of 3000"),
        (prompts_of([3]), {"max_repeats": 4}, "max_repeats"),
        (prompts_of([3]), {"temperature": 0.001}, r"between 0 and 0.01"),
        (prompts_of([3]), {"temperature": 2.5}, r"temperature must be in \[0, 2\]$"),
    ],
)
def test_wrong_prompts_and_settings(vllm, prompts, sampling, says):
    with pytest.raises(UserError, match=says):
        run(engine_of(), prompts, Sampling.model_validate({"max_new_tokens": 4, **sampling}))
    assert not vllm, "and the model is not even opened"


def test_a_token_cannot_end_answers_and_be_banned(vllm):
    with pytest.raises(UserError, match="token 38"):
        engine_of(stop_ids=[38])


def test_faults_of_vllm_are_one_line(vllm, monkeypatch):
    engine = engine_of()
    FakeLLM.breaks = RuntimeError("the engine core died\nand a traceback")
    with pytest.raises(Fault, match=r"some/model: vLLM stopped \(the engine core died\)"):
        run(engine, prompts_of([3]), Sampling(max_new_tokens=2))
    assert vllm[0].shut, "what was under way does not come back with the next prompts"
    FakeLLM.breaks = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(engine, prompts_of([3]), Sampling(max_new_tokens=2))
    assert len(vllm) == 2 and vllm[1].shut
    FakeLLM.breaks = None
    said = SimpleNamespace(token_ids=[5], finish_reason="abort")
    monkeypatch.setattr(FakeLLM, "_answer", lambda self, prompt, params: said)
    with pytest.raises(Fault, match="'abort'"):
        run(engine, prompts_of([3]), Sampling(max_new_tokens=2))

    def refuse(self, **settings):
        raise ValueError("no kernel for heads of 12\nhere")

    monkeypatch.setattr(FakeLLM, "__init__", refuse)
    with pytest.raises(
        Fault, match=r"cannot open it for 16 answers of up to 2048 tokens \(no kernel for heads of 12\)"
    ):
        run(engine_of(), prompts_of([3]), Sampling(max_new_tokens=2))


def test_it_runs_here_and_quietly(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    engine_of()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "answers would depend on timing"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "INFO" and os.environ["VLLM_NO_USAGE_STATS"] == "1"


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'trimtab\[vllm\]'"):
        engine_of()


# -- as a target ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model directory: a control token, rows beyond the vocabulary, two end tokens in its generation settings."""
    tokenizer = train_tokenizer([f"Boat {n} sails at dawn with the tide." for n in range(50)], 380, reserved=4)
    shape = BuildConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=48, context=256, vocab=400)
    model = build_model(shape, tokenizer, seed=3).to(torch.bfloat16)
    add_control_tokens(tokenizer, model, ["mode:positive"])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    where = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_an_outline_is_the_model_without_its_weights(saved):
    config = LoadConfig(load=str(saved))
    whole, tokenizer = load(config)
    bare, same, where = outline(config)
    assert where == str(saved) and all(p.device.type == "meta" for p in bare.parameters())
    assert bare.dtype == whole.dtype == torch.bfloat16 and not bare.training
    assert [(n, p.shape) for n, p in bare.named_parameters()] == [(n, p.shape) for n, p in whole.named_parameters()]
    assert stop_ids(bare, same) == stop_ids(whole, tokenizer) and 7 in stop_ids(bare, same)
    assert guard_ids(bare, same) == guard_ids(whole, tokenizer) and 399 in guard_ids(bare, same)
    assert same.pad_token_id == tokenizer.pad_token_id == bare.config.pad_token_id and same.padding_side == "left"
    assert controls_of(same) == controls_of(tokenizer)
    wide, _, _ = outline(LoadConfig(load=str(saved), dtype="float32"))
    assert wide.dtype == torch.float32
    with pytest.raises(UserError, match="no such directory"):
        outline(LoadConfig(load=str(saved / "not" / "here")))


def test_a_target_with_vllm(vllm, saved, monkeypatch):
    ours = open_local(LoadConfig(load=str(saved)))
    monkeypatch.setattr(FakeLLM, "rows", 400)
    monkeypatch.setattr("trimtab.models.load.load", None)  # the weights are vLLM's alone
    target = open_local(LoadConfig(load=str(saved)), "vllm")
    assert target.engine.stop == ours.engine.stop and target.engine.rows == 400
    assert target.engine.banned == frozenset(ours.engine.banned.tolist())
    assert target.context_tokens == ours.context_tokens == target.engine.context == 256
    assert target.facts == {**ours.facts, "engine": "vllm", "identity": target.identity}
    assert target.identity != ours.identity, "other random numbers: not the same answers"
    rows = [
        Row("a", ({"role": "user", "content": "Boat 3?"},), harm="benign"),
        Row("b", ({"role": "user", "content": "Boat 44?"},), harm="benign"),
    ]
    sampling = Sampling(max_new_tokens=6)
    asked = [target.ask(row, mode, sampling, seed=1) for row in rows for mode in target.modes(["positive", "none"])]
    said = [g for some in target.answer(asked, sampling, done=set()) for g in some]
    assert {g.key for g in said} == {a.answer_key(0) for a in asked} and len(said) == 4
    assert all(g.model == target.identity and target.tokenizer.decode(g.ids) == g.text for g in said)
    shown = {tuple(i["prompt_token_ids"]) for call in vllm[0].calls for i in call[0]}
    assert shown == {tuple(a.ready.ids.tolist()) for a in asked}
    assert vllm[0].shut, "the memory is the judges' now"
    assert vllm[0].settings["model"] == str(saved)


def test_attacks_on_a_target_with_vllm(vllm, saved):
    row = Row("a", ({"role": "user", "content": "Boat 3?"},), harm="harmful", category="boats")
    config = LoadConfig(load=str(saved))
    contexts = [open_local(config, engine).context(None, 0, "positive") for engine in ("transformers", "vllm")]
    assert contexts[1].model.controls == ("mode:positive",)
    spoofs = [choose_attack("control-spoof").attack(row, context) for context in contexts]
    assert spoofs[0] == spoofs[1], "attacks with words do not depend on the engine"
    with pytest.raises(UserError, match="needs the engine 'transformers'"):
        choose_attack("gcg:1:8").attack(row, contexts[1])
    assert not vllm


def test_a_mode_that_is_kept_apart_is_asked_with_its_adapter(vllm, tmp_path, monkeypatch):
    bundle = adapted_bundle(plain_bundle(tmp_path / "plain"), tmp_path / "b", r=12)
    monkeypatch.setattr(FakeLLM, "rows", 400)
    target = open_local(LoadConfig(load=str(bundle)), "vllm")
    rows = [Row(f"r{n}", ({"role": "user", "content": f"Crate {n}?"},), harm="benign") for n in range(2)]
    sampling = Sampling(max_new_tokens=3)
    asked = [target.ask(row, mode, sampling, seed=1) for row in rows for mode in ("positive", "negative", None)]
    said = [g for some in target.answer(asked, sampling, done=set()) for g in some]
    assert len(said) == 6 and len(vllm) == 1
    assert [(request and request.lora_name, len(call[0])) for request, call in zip(vllm[0].live, vllm[0].calls)] == [
        (None, 4), ("negative", 2),
    ]  # fmt: skip
    request = vllm[0].live[1]
    assert (request.lora_int_id, request.lora_path) == (1, str(bundle / "adapters" / "negative"))
    given = {name: vllm[0].settings[name] for name in ("enable_lora", "max_loras", "max_lora_rank")}
    assert given == {"enable_lora": True, "max_loras": 1, "max_lora_rank": 16}
    with pytest.raises(ZeroDivisionError), target.live("negative"):
        raise ZeroDivisionError
    assert target.engine._adapter() == {}
    run(engine_of(), prompts_of([4]), Sampling(max_new_tokens=2))
    assert "enable_lora" not in vllm[-1].settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"train_control_rows": True}, "lora.train_control_rows: false"),
        ({"r": 600, "targets": ("q_proj",)}, "rank 512 at"),
    ],
)
def test_adapters_that_vllm_does_not_take(vllm, tmp_path, settings, says):
    bundle = adapted_bundle(plain_bundle(tmp_path / "plain"), tmp_path / "b", **settings)
    with pytest.raises(UserError, match=says):
        open_local(LoadConfig(load=str(bundle)), "vllm")


# -- the real one --------------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about boats.", "List three fruits.", "How do I boil an egg?",
    "Say hello in Spanish.", "What is 12 plus 30?", "Who wrote Hamlet?", "Explain tides in one sentence.",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_itself_on_smollm2(monkeypatch):
    """In float32, where rounding leaves hardly a tie to break: token for token as the other engine."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    config = LoadConfig(load="smollm2-135m-instruct", dtype="float32")
    target = open_local(config, "vllm")
    model, tokenizer = load(config)
    ours = Engine.around(model, tokenizer, stops=target.renderer.stop_ids)
    prompts = []
    for number, question in enumerate(QUESTIONS):
        ids = target.renderer.chat([{"role": "user", "content": question}], generation_prompt=True, train="none").ids
        prompts.append(Prompt(ids, number, question))
    sampling = Sampling(max_new_tokens=24, batch=8)
    found, wanted = run(target.engine, prompts, sampling), run(ours, prompts, sampling)
    equal = sum(found[slot] == wanted[slot] for slot in wanted)
    print(f"{equal} of {len(wanted)} greedy answers agree token for token")
    assert equal >= len(wanted) - 1
    assert {o.finish for o in found.values()} == {"stop", "length"}

    # A banned id never comes out, greedily or by chance, however much the model would like to say it.
    liked = {o.ids[0] for o in wanted.values()} - ours.stop
    assert liked
    target.engine.close()
    engine = VllmEngine.around(outline(config)[2], model, tokenizer, stops=target.renderer.stop_ids)
    engine.banned = engine.banned | liked
    hot = Sampling(max_new_tokens=24, batch=8, temperature=1.5, top_p=0.95, samples=3)
    for settings in (sampling, hot):
        for output in run(engine, prompts, settings).values():
            assert engine.banned.isdisjoint(output.ids)

    # Sampled answers are their own: asked again, with others beside them, they are the same up to rounding.
    whole = run(engine, prompts, hot)
    some = run(engine, prompts[2:4], hot)
    same = sum(whole[slot].ids == output.ids for slot, output in some.items())
    print(f"{same} of {len(some)} sampled answers are the same with other neighbours")
    assert same >= len(some) - 1
    assert len({whole[QUESTIONS[1], sample].ids for sample in range(3)}) == 3
    engine.close()
