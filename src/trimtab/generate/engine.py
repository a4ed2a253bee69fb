"""Batched generation on ``transformers``: an own decode loop, so that every answer has its own random numbers.

Answers are decoded side by side in slots; one that ends leaves its slot to the next prompt at once. What prompts have in
common from their start (samples of one prompt, attacks that only add to it, a shared system prompt) is computed once.
The schedule is a pure function of the prompt list, and the random number of a step belongs to (prompt seed, sample,
step), never to the batch: an answer does not depend on its neighbours beyond the rounding of the logits, and a run that
was stopped forms the same answers again.
Trades off: one host synchronisation per step, and buffers as wide as the longest answer under way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trimtab.errors import UserError
from trimtab.generate.config import Sampling
from trimtab.generate.fill import Filling
from trimtab.generate.packed import packed
from trimtab.generate.safebeam import Cost, Search, check_searchable
from trimtab.generate.sample import choose, repeats, wide_type
from trimtab.generate.schedule import Prompt, waves
from trimtab.generate.slots import GROW, Layout, Slots
from trimtab.models.config import HARM_TAGS
from trimtab.models.load import stop_ids
from trimtab.seeds import rng_of

Progress = Callable[[int, int, int], None]
"""Called now and then with (answers finished, answers in all, tokens generated so far)."""

_SHRINK_AT = 0.75
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class Output:
    """One answer. ``index`` points into the prompt list; ``ids`` exclude the end token; see ``Generation.finish``."""

    index: int
    key: str
    sample: int
    ids: tuple[int, ...]
    finish: str


class Engine:
    """A model ready to answer.

    stop_ids    ids that end an answer (they are not part of it)
    banned_ids  ids that are never generated: control tokens, turn markers, rows beyond the vocabulary
    pad_id      fills the left of short rows; masked, so any id will do
    tag_id      the harmfulness tag, which SafeBeam reads; None: the model knows none

    ``cost`` counts what SafeBeam has computed here so far; ``watch``, if it is set, is called with (key, token) of every token
    as it is chosen, so that an answer can be shown while it is made (SafeBeam chooses at the end, and tells nothing).
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Collection[int],
        banned_ids: Collection[int] = (),
        pad_id: int = 0,
        tag_id: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        kinds = set(getattr(model.config, "layer_types", None) or ())
        if kinds - _ATTENTION_LAYERS or getattr(model.config, "is_encoder_decoder", False):
            raise UserError(f"{type(model).__name__}: only decoders with plain attention layers can generate here")
        check_ends(stop_ids, banned_ids)
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.stop = frozenset(stop_ids)
        self.banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=self.device)
        self.pad_id = pad_id
        self.tag = tag_id
        self.cost = Cost()
        self.watch: Callable[[str, int], None] | None = None
        self.context = int(getattr(model.config, "max_position_embeddings", 0)) or None
        # A window is measured in columns: what a prompt shares must then stand right before the rest of it.
        self._windowed = bool(kinds - {"full_attention"}) or bool(getattr(model.config, "sliding_window", None))
        self._layout: Layout | None = None
        self.searchable = False  # found out by trying (``safebeam.check_searchable``)
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def around(cls, model: Any, tokenizer: Any, *, stops: Collection[int] = (), allow: Collection[int] = ()) -> Engine:
        """An engine for a model and its tokenizer: their stop ids and ``stops`` (the chat template's, say) end an
        answer, and ``guard_ids`` but ``allow`` are banned."""
        ends = stop_ids(model, tokenizer) | set(stops)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        banned = guard_ids(model, tokenizer) - ends - set(allow)
        return cls(model, stop_ids=ends, banned_ids=banned, pad_id=pad, tag_id=tag_of(tokenizer))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        done: Collection[tuple[str, int]] = frozenset(),
        progress: Progress | None = None,
    ) -> Iterator[list[Output]]:
        """Answer every prompt ``sampling.samples`` times; yields answers as they end, some at a time.

        ``done`` holds the (key, sample) pairs of an earlier run: they are not yielded again, and a wave made of them
        alone is skipped. ``UserError``, before anything is generated, for an empty prompt, one that does not fit the
        model's context, an id that the model lacks, a repeated key, or a model that SafeBeam cannot decode with.
        """
        rows = self.model.get_input_embeddings().weight.shape[0]
        check_prompts(prompts, sampling, rows, self.context)
        wide = 1
        if sampling.safebeam is not None:
            check_searchable(self)
            wide = sampling.safebeam.beams * sampling.safebeam.candidates
        with packed(self.model, wide * min(sampling.batch, len(prompts) * sampling.samples)):
            yield from self._waves(prompts, sampling, done, progress)

    def _waves(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        done: Collection[tuple[str, int]],
        progress: Progress | None,
    ) -> Iterator[list[Output]]:
        total = len(prompts) * sampling.samples
        finished, tokens = 0, 0
        for wave in waves(prompts, sampling):
            wanted = {slot for slot in wave if (prompts[slot[0]].key, slot[1]) not in done}
            if not wanted:
                finished += len(wave)
                if progress is not None:
                    progress(finished, total, tokens)
                continue
            for outputs in self._decode(prompts, wave, sampling):
                finished += len(outputs)
                tokens += sum(len(output.ids) for output in outputs)
                if kept := [output for output in outputs if (output.index, output.sample) in wanted]:
                    yield kept
                if progress is not None:
                    progress(finished, total, tokens)

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Prompt], wave: Sequence[tuple[int, int]], sampling: Sampling
    ) -> Iterator[list[Output]]:
        """One wave, to its end."""
        training = self.model.training
        self.model.eval()
        try:
            if sampling.safebeam is not None:
                search = Search(self, self.layout, [(prompts[index], index) for index, _ in wave], sampling)
                for found in search.run():
                    yield [Output(f.index, prompts[f.index].key, 0, f.ids, f.finish) for f in found]
                return
            answers = [_Answer(prompts[index], index, sample) for index, sample in wave]
            yield from _Wave(self, self.layout, answers, sampling).run()
        finally:
            self.model.train(training)

    @property
    def layout(self) -> Layout:
        """How the model's keys and values are held."""
        if self._layout is None:
            self._layout = Layout.of(self.model)
        return self._layout

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, slots: Slots) -> torch.Tensor:
        """Logits of the last position, ``[rows, vocabulary]``; the keys and values of ``ids`` are in the slots then."""
        extra = {"logits_to_keep": 1} if self._last_only else {}
        result = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=slots.cache, use_cache=True,
            **extra,
        )  # fmt: skip
        slots.filled += ids.shape[1]
        return result.logits[:, -1]


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, rows: int, context: int | None) -> None:
    """``UserError`` for a repeated key, an empty prompt, an id outside the model's ``rows`` embedding rows, or a prompt
    that leaves no room for its answer in ``context`` tokens (None: no limit is known)."""
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.key in seen:
            raise UserError(f"prompt {prompt.key!r} is given twice; keys must be unique")
        seen.add(prompt.key)
        size = len(prompt.ids)
        if not size:
            raise UserError(f"prompt {prompt.key!r} is empty; at least one token is needed")
        if int(prompt.ids.min()) < 0 or int(prompt.ids.max()) >= rows:
            raise UserError(f"prompt {prompt.key!r} has ids outside the model's {rows} embedding rows")
        if context is not None and size + sampling.max_new_tokens > context:
            raise UserError(
                f"prompt {prompt.key!r}: {size} tokens + max_new_tokens={sampling.max_new_tokens} exceed the "
                f"model's context of {context}; lower max_new_tokens or shorten the prompt"
            )


