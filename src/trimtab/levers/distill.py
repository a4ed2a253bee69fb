"""Multi-directional self-distillation: a model's own answers, one per mode (arXiv 2508.14904, sec. 3.1).

The base model answers each prompt once per mode, brought to it by an instruction; the row that comes of it has the answer
and not the instruction, so that training puts the mode's token in the instruction's place. The instruction stands at the
end of the prompt, so that the modes have all before it in common and it is computed once. The paper names neither its
instructions nor its filter; here an answer is kept if its judge says that it does what its mode is to do, and every
answer that is not kept has a reason.

Reasoning that opens an answer is taken off: it speaks of the instruction, which the trained model will not be given.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from trimtab.data.thinking import without_reasoning
from trimtab.errors import UserError
from trimtab.levers.modes import MODES, PROMPT, Behaviour, Shown, fits, meant, shown, with_text
from trimtab.seeds import uniform_of
from trimtab.types import Row, Verdict

Reason = Literal["cut off", "empty", "quotes", "unscored", "another behaviour", "as another mode", "too common"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why an answer is dropped, in the order of the checks: it did not end by itself; it is empty; it quotes an instruction;
no judge could tell what it does; it does something else than its mode; an earlier mode, meant to do something else, gave
the same answer; too many prompts were given this answer already."""

MOST_COMMON: dict[Behaviour, float] = {"positive": 0.1, "negative": 0.1, "rejective": 0.5}
"""Share of a class's prompts that one and the same answer is kept for, by what the mode is judged as: a model that says one
thing to everything teaches little, but refusals are mostly alike. Which prompts keep it is drawn by their ids."""
FEWEST_COMMON = 10
"""Prompts that may be given the same answer, however few there are."""
CLASSES = ("harmful", "benign", "contrast", "none")
"""Classes of prompts in yields; ``none``: the row does not say."""

_QUOTED = 8
_EAST = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_EAST}]|[^\W{_EAST}]+")


@dataclass(frozen=True, slots=True)
class Answer:
    """One judged answer. ``prompt``: the row without the instruction; ``finish``: as ``Generation.finish``."""

    key: str
    prompt: Row
    mode: str
    sample: int
    text: str
    finish: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answer that is not kept, and why; ``shown`` is what its judge saw it do."""

    answer: Answer
    reason: Reason
    shown: Shown | None


@dataclass(frozen=True)
class Picked:
    """What is kept. ``spare``: keys of the samples that were not looked at, since an earlier one had been kept."""

    rows: tuple[Row, ...]
    dropped: tuple[Dropped, ...]
    spare: tuple[str, ...]


@dataclass(frozen=True)
class Yield:
    """Of the prompts of one class, how many got a row in one mode.

    asked     prompts; ``kept`` and ``dropped`` add up to it
    unscored  of the kept: answers that no judge could tell
    dropped   reason -> prompts; with several samples the reason of the one that passed most checks
    """

    mode: str
    harm: str
    asked: int
    kept: int
    unscored: int
    dropped: Mapping[Reason, int]


def unique_prompts(prompts: Iterable[Row]) -> tuple[list[Row], int]:
    """Each prompt once, the first of equal ones, and how many were left out.

    Prompts are equal if they read the same (``normalised``) under the same policy. ``UserError`` for two that differ and
    have one id.
    """
    kept: dict[str, Row] = {}
    seen: set[tuple[object, ...]] = set()
    repeated = 0
    for row in prompts:
        assert row.messages is not None
        said = (row.policy, *((m["role"], normalised(m["content"])) for m in row.messages))
        if said in seen:
            repeated += 1
            continue
        if row.id in kept:
            raise UserError(f"prompts: two different prompts have the id {row.id!r}; ids must be unique")
        seen.add(said)
        kept[row.id] = row
    return list(kept.values()), repeated


def elicited(prompts: Sequence[Row], elicit: Mapping[str, str]) -> list[Row]:
    """Every prompt once per mode, its instruction at the end of the last user message; modes of a prompt side by side.

    ``UserError`` for a prompt whose id is that of another with a mode behind it.
    """
    found = [
        replace(with_text(row, [text], "words"), id=_id(row, mode), metadata={**row.metadata, PROMPT: row.id})
        for row in prompts
        for mode, text in elicit.items()
    ]
    if taken := {row.id for row in prompts} & {row.id for row in found}:
        raise UserError(f"prompts: the id {min(taken)!r} is that of an answer to another prompt; give it another id")
    return found


def pick(
    prompts: Sequence[Row],
    answers: Iterable[Answer],
    elicit: Mapping[str, str],
    behaves: Mapping[str, Behaviour],
    *,
    keep_unscored: bool = False,
) -> Picked:
    """The first answer of each prompt and mode that passes every check (``REASONS``), as a row of that mode.

    elicit   mode -> its instruction; of two modes with the same answer the one that stands later here loses it
    behaves  mode of another name -> what it is judged as

    Rows stand in the order of the prompts, and of ``elicit``. Each has the id ``PROMPT#MODE`` and in its metadata the
    prompt's id and which sample it is, judged by whom.
    """
    given: dict[tuple[str, str], list[Answer]] = defaultdict(list)
    for answer in sorted(answers, key=lambda answer: answer.sample):
        given[answer.prompt.id, answer.mode].append(answer)
    size = Counter(map(class_of, prompts))
    common: Counter[tuple[str, str, str]] = Counter()
    rows: dict[tuple[str, str], Row] = {}
    dropped: list[Dropped] = []
    spare: list[str] = []
    for prompt in sorted(prompts, key=lambda row: uniform_of("common", row.id)):
        harm = class_of(prompt)
        before: dict[str, set[Behaviour]] = defaultdict(set)
        for mode in elicit:
            behaviour = behaviour_of(mode, behaves)
            for answer in given[prompt.id, mode]:
                if (prompt.id, mode) in rows:
                    spare.append(answer.key)
                    continue
                text = normalised(answer.text)
                reason = _fault(answer, elicit.values(), behaviour, keep_unscored)
                if reason is None and before[text] - {meant(behaviour, prompt.harm)}:
                    reason = "as another mode"
                if reason is None and common[mode, harm, text] >= _most(behaviour, size[harm]):
                    reason = "too common"
                if reason is not None:
                    dropped.append(Dropped(answer, reason, shown(prompt.harm, answer.verdict)))
                    continue
                before[text].add(meant(behaviour, prompt.harm))
                common[mode, harm, text] += 1
                rows[prompt.id, mode] = _row(answer)
    place = {row.id: number for number, row in enumerate(prompts)}
    modes = list(elicit)
    dropped.sort(key=lambda d: (place[d.answer.prompt.id], modes.index(d.answer.mode), d.answer.sample))
    ordered = (rows.get((prompt.id, mode)) for prompt in prompts for mode in modes)
    return Picked(tuple(row for row in ordered if row is not None), tuple(dropped), tuple(spare))


def yields(prompts: Sequence[Row], elicit: Mapping[str, str], picked: Picked) -> list[Yield]:
    """One ``Yield`` for each mode and each class that there are prompts of."""
    kept = {row.id: row for row in picked.rows}
    furthest: dict[str, Reason] = {}
    for one in picked.dropped:
        id = _id(one.answer.prompt, one.answer.mode)
        furthest[id] = max(furthest.get(id, one.reason), one.reason, key=REASONS.index)
    found = []
    for mode in elicit:
        for harm in CLASSES:
            ids = [_id(row, mode) for row in prompts if class_of(row) == harm]
            if not ids:
                continue
            lost = Counter(furthest[id] for id in ids if id not in kept)
            rows = [kept[id] for id in ids if id in kept]
            unscored = sum(not row.metadata[DISTILLED]["scored"] for row in rows)
            reasons = {reason: lost[reason] for reason in REASONS if lost[reason]}
            found.append(Yield(mode, harm, len(ids), len(rows), unscored, reasons))
    return found


DISTILLED = "distilled"
"""Metadata of a row: ``{"sample", "judge", "scored"}`` of the answer that it was made of."""


def behaviour_of(mode: str, behaves: Mapping[str, Behaviour]) -> Behaviour:
    """What a mode is judged as."""
    own = behaves.get(mode)
    return own if own is not None else next(one for one in MODES if one == mode)


def class_of(prompt: Row) -> str:
    """The prompt's class among ``CLASSES``."""
    return prompt.harm or "none"


