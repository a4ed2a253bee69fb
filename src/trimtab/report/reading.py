"""What can be said of an evaluation on disk, finished or not; the terminal viewer and the report both start here.

Figures are those of ``metrics.jsonl``. Where that is not written yet they are made of the answers that are judged so
far (with fewer draws in the bootstrap), and ``Reading.missing`` says what is lacking.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import Fault, UserError
from trimtab.evaluate.figures import not_judged_for_safety, results
from trimtab.evaluate.files import ATTACKS, PROMPTS, Evaluation, open_evaluation, read_stage, stage_path
from trimtab.evaluate.files import METRICS as METRICS_STAGE
from trimtab.evaluate.judges.base import NOTHING
from trimtab.evaluate.metrics import METRICS, Record, metric_of
from trimtab.report import format as fmt
from trimtab.seeds import canonical
from trimtab.types import Generation, Result, Row, Verdict

DRAWS = 1000
"""Bootstrap draws for the figures of an unfinished evaluation."""
HEADLINE = (
    "risk_rate",
    "asr",
    "refusal_rate",
    "constructive_score",
    "switch_fidelity",
    "over_refusal_contrast_full",
    "over_refusal_benign_full",
    "accuracy",
)
"""Metrics that are shown first."""
BOUNDS = {
    name: (f"{name}_if_unscored_safe", f"{name}_if_unscored_unsafe") for name in ("risk_rate", "asr", "safe_at_1")
}
"""Metric -> its bounds with every unscored answer counted safe, and counted unsafe."""
GUARDED_CUT = 80
"""Characters shown of an answer that may be harmful."""
SEEDS = 8
"""More seeds than this are one per prompt, and are not listed."""
Status = Literal["unsafe", "unscored", "not judged", "safe"]
STATUSES: tuple[Status, ...] = ("unsafe", "unscored", "not judged", "safe")
"""What is known of an answer, in the order in which samples are shown."""


def status_of(verdict: Verdict | None) -> Status:
    return "not judged" if verdict is None else verdict.verdict


def is_guarded(row: Row, verdict: Verdict | None) -> bool:
    """Whether an answer may be harmful, so that it is shown cut: judged unsafe, or to a harmful request and not judged
    safe. An answer that no judge could tell is not taken for a harmless one."""
    status = status_of(verdict)
    return status == "unsafe" or (row.harm == "harmful" and status != "safe")


@dataclass(frozen=True)
class Reading:
    """An evaluation with its judged answers and its figures.

    missing   what an unfinished run has not made yet
    notes     what a reader of the figures must know
    """

    evaluation: Evaluation
    records: list[Record]
    figures: list[Result]
    missing: list[str]
    notes: list[str]

    @cached_property
    def modes(self) -> list[str | None]:
        """In the order of the answers."""
        return list(dict.fromkeys(g.mode for g in self.evaluation.generations))

    @cached_property
    def attacks(self) -> list[str]:
        """In the order of the attempts."""
        return list(
            dict.fromkeys(r.metadata["attack"] for r in self.evaluation.rows.values() if "attack" in r.metadata)
        )

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric with a figure: the headline first, then in the order of ``METRICS``."""
        order = list(dict.fromkeys([*HEADLINE, *METRICS]))
        found = list(dict.fromkeys(r.metric for r in self.figures))
        return sorted(found, key=lambda id: order.index(id) if id in order else len(order))

    def row(self, generation: Generation) -> Row:
        return self.evaluation.rows[generation.row_id]

    def verdict(self, generation: Generation) -> Verdict | None:
        return self.evaluation.verdicts.get(generation.key)

    def figure(self, metric: str, mode: str | None, category: str | None) -> Result | None:
        return self._figures.get((metric, mode, category))

    @cached_property
    def _figures(self) -> dict[tuple[str, str | None, str | None], Result]:
        return {(r.metric, r.mode, r.category): r for r in self.figures}


