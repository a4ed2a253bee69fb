"""A model behind an OpenAI-compatible endpoint as what is evaluated (``targets`` has the one that is loaded here)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.errors import Fault, UserError
from trimtab.evaluate.targets import FILTERED, NO_MODE, REJECTED, Asked, Progress, Target
from trimtab.generate.config import Sampling
from trimtab.seeds import seed_of
from trimtab.types import Generation, Row

if TYPE_CHECKING:
    from trimtab.endpoint import EndpointConfig

_NOT_TAKEN = frozenset({"http 400", "http 413", "http 422"})


@dataclass
class _Missing:
    """Answers that did not come, and why."""

    reasons: Counter[str] = field(default_factory=Counter)
    words: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, words: str) -> None:
        self.reasons[reason] += 1
        if words:
            self.words.setdefault(reason, words)

    def check(self, total: int) -> None:
        if self.reasons:
            parts = [(f"{reason} {n}", self.words.get(reason)) for reason, n in self.reasons.most_common()]
            said = ", ".join(f"{part}: {words}" if words else part for part, words in parts)
            raise Fault(
                f"{self.reasons.total()} of {total} answers did not come ({said}); those that came are kept: run the same "
                "command again to ask for the rest"
            )


class EndpointTarget(Target):
    """A model behind an OpenAI-compatible endpoint: messages go out, its own server renders them.

    prefill  the server continues an assistant message that ends the conversation (vLLM's ``continue_final_message``)
    """

    def __init__(self, config: EndpointConfig, *, prefill: bool = False) -> None:
        from trimtab.endpoint import Endpoint

        self.endpoint = Endpoint(config)
        self.prefill = prefill
        self.name = config.model
        self.identity = self.endpoint.identity
        self.facts = {
            "name": config.model,
            "kind": "endpoint",
            "identity": self.identity,
            "url": config.url,
            "template_hash": None,
            "modes": [],
        }

    def modes(self, wanted: Sequence[str] | None) -> tuple[str | None, ...]:
        named = [mode for mode in wanted or () if mode != NO_MODE]
        if named:
            raise UserError(
                f"modes: {named[0]!r} cannot be asked of an endpoint; its server decides which mode is live"
            )
        return (None,)

    def ask(self, row: Row, mode: str | None, sampling: Sampling, seed: int) -> Asked:
        assert row.messages is not None
        messages: list[dict[str, Any]] = [dict(m) for m in row.messages]
        opening = row.metadata.get("prefill")
        if opening is not None:
            if not self.prefill:
                attack = row.metadata.get("attack")
                what, other = (f"attack {attack!r}", "the attack") if attack else (f"row {row.id!r}", "the row")
                raise UserError(
                    f"{what} opens the answer, which the chat-completions API does not know; leave {other} out, or say "
                    "--endpoint-prefill if the server continues a last assistant message (vLLM does)"
                )
            messages.append({"role": "assistant", "content": opening})
        asked = self._key(row, mode, messages, sampling, seed)
        asked.ready = messages
        return asked

    def answer(
        self, asked: Sequence[Asked], sampling: Sampling, done: Collection[str], progress: Progress | None = None
    ) -> Iterator[list[Generation]]:
        from trimtab.endpoint import EndpointError, Request

        for name in ("max_repeats", "safebeam"):
            if getattr(sampling, name) is not None:
                raise UserError(f"sampling: {name!r} cannot be asked of an endpoint; leave it out")
        more = {k: v for k in ("top_p", "top_k") if (v := getattr(sampling, k)) is not None}
        todo = [(a, s) for a in asked for s in range(sampling.samples) if a.answer_key(s) not in done]
        missing, finished = _Missing(), len(asked) * sampling.samples - len(todo)

        def requests() -> Iterator[Request]:
            for a, sample in todo:
                extra = dict(more)
                if a.row.metadata.get("prefill") is not None:
                    extra |= {"add_generation_prompt": False, "continue_final_message": True}
                seed = seed_of("endpoint", a.seed, sample) % 2**31
                yield Request(a.ready, sampling.max_new_tokens, sampling.temperature, seed, extra)

        for (a, sample), reply in zip(todo, self.endpoint.complete_all(requests())):
            if not isinstance(reply, EndpointError):
                yield [self._generation(a, sampling, sample, (), reply.text, reply.finish)]
            elif reply.reason in ("content filter", "refused"):
                yield [self._unanswered(a, sampling, sample, FILTERED)]
            elif reply.reason in ("no content", "truncated"):
                # An answer without a text is the model's answer; the judges leave it unscored. Asked again it would say the
                # same, and the run would never come to its end.
                yield [self._unanswered(a, sampling, sample, "stop" if reply.reason == "no content" else "length")]
            elif reply.reason in _NOT_TAKEN and "attack" in a.row.metadata:
                yield [self._unanswered(a, sampling, sample, REJECTED)]
            else:
                missing.add(reply.reason, reply.message)
                continue
            finished += 1
            if progress is not None:
                progress(finished, len(asked) * sampling.samples, 0)
        missing.check(len(asked) * sampling.samples)

    def close(self) -> None:
        self.endpoint.close()
