"""Batched generation on ``transformers``: an own decode loop, so that every answer has its own random numbers.

Answers are decoded side by side in left-padded batches, longest prompts first; the batches are a pure function of the
prompt list, so a run that was stopped forms the same ones again. The random number of a step belongs to (prompt seed,
sample, step), never to the batch: an answer does not depend on its neighbours beyond the rounding of the logits.
Finished rows leave the batch when that pays, with the columns of padding that only they needed.
Trades off: one prefill per sample (prefixes are not shared), and one host synchronisation per step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from trimtab.errors import Fault, UserError
from trimtab.generate.config import Sampling
from trimtab.models.load import stop_ids
from trimtab.seeds import rng_of

Progress = Callable[[int, int, int], None]
"""Called after each batch with (answers finished, answers in all, tokens generated so far)."""

_CHUNK = 128
_SHRINK_AT = 0.75
_LONGEST_PHRASE = 32
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: ``ids`` (1-d integers, the assistant's header included), its seed, and a unique key."""

    ids: np.ndarray
    seed: int
    key: str


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
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: Collection[int],
        banned_ids: Collection[int] = (),
        pad_id: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        kinds = set(getattr(model.config, "layer_types", None) or ()) - _ATTENTION_LAYERS
        if kinds or getattr(model.config, "is_encoder_decoder", False):
            raise UserError(f"{type(model).__name__}: only decoders with plain attention layers can generate here")
        if overlap := set(stop_ids) & set(banned_ids):
            raise UserError(f"token {min(overlap)} is both a stop id and a banned id; take it out of one")
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.stop = frozenset(stop_ids)
        self.banned = torch.tensor(sorted(banned_ids), dtype=torch.long, device=self.device)
        self.pad_id = pad_id
        self.context = int(getattr(model.config, "max_position_embeddings", 0)) or None
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def around(cls, model: Any, tokenizer: Any, *, stops: Collection[int] = (), allow: Collection[int] = ()) -> Engine:
        """An engine for a model and its tokenizer: their stop ids and ``stops`` (the chat template's, say) end an
        answer, and ``guard_ids`` but ``allow`` are banned."""
        ends = stop_ids(model, tokenizer) | set(stops)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        banned = guard_ids(model, tokenizer) - ends - set(allow)
        return cls(model, stop_ids=ends, banned_ids=banned, pad_id=pad)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        done: Collection[tuple[str, int]] = frozenset(),
        progress: Progress | None = None,
    ) -> Iterator[list[Output]]:
        """Answer every prompt ``sampling.samples`` times; yields one list per finished batch, longest prompts first.

        ``done`` holds the (key, sample) pairs of an earlier run: they are not yielded again, and a batch made of them
        alone is skipped. ``UserError``, before anything is generated, for an empty prompt, one that does not fit the
        model's context, an id that the model lacks, or a repeated key.
        """
        self._check(prompts, sampling)
        total = len(prompts) * sampling.samples
        finished, tokens = 0, 0
        for batch in batches(prompts, sampling):
            wanted = [slot for slot in batch if (prompts[slot[0]].key, slot[1]) not in done]
            if wanted:
                outputs = self._decode([_Answer(prompts[index], index, sample) for index, sample in batch], sampling)
                tokens += sum(len(output.ids) for output in outputs)
                kept = set(wanted)
                yield [output for output in outputs if (output.index, output.sample) in kept]
            finished += len(batch)
            if progress is not None:
                progress(finished, total, tokens)

    def _check(self, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        seen: set[str] = set()
        rows = self.model.get_input_embeddings().weight.shape[0]
        for prompt in prompts:
            if prompt.key in seen:
                raise UserError(f"prompt {prompt.key!r} is given twice; keys must be unique")
            seen.add(prompt.key)
            size = len(prompt.ids)
            if not size:
                raise UserError(f"prompt {prompt.key!r} is empty; at least one token is needed")
            if int(prompt.ids.min()) < 0 or int(prompt.ids.max()) >= rows:
                raise UserError(f"prompt {prompt.key!r} has ids outside the model's {rows} embedding rows")
            if self.context is not None and size + sampling.max_new_tokens > self.context:
                raise UserError(
                    f"prompt {prompt.key!r}: {size} tokens + max_new_tokens={sampling.max_new_tokens} exceed the "
                    f"model's context of {self.context}; lower max_new_tokens or shorten the prompt"
                )

    @torch.inference_mode()
    def _decode(self, answers: list[_Answer], sampling: Sampling) -> list[Output]:
        """Generate one batch to its end. ``live`` are the answers still in the tensors, row by row."""
        training = self.model.training
        self.model.eval()
        try:
            live = answers
            ids, mask = self._pad([answer.prompt.ids for answer in live])
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = Cache(layer_class_to_replicate=_GrowingLayer)
            numbers = self._numbers(answers, sampling)
            for step in range(sampling.max_new_tokens):
                logits = self._forward(ids, mask, positions, cache)
                uniform = None if numbers is None else numbers[[answer.row for answer in live], step]
                chosen = choose(logits, sampling, uniform, self.banned)
                for answer, token in zip(live, chosen.tolist()):
                    answer.take(token, self.stop, sampling)
                keep = [row for row, answer in enumerate(live) if answer.finish is None]
                if not keep:
                    break
                if len(keep) <= _SHRINK_AT * len(live):
                    live = [live[row] for row in keep]
                    index = torch.tensor(keep, device=self.device)
                    chosen, positions, mask = chosen[index], positions[index], mask[index]
                    cut = int(mask.argmax(-1).min())
                    mask = mask[:, cut:]
                    for layer in cache.layers:
                        assert isinstance(layer, _GrowingLayer)
                        layer.select(index, cut)
                ids = chosen[:, None]
                positions = positions[:, -1:] + 1
                mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=-1)
        finally:
            self.model.train(training)
        return [answer.output() for answer in answers]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits of the last position, ``[rows, vocabulary]``."""
        extra = {"logits_to_keep": 1} if self._last_only else {}
        result = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **extra
        )
        return result.logits[:, -1]

    def _pad(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """``ids`` and ``mask``, ``[rows, longest]``, padded on the left."""
        width = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _numbers(self, answers: list[_Answer], sampling: Sampling) -> torch.Tensor | None:
        """Uniform numbers ``[answers, steps]``; the number of a step does not depend on ``max_new_tokens``."""
        for row, answer in enumerate(answers):
            answer.row = row
        if sampling.temperature == 0:
            return None
        drawn = [
            rng_of("generate", answer.prompt.seed, answer.sample).random(sampling.max_new_tokens) for answer in answers
        ]
        return torch.from_numpy(np.stack(drawn)).to(self.device, _wide(self.device))


def batches(prompts: Sequence[Prompt], sampling: Sampling) -> list[list[tuple[int, int]]]:
    """The (prompt index, sample) pairs of every batch: longest prompts first, ties and samples in order."""
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index].ids), index))
    slots = [(index, sample) for index in order for sample in range(sampling.samples)]
    return [slots[start : start + sampling.batch] for start in range(0, len(slots), sampling.batch)]


def guard_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids an answer must never hold: added special tokens that do not end it, and rows beyond the vocabulary."""
    ends = stop_ids(model, tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    rows = model.get_output_embeddings().weight.shape[0]
    return {number for number in special | set(range(len(tokenizer), rows)) if number not in ends and number < rows}


def choose(
    logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None, banned: torch.Tensor
) -> torch.Tensor:
    """Next token of every row, ``[rows]``: greedy, or the inverse of the cumulated probabilities at ``uniform``.

    The probabilities are cumulated in the order of the ids, in float64 where the device has it, so a rounding of the
    logits moves a choice only where ``uniform`` lies within that rounding of a boundary.
    """
    if banned.numel():
        logits = logits.index_fill(-1, banned, float("-inf"))
    best, token = logits.max(dim=-1)
    if not torch.isfinite(best).all():
        raise Fault("the model's logits are not finite (NaN or infinite); its weights or precision are broken")
    if uniform is None:
        return token
    wide = _wide(logits.device)
    scaled = (logits.to(wide) - best.to(wide)[:, None]) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        kept = scaled.topk(sampling.top_k, dim=-1).indices
        scaled = torch.full_like(scaled, float("-inf")).scatter(-1, kept, scaled.gather(-1, kept))
    weight = scaled.exp()
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, where = weight.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p * ordered.sum(-1, keepdim=True), 0.0)
        weight = torch.zeros_like(weight).scatter(-1, where, ordered)
    heap = weight.cumsum(-1)
    target = uniform[:, None].to(wide) * heap[:, -1:]
    found = torch.searchsorted(heap, target, right=True)[:, 0]
    # uniform < 1, but its product with the sum may round up to the sum: then the last token with weight is meant.
    last = weight.shape[-1] - 1 - (weight > 0).flip(-1).int().argmax(-1)
    return torch.minimum(found, last)


