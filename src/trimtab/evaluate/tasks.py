"""Tasks by name: what a panel may ask for, each with a card that says what its figure means and what it does not.

A task is a named prompt set (``data.promptsets``) or a kind of Tidewater request, with the metric that it is read by and
the judge that it gets when no other is asked for. The groups hold only tasks that need no Hub, so that an evaluation of
the default panel runs on any machine; tasks of the Hub are asked for by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trimtab.data.promptsets import SETS
from trimtab.data.setcard import PromptSet
from trimtab.data.sources import SourceConfig
from trimtab.errors import UserError
from trimtab.evaluate.metrics import METRICS
from trimtab.evaluate.panel import TaskConfig
from trimtab.types import Harm
from trimtab.world.tidewater import Tidewater

JudgeName = Literal["tidewater", "refusal", "numeric", "code", "choice"]


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """What is known of a task. Exactly one of ``set`` and ``kind`` is given: a prompt set, or a kind of Tidewater request.

    metric    id of the headline metric (``evaluate.metrics``); its range and direction are the task's
    judge     name of the judge that scores the task when no other is asked for
    default   how many rows are taken when no limit is given (None: all of them)
    caveats   what a reader of the figure must know, a sentence each
    """

    name: str
    about: str
    metric: str
    judge: JudgeName
    caveats: tuple[str, ...] = ()
    default: int | None = None
    set: PromptSet | None = None
    kind: str | None = None
    kind_rows: int = 0
    kind_harm: Harm | None = None
    kind_category: str = ""

    @property
    def source(self) -> str:
        """Where the prompts come from."""
        return "Tidewater, Trimtab's sandbox world" if self.set is None else self.set.origin

    @property
    def revision(self) -> str:
        """What pins the prompts: a wheel's sha256, a Hub commit, or a hash of our own rows; Tidewater is pinned by the
        settings of its world."""
        return "the settings of the world" if self.set is None else self.set.revision

    @property
    def licence(self) -> str:
        return "Apache-2.0" if self.set is None else self.set.licence

    @property
    def rows(self) -> int:
        """How many prompts there are (Tidewater: in the default town)."""
        return self.kind_rows if self.set is None else self.set.rows

    @property
    def harm(self) -> str:
        """Class of its prompts: benign, harmful, contrast, or mixed."""
        return (self.kind_harm if self.set is None else self.set.harm) or "mixed"

    @property
    def category(self) -> str:
        """What ``Row.category`` holds, by which its tables are split."""
        return self.kind_category if self.set is None else self.set.category

    @property
    def range(self) -> tuple[float, float]:
        return METRICS[self.metric].range

    @property
    def direction(self) -> str:
        return METRICS[self.metric].direction

    @property
    def offline(self) -> bool:
        """Whether it can be read without the Hub (a package registry may be needed once)."""
        return self.set is None or self.set.offline

    def plain(self) -> dict[str, Any]:
        """The whole card, JSON-ready, for a file's header and for printing."""
        return {
            "name": self.name, "about": self.about, "source": self.source, "revision": self.revision,
            "licence": self.licence, "rows": self.rows, "default": self.default, "harm": self.harm,
            "category": self.category, "metric": self.metric, "range": list(self.range), "direction": self.direction,
            "judge": self.judge, "offline": self.offline, "caveats": list(self.caveats),
        }  # fmt: skip


_ONE_SIDED = (
    "The refusal match can tell a refusal, never harm: without another judge (a rubric or a classifier) safe_at_1 is "
    "unscored and only refusal_rate and the lower bound of Safe@1 can be read."
)
_KNOWN = "Public for years and likely part of what models were trained on."
_RUNS_CODE = "Scoring runs the model's code, and is left undone unless that is allowed."
_OVER: dict[Harm, str] = {"contrast": "over_refusal_contrast_full", "benign": "over_refusal_benign_full"}


def _safety(name: str, *caveats: str) -> TaskCard:
    set_ = SETS[name]
    return TaskCard(
        name=name, about=set_.about, set=set_, metric="safe_at_1", judge="refusal", caveats=(*caveats, _ONE_SIDED)
    )


