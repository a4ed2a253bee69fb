"""Which answers of two evaluations can be compared, and what differs between the two besides the model.

Answers are paired by (row id, sample) within one mode of each. Other judges, and prompts that only one side has, are an
error until the user allows them. An attack that put its prompts to the two models in other words is compared by prompt
alone (asr).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from trimtab.errors import UserError
from trimtab.evaluate.files import Evaluation
from trimtab.evaluate.metrics import Metric, Record, by_pair
from trimtab.evaluate.targets import NO_MODE
from trimtab.types import Generation, Row

Pair = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: where it lies, what was evaluated, in which mode, and who judged it (judge id -> name)."""

    path: str
    name: str
    identity: str | None
    mode: str | None
    judges: dict[str, str]
    answers: int

    @property
    def label(self) -> str:
        """The name, with the mode where there is one."""
        return self.name if self.mode is None else f"{self.name} ({self.mode})"


@dataclass(frozen=True, slots=True)
class Pairing:
    """The answers of both sides that can be compared.

    pairs             (row id, sample) of what both answered in the same words
    reworded          attacks whose attempts differ between the sides; their records are on both, and only metrics of whole
                      prompts can be compared over them
    only_a, only_b    answers to prompts that the other side does not have; left out
    changed           prompts that have the same id and another content, in answers; left out on both sides
    warnings          what differs besides the model, one sentence each
    """

    a: Side
    b: Side
    records_a: tuple[Record, ...]
    records_b: tuple[Record, ...]
    pairs: tuple[Pair, ...]
    reworded: tuple[str, ...]
    only_a: int
    only_b: int
    changed: int
    warnings: tuple[str, ...]

    def both(self, metric: Metric) -> bool:
        """Whether answers of both sides have the metric. What fits one mode says nothing of another: of two modes, switch
        fidelity is not compared."""
        told = all(any(map(metric.of, side)) for side in (self.records_a, self.records_b))
        return told and not (metric.id == "switch_fidelity" and self.a.mode != self.b.mode)


def pair_up(
    a: Evaluation,
    b: Evaluation,
    *,
    modes: tuple[str | None, str | None] | None = None,
    common: bool = False,
    allow_different_judges: bool = False,
) -> Pairing:
    """The answers of ``a`` and ``b`` to the same prompts.

    modes     the mode of each side (None: answers without a control token); if not given, the one mode both have
    common    leave out prompts that only one side has; otherwise they are a ``UserError``, as are sides with no pair in
              common, no or several modes in common, answers that are not judged, and, unless ``allow_different_judges``,
              other judges
    """
    mode_a, mode_b = modes if modes is not None else (_common_mode(a, b),) * 2
    first, second = (by_pair(records_of(evaluation, mode)) for evaluation, mode in ((a, mode_a), (b, mode_b)))
    second, resystemed = _as_if_same_system(first, second)
    reworded = _reworded(first, second)
    kept_a, kept_b, only_a, only_b, changed = _kept(first, second, reworded, _renewed(a, b) if reworded else set())
    left_out = [
        f"{count} {'answer' if count == 1 else 'answers'} {what}"
        for count, what in ((only_a, "only in A"), (only_b, "only in B"), (changed, "to prompts worded otherwise in B"))
        if count
    ]  # fmt: skip
    if not kept_a:
        raise UserError(
            f"{a.path} and {b.path} have no answers to the same prompts ({', '.join(left_out)}); evaluate both on one panel"
        )
    pairs = tuple(sorted(kept_a.keys() & kept_b.keys()))
    if left_out and not common:
        raise UserError(
            f"{a.path} and {b.path} do not hold the same prompts: {', '.join(left_out)}; --common compares the "
            f"{len(pairs)} answers that both have"
        )
    judges_a, judges_b = judges_of(a, kept_a.values()), judges_of(b, kept_b.values())
    said = []
    if judges_a.keys() != judges_b.keys():
        names = f"A was judged by {_named(judges_a)}, B by {_named(judges_b)}"
        if not allow_different_judges:
            raise UserError(
                f"{names}: their figures are not comparable; judge both with the same judges (trimtab judge), or say "
                "--allow-different-judges"
            )
        said.append(f"judges differ: {names}; what follows may be the judges' difference, not the models'")
    if left_out:
        said.append(f"left out: {', '.join(left_out)}")
    differences = _differences(a, b, [(kept_a[p].generation, kept_b[p].generation) for p in pairs])
    if resystemed and not any(d.startswith(_FACTS["system_hash"]) for d in differences):
        said.append(f"system prompts differ: those of {resystemed} prompts are others in B")
    said += differences
    said += [f"attack {name!r} asked A and B in other words: only its success (asr) is compared" for name in reworded]
    return Pairing(
        _side(a, mode_a, judges_a, len(first)), _side(b, mode_b, judges_b, len(second)), tuple(kept_a.values()),
        tuple(kept_b.values()), pairs, tuple(reworded), only_a, only_b, changed, tuple(said),
    )  # fmt: skip


