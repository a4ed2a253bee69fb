"""The search behind the GCG attack: a suffix of the last user message that makes a given opening likely (2307.15043).

Everything happens on the ids that the renderer makes, with the mode's control ids where they belong. A candidate counts
only if the renderer gives back its very ids when the suffix is written out as text, so the loss that was minimised is that
of the attempt as it will be generated from; no candidate holds an added token. What stands before the suffix is computed
once. Deterministic for a seed on one machine and number of threads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trimtab.errors import Fault, UserError
from trimtab.types import SPAN_ID, Message

_FILLERS = (" !", " x", " a", "!", "x ")


@dataclass(frozen=True, slots=True)
class Found:
    """The best suffix (with the blank that parts it from the request), and what it took."""

    suffix: str
    loss_first: float
    loss_best: float
    steps: int
    queries: int


def search(
    handle: Any,
    messages: Sequence[Message],
    target: str,
    *,
    steps: int,
    width: int,
    topk: int,
    length: int,
    batch: int,
    seed: int,
) -> Found:
    """Search for ``steps`` steps, or until ``target`` is what the model would greedily say.

    handle        ``.model``, ``.tokenizer``, ``.renderer``, ``.controls`` (names that are live), ``.controls_at`` (by
                  default the system slot)
    width, topk   candidates per step; tokens per position that they are drawn from
    length        of the suffix in tokens; batch: candidates evaluated at once

    ``UserError`` where the prompt does not fit the model's context or the tokenizer cannot hold a suffix.
    """
    prompt = _Prompt(handle, messages, target, length)
    model = handle.model
    training = model.training
    model.eval()
    try:
        return _search(_Scorer(model, prompt, batch), prompt, steps, width, topk, seed)
    finally:
        model.train(training)


def _search(scorer: _Scorer, prompt: _Prompt, steps: int, width: int, topk: int, seed: int) -> Found:
    generator = torch.Generator().manual_seed(seed)
    allowed = prompt.allowed(scorer.rows)
    current = best = torch.tensor(prompt.start)
    losses, hits = scorer.losses(current[None])
    first = lowest = float(losses[0])
    reached, queries, made = bool(hits[0]), 1, 0
    while made < steps and not reached:
        made += 1
        top = scorer.promising(current, allowed, topk)
        candidates = _drawn(current, top, prompt, width, generator)
        if not len(candidates):
            continue  # every draw was a suffix that text cannot hold; the next draws are others
        losses, hits = scorer.losses(candidates)
        queries += len(candidates)
        for i in torch.argsort(losses, stable=True).tolist():
            if prompt.holds(candidates[i].tolist()):
                current = candidates[i]
                if float(losses[i]) < lowest:
                    best, lowest, reached = current, float(losses[i]), bool(hits[i])
                break
    return Found(prompt.text_of(best.tolist()), first, lowest, made, queries)


def _drawn(
    current: torch.Tensor, top: torch.Tensor, prompt: _Prompt, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Up to ``width`` distinct suffixes ``[n, length]`` with one token replaced, that survive being written as text."""
    kept: dict[tuple[int, ...], None] = {}
    for _ in range(4):
        where = torch.randint(len(current), (width,), generator=generator)
        which = torch.randint(top.shape[1], (width,), generator=generator)
        drawn = current.repeat(width, 1)
        drawn[torch.arange(width), where] = top[where, which]
        for ids in drawn.tolist():
            key = tuple(ids)
            if len(kept) < width and key not in kept and ids != current.tolist() and prompt.writable(ids):
                kept[key] = None
        if len(kept) == width:
            break
    return torch.tensor(list(kept), dtype=torch.long).reshape(-1, len(current))


