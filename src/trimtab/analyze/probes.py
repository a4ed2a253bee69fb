"""Linear probes: can a line through a model's states tell harmful requests from the others, and where (2601.07087)?

One protocol for the states of every layer, for the words of the prompt and for shuffled labels: folds that keep the
prompts about one thing together, scores only of prompts that a probe was not trained on. The layer is always chosen on
training rows: the headline is nested, and the curves by layer are there to be looked at, not to be picked from.
Trades off: intervals resample the tested prompts, not the training; see docs/analysis.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.analyze.auroc import Separation, cluster_weights, curve_figures, percentiles, separation
from trimtab.analyze.config import ProbeConfig
from trimtab.analyze.logistic import Floats, fit_scores
from trimtab.analyze.metrics import ALL, HELDOUT, LOSO, result_of
from trimtab.analyze.states import POOLINGS, Pooling, States
from trimtab.errors import UserError
from trimtab.seeds import rng_of
from trimtab.types import Result, Row

Bools = NDArray[np.bool_]
Set = tuple[Pooling, int]
"""One set of features: the states of a layer under a pooling."""
SHUFFLES = 10
INNER = 3
"""Folds by which the layer is chosen where one split is tested (a task left out, held-out hazards)."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prompts:
    """What is probed, n prompts.

    positive  bool[n]: harmful
    group     int[n]: what a prompt is about; prompts of one group are never in training and test at once
    task      str[n]: the task that a prompt comes from
    unseen    bool[n]: it is about a held-out hazard of Tidewater
    seen      bool[n]: it is about a hazard that is not held out
    words     float64[n, tokens]: how often each token occurs, tokens of one prompt only left out
    """

    positive: Bools
    group: NDArray[np.int64]
    task: NDArray[np.str_]
    unseen: Bools
    seen: Bools
    words: Floats

    def __len__(self) -> int:
        return len(self.positive)

    @classmethod
    def of(cls, rows: Sequence[Row], ids: Sequence[NDArray[Any]]) -> Prompts:
        """From the rows of a panel and their rendered prompts. ``UserError`` for a row that has no class."""
        for row in rows:
            if row.harm is None:
                raise UserError(
                    f"task {row.metadata.get('task')!r}: row {row.id!r} is neither harmful nor harmless; give the task's "
                    "source a 'harm'"
                )
        names: dict[str, int] = {}
        about = [row.metadata.get("heldout") if row.source == "tidewater" else None for row in rows]
        return cls(
            positive=np.array([row.harm == "harmful" for row in rows], bool),
            group=np.array([names.setdefault(group_of(row), len(names)) for row in rows], np.int64),
            task=np.array([str(row.metadata.get("task", "")) for row in rows]),
            unseen=np.array([held is True for held in about], bool),
            seen=np.array([held is False for held in about], bool),
            words=_counts(ids),
        )


def group_of(row: Row) -> str:
    """What a prompt is about: its item or fact (``metadata``), the prompt that it is an attempt on, or itself."""
    for key in ("item", "fact", "base"):
        if row.metadata.get(key) is not None:
            return f"{key} {row.metadata[key]}"
    return f"row {row.id}"


def _counts(ids: Sequence[NDArray[Any]]) -> Floats:
    tokens, at = np.unique(np.concatenate([np.asarray(i, np.int64) for i in ids]), return_inverse=True)
    counts = np.zeros((len(ids), len(tokens)))
    np.add.at(counts, (np.repeat(np.arange(len(ids)), [len(i) for i in ids]), at), 1)
    kept: Floats = counts[:, (counts > 0).sum(0) >= 2]
    return kept


# -- folds ---------------------------------------------------------------------------------------------------------


def folds_of(positive: Bools, group: NDArray[Any], most: int, *key: str | int) -> NDArray[np.int64]:
    """Fold of every row, int[n]: whole groups, each class spread as evenly as whole groups allow; at most ``most`` folds,
    fewer where a class has fewer groups. ``UserError`` where a class has fewer than two groups."""
    names, of = np.unique(group, return_inverse=True)
    size = np.stack([np.bincount(of, weights=c, minlength=len(names)) for c in (positive, ~positive)], axis=1)
    folds = min(most, *(int(np.count_nonzero(size[:, c])) for c in (0, 1)))
    if folds < 2:
        lack = "harmful" if np.count_nonzero(size[:, 0]) < 2 else "harmless"
        raise UserError(
            f"tasks: the {lack} prompts are about fewer than two things, so no probe can be tested on another than it was "
            "trained on; add prompts"
        )
    total = np.maximum(size.sum(0), 1)
    load = np.zeros((folds, 2))
    place = np.zeros(len(names), np.int64)
    # Largest groups first, each to the fold that then is the emptiest in the classes that the group holds.
    shuffled = rng_of("probe folds", *key).permutation(len(names))
    for g in sorted(shuffled, key=lambda g: -float(size[g].sum())):
        fill = ((load + size[g]) / total) @ (size[g] / size[g].sum())
        place[g] = int(np.argmin(fill))
        load[place[g]] += size[g]
    fold: NDArray[np.int64] = place[of]
    return fold


