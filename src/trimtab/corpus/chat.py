"""Chat models that write: the protocol, and the one behind an endpoint, which never asks the same twice.

Every answer of an endpoint is appended to a JSONL file in the work directory before it is used, under the digest of what
was asked (who, messages, sampling, seed). A killed run, or one with another number of workers, finds it there. Each process
writes a file of its own; a line that a crash cut short is asked again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from trimtab.artifact import is_no_space, no_space
from trimtab.corpus.lazy import Lazy
from trimtab.endpoint import Completion, Endpoint, EndpointConfig, EndpointError, Request
from trimtab.errors import Fault
from trimtab.seeds import digest
from trimtab.types import Message


class Chat(Protocol):
    """A chat model. ``write``: one text per prompt, in order; None where no answer came."""

    identity: str

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]: ...


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer (``cut``: ended by the token limit), or None and the reason why there is none."""

    text: str | None
    reason: str = ""
    cut: bool = False


class EndpointChat(Lazy):
    """The chat model of an endpoint; ``work`` is where its answers are kept (None: nowhere).

    Retries, and what stops a run, are the endpoint's. Errors are not kept: the next run asks again.
    """

    def __init__(self, config: EndpointConfig, work: Path | None) -> None:
        self.config, self.work = config, work
        self.identity = Endpoint(config).identity  # and a missing key is found here, before anything is asked

    @cached_property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.config)

    @cached_property
    def answers(self) -> Answers | None:
        return Answers(self.work) if self.work is not None else None

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        with closing(self.ask(prompts, max_tokens=max_tokens, temperature=temperature, seeds=seeds)) as replies:
            for reply in replies:
                yield reply.text

    def ask(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Generator[Reply, None, None]:
        """As ``write``, with the reason where no answer came ("endpoint: timeout"; see ``endpoint.REASONS``)."""
        keys = [
            digest([self.identity, prompt, max_tokens, temperature, seed])
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        known: dict[str, Reply] = {}
        todo: dict[str, Request] = {}  # what stands twice among the prompts is asked once
        for key, prompt, seed in zip(keys, prompts, seeds):
            kept = self.answers.get(key) if self.answers is not None and key not in todo else None
            if kept is not None:
                known[key] = Reply(kept["text"], cut=kept["cut"])
            elif key not in known:
                todo[key] = Request(prompt, max_tokens, temperature, seed)
        with closing(self.endpoint.complete_all(iter(todo.values()))) as replies:
            for key in keys:
                if key not in known:
                    known[key] = self._keep(key, next(replies))
                yield known[key]

    def close(self) -> None:
        """Close the connections and files; a later call opens them again."""
        for name in ("endpoint", "answers"):
            if (opened := self.__dict__.pop(name, None)) is not None:
                opened.close()

    def _keep(self, key: str, done: Completion | EndpointError) -> Reply:
        if isinstance(done, EndpointError):
            return Reply(None, f"endpoint: {done.reason}")
        cut = done.finish == "length"
        if self.answers is not None:
            self.answers.put(key, {"text": done.text, "cut": cut})
        return Reply(done.text, cut=cut)


class Answers:
    """Answers kept in a directory of JSONL files: all that stand there are read, one of our own is written.

    Only the places of the answers are held in memory (about 200 bytes each), not their texts.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._places: dict[str, tuple[Path, int]] = {}
        self._own: tuple[Path, int] | None = None  # path, file descriptor
        directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(directory.glob("answers-*.jsonl")):
            self._index(path)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> dict[str, Any] | None:
        """What was put under ``key``, or None."""
        if key not in self._places:
            return None
        path, at = self._places[key]
        with path.open("rb") as file:
            file.seek(at)
            return dict(json.loads(file.readline()))

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer; when this returns, a killed process cannot lose it. ``Fault``: a full disk."""
        line = json.dumps({"key": key, **answer}, ensure_ascii=False).encode("utf-8") + b"\n"
        try:
            if self._own is None:
                descriptor, name = tempfile.mkstemp(prefix="answers-", suffix=".jsonl", dir=self.directory)
                self._own = Path(name), descriptor
            path, descriptor = self._own
            at = os.lseek(descriptor, 0, os.SEEK_END)
            try:
                while line:
                    line = line[os.write(descriptor, line) :]
            except OSError:
                os.ftruncate(descriptor, at)  # half a line would spoil the next one
                raise
        except OSError as error:
            if is_no_space(error):
                raise no_space(self.directory) from error
            raise Fault(f"cannot write to {self.directory}: {error.strerror}") from error
        self._places[key] = path, at

    def close(self) -> None:
        if self._own is not None:
            os.close(self._own[1])
            self._own = None

    def _index(self, path: Path) -> None:
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return  # cut short by a crash, or being written
                try:
                    data = json.loads(line)
                    key, _, _ = data["key"], data["text"], data["cut"]
                except (ValueError, KeyError, TypeError):
                    raise Fault(
                        f"{path}, line {number}: damaged; remove the file (its answers are asked again)"
                    ) from None
                self._places[key] = path, at
                at += len(line)