def normalised(text: str) -> str:
    """A text by which equal ones are found: compatibility forms, case and white space do not count, nor does reasoning."""
    answer = without_reasoning(text)
    return " ".join(unicodedata.normalize("NFKC", text if answer is None else answer).casefold().split())


def quotes(text: str, instruction: str) -> bool:
    """Whether a text repeats an instruction: ``_QUOTED`` of its words in a row, or half of one that is shorter than twice
    that (four words at least, or all there are). A Chinese or Japanese character counts as a word."""
    told, said = _words(instruction), _words(text)
    size = min(_QUOTED, max(-(-len(told) // 2), min(len(told), 4)))
    if not size:
        return False
    runs = {tuple(told[i : i + size]) for i in range(len(told) - size + 1)}
    return any(tuple(said[i : i + size]) in runs for i in range(len(said) - size + 1))


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _fault(answer: Answer, instructions: Iterable[str], behaviour: Behaviour, keep_unscored: bool) -> Reason | None:
    """Why an answer is of no use by itself."""
    if answer.finish != "stop":
        return "cut off"
    text = without_reasoning(answer.text)
    if text is None or not text.strip():
        return "empty"
    if any(quotes(text, instruction) for instruction in instructions):
        return "quotes"
    told = fits(behaviour, answer.prompt.harm, answer.verdict)
    if told is None:
        return None if keep_unscored else "unscored"
    return None if told else "another behaviour"


def _most(behaviour: Behaviour, prompts: int) -> int:
    """For how many of so many prompts one answer is kept."""
    return max(FEWEST_COMMON, int(MOST_COMMON[behaviour] * prompts))


def _row(answer: Answer) -> Row:
    """The prompt as it was before its instruction, with the answer."""
    text = without_reasoning(answer.text)
    assert text is not None and text.strip(), "an answer without a text was dropped"
    prompt, verdict = answer.prompt, answer.verdict
    scored = shown(prompt.harm, verdict) is not None
    about = {
        **prompt.metadata,
        PROMPT: prompt.id,
        DISTILLED: {"sample": answer.sample, "judge": verdict.judge, "scored": scored},
    }
    return replace(prompt.with_answer(text.strip(), id=_id(prompt, answer.mode), mode=answer.mode), metadata=about)


def _id(prompt: Row, mode: str) -> str:
    return f"{prompt.id}#{mode}"