def modes_of(evaluation: Evaluation) -> list[str | None]:
    """The modes of its answers, the one without a control token first."""
    return sorted({g.mode for g in evaluation.generations}, key=lambda mode: (mode is not None, mode or ""))


def mode_name(mode: str | None) -> str:
    """``none`` for answers without a control token."""
    return NO_MODE if mode is None else mode


def mode_named(name: str) -> str | None:
    """Inverse of ``mode_name``."""
    return None if name == NO_MODE else name


def records_of(evaluation: Evaluation, mode: str | None) -> list[Record]:
    """The judged answers of one mode; ``UserError`` if it has none, or if some answer is not judged."""
    if mode not in (have := modes_of(evaluation)):
        raise UserError(
            f"{evaluation.path} has no answers in mode {mode_name(mode)!r}; it has "
            f"{', '.join(map(mode_name, have)) or 'no answers at all'}"
        )
    return [record for record in evaluation.records() if record.generation.mode == mode]


def judges_of(evaluation: Evaluation, records: Iterable[Record]) -> dict[str, str]:
    """Judge id -> name of those who judged ``records``: from the header, or from the verdicts where it does not say."""
    records = list(records)
    sources = {record.row.source for record in records}
    told = {
        str(judge["id"]): str(judge.get("name", judge["id"]))
        for judge in evaluation.judging.get("judges", ())
        if judge.get("sources") is None or sources & set(judge["sources"])
    }
    return told or {record.verdict.judge: record.verdict.judge for record in records}


def _common_mode(a: Evaluation, b: Evaluation) -> str | None:
    have_a, have_b = modes_of(a), modes_of(b)
    both = [mode for mode in have_a if mode in have_b]
    if len(both) == 1:
        return both[0]
    if both:
        raise UserError(
            f"both evaluations have several modes ({', '.join(map(mode_name, both))}); choose one with --mode"
        )
    for evaluation, have in ((a, have_a), (b, have_b)):
        if not have:
            raise UserError(f"{evaluation.path} holds no answers")
    named_a, named_b = (", ".join(map(mode_name, have)) for have in (have_a, have_b))
    raise UserError(
        f"A has answers in mode {named_a}, B in {named_b}; choose one of each, such as "
        f"--modes {mode_name(have_a[0])}:{mode_name(have_b[0])}"
    )


def _as_if_same_system(first: Mapping[Pair, Record], second: Mapping[Pair, Record]) -> tuple[dict[Pair, Record], int]:
    """``second`` with the content hashes of ``first`` where nothing but the system prompt differs; how many prompts."""
    found, renamed = {}, set()
    for pair, record in second.items():
        other = first.get(pair)
        if (
            other is not None
            and other.generation.row_hash != record.generation.row_hash
            and _without_system(other.row) == _without_system(record.row)
        ):
            record = replace(record, generation=replace(record.generation, row_hash=other.generation.row_hash))
            renamed.add(record.row.id)
        found[pair] = record
    return found, len(renamed)


def _without_system(row: Row) -> Row:
    if row.messages is None:
        return row
    return replace(row, messages=tuple(m for m in row.messages if m["role"] != "system"))


def _reworded(first: Mapping[Pair, Record], second: Mapping[Pair, Record]) -> list[str]:
    """Attacks that both sides have, of whose attempts on the same prompts some are not the same in both."""
    contents: dict[str, list[dict[str, set[tuple[str, int, str]]]]] = {}
    for i, side in enumerate((first, second)):
        for record in side.values():
            if (name := record.row.metadata.get("attack")) is not None:
                mine = contents.setdefault(str(name), [defaultdict(set), defaultdict(set)])[i]
                mine[record.prompt].add((*record.pair, record.generation.row_hash))
    return sorted(
        name for name, (a, b) in contents.items() if any(a[prompt] != b[prompt] for prompt in a.keys() & b.keys())
    )


