"""The prefix lever's ratio curves: arms that are equal in everything but the ratio, what each ratio gave, and the trend.

A trend is a contrast (``contrasts``): the change along the least-squares line from the lowest ratio to the highest, within
each seed on the same prompts, with one interval over seeds and prompts. Holm's adjustment is over all trends of the single
series, and over all of the series taken together, each by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from trimtab.evaluate import stats
from trimtab.report import contrasts
from trimtab.report.contrasts import Terms, Values, contrast, scaled, slope
from trimtab.report.data import Arm, Place, RatioCurve
from trimtab.report.panels import Cells, card_of, is_harmful
from trimtab.report.pulled import Prefix
from trimtab.report.view import fold

TRAINING = "training"
"""The place of figures that come from the log of the training."""
BODY_LOSS = "body_loss"
_FORMS: dict[str, Callable[[Any], str]] = {
    "variant": str, "keyword": lambda v: f"cue “{v}”" if v else "without the cue",
    "placement": lambda v: f"before the {v}", "opens": lambda v: f"opens the {v}",
    "loss_on_prefix": lambda v: "with loss" if v else "no loss on the prefix",
    "primer": lambda v: "primer" if v else "", "at_inference": lambda v: f"{v} at inference",
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Arms that are equal in everything but the ratio: ``at`` is ratio -> arm ids, one per seed.

    weight  training FLOPs per token, by which series stand in order (a larger model's are more)
    kin     series of one kin differ in what else is swept alone (sizes, say), and can be taken together
    """

    group: str
    label: str
    prefix: Prefix
    at: Mapping[float, tuple[str, ...]]
    weight: float
    kin: str

    @property
    def ratios(self) -> list[float]:
        return sorted(self.at)


def series_of(arms: Sequence[Arm], told: Mapping[str, Prefix], weight: Callable[[str], float]) -> list[Series]:
    """The series of a study, by arm group and then from the lightest model to the heaviest. A series without ratio 0
    borrows it from one that is the same training there. Those of a single ratio are left out."""
    families: dict[tuple[str, str, str], list[str]] = {}
    for arm in arms:
        if arm.id in told:
            families.setdefault(arm.family, []).append(arm.id)
    of = {arm.id: arm for arm in arms}
    found: dict[str, dict[float, tuple[str, ...]]] = {}
    for ids in families.values():
        mine = told[ids[0]]
        key = repr(
            (of[ids[0]].group, mine.stage, sorted(mine.settings.items(), key=str), sorted(mine.swept.items(), key=str))
        )
        found.setdefault(key, {})[mine.ratio] = tuple(ids)
    untouched = {
        repr(sorted(told[at[0.0][0]].rest.items(), key=str)): at[0.0]
        for at in found.values()
        if 0.0 in at and told[at[0.0][0]].settings.get("at_inference", "none") == "none"
    }
    series = []
    for at in found.values():
        first = next(iter(at.values()))[0]
        mine = told[first]
        base = untouched.get(repr(sorted(mine.rest.items(), key=str)))
        if 0.0 not in at and base is not None and mine.settings.get("at_inference", "none") == "none":
            at = {0.0: base, **at}
        if len(at) > 1:
            group = of[first].group
            kin = repr((group, mine.stage, sorted(mine.settings.items(), key=str)))
            series.append(Series(group, "", mine, dict(sorted(at.items())), weight(first), kin))
    order = list(dict.fromkeys(s.group for s in series))
    series.sort(key=lambda s: (order.index(s.group), str(s.prefix.unusual), s.weight))
    return [replace(s, label=_label(s, [o for o in series if o.group == s.group])) for s in series]


def _label(one: Series, others: Sequence[Series]) -> str:
    """What sets a series apart from the others of its group, in words."""
    names = dict.fromkeys(name for s in others for name in s.prefix.swept)
    parts = []
    for name in names:
        values = [s.prefix.swept.get(name) for s in others]
        if len({repr(v) for v in values}) > 1:
            parts.append(_shown(name, one.prefix.swept.get(name), [v for v in values if isinstance(v, Mapping)]))
    for name, words in _FORMS.items():
        values = [s.prefix.settings.get(name) for s in others]
        if len({repr(v) for v in values}) > 1:
            parts.append(words(one.prefix.settings.get(name)))
    return ", ".join(p for p in parts if p)