def shuffled_labels(positive: Bools, group: NDArray[Any], *key: str | int) -> Bools:
    """The labels moved between groups: groups are dealt in another order, and labels within each are dealt anew, so that
    every group keeps its size, and about one group's mix, and nothing of what it is about. Class totals are kept."""
    rng = rng_of("probe shuffle", *key)
    names = np.unique(group)
    dealt = np.concatenate([positive[group == g] for g in rng.permutation(names)])
    labels = np.empty_like(positive)
    start = 0
    for g in names:
        rows = np.flatnonzero(group == g)
        labels[rows] = rng.permutation(dealt[start : start + len(rows)])
        start += len(rows)
    return labels


@dataclass(frozen=True)
class Split:
    """One training and one test set that share no group."""

    name: str
    train: Bools
    test: Bools


def splits_of(prompts: Prompts, fold: NDArray[np.int64]) -> Iterator[Split]:
    """Held-out hazards, and each task left out.

    ``heldout``: trained on everything about seen hazards and, of the rest, on all but fold 0; tested on everything about
    held-out hazards and the rest's fold 0. ``loso:TASK``: trained on the other tasks, tested on the task; a task of one
    class only is tested against the other class in fold 0 of the other tasks, which is then not trained on. Never trained
    on: a row whose group is tested.
    """
    rest = ~prompts.seen & ~prompts.unseen
    if prompts.seen.any() and prompts.unseen.any():
        yield _apart(HELDOUT, prompts, ~prompts.unseen, prompts.unseen | (rest & (fold == 0)))
    for task in dict.fromkeys(prompts.task.tolist()):
        mine = prompts.task == task
        classes = np.unique(prompts.positive[mine])
        test = mine
        train = ~mine
        if len(classes) == 1:
            test = mine | (~mine & (fold == 0) & (prompts.positive != classes[0]))
            train = ~mine & (fold != 0)
        yield _apart(LOSO + task, prompts, train, test)


def _apart(name: str, prompts: Prompts, train: Bools, test: Bools) -> Split:
    return Split(name, train & ~test & ~np.isin(prompts.group, prompts.group[test]), test)


# -- scores --------------------------------------------------------------------------------------------------------


def out_of_fold(features: NDArray[Any], labels: Bools, fold: NDArray[Any], l2: float) -> Floats:
    """Score of every row, by a probe that was trained on the other folds."""
    scores = np.zeros(len(labels))
    for i in np.unique(fold):
        test = fold == i
        scores[test] = fit_scores(features[~test], labels[~test], features[test], l2)
    return scores


def _auroc(scores: Floats, labels: Bools) -> float:
    value = float(curve_figures(scores, labels, np.ones((1, len(scores))))[0][0])
    return value if value == value else 0.5


def _best(values: Mapping[Set, float]) -> Set:
    """The set of the highest AUROC; of equal ones the first."""
    return max(values, key=lambda s: values[s])


@dataclass(frozen=True)
class Probed:
    """All that was found. ``chosen``: the layer and pooling that ablation takes its direction from, by cross-validation over
    all prompts, layer 0 left out; ``layers``: the curves, JSON-ready (see docs/analysis.md)."""

    results: list[Result]
    layers: dict[str, Any]
    chosen: Set


@dataclass(frozen=True)
class _Tested:
    """The rows that scores are given for: their labels, groups and resamples."""

    name: str
    y: Bools
    group: NDArray[np.int64]
    weights: Floats

    def figures(self, scores: Floats) -> Separation:
        return separation(scores, self.y, self.group, self.weights)