def _over_refusal(name: str, *caveats: str, default: int | None = None) -> TaskCard:
    set_ = SETS[name]
    assert set_.harm is not None
    return TaskCard(
        name=name,
        about=set_.about,
        set=set_,
        metric=_OVER[set_.harm],
        judge="refusal",
        caveats=caveats,
        default=default,
    )


def _capability(name: str, judge: JudgeName, *caveats: str) -> TaskCard:
    set_ = SETS[name]
    return TaskCard(name=name, about=set_.about, set=set_, metric="accuracy", judge=judge, caveats=caveats)


def _tidewater(name: str, kind: str, about: str, harm: Harm | None, metric: str, category: str, rows: int) -> TaskCard:
    caveats = ("A fictional town: figures compare arms that were trained on it, not models at large.",)
    return TaskCard(
        name=name, about=about, kind=kind, kind_rows=rows, kind_harm=harm, kind_category=category, metric=metric,
        judge="tidewater", caveats=caveats, default=96,
    )  # fmt: skip


TASKS: dict[str, TaskCard] = {
    card.name: card
    for card in (
        _safety("harmbench", _KNOWN),
        _safety("strongreject", _KNOWN),
        _safety("strongreject-small", "Part of strongreject: do not pool the two."),
        _safety("advbench", "Many near-duplicates: intervals that treat its prompts as independent are too narrow.", _KNOWN),
        _safety("donotanswer", "Many prompts are mild: an answer that helps may be the right one.", _KNOWN),
        _safety("past-tense", "Questions about the past may have a harmless answer."),
        _safety("future-tense", "Questions about the future may have a harmless answer."),
        _safety("redharness", "Synthetic and small; 20 of its 50 prompts are benign or contrasts."),
        _safety("jailbreakbench", "Nearly half of its behaviours come from AdvBench and HarmBench: do not pool them.", _KNOWN),
        _safety("wildjailbreak", "The prompts are attacks already: other wordings around them mean little.", _KNOWN),
        _safety("xstest-unsafe", "Counterparts of xstest; meant to be read beside it."),
        _over_refusal("harmbench-benign"),
        _over_refusal("lookalikes", "Written by one author for this project; no model's refusals were used to choose them."),
        _over_refusal("xstest", _KNOWN),
        _over_refusal("orbench-hard", "Machine-written and labelled safe by models: some of its prompts are arguable."),
        _over_refusal("jailbreakbench-benign"),
        _over_refusal("wildjailbreak-benign", "Harmless requests in odd wrappings: a puzzled answer is no refusal."),
        _over_refusal("slabs-benign", "Plain prompts: nearly every model is at zero.", default=400),
        _over_refusal("neuralchemy-benign", "Mostly filled templates, so prompts resemble one another.", default=400),
        _capability("arithmetic", "numeric", "Templates: a model finetuned on them would be at one."),
        _capability("gsm-symbolic", "numeric", "84 templates with drawn names and numbers, so problems resemble one another.",
                    "A few drawn problems are odd (an age below zero); their answers follow from what they say.",
                    "Which problems are drawn depends on the version of the package."),
        _capability("gsm8k", "numeric", _KNOWN, "Zero-shot, so below the usual eight-shot figures."),
        _capability("openbookqa", "choice", _KNOWN, "The book of facts is not given; guessing gives 0.25."),
        _capability("truthfulqa", "choice", _KNOWN, "Choices are shuffled per question: in the source the true one is first.",
                    "The number of choices differs, so there is no one rate for guessing."),
        _capability("humaneval", "code", _KNOWN, _RUNS_CODE),
        _capability("programs", "code", "Templates: a model finetuned on them would be at one.",
                    "Far below HumanEval: for models of a few million parameters.", _RUNS_CODE),
        _capability("mbpp", "code", _KNOWN, _RUNS_CODE),
        _tidewater("tidewater-hazards", "harmful-heldout", "Requests for hazards that training never asked about.",
                   "harmful", "safe_at_1", "always 'hazard'", 144),
        _tidewater("tidewater-hazards-seen", "harmful-seen", "Requests for hazards that training asked about, reworded.",
                   "harmful", "safe_at_1", "always 'hazard'", 144),
        _tidewater("tidewater-contrasts", "contrast-heldout", "Safe questions about hazards: recognising, cleaning up, the law.",
                   "contrast", "over_refusal_contrast_full", "always 'care'", 288),
        _tidewater("tidewater-goods", "benign", "Requests for recipes that are harmless.",
                   "benign", "helpful_rate", "always 'recipe'", 288),
        _tidewater("tidewater-laws", "policy", "Requests that one quay's law allows and another's forbids.",
                   None, "safe_at_1", "always 'law'", 144),
        _tidewater("tidewater-facts", "fact", "Questions about the town.", "benign", "accuracy", "always 'fact'", 180),
        _tidewater("tidewater-sums", "arithmetic", "Sums about cargo.", "benign", "accuracy", "always 'arithmetic'", 672),
        _tidewater("tidewater-programs", "code", "Programs in the town's little language, to be worked out.",
                   "benign", "accuracy", "always 'code'", 471),
    )
}  # fmt: skip
"""Every task by its name."""

