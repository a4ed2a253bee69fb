"""Step ``dpo``: pairs from Tidewater, from sets of preferences, or from rows of two modes; a bundle tuned on them by TRL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.artifact import Artifact
from trimtab.data.render import Renderer
from trimtab.errors import UserError
from trimtab.levers.modes import MODES, PROMPT, Switch
from trimtab.machine import peak_memory
from trimtab.models.load import load
from trimtab.models.tokens import controls_of, merge_adapter
from trimtab.recipe.stages import ChatSource
from trimtab.seeds import canonical
from trimtab.study.execute import Context
from trimtab.study.steps.chat import part_rows
from trimtab.study.steps.common import (
    check_length,
    check_unchanged,
    cost_of,
    save_tuned,
    start_model,
    start_switch,
)
from trimtab.train.config import TrainConfig
from trimtab.train.lora import attach
from trimtab.types import Message, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt. ``prompt``: a row without an answer; its policy's token is shown, no mode's ever is."""

    prompt: Row
    chosen: str
    rejected: str


def run_dpo(context: Context) -> None:
    """Train on the pairs; leaves the bundle in ``model/``, and the log. A killed step starts anew."""
    from trimtab.train.dpo import PairIds, train_dpo

    check_unchanged(context)
    config = context.step.config
    settings = TrainConfig.model_validate(config["train"])
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    pairs, counts = build_pairs(config["data"], town, context.inputs)
    model, tokenizer = load(start_model(context))
    check_length(context, model, config["length"])
    controls, switch = controls_of(tokenizer), start_switch(context)
    renderer = Renderer(tokenizer, controls=controls)
    rendered = [PairIds.of(*conversations(renderer, switch, pair)) for pair in pairs]
    fitting = [pair for pair in rendered if len(pair) <= config["length"]]
    counts["long"] = len(rendered) - len(fitting)
    if not fitting:
        raise UserError(
            f"stage {context.step.name!r}: no pair is left to train on ({_told(counts)}); look at 'data' and 'length'"
        )
    if settings.lora is not None:
        model = attach(model, settings.lora, seed=config["seed"])
    total = max(1, round(len(fitting) * config["epochs"] / settings.rows_per_step))
    with peak_memory() as peak:
        result = train_dpo(
            model,
            tokenizer,
            fitting,
            settings,
            beta=config["beta"],
            loss=config["loss"],
            total_steps=total,
            seed=config["seed"],
            work=context.work,
            progress=context.progress,
        )
    if settings.lora is not None:
        model = merge_adapter(model)
    save_tuned(context, model, tokenizer, controls)
    draft = context.draft
    draft.tokens = result.tokens
    draft.facts = {
        "shape": context.step.shape,
        "steps": total,
        "pairs": len(fitting),
        "left_out": counts,
        "cost": cost_of(
            context,
            tokens=result.tokens,
            read=result.read,
            trained_tokens=result.trained_tokens,
            steps=total,
            seconds=result.seconds,
            peak=peak,
        ),
    }


def conversations(renderer: Renderer, switch: Switch, pair: Pair) -> Iterator[Any]:
    """The rendered conversation with the chosen, then with the rejected answer."""
    for answer in (pair.chosen, pair.rejected):
        told, controls = switch.tell(pair.prompt.with_answer(answer), None)
        yield renderer.row(told, controls=controls, controls_at=switch.at)