class _Prompt:
    """The rendered conversation with a suffix in it.

    before, after   ids left of the suffix; ids right of it, the target last
    start           ids of the first suffix
    goal            number of target ids
    """

    def __init__(self, handle: Any, messages: Sequence[Message], target: str, length: int) -> None:
        self.renderer, self.tokenizer, self.controls = handle.renderer, handle.tokenizer, tuple(handle.controls)
        self.at = getattr(handle, "controls_at", "system")
        self.encoder = handle.renderer.encoder
        self.messages, self.target = tuple(messages), target
        self.request = messages[-1]["content"].rstrip()
        asked, (low, high), _ = self._render("")
        self.plain = asked[low:high]
        for filler in _FILLERS:
            text = filler * length
            ids, (low, high), goal = self._render(text)
            content = ids[low:high]
            self.start = content[len(self.plain) :]
            heads = [h for h in (True, False) if self.encoder.encode(self.request + text, head=h) == content]
            if content[: len(self.plain)] == self.plain and len(self.start) == length and heads:
                self.head = heads[0]
                break
        else:
            raise UserError(
                "gcg: this tokenizer or chat template changes text after a request; no suffix can be placed"
            )
        cut = low + len(self.plain)
        self.before, self.after, self.goal = ids[:cut], ids[high:], goal
        self.base_text = self._decode(self.plain)
        if self.text_of(self.start) != text:
            raise UserError(
                "gcg: this tokenizer does not give back the text that it encoded; no suffix can be written out"
            )

    def _render(self, suffix: str) -> tuple[list[int], tuple[int, int], int]:
        """Ids, the (start, end) of the last message's content in them, and the number of target ids at their end."""
        last: Message = {**self.messages[-1], "content": self.request + suffix}
        rendered = self.renderer.chat(
            [*self.messages[:-1], last],
            controls=self.controls,
            controls_at=self.at,
            prefill=self.target,
            generation_prompt=True,
        )
        inside = (rendered.message == len(self.messages) - 1) & (rendered.span == SPAN_ID["prompt"])
        where = np.flatnonzero(inside)
        if not len(where):
            raise UserError("gcg: the last user message is empty; there is nothing to add a suffix to")
        breaks = np.flatnonzero(np.diff(where) > 1)  # a name before the content is a run of its own
        low = int(where[breaks[-1] + 1]) if len(breaks) else int(where[0])
        goal = int(((rendered.message == -1) & (rendered.span == SPAN_ID["prefix"])).sum())
        if not goal:
            raise UserError("gcg: the target has no tokens")
        return rendered.ids.tolist(), (low, int(where[-1]) + 1), goal

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text_of(self, suffix: Sequence[int]) -> str:
        """The suffix as text; decoded behind the request, since some tokenizers drop the first blank of a text."""
        return self._decode([*self.plain, *suffix])[len(self.base_text) :]

    def writable(self, suffix: list[int]) -> bool:
        """Whether the suffix written out after the request is encoded as these ids again."""
        text = self.text_of(suffix)
        return text == text.rstrip() and self.encoder.encode(self.request + text, head=self.head) == self.plain + suffix

    def holds(self, suffix: list[int]) -> bool:
        """Whether the whole conversation with the suffix as text renders to the ids that were evaluated."""
        try:
            return self._render(self.text_of(suffix))[0] == [*self.before, *suffix, *self.after]
        except UserError:  # the template makes other structure of this text
            return False

    def allowed(self, rows: int) -> torch.Tensor:
        """Ids that a suffix may hold: ordinary tokens of printable ASCII that are not blank."""
        kept = []
        for token in range(min(len(self.tokenizer), rows)):
            if token not in self.encoder.added:
                text = self._decode([token])
                if text.strip() and text.isascii() and text.isprintable():
                    kept.append(token)
        if not kept:
            raise UserError("gcg: the vocabulary has no token of plain ASCII text to build a suffix from")
        return torch.tensor(kept)


class _Scorer:
    """Losses of suffixes and promising replacements, by one model for one prompt."""

    def __init__(self, model: Any, prompt: _Prompt, batch: int) -> None:
        self.model, self.batch, self.goal = model, batch, prompt.goal
        self.weight: torch.Tensor = model.get_input_embeddings().weight
        self.rows = int(self.weight.shape[0])
        self.device = self.weight.device
        self.before = torch.tensor([prompt.before], device=self.device)
        self.after = torch.tensor([prompt.after], device=self.device)
        self.target = self.after[0, -self.goal :]
        size = len(prompt.before) + len(prompt.start) + len(prompt.after)
        context = getattr(model.config, "max_position_embeddings", None)
        if context and size > context:
            raise UserError(f"gcg: prompt, suffix and target have {size} tokens; the model's context is {context}")
        with torch.no_grad():
            self.cache = model(input_ids=self.before, use_cache=True).past_key_values
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def losses(self, suffixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the target after each suffix ``[n, length]``, and whether each would be said greedily."""
        losses, hits = [], []
        for part in suffixes.split(self.batch):
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(part))
            ids = torch.cat([part.to(self.device), self.after.expand(len(part), -1)], dim=1)
            extra = {"logits_to_keep": self.goal + 1} if self.last_only else {}
            logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **extra).logits
            logits = logits[:, -self.goal - 1 : -1].float()
            target = self.target.expand(len(part), -1)
            losses.append(functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1).cpu())
            hits.append((logits.argmax(-1) == target).all(1).cpu())
        found = torch.cat(losses)
        if not torch.isfinite(found).all():
            raise Fault("gcg: the model's loss is not finite; its weights or precision are broken")
        return found, torch.cat(hits)

    @torch.enable_grad()
    def promising(self, suffix: torch.Tensor, allowed: torch.Tensor, topk: int) -> torch.Tensor:
        """The tokens ``[length, topk]`` whose embeddings lie furthest down the gradient of the loss.

        The gradient is taken by the embeddings and not by one-hot rows: a model that scales its embeddings only scales
        every score alike.
        """
        ids = torch.cat([self.before, suffix.to(self.device)[None], self.after], dim=1)
        embedded = self.model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0, -self.goal - 1 : -1].float()
        loss = functional.cross_entropy(logits, self.target)
        (gradient,) = torch.autograd.grad(loss, embedded)
        start = self.before.shape[1]
        wanted = allowed.to(self.device)
        scores = -(gradient[0, start : start + len(suffix)] @ self.weight.detach()[wanted].T)
        return wanted[scores.topk(min(topk, len(allowed)), dim=1).indices].cpu()