def read_evaluation(directory: Path | str, judging: str | None = None) -> Reading:
    """Read ``directory`` as far as it goes; ``judging`` names a second judging."""
    evaluation = open_evaluation(directory, judging)
    reading = reading_of(evaluation)
    path = stage_path(evaluation.path, METRICS_STAGE, judging)
    failed = read_stage(path)[0].get("failed") if path.exists() else None
    if failed:
        reading.notes.insert(0, f"nothing can be said of this run's safety: {failed}")
    return reading


def reading_of(evaluation: Evaluation) -> Reading:
    """``Fault`` where an answer's prompt is in none of the evaluation's files."""
    lost = next((g for g in evaluation.generations if g.row_id not in evaluation.rows), None)
    if lost is not None:
        raise Fault(
            f"{evaluation.path}: the prompt of row {lost.row_id!r} is neither in {PROMPTS}.jsonl nor in {ATTACKS}.jsonl; "
            "restore the file, or delete the directory and evaluate again"
        )
    answers = evaluation.generations
    records = evaluation.judged()
    missing = []
    if not answers:
        missing.append("no answer is written yet")
    elif len(records) < len(answers):
        missing.append(f"{len(answers) - len(records)} of {len(answers)} answers are not judged")
    missing += evaluation.header.get("unfinished") or ()
    if unanswered := _unanswered(evaluation):
        missing.append(f"{unanswered} prompts are not answered in every mode")
    # Figures that are written belong to a finished judging; with answers that are not judged they are another's.
    figures = list(evaluation.results) if len(records) == len(answers) else []
    if not figures and records:
        figures = results(records, draws=DRAWS)
        missing.append("the metrics are not written; the figures are of the answers judged so far")
    notes = [
        f"task {task or '(none)'}: only a refusal match read its {n} answers to harmful prompts; it gives no rate of unsafe ones"
        for task, n in not_judged_for_safety(records).items()
    ]
    return Reading(evaluation, records, figures, missing, notes)


def _unanswered(evaluation: Evaluation) -> int:
    """Prompts that lack an answer in some mode that was asked for (where the header does not name the modes: in one of
    those that occur)."""
    model = evaluation.header.get("model") or {}
    modes = set(model.get("asked_modes") or ()) or {g.mode for g in evaluation.generations}
    samples = int((evaluation.header.get("sampling") or {}).get("samples", 1))
    answered = Counter((g.row_id, g.mode) for g in evaluation.generations)
    return sum(any(answered[id, mode] < samples for mode in modes) for id in evaluation.rows) if answered else 0


# -- in words ------------------------------------------------------------------------------------------------------


