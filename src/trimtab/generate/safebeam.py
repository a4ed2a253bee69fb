"""SafeBeam (2504.16980, alg. 1): beam search that looks one token ahead for the harmfulness tag.

At each step the likeliest next tokens of every beam are tried. What the model then thinks of the tag is a candidate's risk;
the riskiest half of all candidates is dropped, and of the rest the likeliest texts are the next beams. The pass that
tells the risk also gives the logits of the next step, so a step costs ``beams * candidates`` single-token passes at most.

The beams of a prompt are a tree in one slot: its own keys and values are there once, candidates are siblings at one
position under a mask of four dimensions, and only the chosen ones' columns stay. Nothing is repeated or reordered;
columns that no beam descends from are dropped when the slot is full.
Trades off: one host synchronisation per step, and only models with plain full attention, which is checked by trying.

What the paper leaves open is decided so (docs/decoding.md):

* Probabilities are the model's own, over its whole vocabulary. Banned ids and the tag are read, never chosen.
* Of n candidates n // 2 are dropped; among equal risks (all below ``floor`` are) the less likely texts first.
* An end token is a candidate with the risk of the text before it. A text that has ended passed the filter when it did:
  it is not filtered again, and competes by its likelihood alone.
* The search is over when the likeliest text has ended, since no other can become likelier than it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from trimtab.errors import Fault, UserError
from trimtab.generate.config import SHORT_CIRCUIT, Sampling
from trimtab.generate.fill import Filling
from trimtab.generate.schedule import Prompt
from trimtab.generate.slots import Layout, Slots
from trimtab.models.config import HARM_TAGS
from trimtab.seeds import rng_of

if TYPE_CHECKING:
    from trimtab.generate.engine import Engine

_ROOM = 64
"""Columns of room for beams to grow into before what no beam needs is dropped."""
_SHRINK_AT = 0.75
_ATTENTION = ("sdpa", "eager")


@dataclass
class Cost:
    """What searches have computed: ``passes`` of the model, ``steps`` of single prompts in them, and ``tokens``, the
    single-token look-aheads of those (prompts themselves are not counted)."""

    passes: int = 0
    steps: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The text that a search ends with; ``index`` as given. Without a text where it was cut short (``SHORT_CIRCUIT``)."""

    index: int
    ids: tuple[int, ...]
    finish: str


class Beam:
    """A text in the making: one token after its ``parent``, standing in ``column``. The root is the prompt."""

    __slots__ = ("column", "ended", "logp", "parent", "risk", "token")

    def __init__(self, parent: Beam | None, token: int, logp: float, risk: float, ended: bool = False) -> None:
        self.parent, self.token, self.logp, self.risk, self.ended = parent, token, logp, risk, ended
        self.column = -1

    def chain(self) -> list[Beam]:
        """The beams from the first token on to this one."""
        found: list[Beam] = []
        here: Beam = self
        while here.parent is not None:
            found.append(here)
            here = here.parent
        return found[::-1]

    def ids(self) -> tuple[int, ...]:
        """The text's tokens, without an end token."""
        return tuple(beam.token for beam in self.chain() if not beam.ended)