def _shown(name: str, value: Any, others: Sequence[Mapping[str, Any]]) -> str:
    """A swept value: of a model that is spelt out or loaded only what says how large it is."""
    if isinstance(value, Mapping):
        if "load" in value:
            return str(value["load"]).rstrip("/").split("/")[-1]
        if "hidden" in value and "layers" in value:
            return f"{value['hidden']} × {value['layers']} layers"
        return ", ".join(f"{k} {v}" for k, v in value.items() if any(o.get(k) != v for o in others))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.rstrip("/").split("/")[-1] if name.endswith("model") else f"{name} {text}"


# -- curves ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    """What a curve is of."""

    place: str
    kind: str
    mode: str | None
    task: str
    metric: str


def curves_of(
    series: Sequence[Series], cells: Cells, places: Sequence[Place], losses: Mapping[str, float]
) -> list[RatioCurve]:
    """Every metric of every series at every place, and of each kin together; then the loss of the trainings' ends
    (``losses``: arm -> mean loss of body tokens over the last tenth)."""
    found: list[RatioCurve] = []
    for _, some in groupby(series, key=lambda s: s.kin):
        kin = list(some)
        for key in _keys(kin, cells, places):
            at = {id(s): [(r, _values(cells, s.at[r], key)) for r in s.ratios] for s in kin}
            at = {s: [(r, v) for r, v in values if v] for s, values in at.items()}
            mine = [s for s in kin if len(at[id(s)]) > 1]
            found += [_curve(s, key, at[id(s)], cells) for s in mine]
            if len(mine) > 1:
                left = sum(_unscored(s, key, cells) for s in mine)
                found += [replace(c, unscored=left) for c in _pooled(mine, key, [at[id(s)] for s in mine])]
        trained = [(s, [(r, _lost(losses, s.at[r], cells)) for r in s.ratios]) for s in kin]
        key = _Key(TRAINING, "", None, "", BODY_LOSS)
        found += [_curve(s, key, at, cells) for s, at in trained if all(v for _, v in at)]
    for pooled in (False, True):
        chosen = [i for i, c in enumerate(found) if (c.pooled > 1) == pooled]
        tests = [i for i in chosen if found[i].trend["p"] == found[i].trend["p"]]
        holm = dict(zip(tests, stats.holm([found[i].trend["p"] for i in tests]).tolist() if tests else []))
        for i in chosen:
            found[i] = replace(found[i], trend={**found[i].trend, "p_holm": holm.get(i)})
    return found


def _keys(kin: Sequence[Series], cells: Cells, places: Sequence[Place]) -> Iterator[_Key]:
    arms = [id for s in kin for ids in s.at.values() for id in ids]
    order = cells.groups()
    for place in places:
        seen = {k for arm in arms if (cell := cells.by_arm.get((arm, place.stage))) for k in cell.values}
        for mode, group, metric in sorted(seen, key=lambda k: (order.index(k[1]), _rank(k[2]), k[2], k[0] or "")):
            yield _Key(place.stage, place.kind, mode, group, metric)


_FIRST = ("risk_rate", "accuracy", "over_refusal_contrast_full", "over_refusal_benign_full", "no_answer_rate")


def _rank(metric: str) -> int:
    return _FIRST.index(metric) if metric in _FIRST else len(_FIRST)


def _values(cells: Cells, ids: Iterable[str], key: _Key) -> Values:
    return shown(key.metric, cells.values(ids, key.place, key.task, key.metric, key.mode))


def shown(metric: str, values: Values) -> Values:
    """The values as they are shown: of a risk rate Safe@1, as in the paper."""
    if metric != "risk_rate":
        return values
    return {seed: {prompt: 1.0 - v for prompt, v in told.items()} for seed, told in values.items()}


def _lost(losses: Mapping[str, float], ids: Iterable[str], cells: Cells) -> Values:
    return {cells.seeds[i]: {"": losses[i]} for i in ids if i in losses}


def rise(at: Sequence[tuple[float, Values]]) -> Terms:
    """Terms of the change along the least-squares line from the first position to the last."""
    if len(at) == 2:  # a plain difference, which may have an exact test
        return [(1.0, at[1][1]), (-1.0, at[0][1])]
    return scaled(slope(at), at[-1][0] - at[0][0])


def _estimate(terms: Terms, key: str) -> dict[str, Any]:
    made = contrast(terms, key=key)
    none = {"difference": float("nan"), "low": float("nan"), "high": float("nan"), "p": float("nan"), "n": 0}
    return {**none, "seeds": 0, "each": [], "interval": contrasts.NONE} if made is None else made.plain()


