"""The safety alignment margin: how far apart a model's modes are before a word is said (2508.14904, sec. 3.3).

A point is what a model makes of one prompt in one mode where its answer begins: the float logits of the first token over the
vocabulary, or the state of a layer there. Labels are the modes, the figure is the mean silhouette. Left out of the logits
are ids that are never generated (control tokens, turn markers, rows beyond the vocabulary): a control's own logit would
tell the modes apart without any answer being likelier. Later tokens follow the model's own greedy answer in each mode; a
prompt is left out of them once one of its answers has ended.

A model that has a mode is asked in it by its own switch, any other by an instruction at the end of the prompt, so that
base, SFT, DPO and co-trained models are measured alike; that a margin in words is another question than one by token is for
the reader to keep in mind. Trades off: each token is a pass over the whole prompt, so that no more than one matrix [points,
vocabulary] is held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trimtab.analyze.config import MarginConfig
from trimtab.analyze.metrics import ALL, result_of
from trimtab.analyze.silhouette import Geometry, Margins, geometry, gram_of, margins, silhouettes
from trimtab.analyze.states import streamed
from trimtab.errors import UserError
from trimtab.generate.config import Sampling
from trimtab.levers.modes import with_text
from trimtab.seeds import rng_of
from trimtab.types import HARMS, Result, Row

if TYPE_CHECKING:
    from trimtab.evaluate.targets import LocalTarget

Progress = Callable[[int, int], None]
_INTERVAL = "prompt-bootstrap"


@dataclass(frozen=True)
class Asked:
    """The prompts as ids, ``ids[prompt][mode]``, and how each mode is asked: by ``levers.modes.Token``."""

    rows: Sequence[Row]
    modes: tuple[str, ...]
    by: Mapping[str, str]
    ids: list[list[NDArray[Any]]]


def ask(
    target: LocalTarget, rows: Sequence[Row], modes: Sequence[str], words: Mapping[str, str], tokens: int, seed: int
) -> Asked:
    """Make every prompt ready in every mode. ``UserError`` for fewer than two modes or prompts, a mode named twice, a mode
    that the model lacks and ``words`` does not tell, and a prompt that does not fit the model."""
    if len(modes) < 2 or len(set(modes)) < len(modes):
        raise UserError(f"modes: a margin lies between two or more, each named once, not {', '.join(modes) or 'none'}")
    if len(rows) < 2:
        raise UserError(f"tasks: a margin needs two prompts or more, not {len(rows)}")
    has = target.switch.modes if target.prompting == "chat" else {}
    for mode in modes:
        if mode not in has and not words.get(mode, "").strip():
            raise UserError(
                f"words: {target.name} has no mode {mode!r} (it has {', '.join(sorted(has)) or 'none'}), and 'words' no "
                "instruction to ask for it; give one, or leave the mode out"
            )

    def ready(row: Row, mode: str) -> NDArray[Any]:
        told, own = (row, mode) if mode in has else (with_text(row, [words[mode]], "words"), None)
        ids: NDArray[Any] = target.ask(told, own, Sampling(max_new_tokens=tokens), seed).ready.ids
        return ids

    by = {mode: target.switch.token if mode in has else "words" for mode in modes}
    return Asked(rows, tuple(modes), by, [[ready(row, mode) for mode in modes] for row in rows])


def measure(
    target: LocalTarget, asked: Asked, config: MarginConfig, seed: int, progress: Progress | None = None
) -> tuple[list[Result], dict[str, Any]]:
    """The margins of a model: results, and what ``margin.json`` holds (docs/analysis.md). ``UserError`` for a layer that
    the model lacks. A token that fewer than two prompts come to has results with ``n == 0``."""
    reader = _Reader(target, asked, config)
    results: list[Result] = []
    figures: list[dict[str, Any]] = []
    for token in range(1, config.tokens + 1):
        kept = reader.kept()
        rows = [asked.rows[p] for p in kept]
        if len(kept) < 2:
            results += [
                result_of(f"margin_{f}_{d}", float("nan"), -1.0, 1.0, 0, "unscored", _category(token, None, ALL))
                for f in config.features
                for d in config.distances
            ]
            continue
        for features, layer, points in reader.points(kept, token == config.tokens, progress):
            gram = gram_of(points)
            for distance in config.distances:
                seen = geometry(gram, distance)
                about = {"features": features, "distance": distance, "token": token, "layer": layer}
                one = _Figure(rows, asked.modes, seen, about, config.bootstrap, seed)
                results += one.results()
                figures.append(one.plain())
    told = {
        "modes": list(asked.modes),
        "asked": dict(asked.by),
        "prompts": len(asked.rows),
        "left_out_ids": len(target.engine.banned),
        "figures": figures,
    }
    return results, told


def _category(token: int, layer: int | None, part: str) -> str:
    """``Result.category``: the part, after the token (from the second on) and the layer."""
    where = ([f"token:{token}"] if token > 1 else []) + ([] if layer is None else [f"layer:{layer}"])
    return "/".join([*where, part])


class _Reader:
    """Reads the places of an answer one after the other. ``ended``: bool[prompts, modes]."""

    def __init__(self, target: LocalTarget, asked: Asked, config: MarginConfig) -> None:
        self.target, self.asked, self.config = target, asked, config
        self.model = target.model
        self.ids = [[np.asarray(ids, np.int64) for ids in row] for row in asked.ids]
        self.ended = np.zeros((len(self.ids), len(asked.modes)), bool)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        allowed = np.ones(vocabulary, bool)
        allowed[target.engine.banned.cpu().numpy()] = False
        self.allowed = np.flatnonzero(allowed)
        self.layers = self._layers() if "hidden" in config.features else ()
        self.done, self.passes = 0, self.ended.size * config.tokens

    def _layers(self) -> tuple[int, ...]:
        most = int(self.model.config.num_hidden_layers)
        for layer in self.config.layers:
            if not 0 <= layer <= most:
                raise UserError(f"layers: {layer} is none of this model's, which are 0 to {most}")
        return tuple(dict.fromkeys(self.config.layers)) or tuple(range(most + 1))

    def kept(self) -> list[int]:
        """The prompts whose answers have not ended in any mode."""
        return [int(p) for p in np.flatnonzero(~self.ended.any(1))]

    def points(
        self, kept: list[int], last: bool, progress: Progress | None
    ) -> list[tuple[str, int | None, NDArray[np.float32]]]:
        """The points of the next place, (features, layer, float32[prompts x modes, features]); then each answer goes on by
        its likeliest token, unless this was the ``last`` place."""
        modes = len(self.asked.modes)
        logits = np.empty((len(kept), modes, len(self.allowed)), np.float32)
        hidden = {
            at: np.empty((len(kept), modes, int(self.model.config.hidden_size)), np.float32) for at in self.layers
        }
        for m, mode in enumerate(self.asked.modes):
            order = sorted(range(len(kept)), key=lambda k: len(self.ids[kept[k]][m]))
            with self.target.live(mode):
                for start in range(0, len(order), self.config.batch):
                    some = order[start : start + self.config.batch]
                    out, states = read_last(self.target, [self.ids[kept[k]][m] for k in some], self.layers)
                    logits[some, m] = out[:, self.allowed]
                    for at, state in states.items():
                        hidden[at][some, m] = state
                    self.done += len(some)
                    if progress is not None:
                        progress(self.done, self.passes)
        if not last:
            self._go_on(kept, logits)
        every: list[tuple[str, int | None, NDArray[np.float32]]] = []
        if "logits" in self.config.features:
            every.append(("logits", None, logits.reshape(len(kept) * modes, -1)))
        return every + [("hidden", at, state.reshape(len(kept) * modes, -1)) for at, state in hidden.items()]

    def _go_on(self, kept: list[int], logits: NDArray[np.float32]) -> None:
        likeliest = self.allowed[logits.argmax(2)]
        for k, p in enumerate(kept):
            for m, token in enumerate(likeliest[k]):
                self.ended[p, m] = int(token) in self.target.engine.stop
                self.ids[p][m] = np.append(self.ids[p][m], token)


@torch.inference_mode()
def read_last(
    target: LocalTarget, prompts: Sequence[NDArray[Any]], layers: Sequence[int] = ()
) -> tuple[NDArray[np.float32], dict[int, NDArray[np.float32]]]:
    """What stands at the last token of each prompt: float32 logits [prompts, rows of the output layer], and the stream after
    ``layers`` (as in ``analyze.states``), float32 [prompts, hidden] each. Padded on the left, and the padding masked."""
    model, device = target.model, target.engine.device
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), target.engine.pad_id, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    states: dict[int, NDArray[np.float32]] = {}

    def visit(layer: int, stream: torch.Tensor) -> None:
        if layer in layers:
            states[layer] = stream[:, -1].float().cpu().numpy()

    attention = torch.from_numpy(mask).to(device)
    given: dict[str, Any] = {
        "input_ids": torch.from_numpy(ids).to(device), "attention_mask": attention,
        "position_ids": (attention.cumsum(1) - 1).clamp(min=0), "use_cache": False,
    }  # fmt: skip
    if "logits_to_keep" in signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    training = model.training
    model.eval()
    try:
        with streamed(model, visit) if layers else nullcontext():
            logits = model(**given).logits[:, -1]
    finally:
        model.train(training)
    return logits.float().cpu().numpy(), states


class Part(NamedTuple):
    """A mean silhouette with its interval, over ``n`` prompts; none of it is told where ``n`` is 0."""

    value: float
    low: float
    high: float
    n: int


@dataclass
class _Figure:
    """One set of points by one distance: its margins over all prompts, by mode and by class."""

    rows: Sequence[Row]
    modes: tuple[str, ...]
    seen: Geometry
    about: dict[str, Any]
    bootstrap: int
    seed: int
    _found: dict[str, Margins] = field(default_factory=dict)

    def __post_init__(self) -> None:
        every = np.arange(len(self.rows))
        self.parts = {ALL: self._part(ALL, every)}
        for m, mode in enumerate(self.modes):
            self.parts[f"mode:{mode}"] = self._part(ALL, every, m + 1)
        for harm in HARMS:
            inside = np.array([p for p, row in enumerate(self.rows) if row.harm == harm], np.int64)
            if len(inside):
                self.parts[harm] = self._part(harm, inside)

    def _part(self, name: str, prompts: NDArray[Any], which: int = 0) -> Part:
        """Of these prompts alone, as if no other had been asked; one prompt has no margin."""
        if len(prompts) < 2:
            return Part(float("nan"), -1.0, 1.0, 0)
        if name not in self._found:
            modes = len(self.modes)
            points = (prompts[:, None] * modes + np.arange(modes)).ravel()
            rng = rng_of("margin", self.seed, name)  # the same resamples for all figures, so that they can be compared
            self._found[name] = margins(self.seen.distances[np.ix_(points, points)], modes, self.bootstrap, rng)
        m = self._found[name]
        return Part(float(m.value[which]), float(m.low[which]), float(m.high[which]), len(prompts))

    def results(self) -> list[Result]:
        id = f"margin_{self.about['features']}_{self.about['distance']}"
        return [
            result_of(id, p.value, p.low, p.high, p.n, _INTERVAL if p.n else "unscored",
                      _category(self.about["token"], self.about["layer"], name))
            for name, p in self.parts.items()
        ]  # fmt: skip

    def plain(self) -> dict[str, Any]:
        modes = len(self.modes)
        own = silhouettes(self.seen.distances, modes)[0]
        points = [
            {
                "prompt": row.id, "class": row.harm, "mode": mode, "s": _short(own[p, m]),
                "x": _short(self.seen.places[p * modes + m, 0]), "y": _short(self.seen.places[p * modes + m, 1]),
            }
            for p, row in enumerate(self.rows)
            for m, mode in enumerate(self.modes)
        ]  # fmt: skip
        values = {
            name: {"value": p.value if p.n else None, "low": p.low, "high": p.high, "n": p.n}
            for name, p in self.parts.items()
        }
        variance = [_short(share) for share in self.seen.variance]
        return {**self.about, "margins": values, "variance": variance, "points": points}


def _short(value: Any) -> float:
    """Five digits: what a plot needs."""
    return float(f"{float(value):.5g}")
