"""SafeBeam: the batched search equals a plain slow one, token for token; what it costs, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from trimtab.errors import Fault, UserError
from trimtab.generate import safebeam
from trimtab.generate.config import SHORT_CIRCUIT, SafeBeam, Sampling
from trimtab.generate.engine import Engine, tag_of
from trimtab.generate.schedule import Prompt
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.config import HARM_TAG, BuildConfig

torch.set_num_threads(1)
VOCAB, TAG = 400, 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"Boat {n} sails at dawn with the tide." for n in range(50)], 380, reserved=4)


def model_of(tokenizer, seed=11, std=0.25, **changes):
    shape = {"hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64, "context": 256, "vocab": VOCAB}
    return build_model(BuildConfig(**(shape | {"init_std": std} | changes)), tokenizer, seed=seed)


@pytest.fixture(scope="module")
def model(tokenizer):
    return model_of(tokenizer)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Prompt(rng.integers(20, 380, size=n), seed=i, key=f"p{i}") for i, n in enumerate(lengths)]


def run(engine, prompts, sampling, **kwargs):
    found = {}
    for batch in engine.generate(prompts, sampling, **kwargs):
        for output in batch:
            assert output.key not in found and output.sample == 0
            found[output.key] = output
    return found


def search(beams, candidates, tokens=12, batch=16, **more):
    asked = SafeBeam(beams=beams, candidates=candidates, **more)
    return Sampling(max_new_tokens=tokens, batch=batch, safebeam=asked)


# -- the plain slow search ---------------------------------------------------------------------------------------------


@dataclass
class Text:
    ids: list[int]
    logp: float
    risk: float
    ended: bool = False


@dataclass
class Told:
    """What the slow search saw on its way."""

    looked: int = 0
    margins: list[float] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    ended: int = 0


@torch.no_grad()
def next_logp(model, ids):
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), dim=-1)


def slow(model, prompt, sampling, stop=(), banned=(), tag=TAG):
    """Algorithm 1 as it is written: whole texts, no cache, a pass for every candidate."""
    k, n, limit = sampling.safebeam.beams, sampling.safebeam.candidates, sampling.safebeam.short_circuit
    start, told = prompt.ids.tolist(), Told()
    beams = [Text([], 0.0, float(next_logp(model, start)[tag].exp()))]
    for _ in range(sampling.max_new_tokens):
        pool = []
        for beam in (b for b in beams if not b.ended):
            logp = next_logp(model, start + beam.ids)
            allowed = [t for t in logp.argsort(descending=True, stable=True).tolist() if t != tag and t not in banned]
            told.margins.append(float(logp[allowed[n - 1]] - logp[allowed[n]]) if n < len(allowed) else 1.0)
            for token in allowed[:n]:
                told.looked += 1
                if token in stop:
                    pool.append(Text(beam.ids, beam.logp + float(logp[token]), beam.risk, True))
                    continue
                ids = [*beam.ids, token]
                risk = float(next_logp(model, start + ids)[tag].exp())
                pool.append(Text(ids, beam.logp + float(logp[token]), risk))
        ended = [b for b in beams if b.ended]
        if limit is not None and min(b.risk for b in pool + ended) >= limit:
            return (), SHORT_CIRCUIT, told
        floor = sampling.safebeam.floor
        pool.sort(key=lambda text: (max(text.risk, floor), -text.logp))
        keep = len(pool) - len(pool) // 2
        told.dropped.append((len(pool), len(pool) - keep))
        rest = sorted(ended + pool[:keep], key=lambda text: -text.logp)
        told.margins += [
            # Equal risks: two ends of one text, or both below the floor.
            b.risk / max(a.risk, 1e-30) - 1 if a.risk != b.risk and b.risk > floor else a.logp - b.logp
            for a, b in zip(pool[keep - 1 : keep], pool[keep:])
        ]
        told.margins += [a.logp - b.logp for a, b in zip(rest[k - 1 : k], rest[k:])]
        beams = rest[:k]
        told.ended += sum(b.ended for b in beams)
        if beams[0].ended:
            return tuple(beams[0].ids), "stop", told
    return tuple(beams[0].ids), "length", told


def agree(model, prompts, sampling, stop=(), banned=()):
    """Both searches find the same; returns what the slow one saw."""
    engine = Engine(model, stop_ids=stop, banned_ids=banned, tag_id=TAG)
    found = run(engine, prompts, sampling)
    seen = []
    for prompt in prompts:
        ids, finish, told = slow(model, prompt, sampling, stop, banned)
        assert min(told.margins, default=1.0) > 1e-5, "a tie would make this test say nothing; take another seed"
        assert (found[prompt.key].ids, found[prompt.key].finish) == (ids, finish), prompt.key
        seen.append(told)
    cost = engine.cost
    assert cost.tokens == sum(told.looked for told in seen)
    assert cost.steps == sum(len(told.dropped) for told in seen) + sum(
        o.finish == SHORT_CIRCUIT for o in found.values()
    )
    assert cost.tokens <= sampling.safebeam.beams * sampling.safebeam.candidates * cost.steps
    return seen, found


LENGTHS = [3, 17, 1, 40, 9]


@pytest.mark.parametrize(
    ("beams", "candidates", "seed"), [(1, 2, 1), (1, 5, 2), (2, 3, 3), (3, 3, 4), (4, 8, 5), (5, 7, 6), (3, 2, 7)]
)
def test_it_equals_the_plain_search(tokenizer, beams, candidates, seed):
    seen, found = agree(model_of(tokenizer, seed), prompts_of(LENGTHS, seed), search(beams, candidates))
    assert {o.finish for o in found.values()} == {"length"} and {len(o.ids) for o in found.values()} == {12}
    if beams * candidates % 2:
        assert (beams * candidates, beams * candidates // 2) in {pair for told in seen for pair in told.dropped}
    assert {told.dropped[0][0] for told in seen} == {candidates}, "the first step has one beam"


def test_texts_that_end_compete_by_their_likelihood(tokenizer):
    """With ends about, beams end at different steps, searches stop early, and some ended texts are overtaken."""
    finishes, ended = set(), 0
    for seed in range(4):
        stop = set(np.random.default_rng(seed).integers(20, 380, size=25).tolist())
        seen, found = agree(
            model_of(tokenizer, seed), prompts_of([2, 11, 30, 7], seed), search(3, 5, 12), stop, banned={4, 5}
        )
        finishes |= {output.finish for output in found.values()}
        ended += sum(told.ended for told in seen)
        assert not any(set(output.ids) & stop for output in found.values())
    assert finishes == {"stop", "length"} and ended > 10


def test_long_searches_set_their_slots_anew(tokenizer, monkeypatch):
    monkeypatch.setattr(safebeam, "_ROOM", 4)  # the slots fill every step or two
    agree(model_of(tokenizer, 9), prompts_of([5, 21], 9), search(3, 4, 24))


def test_full_precision_and_tied_choices_are_deterministic(model):
    sampling = search(4, 8, 30)
    prompts = prompts_of(LENGTHS)
    engine = Engine(model, stop_ids=[2], tag_id=TAG)
    assert run(engine, prompts, sampling) == run(engine, prompts, sampling)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.integers(2, 6))
def test_answers_do_not_depend_on_the_batch(model, seed, batch, beams, candidates):
    rng = np.random.default_rng(seed)
    prompts = prompts_of(rng.integers(1, 30, size=7), seed)
    stop = rng.integers(20, 380, size=30).tolist()
    engine = Engine(model, stop_ids=stop, tag_id=TAG)
    whole = run(engine, prompts, search(beams, candidates, 10, 7))
    assert run(engine, prompts, search(beams, candidates, 10, batch)) == whole
    assert run(engine, prompts[3:4], search(beams, candidates, 10))["p3"].ids == whole["p3"].ids


def test_prompts_that_share_their_start_are_found_alike(model):
    rng = np.random.default_rng(5)
    head = rng.integers(20, 380, size=40)
    prompts = [Prompt(np.concatenate([head, rng.integers(20, 380, size=n)]), n, f"p{n}") for n in (1, 3, 9)]
    agree(model, prompts, search(2, 4, 8))


def test_banned_ids_and_the_tag_are_never_chosen(tokenizer, model):
    prompts, sampling = prompts_of(LENGTHS), search(4, 6, 20)
    free = run(Engine(model, stop_ids=[], tag_id=TAG), prompts, sampling)
    common = {token for output in free.values() for token in output.ids}
    _, found = agree(model, prompts[:2], search(4, 6, 10), banned=common)
    assert not any(common & set(output.ids) for output in found.values())
    likely = int(free["p0"].ids[0])  # as the tag, it is read but not chosen
    tagged = run(Engine(model, stop_ids=[], tag_id=likely), prompts, sampling)
    assert all(likely not in output.ids for output in tagged.values())


def test_fewer_tokens_than_candidates(model):
    """With three tokens left that may be chosen, three are tried, whatever N is."""
    left = {30, 77, 200}
    prompts = prompts_of([4])
    engine = Engine(model, stop_ids=[], banned_ids=set(range(VOCAB)) - left, tag_id=TAG)
    ids = run(engine, prompts, search(2, 8, 6))["p0"].ids
    assert len(ids) == 6 and set(ids) <= left
    nothing = Engine(model, stop_ids=[], banned_ids=range(VOCAB), tag_id=TAG)
    with pytest.raises(Fault, match="probability of 0"):
        run(nothing, prompts, search(2, 8, 6))


def test_it_moves_away_from_the_tag(model):
    """The risk along its texts is lower than along greedy ones."""
    prompts = prompts_of([5, 9, 14, 20, 6, 31])
    tag = 150
    engine = Engine(model, stop_ids=[], banned_ids=[tag], tag_id=tag)

    def risk(sampling):
        found = run(engine, prompts, sampling)
        texts = [[*p.ids.tolist(), *found[p.key].ids] for p in prompts]
        return float(np.mean([next_logp(model, t[: len(t) - i])[tag].exp().item() for t in texts for i in range(15)]))

    assert risk(search(4, 8, 15)) < 0.5 * risk(Sampling(max_new_tokens=15))


def test_below_the_floor_likelihood_decides(tokenizer):
    for floor in (3e-4, 2e-3):
        agree(model_of(tokenizer, 2), prompts_of(LENGTHS, 2), search(3, 4, 10, floor=floor), [50, 60, 70])
    model, prompts = model_of(tokenizer, 2), prompts_of(LENGTHS, 2)
    engine = Engine(model, stop_ids=[], tag_id=TAG)
    greedy = run(engine, prompts, Sampling(max_new_tokens=10))
    assert run(engine, prompts, search(1, 4, 10, floor=0.999)) == greedy
    assert run(engine, prompts, search(1, 4, 10)) != greedy


# -- cutting short -----------------------------------------------------------------------------------------------------


def test_an_answer_is_withheld_once_every_way_on_is_risky(tokenizer):
    finishes = []
    for limit in (1e-5, 2e-4, 6e-4, 0.9):
        for seed in range(2):
            stop = np.random.default_rng(seed).integers(20, 380, size=20).tolist()
            _, found = agree(
                model_of(tokenizer, seed), prompts_of([2, 11, 30], seed), search(2, 4, 10, short_circuit=limit), stop
            )
            finishes.append([output.finish for output in found.values()])
            assert all(output.ids == () for output in found.values() if output.finish == SHORT_CIRCUIT)
    told = [sum(finish == SHORT_CIRCUIT for finish in some) for some in finishes]
    assert told[-1] == 0 and sum(told) > 2, told


# -- resuming and progress ---------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(model, monkeypatch):
    monkeypatch.setattr("trimtab.generate.schedule.WAVE", 2)
    prompts, sampling = prompts_of([3, 9, 4, 20, 8, 2, 6]), search(2, 4, 6, 2)
    engine = Engine(model, stop_ids=[], tag_id=TAG)
    events = []
    whole = [o for some in engine.generate(prompts, sampling, progress=lambda *e: events.append(e)) for o in some]
    assert len(whole) == 7 and events[-1] == (7, 7, 42)
    for kept in (3, 4, 6):
        done = {(output.key, 0) for output in whole[:kept]}
        assert [o for some in engine.generate(prompts, sampling, done=done) for o in some] == whole[kept:]
    before = engine.cost.passes
    assert not run(engine, prompts, sampling, done={(output.key, 0) for output in whole})
    assert engine.cost.passes == before


# -- other models ------------------------------------------------------------------------------------------------------


def test_models_with_learned_positions_search_too(tokenizer):
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.4)
    agree(GPT2LMHeadModel(shape).eval(), prompts_of([3, 12, 7]), search(3, 4, 8))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_either_attention_searches(tokenizer, kind):
    built = model_of(tokenizer, 4)
    built.set_attn_implementation(kind)
    agree(built, prompts_of([3, 12, 7]), search(3, 4, 8))


def test_half_precision_runs(tokenizer):
    half = model_of(tokenizer, 4).to(torch.bfloat16)
    engine = Engine(half, stop_ids=[], tag_id=TAG)
    found = run(engine, prompts_of(LENGTHS), search(4, 8, 20))
    assert all(len(output.ids) == 20 for output in found.values()) and engine.cost.passes <= 2 * 20


def test_models_that_do_not_take_siblings_are_refused():
    torch.manual_seed(0)
    window = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    counted = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.4)
    for made in (Gemma3ForCausalLM(window), BloomForCausalLM(counted)):
        engine = Engine(made.eval(), stop_ids=[], tag_id=TAG)
        with pytest.raises(UserError, match=r"ForCausalLM: SafeBeam needs a model with plain full attention"):
            run(engine, prompts_of([4]), search(2, 4))
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)).eval()
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="attention 'sdpa' or 'eager', not 'flash_attention_2'"):
        run(Engine(other, stop_ids=[], tag_id=TAG), prompts_of([4]), search(2, 4))


def test_a_model_that_knows_no_tag_is_refused(tokenizer, model):
    assert tag_of(tokenizer) == TAG == tokenizer.convert_tokens_to_ids(HARM_TAG)
    assert Engine.around(model, tokenizer).tag == TAG
    with pytest.raises(UserError, match=r"trained with the harmfulness tag.*<\|potentially_unsafe\|>"):
        run(Engine(model, stop_ids=[]), prompts_of([4]), search(2, 4))


def test_the_papers_own_name_of_the_tag_is_known():
    from tokenizers import AddedToken

    other = train_tokenizer([f"Boat {n} sails." for n in range(50)], 300, reserved=0)
    other._tokenizer.add_special_tokens([AddedToken("<potentially_unsafe_content>", special=True)])
    assert tag_of(other) == 3, "ours comes first"
    names = dict(other.added_tokens_decoder)
    del names[3]
    stand_in = type("T", (), {"added_tokens_decoder": names})
    assert tag_of(stand_in) == other.convert_tokens_to_ids("<potentially_unsafe_content>")


def test_broken_weights_are_a_fault(tokenizer):
    broken = model_of(tokenizer, 4)
    engine = Engine(broken, stop_ids=[], tag_id=TAG)
    run(engine, prompts_of([4]), search(2, 4, 2))
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(Fault, match="not finite"):
        run(engine, prompts_of([4]), search(2, 4, 2))


def test_what_cannot_be_asked_together_is_refused():
    for more in ({"temperature": 0.5}, {"samples": 2, "temperature": 1.0}, {"max_repeats": 3}):
        with pytest.raises(ValidationError, match="search"):
            Sampling(safebeam=SafeBeam(), **more)
    with pytest.raises(ValidationError, match="temperature > 0"):
        Sampling(safebeam=SafeBeam(), top_k=4)
    for wrong in ({"beams": 0}, {"candidates": 1}, {"short_circuit": 1.0}, {"short_circuit": 0.0}, {"floor": 1.0}):
        with pytest.raises(ValidationError):
            SafeBeam(**wrong)