def _curve(one: Series, key: _Key, at: Sequence[tuple[float, Values]], cells: Cells) -> RatioCurve:
    points = [_point(one.at[r], key, values, cells) for r, values in at]
    words = f"ratio {one.group} {one.label} {key.place} {key.mode} {key.task} {key.metric}"
    label, direction = _named(key)
    return RatioCurve(
        one.group, one.label, key.place, key.kind, key.task, _id(key.metric), label, direction,
        [one.at[r][0] for r, _ in at], [r for r, _ in at], [p[0] for p in points], [p[1] for p in points],
        [p[2] for p in points], min(p[3] for p in points), max(len(v) for _, v in at),
        _estimate(rise(at), f"{words} trend"), _estimate([(1.0, at[-1][1]), (-1.0, at[0][1])], f"{words} ends"),
        key.mode, share=key.metric != BODY_LOSS, unscored=_unscored(one, key, cells),
    )  # fmt: skip


def _point(ids: Sequence[str], key: _Key, values: Values, cells: Cells) -> tuple[float, float, float, int]:
    """Value, interval and n of one ratio, folded over the seeds as everywhere in a report."""
    if key.place == TRAINING:
        mean, low, high, _ = stats.over_seeds([told[""] for told in values.values()])
        return mean, low, high, 0
    results = [
        replace(cell.results[key.mode, key.task, key.metric], seed=cells.seeds[i])
        for i in ids
        if (cell := cells.by_arm.get((i, key.place))) and (key.mode, key.task, key.metric) in cell.values
    ]
    made = fold(results, True)
    if key.metric == "risk_rate":
        return 1.0 - made.value, 1.0 - made.high, 1.0 - made.low, made.n[0]
    return made.value, made.low, made.high, made.n[0]


def _unscored(one: Series, key: _Key, cells: Cells) -> int:
    told = (cells.by_arm.get((i, key.place)) for ids in one.at.values() for i in ids)
    return sum(cell.unscored.get((key.mode, key.task, key.metric), 0) for cell in told if cell is not None)


def _pooled(kin: Sequence[Series], key: _Key, at: Sequence[Sequence[tuple[float, Values]]]) -> Iterator[RatioCurve]:
    """The series of one kin together: the mean of their trends, over the ratios that all of them have."""
    ratios = [r for r, _ in at[0] if all(r in dict(other) for other in at)]
    if len(ratios) < 2:
        return
    cells = [[(r, dict(values)[r]) for r in ratios] for values in at]
    many = len(kin)
    words = f"ratio {kin[0].kin} {key.place} {key.mode} {key.task} {key.metric}"
    points = [contrast([(1 / many, dict(c)[r]) for c in cells], key=f"{words} {r}") for r in ratios]
    if any(p is None for p in points):
        return
    told = [p for p in points if p is not None]
    trend = [term for c in cells for term in scaled(rise(c), 1 / many)]
    ends = [term for c in cells for term in ((1 / many, c[-1][1]), (-1 / many, c[0][1]))]
    label, direction = _named(key)
    names = f"all {many}" if many > 2 else "both"
    form = ", ".join(w for name, words_ in _FORMS.items() if name in kin[0].prefix.unusual
                     if (w := words_(kin[0].prefix.settings[name])))  # fmt: skip
    yield RatioCurve(
        kin[0].group, ", ".join(p for p in (f"{names} together", form) if p), key.place, key.kind, key.task,
        _id(key.metric), label, direction, [kin[0].at[r][0] for r in ratios], ratios, [p.value for p in told],
        [p.low for p in told], [p.high for p in told], min(p.n for p in told), min(len(p.each) for p in told),
        _estimate(trend, f"{words} trend"), _estimate(ends, f"{words} ends"), key.mode, pooled=many,
    )  # fmt: skip


def _id(metric: str) -> str:
    return "safe_at_1" if metric == "risk_rate" else metric


def _named(key: _Key) -> tuple[str, str]:
    if key.metric == BODY_LOSS:
        return "loss of body tokens at the end of training", "none"
    card = card_of(_id(key.metric))
    return card["label"], card["direction"]


def main_curves(curves: Sequence[RatioCurve], group: str) -> list[RatioCurve]:
    """The curves that a group's figures and findings lead with: Safe@1, or accuracy of what is not safety's."""
    mine = [c for c in curves if c.group == group and c.place != TRAINING]
    safe = [c for c in mine if c.metric == "safe_at_1" and is_harmful(c.task)]
    return safe or [c for c in mine if c.metric == "accuracy"]