GROUPS: dict[str, tuple[str, ...]] = {
    "safety": ("harmbench", "strongreject", "advbench", "donotanswer"),
    "overrefusal": ("harmbench-benign", "lookalikes", "slabs-benign"),
    "capability": ("arithmetic", "openbookqa", "humaneval"),
    "tidewater": tuple(name for name, card in TASKS.items() if card.kind is not None),
}
"""Names for several tasks at once; none of them needs the Hub."""


def task_card(name: str) -> TaskCard:
    """The card of one task; ``UserError`` with the names that come close."""
    if name not in TASKS:
        hint = f"; {name!r} is a group ({', '.join(GROUPS[name])})" if name in GROUPS else _close(name, [*TASKS])
        raise UserError(f"task: no task {name!r}{hint}; `trimtab tasks` lists them all")
    return TASKS[name]


def task_config(name: str, *, n: int | None = None, seed: int = 0) -> TaskConfig:
    """One task as the panel takes it. ``n`` prompts are chosen by ``seed``, a smaller n being part of a larger; more than
    there are is a ``UserError``. Without ``n``, the card's default."""
    card = task_card(name)
    if n is not None and n < 1:
        raise UserError(f"task {name!r}: n={n} must be 1 or more")
    if card.set is None:
        return TaskConfig(name=name, tidewater=card.kind, n=n or card.default)
    if n is not None and n > card.rows:
        raise UserError(f"task {name!r}: n={n}, but it has only {card.rows} prompts; lower 'n'")
    n = n or card.default
    verify = None if card.judge in ("tidewater", "refusal") else card.judge
    source = SourceConfig(name=name, seed=seed)
    return TaskConfig(name=name, source=source, n=None if n == card.rows else n, verify=verify)


def resolve_panel(
    names: Sequence[str], limit: int | None = None, world: Tidewater | None = None, seed: int = 0
) -> tuple[TaskConfig, ...]:
    """The tasks that names of tasks and groups stand for, in order, each once.

    ``limit``: at most so many prompts of each task, chosen by ``seed``; those of a smaller limit are part of those of a
    larger. A Tidewater task needs ``world``. ``UserError`` for no name, an unknown one (with what comes close), or a
    limit below 1.
    """
    if not names:
        raise UserError(f"panel: name at least one task or group, such as {', '.join(GROUPS)}")
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} prompts of each task are too few; use 1 or more")
    wanted: dict[str, None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise UserError(
                f"panel: no task or group {name!r}{_close(name, [*GROUPS, *TASKS])}; `trimtab tasks` lists them all"
            )
        wanted |= dict.fromkeys(GROUPS.get(name, (name,)))
    found = []
    for name in wanted:
        card = TASKS[name]
        if card.kind is not None and world is None:
            raise UserError(
                f"panel: task {name!r} asks about the Tidewater world, and there is none here; leave it out, or give the "
                "world that the model was trained on"
            )
        most = card.default or card.rows
        found.append(task_config(name, n=most if limit is None else min(limit, card.rows), seed=seed))
    return tuple(found)


def _close(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower().replace("_", "-"), known, n=4, cutoff=0.5)
    inside = [other for other in known if name and name.lower() in other and other not in near]
    close = (near + inside)[:5]
    return f" (close: {', '.join(close)})" if close else ""
