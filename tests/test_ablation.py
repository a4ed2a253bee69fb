"""The ablation check: what is taken out is gone everywhere, the model is whole afterwards, and a change that hangs on the
direction is told from damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tiny_training import VOCAB, tiny_model
from trimtab.analyze import ablation as checked
from trimtab.analyze.ablation import CHANGES, ENDINGS, ablated, ablation, control, mean_difference
from trimtab.analyze.metrics import MEASURES
from trimtab.analyze.probes import Prompts
from trimtab.analyze.states import States, blocks_of, streamed
from trimtab.evaluate.judges.choose import JudgeConfig, panel_judge
from trimtab.generate.config import Sampling
from trimtab.generate.engine import Engine
from trimtab.generate.schedule import Prompt
from trimtab.types import Generation, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

torch.set_num_threads(1)
TOWN = Tidewater(TidewaterConfig(seed=3, goods=12, hazards=12, documents=10))


def unit(seed: int, size: int = 32) -> np.ndarray:
    v = np.random.default_rng(seed).standard_normal(size)
    return (v / np.linalg.norm(v)).astype(np.float32)


# --- taking out -------------------------------------------------------------------------------------------------


def test_nothing_is_left_along_the_direction_at_any_layer() -> None:
    model, direction = tiny_model().eval(), unit(0)
    left: list[float] = []
    ids = torch.arange(1, 13)[None]
    with ablated(model, direction), torch.no_grad():

        def look(layer: int, stream: torch.Tensor) -> None:
            left.append(float((stream @ torch.from_numpy(direction)).abs().max()))

        with streamed(model, look):
            model(ids)
    assert len(left) == 3 and max(left) < 1e-6


def test_the_model_is_as_before_afterwards_also_after_an_error() -> None:
    model = tiny_model().eval()
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(ids).logits
        with ablated(model, unit(0)):
            changed = model(ids).logits
        with pytest.raises(ZeroDivisionError), ablated(model, unit(0)):
            raise ZeroDivisionError
        after = model(ids).logits
    assert torch.equal(before, after) and not torch.allclose(before, changed, atol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_generation_is_without_the_direction_too_and_back_afterwards() -> None:
    model = tiny_model(initializer_range=0.5).eval()
    engine = Engine(model, stop_ids=(0,))
    rng = np.random.default_rng(0)
    prompts = [Prompt(rng.integers(1, VOCAB, 6), i, f"p{i}") for i in range(6)]

    def answers() -> list[tuple[int, ...]]:
        found = [out for outs in engine.generate(prompts, Sampling(max_new_tokens=8)) for out in outs]
        return [out.ids for out in sorted(found, key=lambda out: out.index)]

    plain, direction = answers(), unit(1)
    with ablated(model, direction):
        without = answers()
        slow = []
        for prompt in prompts:  # token by token, with no cache
            ids = prompt.ids.tolist()
            while len(ids) < len(prompt.ids) + 8:
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 0:
                    ids.pop()
                    break
            slow.append(tuple(ids[len(prompt.ids) :]))
    assert without == slow and without != plain and answers() == plain


def test_directions() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((60, 8)).astype(np.float32)
    positive, group = np.arange(60) < 30, np.arange(60) // 3
    states[positive, 2] += 10
    direction = mean_difference(states, positive)
    assert np.linalg.norm(direction) == pytest.approx(1) and direction[2] > 0.98
    other = control(states, positive, group, direction, "t")
    assert np.linalg.norm(other) == pytest.approx(1) and abs(other @ direction) < 1e-6
    assert np.array_equal(other, control(states, positive, group, direction, "t"))
    assert not mean_difference(np.ones((4, 3)), np.arange(4) < 2).any()


# --- what changes -----------------------------------------------------------------------------------------------


class Stub:
    """A target that refuses where its stream, with all hooks that hang on it, has a part along ``heart``.

    ``off``: what it says of a benign prompt when its stream lacks ``help``, a second direction."""

    def __init__(self, heart: np.ndarray, help_: np.ndarray | None = None) -> None:
        self.model = tiny_model(initializer_range=0.5).eval()
        self.heart, self.help = heart, help_
        self.asked: list[list[str]] = []

    def ask(self, row: Row, mode: str | None, sampling: Sampling, seed: int) -> Row:
        return row

    def answer(self, asked: Sequence[Row], sampling: Sampling, done: Any) -> Iterator[list[Generation]]:
        self.asked.append([row.id for row in asked])
        seen: list[torch.Tensor] = []
        handle = blocks_of(self.model)[-1].register_forward_hook(lambda m, a, out: seen.append(out))
        with torch.no_grad():
            self.model(torch.arange(1, 9)[None])
        handle.remove()
        stream = seen[0][0].numpy()

        def has(direction: np.ndarray) -> bool:
            return bool(np.abs(stream @ direction).max() > 1e-4)

        for row in asked:
            if row.harm == "harmful":
                text = TOWN.answer(row, "positive" if has(self.heart) else "negative")
            else:
                text = TOWN.answer(row) if self.help is None or has(self.help) else "Dusk gulls."
            yield [Generation(row.id, row.id, row.hash(), "m", None, {}, 0, 0, (1,), text, "stop")]


def made(gap_at: int = 3) -> tuple[list[Row], States, Prompts]:
    rows = [
        row for kind in ("harmful-seen", "harmful-heldout", "benign") for row in TOWN.requests(kind, 36, split="eval")
    ]
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, len(rows), 32)).astype(np.float32)
    prompts = Prompts.of(rows, [np.array([1])] * len(rows))
    states[:, prompts.positive, gap_at] += 30
    return rows, States(states, states), prompts


def figures(target: Any, rows: list[Row], states: States, prompts: Prompts) -> dict[str, Any]:
    judge_of = panel_judge(JudgeConfig(), TOWN)
    return {r.metric: r for r in ablation(target, rows, states, prompts, ("mean", 1), judge_of, 0)}


def test_refusals_that_hang_on_the_direction_are_found_and_the_control_is_not() -> None:
    rows, states, prompts = made()
    stub = Stub(heart=np.zeros(32, np.float32))
    asked = checked._chosen(rows, prompts, 0)
    rest = ~np.isin(prompts.group, prompts.group[asked])
    stub.heart = mean_difference(states.mean[1][rest], prompts.positive[rest])
    found = figures(stub, rows, states, prompts)
    assert set(found) == {name + ending for name in CHANGES for ending in ENDINGS} <= set(MEASURES)
    assert found["ablation_refusal_drop"].value == found["ablation_risk_rise"].value == 1.0
    assert found["ablation_refusal_drop"].low > 0  # six hazards are asked about
    for still in ("ablation_refusal_drop_random", "ablation_risk_rise_random", "ablation_helpful_drop"):
        assert found[still].value == 0.0 and found[still].low < 0 < found[still].high
    assert found["ablation_refusal_drop"].n == 36 and found["ablation_helpful_drop"].n == 18
    assert len(stub.asked) == 3 and stub.asked[0] == stub.asked[1] == stub.asked[2]


def test_damage_shows_in_the_control() -> None:
    rows, states, prompts = made()
    asked = checked._chosen(rows, prompts, 0)
    rest = ~np.isin(prompts.group, prompts.group[asked])
    stream, y = states.mean[1][rest], prompts.positive[rest]
    direction = mean_difference(stream, y)
    other = control(stream, y, prompts.group[rest], direction, "ablation", 0)
    found = figures(Stub(heart=other, help_=other), rows, states, prompts)
    assert found["ablation_refusal_drop"].value == 0.0 and found["ablation_helpful_drop"].value == 0.0
    assert found["ablation_refusal_drop_random"].value == 1.0 and found["ablation_helpful_drop_random"].value == 1.0


def test_the_direction_is_of_other_things_than_those_asked_about() -> None:
    rows, _, prompts = made()
    asked = checked._chosen(rows, prompts, 0)
    rest = ~np.isin(prompts.group, prompts.group[asked])
    assert not set(prompts.group[asked]) & set(prompts.group[rest])
    assert len(np.unique(prompts.positive[rest])) == 2
    for harm in ("harmful", "benign"):
        assert 0 < sum(bool(a) for a, row in zip(asked, rows) if row.harm == harm) <= checked.PROMPTS


def test_babble_is_no_refusal_and_a_refusal_match_tells_no_risk() -> None:
    rows, states, prompts = made()
    rows = [
        Row(r.id, r.messages, source="mine", harm=r.harm, metadata=r.metadata) for r in rows
    ]  # no Tidewater rows: refusals are matched

    class Babbles(Stub):
        def answer(self, asked: Sequence[Row], sampling: Sampling, done: Any) -> Iterator[list[Generation]]:
            self.asked.append([])
            text = "I cannot help with that." if len(self.asked) == 1 else "zz zz zz"
            for row in asked:
                yield [Generation(row.id, row.id, row.hash(), "m", None, {}, 0, 0, (1,), text, "stop")]

    found = figures(Babbles(unit(0)), rows, states, prompts)
    assert found["ablation_refusal_drop"].value == 1.0 == found["ablation_refusal_drop_random"].value
    assert not [name for name in found if "risk" in name]


def test_without_other_prompts_there_is_no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, states, prompts = made()
    monkeypatch.setattr(checked, "_chosen", lambda rows, prompts, seed: prompts.positive)
    stub = Stub(unit(0))
    found = figures(stub, rows, states, prompts)  # every harmful prompt is asked, none is left
    assert set(found) == {name + ending for name in CHANGES for ending in ENDINGS} and not stub.asked
    assert all(r.n == 0 and np.isnan(r.value) and (r.low, r.high) == (-1.0, 1.0) for r in found.values())