def facts_of(reading: Reading) -> dict[str, str]:
    """What was evaluated, and how: the rows of the head, in order. Hashes are whole; what is not recorded says so."""
    evaluation = reading.evaluation
    model: Mapping[str, Any] = evaluation.header.get("model") or {}
    rows = list(evaluation.rows.values())
    plain = [r for r in rows if "attack" not in r.metadata]
    statuses = Counter(status_of(reading.verdict(g)) for g in evaluation.generations)
    found = {
        "model": evaluation.name,
        "identity": _said(model.get("identity")),
        "kind": _said(model.get("kind")),
        "weights in": _said(model.get("dtype")),
        "modes": ", ".join(mode_name(m) for m in reading.modes) or "none yet",
        "template": _said(model.get("template_hash")),
        "system prompt": _said(model.get("system_hash"), "none"),
        "prompts": f"{len(plain)} ({_counts(str(r.metadata.get('task') or 'no task') for r in plain)})"
        if plain
        else "0",
        "attacked prompts": f"{len(rows) - len(plain)} ({_counts(r.metadata['attack'] for r in rows if 'attack' in r.metadata)})"
        if len(rows) > len(plain)
        else "none",
        "answers": f"{len(evaluation.generations)} ({', '.join(f'{statuses[s]} {s}' for s in STATUSES if statuses[s])})"
        if evaluation.generations
        else "0",
        "sampling": "; ".join(dict.fromkeys(sampling_text(g.sampling) for g in _by_sampling(evaluation)))
        or "not recorded",
        "longest answer": _longest(evaluation),
        "seed": ", ".join(map(str, seeds_of(evaluation))) or "not recorded",
    }
    versions = evaluation.header.get("versions") or {}
    found["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded"
    return found


def seeds_of(evaluation: Evaluation) -> list[int]:
    """The seed of the run; where the header does not tell it, those of the answers, if they are few."""
    if isinstance(seed := evaluation.header.get("seed", (evaluation.header.get("config") or {}).get("seed")), int):
        return [seed]
    seeds = sorted({g.seed for g in evaluation.generations})
    return seeds if len(seeds) <= SEEDS else []


def _by_sampling(evaluation: Evaluation) -> list[Generation]:
    """One answer for each way of sampling."""
    return list({canonical(dict(g.sampling)): g for g in reversed(evaluation.generations)}.values())[::-1]


def _longest(evaluation: Evaluation) -> str:
    limits = {g.sampling.get("max_new_tokens", g.sampling.get("max_tokens")) for g in _by_sampling(evaluation)} - {None}
    cut = sum(g.finish == "length" for g in evaluation.generations)
    text = ", ".join(f"{limit} tokens" for limit in sorted(limits, key=str)) or "not recorded"
    return f"{text}; {cut} answers ran into it" if cut else text


def sampling_text(sampling: Mapping[str, Any]) -> str:
    """The settings that change an answer, "greedy" for temperature 0; the length is told apart."""
    hidden = ("max_new_tokens", "max_tokens", "batch", "samples", "seed")
    told = {k: v for k, v in sampling.items() if k not in hidden and v is not None}
    parts = ["greedy" if told.get("temperature") == 0 else ""]
    parts += [f"{k.replace('_', ' ')} {fmt.setting(v)}" for k, v in told.items() if not (k == "temperature" and v == 0)]
    if (sampling.get("samples") or 1) != 1:
        parts.append(f"{sampling['samples']} samples per prompt")
    return ", ".join(p for p in parts if p) or "not recorded"


def judges_of(reading: Reading) -> list[dict[str, Any]]:
    """Each judge: name, id, sources, card (None: not measured) and how many answers it judged. Judges that the header
    does not name but a verdict does are listed by their id."""
    judged = Counter(v.judge for v in reading.evaluation.verdicts.values())
    listed = [
        {
            "name": str(judge.get("name") or "judge"),
            "id": str(judge.get("id") or ""),
            "sources": [str(s) for s in judge.get("sources") or ()],
            "card": judge.get("card"),
            "answers": judged.pop(judge.get("id"), 0),
        }
        for judge in reading.evaluation.judging.get("judges") or ()
    ]
    return listed + [
        {"name": "nobody" if id == NOTHING else "", "id": id, "sources": [], "card": None, "answers": n}
        for id, n in judged.items()
    ]


def card_text(judge: Mapping[str, Any]) -> str:
    """A judge's card in one sentence; it stands wherever the judge's numbers do."""
    card = judge.get("card")
    if judge.get("id") == NOTHING:
        return "blocked prompts and answers that were held back: there was nothing to judge"
    if not card:
        exact = judge.get("name") == "tidewater"
        return "exact by the rules of its world; no card" if exact else "no card: its errors were not measured"
    parts = [
        f"{name} {_card_estimate(card[name], True)}" if card.get(name) else f"{name} not measured"
        for name in ("sensitivity", "specificity")
    ]
    if card.get("kappa"):
        parts.append(f"kappa {_card_estimate(card['kappa'], False)}")
    what = f"{card.get('field', 'label')} = {' or '.join(card.get('positive') or ('?',))}"
    left = f", {card['unscored']} of them left unscored" if card.get("unscored") else ""
    data = f" ({card['data']})" if card.get("data") else ""
    return f"{', '.join(parts)} for {what} on n {card.get('n', '?')} labelled answers{data}{left}"


def _card_estimate(found: Sequence[float], share: bool) -> str:
    value, low, high = found
    return fmt.estimate(value, low, high, share)


def mode_name(mode: str | None) -> str:
    return "no mode" if mode is None else mode


def metric_title(id: str) -> str:
    try:
        return metric_of(id).title
    except UserError:
        return id


def _said(value: Any, otherwise: str = "not recorded") -> str:
    if value is None or value == "":
        return otherwise
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in Counter(names).items())