def _kept(
    first: Mapping[Pair, Record], second: Mapping[Pair, Record], reworded: Sequence[str], renewed: set[str]
) -> tuple[dict[Pair, Record], dict[Pair, Record], int, int, int]:
    """What can be compared on each side; how many answers only one has, and how many went to a changed prompt.

    An answer to a ``reworded`` attack stays if the other side attacked the same prompt, whatever was said to it then; but
    not if the plain prompt itself is a ``renewed`` one, nor a sample more than the other side drew, which would be one more
    chance to break the prompt.
    """
    attacked = [
        {(r.row.metadata["attack"], r.prompt, r.generation.sample) for r in side.values() if "attack" in r.row.metadata}
        for side in (first, second)
    ]

    def is_same(record: Record, other: Record | None, there: set[tuple[str, str, int]]) -> bool:
        attack = record.row.metadata.get("attack")
        if attack in reworded:
            return record.prompt not in renewed and (str(attack), record.prompt, record.generation.sample) in there
        return other is not None and other.generation.row_hash == record.generation.row_hash

    kept_a = {p: r for p, r in sorted(first.items()) if is_same(r, second.get(p), attacked[1])}
    kept_b = {p: r for p, r in sorted(second.items()) if is_same(r, first.get(p), attacked[0])}
    lost_a, lost_b = first.keys() - kept_a.keys(), second.keys() - kept_b.keys()
    changed = len(lost_a & lost_b)
    return kept_a, kept_b, len(lost_a) - changed, len(lost_b) - changed, changed


def _side(evaluation: Evaluation, mode: str | None, judges: dict[str, str], answers: int) -> Side:
    identity = evaluation.header.get("model", {}).get("identity")
    return Side(str(evaluation.path), evaluation.name, identity, mode, judges, answers)


def _named(judges: Mapping[str, str]) -> str:
    return ", ".join(name if name == id else f"{name} ({id[:8]})" for id, name in sorted(judges.items())) or "nobody"


_FACTS = {"template_hash": "chat templates", "system_hash": "system prompts", "dtype": "number formats"}
_NO_MATTER = ("batch", "samples")
"""Sampling settings that change no single answer."""


def _differences(a: Evaluation, b: Evaluation, pairs: Sequence[tuple[Generation, Generation]]) -> list[str]:
    """What differs besides the model and would move the figures too."""
    said = []
    for field, what in _FACTS.items():
        models = [evaluation.header.get("model", {}) for evaluation in (a, b)]
        x, y = (model.get(field) for model in models)
        if x != y:
            short = [str(m[field] or "none")[:12] if field in m else "not known" for m in models]
            said.append(f"{what} differ: {short[0]} in A, {short[1]} in B")
    different: dict[str, set[tuple[str, str]]] = defaultdict(set)
    seeds = 0
    for first, second in pairs:
        x, y = first.sampling, second.sampling
        for key in (x.keys() | y.keys()) - set(_NO_MATTER):
            if x.get(key) != y.get(key):
                different[key].add((json.dumps(x.get(key)), json.dumps(y.get(key))))
        seeds += bool(x.get("temperature") and first.seed != second.seed)
    for key, values in sorted(different.items()):
        one, other = min(values)
        said.append(f"sampling differs: {key} is {one} in A and {other} in B")
    if seeds and not different:
        said.append(f"seeds differ in {seeds} of {len(pairs)} pairs: some answers changed by the draw alone")
    return said


def _renewed(a: Evaluation, b: Evaluation) -> set[str]:
    """Ids of the rows that both have, with another content than the system prompt's."""
    return {id for id in a.rows.keys() & b.rows.keys() if _without_system(a.rows[id]) != _without_system(b.rows[id])}


def parse_modes(mode: str | None, modes: str | None) -> tuple[str | None, str | None] | None:
    """``--mode M`` (M of both) and ``--modes A:B`` as a pair of modes; None if neither is given."""
    if mode is not None and modes is not None:
        raise UserError("--mode and --modes: give one of them")
    if modes is not None:
        first, colon, second = modes.partition(":")
        if not (first and colon and second) or ":" in second:
            raise UserError(f"--modes {modes!r}: write one mode of each, such as --modes positive:rejective")
        return mode_named(first), mode_named(second)
    return None if mode is None else (mode_named(mode), mode_named(mode))