def check_ends(stop_ids: Collection[int], banned_ids: Collection[int]) -> None:
    """``UserError`` for an id that is to end an answer and never to come."""
    if overlap := set(stop_ids) & set(banned_ids):
        raise UserError(f"token {min(overlap)} is both a stop id and a banned id; take it out of one")


def tag_of(tokenizer: Any) -> int | None:
    """Id of the harmfulness tag, an added token of the tokenizer by one of the names ``HARM_TAGS``."""
    names = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    return next((names[name] for name in HARM_TAGS if name in names), None)


def guard_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids an answer must never hold: added special tokens that do not end it, and rows beyond the vocabulary."""
    ends = stop_ids(model, tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    rows = model.get_output_embeddings().weight.shape[0]
    return {number for number in special | set(range(len(tokenizer), rows)) if number not in ends and number < rows}


@dataclass
class _Answer:
    """An answer in the making. ``numbers`` are its uniform numbers, one per step; a step's number does not depend on
    ``max_new_tokens``."""

    prompt: Prompt
    index: int
    sample: int
    ids: list[int] = field(default_factory=list)
    finish: str | None = None
    numbers: np.ndarray | None = None

    def take(self, token: int, stop: Collection[int], sampling: Sampling) -> None:
        if token in stop:
            self.finish = "stop"
            return
        self.ids.append(token)
        looping = sampling.max_repeats is not None and repeats(self.ids, sampling.max_repeats)
        if looping or len(self.ids) == sampling.max_new_tokens:
            self.finish = "length"

    def output(self) -> Output:
        assert self.finish is not None
        return Output(self.index, self.prompt.key, self.sample, tuple(self.ids), self.finish)


class _Wave(Filling):
    """Decodes the answers of one wave. Row r of every tensor is slot r; a slot without an answer is idle."""

    def __init__(self, engine: Engine, layout: Layout, answers: list[_Answer], sampling: Sampling) -> None:
        super().__init__(engine, layout)
        self.sampling = sampling
        self.queue = answers[::-1]
        self.left: dict[int, int] = {}
        for answer in answers:
            self.left[answer.index] = self.left.get(answer.index, 0) + 1
        rows = min(sampling.batch, len(answers))
        self.live: list[_Answer | None] = [None] * rows
        self.slots = Slots(layout, rows, 0, GROW)
        self.start = [0] * rows  # the first column of each slot that counts
        device = engine.device
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)

    def run(self) -> Iterator[list[Output]]:
        ended: list[Output] = []
        while True:
            free = [row for row, answer in enumerate(self.live) if answer is None]
            if self.queue and len(free) >= max(1, len(self.live) // 8):
                if ended:
                    yield ended
                    ended = []
                self._admit(free, ended)
                continue
            if len(free) == len(self.live):
                break
            if not self.queue and len(self.live) - len(free) <= _SHRINK_AT * len(self.live):
                self._pack()
            self._step(ended)
        if ended:
            yield ended

    # -- letting prompts in ------------------------------------------------------------------------------------------

    def _admit(self, free: list[int], ended: list[Output]) -> None:
        """Fill free slots from the queue, computing what is not known yet of their prompts."""
        coming = [self.queue.pop() for _ in range(min(len(free), len(self.queue)))]
        self._fill({a.index: a.prompt for a in coming if a.index not in self.filled})
        rows = free[: len(coming)]
        longest = max(len(a.prompt.ids) for a in coming)
        if longest > self.slots.filled:
            every = torch.arange(len(self.live), device=self.engine.device)
            self._move(every, self.slots.filled - longest)
        logits = torch.stack([self.filled[a.index].logits for a in coming])
        for row, answer in zip(rows, coming):
            if self.sampling.temperature > 0:
                rng = rng_of("generate", answer.prompt.seed, answer.sample)
                answer.numbers = rng.random(self.sampling.max_new_tokens)
            self.live[row] = answer
            self.start[row] = self.slots.filled - len(answer.prompt.ids)
            self.slots.put(row, self.filled[answer.index].chunk, self.slots.filled)
            self.left[answer.index] -= 1
            if not self.left[answer.index]:
                del self.filled[answer.index]
        where = torch.tensor(rows, device=self.engine.device)
        # The first token of an answer stands where its prompt ends.
        self.positions[where] = torch.tensor([len(a.prompt.ids) for a in coming], device=self.engine.device)
        self.tokens[where] = self._choose(rows, logits, ended)

    # -- decoding ----------------------------------------------------------------------------------------------------

    def _step(self, ended: list[Output]) -> None:
        """One token for every slot."""
        if self.slots.full:
            starts = [self.start[row] for row, answer in enumerate(self.live) if answer is not None]
            self._move(torch.arange(len(self.live), device=self.engine.device), min(starts))
        width = self.slots.filled + 1
        columns = torch.arange(width, device=self.engine.device)
        mask = (columns[None] >= torch.tensor(self.start, device=self.engine.device)[:, None]).long()
        logits = self.engine._forward(self.tokens[:, None], mask, self.positions[:, None], self.slots)
        self.positions += 1
        if self.engine.context is not None:  # an idle slot counts on too, and must not leave a table of positions
            self.positions.clamp_(max=self.engine.context - 1)
        rows = [row for row, answer in enumerate(self.live) if answer is not None]
        if len(rows) == len(self.live):
            self.tokens = self._choose(rows, logits, ended)
        else:
            where = torch.tensor(rows, device=self.engine.device)
            self.tokens[where] = self._choose(rows, logits[where], ended)

    def _choose(self, rows: list[int], logits: torch.Tensor, ended: list[Output]) -> torch.Tensor:
        """The next tokens of some slots; those that end fall free."""
        uniform = None
        answers = [answer for row in rows if (answer := self.live[row]) is not None]
        if self.sampling.temperature > 0:
            numbers = [float(answer.numbers[len(answer.ids)]) for answer in answers if answer.numbers is not None]
            device = self.engine.device
            uniform = torch.tensor(numbers, dtype=torch.float64).to(device, wide_type(device))
        chosen = choose(logits, self.sampling, uniform, self.engine.banned)
        for row, answer, token in zip(rows, answers, chosen.tolist()):
            answer.take(token, self.engine.stop, self.sampling)
            if self.engine.watch is not None and answer.finish != "stop":
                self.engine.watch(answer.prompt.key, token)
            if answer.finish is not None:
                ended.append(answer.output())
                self.live[row] = None
                self.start[row] = max(self.slots.filled - 1, 0)  # an idle slot looks at as little as it can
        return chosen

    def _pack(self) -> None:
        """Let go of the idle slots, and of the columns that only they used."""
        rows = [row for row, answer in enumerate(self.live) if answer is not None]
        index = torch.tensor(rows, device=self.engine.device)
        self._move(index, min(self.start[row] for row in rows))
        self.live = [self.live[row] for row in rows]
        self.start = [self.start[row] for row in rows]
        self.tokens, self.positions = self.tokens[index], self.positions[index]

    def _move(self, rows: torch.Tensor, cut: int) -> None:
        self.slots.repack(rows, cut)
        self.start = [max(start - cut, 0) for start in self.start]