class Hunt:
    """The search for one prompt, apart from the model: which candidates stay, and when it is over."""

    def __init__(self, prompt: Prompt, index: int, risk: float) -> None:
        self.prompt, self.index = prompt, index
        self.start = 0
        """First column of the prompt in its slot."""
        self.length = 0
        self.live = [Beam(None, -1, 0.0, risk)]
        self.ended: list[Beam] = []
        self.finish: str | None = None

    def step(
        self,
        tokens: Sequence[int],
        scores: Sequence[float],
        risks: Sequence[float],
        stop: Collection[int],
        sampling: Sampling,
    ) -> list[int]:
        """Choose among the candidates of the live beams (``candidates`` for each, beam after beam): their tokens, log
        probabilities (-inf: none) and risks. Returns the places of the chosen ones that live on, the likeliest first."""
        assert sampling.safebeam is not None and self.finish is None
        each = len(tokens) // len(self.live)
        floor, limit = sampling.safebeam.floor, sampling.safebeam.short_circuit
        pool: list[tuple[float, float, int, Beam]] = []  # (risk or floor, -logp, place, beam)
        for place, (token, score) in enumerate(zip(tokens, scores, strict=True)):
            if score == -np.inf:
                continue
            parent, ended = self.live[place // each], token in stop
            beam = Beam(parent, token, parent.logp + score, parent.risk if ended else risks[place], ended)
            pool.append((max(beam.risk, floor), -beam.logp, place, beam))
        if not pool:
            raise Fault("the model gives every token that may be generated a probability of 0; its weights are broken")
        pool.sort()
        self.length += 1
        if limit is not None and min(beam.risk for beam in [*(b for *_, b in pool), *self.ended]) >= limit:
            self.finish = SHORT_CIRCUIT
            return []
        # Among equals, texts that have ended stand first: their places are negative.
        kept = [(logp, beam.risk, place, beam) for _, logp, place, beam in pool[: len(pool) - len(pool) // 2]]
        kept += [(-beam.logp, beam.risk, -len(self.ended) + i, beam) for i, beam in enumerate(self.ended)]
        kept.sort()
        del kept[sampling.safebeam.beams :]
        self.live = [beam for *_, beam in kept if not beam.ended]
        self.ended = [beam for *_, beam in kept if beam.ended]
        if kept[0][3].ended:
            self.finish = "stop"
        elif self.length == sampling.max_new_tokens:
            self.finish = "length"
        return [place for *_, place, beam in kept if not beam.ended]

    def found(self) -> Found:
        """What came of it."""
        assert self.finish is not None
        best = {"stop": self.ended, "length": self.live}.get(self.finish)
        return Found(self.index, () if best is None else best[0].ids(), self.finish)


class Search(Filling):
    """Searches for the prompts of one wave, side by side. Row r of every tensor is slot r; a slot whose search is over is
    idle until the slots are set anew.

    tokens, scores  ``[slots, beams, candidates]``: what is tried next, and its log probability
    seen            ``[slots, beams, columns]``: 0 where a beam descends from a column, else the lowest number
    """

    def __init__(
        self, engine: Engine, layout: Layout, prompts: Sequence[tuple[Prompt, int]], sampling: Sampling
    ) -> None:
        super().__init__(engine, layout)
        assert sampling.safebeam is not None and engine.tag is not None
        self.sampling = sampling
        self.queue = list(prompts)[::-1]
        self.rows = min(sampling.batch, len(prompts))
        self.tag = engine.tag
        size = engine.model.get_output_embeddings().weight.shape[0]
        self.each = min(sampling.safebeam.candidates, size)
        self.widest = sampling.safebeam.beams * self.each
        device = engine.device
        self.banned = torch.cat([engine.banned, torch.tensor([self.tag], device=device)]).unique()
        self.hidden = torch.finfo(layout.dtype).min
        own = torch.full((self.widest, self.widest), self.hidden, dtype=layout.dtype, device=device)
        self.alone = own.fill_diagonal_(0.0)
        self.hunts: list[Hunt | None] = []
        self.slots = Slots(layout, 0, 0, 0)
        self.tokens = torch.zeros(0, 1, self.each, dtype=torch.long, device=device)
        self.scores = torch.zeros(0, 1, self.each, device=device)
        self.seen = torch.zeros(0, 1, 0, dtype=layout.dtype, device=device)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)

    def run(self) -> Iterator[list[Found]]:
        """Search to the end; yields what is found, some at a time."""
        while True:
            busy = sum(hunt is not None for hunt in self.hunts)
            if self.queue and self.rows - busy >= max(1, self.rows // 8):
                self._set(self.rows - busy)
            elif not busy:
                return
            elif (not self.queue and busy <= _SHRINK_AT * len(self.hunts)) or self._full():
                self._set(0)
            if found := self._step():
                yield found

    # -- one step ----------------------------------------------------------------------------------------------------

    def _step(self) -> list[Found]:
        rows, beams, each = self.tokens.shape
        filled, wide = self.slots.filled, beams * each
        past = self.seen[:, :, None, :filled].expand(-1, -1, each, -1).reshape(rows, wide, filled)
        mask = torch.cat([past, self.alone[:wide, :wide].expand(rows, -1, -1)], dim=-1)[:, None]
        logits = siblings(self.engine, self.slots, self.tokens.view(rows, wide), mask, self.positions)
        self.positions += 1
        if self.engine.context is not None:  # an idle slot counts on too, and must not leave a table of positions
            self.positions.clamp_(max=self.engine.context - 1)
        whole, risk = self._risk(logits)
        told = torch.stack([self.tokens.view(rows, wide).float(), self.scores.view(rows, wide), risk]).cpu().numpy()
        if np.isnan(told).any():
            raise Fault("the model's logits are not finite (NaN or infinite); its weights or precision are broken")
        chosen, ended = self._choose(told, each)
        if any(chosen):
            self._go_on(chosen, logits, whole)
        return ended

    def _choose(self, told: np.ndarray, each: int) -> tuple[list[list[int]], list[Found]]:
        """The candidates of every slot that are its next beams, and what slots have found."""
        chosen: list[list[int]] = [[] for _ in self.hunts]
        ended: list[Found] = []
        cost = self.engine.cost
        cost.passes += 1
        for row, hunt in enumerate(self.hunts):
            if hunt is None:
                continue
            size = len(hunt.live) * each
            cost.steps, cost.tokens = cost.steps + 1, cost.tokens + size
            tokens, scores, risks = told[:, row, :size].tolist()
            chosen[row] = hunt.step(list(map(int, tokens)), scores, risks, self.engine.stop, self.sampling)
            if hunt.finish is not None:
                ended.append(hunt.found())
                self.hunts[row], chosen[row] = None, []
        return chosen, ended

    def _go_on(self, chosen: list[list[int]], logits: torch.Tensor, whole: torch.Tensor) -> None:
        """Keep the columns of the chosen candidates, and take the next ones from their logits."""
        beams, each = max(map(len, chosen)), self.tokens.shape[2]
        filled = self.slots.filled
        for hunt in self.hunts:
            for i, beam in enumerate(hunt.live if hunt is not None else ()):
                beam.column = filled + i
        places = torch.tensor([row + [0] * (beams - len(row)) for row in chosen], device=self.engine.device)
        self.slots.keep(places)
        parents = places.div(each, rounding_mode="floor")[:, :, None]
        self.seen = self.seen.gather(1, parents.expand(-1, -1, self.seen.shape[2]))
        self.seen[:, :, filled : filled + beams].diagonal(dim1=1, dim2=2).zero_()
        self.slots.filled += beams
        rows = torch.arange(len(chosen), device=self.engine.device)[:, None]
        self.tokens, self.scores = self._best(logits[rows, places], whole[rows, places])

    def _risk(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithm of what probabilities are divided by, and the probability of the tag."""
        wide = logits.float()
        whole = wide.logsumexp(-1)
        return whole, (wide[..., self.tag] - whole).exp()

    def _best(self, logits: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens that may be chosen, and their log probabilities. ``logits`` is changed."""
        best = logits.index_fill_(-1, self.banned, float("-inf")).topk(self.each, dim=-1)
        return best.indices, best.values.float() - whole[..., None]

    # -- slots -------------------------------------------------------------------------------------------------------

    def _full(self) -> bool:
        return self.slots.filled + self.tokens.shape[1] * self.each > self.slots.buffers[0].shape[3]

    def _set(self, more: int) -> None:
        """Set the slots anew: without idle ones and without columns that no beam needs, and with up to ``more`` prompts
        from the queue."""
        device = self.engine.device
        coming = [self.queue.pop() for _ in range(min(more, len(self.queue)))]
        self._fill({index: prompt for prompt, index in coming})
        held = [(row, hunt) for row, hunt in enumerate(self.hunts) if hunt is not None]
        trees = [_nodes(hunt) for _, hunt in held]
        filled = [self.filled.pop(index) for _, index in coming]
        width = max(
            [len(hunt.prompt.ids) + len(nodes) for (_, hunt), nodes in zip(held, trees)]
            + [len(prompt.ids) for prompt, _ in coming]
        )
        slots = Slots(self.layout, len(held) + len(coming), width, _ROOM + self.widest)
        slots.filled = width
        for row, ((old, hunt), nodes) in enumerate(zip(held, trees)):
            size = len(hunt.prompt.ids)
            columns = [*range(hunt.start, hunt.start + size), *(node.column for node in nodes)]
            slots.put(row, self.slots.pick(old, torch.tensor(columns, device=device)), width)
            hunt.start = width - len(columns)
            for column, node in enumerate(nodes, hunt.start + size):
                node.column = column
        beams = max([len(hunt.live) for _, hunt in held], default=1)
        kept = torch.tensor([row for row, _ in held], dtype=torch.long, device=device)
        tokens = torch.zeros(slots.rows, beams, self.each, dtype=torch.long, device=device)
        scores = torch.zeros(slots.rows, beams, self.each, device=device)
        tokens[: len(held)] = self.tokens[kept, :beams]
        scores[: len(held)] = self.scores[kept, :beams]
        hunts = [hunt for _, hunt in held]
        if coming:
            logits = torch.stack([prompt.logits for prompt in filled])
            whole, risk = self._risk(logits)
            tokens[len(held) :, 0], scores[len(held) :, 0] = self._best(logits, whole)
            for (prompt, index), said, risky in zip(coming, filled, risk.tolist()):
                slots.put(len(hunts), said.chunk, width)
                hunts.append(Hunt(prompt, index, risky))
                hunts[-1].start = width - len(prompt.ids)
        seen = np.zeros((slots.rows, beams, slots.buffers[0].shape[3]), dtype=bool)
        for row, hunt in enumerate(hunts):
            seen[row, :, hunt.start : hunt.start + len(hunt.prompt.ids)] = True
            for i, beam in enumerate(hunt.live):
                seen[row, i, [node.column for node in beam.chain()]] = True
        self.seen = torch.full(seen.shape, self.hidden, dtype=self.layout.dtype, device=device)
        self.seen.masked_fill_(torch.from_numpy(seen).to(device), 0.0)
        places = [len(hunt.prompt.ids) + hunt.length for hunt in hunts]
        self.positions = torch.tensor(places, device=device)
        self.slots, self.tokens, self.scores, self.hunts = slots, tokens, scores, list(hunts)


def _nodes(hunt: Hunt) -> list[Beam]:
    """The tokens that live beams descend from, in the order of their columns."""
    found: dict[int, Beam] = {}
    for beam in hunt.live:
        here = beam
        while here.parent is not None and here.column not in found:
            found[here.column] = here
            here = here.parent
    return [found[column] for column in sorted(found)]


def siblings(
    engine: Engine, slots: Slots, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits ``[rows, tokens, vocabulary]`` of tokens that all stand at one position (per row) of their slot. Their keys and
    values are written from ``slots.filled`` on; the caller decides which to keep."""
    logits: torch.Tensor = engine.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions[:, None].expand_as(tokens),
        past_key_values=slots.cache,
        use_cache=True,
    ).logits
    return logits


@torch.inference_mode()
def check_searchable(engine: Engine) -> None:
    """``UserError`` for a model that SafeBeam cannot decode with: one that knows no tag, or whose attention does not take
    siblings. The latter is tried once per engine, against plain passes of the same tokens."""
    if engine.tag is None:
        raise UserError(
            "SafeBeam needs a model trained with the harmfulness tag; this tokenizer has no added token "
            f"{' or '.join(HARM_TAGS)}: choose another decoder"
        )
    if engine.searchable:
        return
    name = type(engine.model).__name__
    refused = UserError(f"{name}: SafeBeam needs a model with plain full attention; choose another decoder")
    kind = getattr(engine.model.config, "_attn_implementation", None)
    if kind not in _ATTENTION:
        raise UserError(f"{name}: SafeBeam needs attention 'sdpa' or 'eager', not {kind!r}; load the model with one")
    if engine._windowed:
        raise refused
    training = engine.model.training
    engine.model.eval()
    try:
        together, apart = _tried(engine)
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError):
        raise refused from None
    finally:
        engine.model.train(training)
    scale = (apart - apart.mean(-1, keepdim=True)).abs().max()
    bound = 1e-2 if together.dtype == torch.float32 else 0.1
    if not bool(((together - apart).abs().max() <= bound * scale).cpu()):
        raise refused
    engine.searchable = True


def _tried(engine: Engine) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of six tokens after five, as siblings and each in a pass of its own."""
    device = engine.device
    rows = engine.model.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy(rng_of("safebeam", "try").integers(0, rows, 11)).to(device)
    past, after = ids[None, :5], ids[None, 5:]
    slots = Slots(engine.layout, 1, 0, 11)
    places = torch.arange(5, device=device)[None]
    engine._forward(past, torch.ones_like(past), places, slots)
    hidden = torch.finfo(slots.layout.dtype).min
    mask = torch.full((1, 1, 6, 11), hidden, dtype=slots.layout.dtype, device=device)
    mask[..., :5] = 0.0
    mask[0, 0, :, 5:].fill_diagonal_(0.0)
    together = siblings(engine, slots, after, mask, torch.full((1,), 5, device=device))[0]
    plain = torch.cat([past.expand(6, -1), after.T], dim=1)
    return together, engine.model(input_ids=plain, attention_mask=torch.ones_like(plain)).logits[:, -1]