def repeats(ids: Sequence[int], times: int) -> bool:
    """Whether ``ids`` end in one phrase of 1 to 32 tokens, ``times`` times over."""
    for size in range(1, min(_LONGEST_PHRASE, len(ids) // times) + 1):
        span = size * times
        if ids[-1] == ids[-1 - size] and list(ids[-span:-size]) == list(ids[-span + size :]):
            return True
    return False


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class _Answer:
    """An answer in the making."""

    prompt: Prompt
    index: int
    sample: int
    row: int = 0
    ids: list[int] = field(default_factory=list)
    finish: str | None = None

    def take(self, token: int, stop: Collection[int], sampling: Sampling) -> None:
        if self.finish is not None:
            return
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


class _GrowingLayer(DynamicLayer):
    """Keys and values of one layer in a buffer that grows by chunks: a step writes one column and copies nothing.

    ``keys`` and ``values`` are views of the filled part, ``[rows, kv_heads, filled, head_dim]``. Sliding-window layers
    keep their full length; the model's mask hides what lies outside the window.
    """

    filled: int
    buffers: list[torch.Tensor]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.filled = 0
        end = self.filled + key_states.shape[-2]
        if self.filled == 0 or end > self.buffers[0].shape[-2]:
            grown: list[torch.Tensor] = []
            for state, old in ((key_states, self.keys), (value_states, self.values)):
                buffer = state.new_empty(*state.shape[:-2], end + _CHUNK, state.shape[-1])
                if self.filled and old is not None:
                    buffer[:, :, : self.filled] = old
                grown.append(buffer)
            self.buffers = grown
        for state, buffer in zip((key_states, value_states), self.buffers):
            buffer[:, :, self.filled : end] = state
        self.filled = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def select(self, rows: torch.Tensor, cut: int) -> None:
        """Keep some rows, and drop the first ``cut`` columns (padding of all rows that stay)."""
        self.buffers = [buffer.index_select(0, rows)[:, :, cut:] for buffer in self.buffers]
        self.filled -= cut
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