def build_pairs(
    data: Sequence[Mapping[str, Any]], town: Tidewater, distilled: Mapping[str, Artifact]
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of a stage's ``data``, in its order, and how many rows or pairs were left out, by why.

    distilled  input ``distill:STAGE`` -> the artefact of an earlier distill stage

    Counted are ``same`` (pairs of two equal answers), ``unpaired`` (rows of a positive or negative mode without a partner) and
    ``other_modes`` (rows of any other mode). ``UserError`` for rows that are neither pairs nor of a mode.
    """
    pairs: list[Pair] = []
    halves: list[tuple[str, Row]] = []
    counts = Counter(same=0, unpaired=0, other_modes=0)
    for item in data:
        part = ChatSource.model_validate({k: v for k, v in item.items() if k != "content"})
        behaves: Mapping[str, str] = {mode: mode for mode in MODES}
        if part.tidewater is not None:
            pairs += _tidewater(town, part)
            continue
        if part.stage is not None:
            behaves = {**behaves, **distilled[f"distill:{part.stage}"].manifest["config"].get("behaves", {})}
        for row in part_rows(part, town, distilled, field="data"):
            if "chosen" in row.metadata or "rejected" in row.metadata:
                pairs.append(_preference(row))
            elif row.mode is None:
                raise UserError(
                    f"row {row.id!r}: DPO needs the columns 'chosen' and 'rejected', or rows with 'mode: positive' and "
                    "'mode: negative'; it has none of them"
                )
            elif behaves.get(row.mode) in ("positive", "negative"):
                halves.append((behaves[row.mode], row))
            else:
                counts["other_modes"] += 1
    made, counts["unpaired"] = _paired(halves)
    pairs += made
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    counts["same"] = len(pairs) - len(different)
    return different, dict(counts)


def _tidewater(town: Tidewater, part: ChatSource) -> Iterator[Pair]:
    assert part.tidewater is not None and part.n is not None
    requests = town.requests(part.tidewater, part.n, policy=part.policy)
    preferences = town.preferences(part.tidewater, part.n, policy=part.policy)
    for row, pair in zip(requests, preferences, strict=True):
        yield Pair(row, pair["chosen"][0]["content"], pair["rejected"][0]["content"])


def _preference(row: Row) -> Pair:
    """A row of ``prompt``, ``chosen`` and ``rejected``, each a text or a list of messages (which may repeat the prompt)."""
    if row.messages is None or row.messages[-1]["role"] == "assistant":
        raise UserError(f"row {row.id!r}: a preference needs a 'prompt' that ends in what is asked")
    return Pair(row, *(_answer(row, row.messages, column) for column in ("chosen", "rejected")))


def _answer(row: Row, prompt: Sequence[Message], column: str) -> str:
    given = row.metadata.get(column)
    if isinstance(given, str):
        return given
    messages = [dict(m) for m in given if isinstance(m, Mapping)] if isinstance(given, list) else []
    if _spoken(messages[: len(prompt)]) == _spoken(prompt):
        messages = messages[len(prompt) :]
    one = messages[0] if len(messages) == 1 else {}
    if one.get("role") != "assistant" or not isinstance(one.get("content"), str):
        raise UserError(f"row {row.id!r}: {column!r} must be a text, or a list with one assistant message")
    return str(one["content"])


def _spoken(messages: Iterable[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(m.get("role"), m.get("content")) for m in messages]


def _paired(halves: Iterable[tuple[str, Row]]) -> tuple[list[Pair], int]:
    """Positive and negative answers to one prompt, the first with the first and so on; and how many have no partner.

    A prompt is known by ``metadata["prompt"]`` where a row has it, else by its messages, which must be equal in any case.
    """
    prompts: dict[str, dict[str, list[Row]]] = {}
    total = 0
    for behaviour, row in halves:
        if not row.messages or row.messages[-1]["role"] != "assistant":
            raise UserError(f"row {row.id!r}: a row of a mode needs messages that end in an assistant message")
        key = canonical(row.metadata[PROMPT] if PROMPT in row.metadata else _spoken(row.messages[:-1]))
        prompts.setdefault(key, {"positive": [], "negative": []})[behaviour].append(row)
        total += 1
    pairs = []
    for answers in prompts.values():
        for good, bad in zip(answers["positive"], answers["negative"], strict=False):
            assert good.messages and bad.messages
            if _spoken(good.messages[:-1]) == _spoken(bad.messages[:-1]):
                prompt = replace(good, messages=good.messages[:-1], mode=None, prefix=None, prefix_at=None)
                pairs.append(Pair(prompt, good.messages[-1]["content"], bad.messages[-1]["content"]))
    return pairs, total - 2 * len(pairs)


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in counts.items() if n) or "the data are empty"