class _Probing:
    """One probing, in the order in which it is done."""

    def __init__(self, states: States, prompts: Prompts, config: ProbeConfig, seed: int) -> None:
        self.prompts, self.config, self.seed = prompts, config, seed
        self.y = prompts.positive
        self.layers = list(range(len(states.mean)))
        self.x: dict[Set, NDArray[Any]] = {(p, at): states.of(p)[at] for p in POOLINGS for at in self.layers}
        self.fold = folds_of(self.y, prompts.group, config.folds, seed)
        self.folds = int(self.fold.max()) + 1
        self.results: list[Result] = []
        self.curves: list[dict[str, Any]] = []
        self.choices: dict[str, Any] = {}

    def fit(self, x: NDArray[Any], train: Bools, test: Bools) -> Floats:
        return fit_scores(x[train], self.y[train], x[test], self.config.l2)

    # -- all prompts -----------------------------------------------------------------------------------------------

    def cross_validated(self) -> dict[Set, Floats]:
        return {s: out_of_fold(x, self.y, self.fold, self.config.l2) for s, x in self.x.items()}

    def inner(self) -> list[dict[Set, float]]:
        """For each fold, the AUROC of every set among the other folds, by probes that saw neither the fold nor what they
        score. A probe without folds i and j scores j for the choice in i, and i for the choice in j."""
        if self.folds < 3:  # two folds leave nothing to choose by: then the first layer's mean, for want of better
            return [dict.fromkeys(self.x, 0.5)] * self.folds
        found: list[dict[Set, float]] = [{} for _ in range(self.folds)]
        for s, x in self.x.items():
            scores = np.zeros((self.folds, len(self.y)))
            for i in range(self.folds):
                for j in range(i):
                    pair = np.isin(self.fold, (i, j))
                    both = np.zeros(len(self.y))
                    both[pair] = self.fit(x, ~pair, pair)
                    scores[i, self.fold == j] = both[self.fold == j]
                    scores[j, self.fold == i] = both[self.fold == i]
            for i in range(self.folds):
                others = self.fold != i
                found[i][s] = _auroc(scores[i, others], self.y[others])
        return found

    def nested(self, scores: Mapping[Set, Floats], inner: Sequence[Mapping[Set, float]], *names: Pooling) -> Floats:
        """Out-of-fold scores, each fold by the set that its own training folds chose among ``names``."""
        picked = [_best({s: v for s, v in values.items() if s[0] in names}) for values in inner]
        self.choices[ALL if len(names) > 1 else names[0]] = [_plain(s) for s in picked]
        whole = np.zeros(len(self.y))
        for i, s in enumerate(picked):
            whole[self.fold == i] = scores[s][self.fold == i]
        return whole

    # -- one split -------------------------------------------------------------------------------------------------

    def choose(self, split: Split) -> Set:
        """The set that does best among the training rows of a split."""
        train = split.train
        fold = folds_of(self.y[train], self.prompts.group[train], INNER, self.seed, split.name)
        return _best({
            s: _auroc(out_of_fold(x[train], self.y[train], fold, self.config.l2), self.y[train])
            for s, x in self.x.items()
        })  # fmt: skip

    def can(self, split: Split) -> bool:
        """Whether both sides of a split have both classes, the training side about two things each."""
        group = self.prompts.group
        told = all(len(np.unique(group[split.train & (self.y == c)])) >= 2 for c in (False, True))
        return told and len(np.unique(self.y[split.test])) == 2

    # -- figures ---------------------------------------------------------------------------------------------------

    def tested(self, name: str, test: Bools) -> _Tested:
        group = self.prompts.group[test]
        rng = rng_of("probe intervals", self.seed, name)
        return _Tested(name, self.y[test], group, cluster_weights(group, self.config.bootstrap, rng))

    def tell(self, on: _Tested, probe: Floats, words: Floats | None = None) -> None:
        """The results on one set of rows: of the probe, of the words, and of the one above the other."""
        self._tell("", on, on.figures(probe))
        if words is None:
            return
        self._tell("_words", on, on.figures(words))
        gain, gained = (
            curve_figures(probe, on.y, w)[0] - curve_figures(words, on.y, w)[0]
            for w in (np.ones((1, len(on.y))), on.weights)
        )
        value = float(gain[0])
        low, high = percentiles(gained, (-1.0, 1.0))
        if high - low < 1e-12:  # equal in all resamples: they say nothing of the spread
            low, high = -1.0, 1.0
        low, high = min(low, value), max(high, value)
        self.results.append(result_of("probe_auroc_gain", value, low, high, len(on.y), "cluster-bootstrap", on.name))

    def _tell(self, ending: str, on: _Tested, s: Separation) -> None:
        kind = "cluster-bootstrap"
        for id, estimate, interval in (
            (f"probe_auroc{ending}", s.auroc, kind),
            (f"probe_tpr_at_1fpr{ending}", s.tpr, f"{kind}, no false alarm" if s.strict else kind),
        ):
            self.results.append(
                result_of(id, estimate.value, estimate.low, estimate.high, len(on.y), interval, on.name)
            )

    def untold(self, category: str) -> None:
        for id in ("probe_auroc", "probe_tpr_at_1fpr"):
            self.results.append(result_of(id, float("nan"), 0.0, 1.0, 0, "unscored", category))

    def curve(self, pooling: Literal["mean", "last", "words"], on: _Tested, scores: Sequence[Floats]) -> None:
        """One score list per layer; a single one (the words') is the same at all of them."""
        by_layer = [on.figures(of) for of in scores] * (len(self.layers) // len(scores))
        first = by_layer[0]
        for metric in ("auroc", "tpr_at_1fpr"):
            found = [s.auroc if metric == "auroc" else s.tpr for s in by_layer]
            self.curves.append({
                "pooling": pooling, "metric": metric, "category": on.name,
                "values": [e.value for e in found], "low": [e.low for e in found], "high": [e.high for e in found],
                "n": [first.positives, first.negatives],
                "strict": metric == "tpr_at_1fpr" and first.strict,
            })  # fmt: skip

    def shuffled(self, chosen: Set) -> None:
        """Probes of shuffled labels, under the chosen pooling, at every layer; the figure is that of the chosen layer."""
        dealt = [shuffled_labels(self.y, self.prompts.group, self.seed, i) for i in range(SHUFFLES)]
        folds = [
            folds_of(labels, self.prompts.group, self.config.folds, self.seed, i) for i, labels in enumerate(dealt)
        ]
        values = np.array([
            [
                _auroc(out_of_fold(self.x[chosen[0], layer], labels, fold, self.config.l2), labels)
                for labels, fold in zip(dealt, folds)
            ]
            for layer in self.layers
        ])  # fmt: skip
        low, high = np.quantile(values, [0.025, 0.975], axis=1)
        self.curves.append({
            "pooling": "shuffled", "metric": "auroc", "category": ALL, "values": values.mean(1).tolist(),
            "low": low.tolist(), "high": high.tolist(),
            "n": [int(self.y.sum()), int((~self.y).sum())], "strict": False,
        })  # fmt: skip
        at = chosen[1]
        value, least, most = (float(v[at]) for v in (values.mean(1), low, high))
        interval = f"central 95 % of {SHUFFLES} shuffles"
        self.results.append(result_of("probe_auroc_shuffled", value, least, most, len(self.y), interval, ALL))


def probe(states: States, prompts: Prompts, config: ProbeConfig, seed: int, progress: Progress | None = None) -> Probed:
    """Probe every layer under both poolings, with the baselines, the held-out hazards and each task left out.

    ``UserError`` where a class has fewer than two groups. A task that cannot be left out (no harmful prompt, say, would
    remain) has a result with ``n == 0``. A pure function of its arguments.
    """
    p = _Probing(states, prompts, config, seed)
    splits = list(splits_of(prompts, p.fold))
    done, total = 0, 3 + len(splits)

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    every = p.tested(ALL, np.ones(len(prompts), bool))
    words = out_of_fold(prompts.words, p.y, p.fold, config.l2)
    scores = p.cross_validated()
    step()
    inner = p.inner()
    p.tell(every, p.nested(scores, inner, *POOLINGS), words)
    for pooling in POOLINGS:
        p.tell(replace(every, name=pooling), p.nested(scores, inner, pooling))
        p.curve(pooling, every, [scores[pooling, layer] for layer in p.layers])
    p.curve("words", every, [words])
    step()
    for split in splits:
        if p.can(split):
            on = p.tested(split.name, split.test)
            of = {s: p.fit(x, split.train, split.test) for s, x in p.x.items()}
            plain = p.fit(prompts.words, split.train, split.test)
            picked = p.choose(split)
            p.choices[split.name] = _plain(picked)
            p.tell(on, of[picked], plain)
            for pooling in POOLINGS:
                p.curve(pooling, on, [of[pooling, layer] for layer in p.layers])
            p.curve("words", on, [plain])
        else:
            p.untold(split.name)
        step()
    chosen = _best({s: _auroc(v, p.y) for s, v in scores.items() if s[1] > 0})
    p.shuffled(chosen)
    step()
    layers = {
        "layers": p.layers, "curves": p.curves, "chosen": {**p.choices, "ablation": _plain(chosen)}, "folds": p.folds,
        "prompts": {"harmful": int(p.y.sum()), "harmless": int((~p.y).sum()), "groups": len(np.unique(prompts.group))},
    }  # fmt: skip
    return Probed(p.results, layers, chosen)


def _plain(s: Set) -> dict[str, Any]:
    return {"layer": s[1], "pooling": s[0]}
