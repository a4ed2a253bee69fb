"""A model provider for Inspect: ``--model trimtab/<bundle>@<mode>`` runs any Inspect task on a bundle and a mode.

Inspect finds this module through its entry point group. Calls that wait at the same time are answered together on one
``Engine`` by a worker thread, and all modes of a bundle share that engine, so two modes cost one model and fill one
batch (but for a mode that is kept apart: its adapter is put on for a batch of its own). Prompts go through the
token-safe renderer: what it refuses is an error of that sample, never an answer.

Trade-offs: a stop string is looked for once the answer is whole (its tokens are counted and paid for), and the default
is greedy, so that an evaluation is the same tomorrow. Sampled answers depend on (seed, sample id, epoch, messages) and
not on what happens to be in the batch.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from trimtab.config import Config
from trimtab.errors import TrimtabError, UserError
from trimtab.evaluate.targets import NO_MODE, LocalTarget, open_local
from trimtab.generate.config import Sampling
from trimtab.models.config import LoadConfig
from trimtab.seeds import digest, seed_of
from trimtab.types import Message, Row

try:
    import anyio
    import anyio.from_thread
    import anyio.lowlevel
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelCall,
        ModelOutput,
        ModelUsage,
        StopReason,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise UserError(f"the Inspect provider needs inspect-ai ({error}): pip install 'trimtab[inspect]'") from None

if TYPE_CHECKING:
    from trimtab.generate.engine import Output

_WAIT = 0.02
"""Seconds without a new call after which a batch is started."""
_LONGEST = 2048
_UNSUPPORTED = (
    "best_of", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs",
    "response_schema", "modalities", "extra_body", "verbosity", "effort", "reasoning_effort", "reasoning_mode",
    "reasoning_tokens", "reasoning_summary",
)  # fmt: skip
"""Settings that would change an answer and cannot be honoured here; those of a remote service (retries) mean nothing."""


class Refused(UserError, PrerequisiteError):
    """A wrong model name or option, in the kind of error that Inspect prints as one line."""


class ModelOptions(Config):
    """What ``-M NAME=VALUE`` may set."""

    revision: str | None = Field(None, description="Hub commit or tag.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="Type of the loaded weights.")
    batch: int = Field(16, ge=1, description="Answers decoded side by side.")


@modelapi(name="trimtab")
def provider() -> type[ModelAPI]:
    """What Inspect calls for a model named ``trimtab/...``."""
    return TrimtabAPI


def split_name(name: str) -> tuple[str, str | None]:
    """``BUNDLE@MODE`` as (bundle, mode); the mode is None where none is named. A directory may have an @ in its name."""
    if "@" not in name or Path(name).expanduser().is_dir():
        return name, None
    bundle, _, mode = name.rpartition("@")
    if not bundle or not mode:
        raise UserError("write trimtab/BUNDLE or trimtab/BUNDLE@MODE")
    return bundle, mode


class TrimtabAPI(ModelAPI):
    """One bundle in one mode. ``model_name`` is ``BUNDLE[@MODE]``: a directory, a Hub id or the packaged model.

    Without a mode the bundle's default is live, if it has one, else no control token; ``@none`` asks for none. The
    negative mode is live only where it is named. ``Refused`` for a bundle, mode or option that does not exist.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        try:
            bundle, mode = split_name(model_name)
            self.host = _host(bundle, _options(model_args))
            self.mode = self.host.choose(mode)
        except TrimtabError as error:
            raise Refused(f"model trimtab/{model_name}: {error}") from error
        self.target = self.host.target
        self._asked: Counter[tuple[str | None, str]] = Counter()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> tuple[ModelOutput | Exception, ModelCall]:
        _check(tools, config)
        messages, prefill = _plain(input)
        renderer = self.target.renderer
        opened = {} if prefill is None else {"prefill": prefill}
        ids = self.target.ids(Row("inspect", tuple(messages), metadata=opened), self.mode)
        asked = config.max_tokens or self.max_tokens()
        sampling = _sampling(config, self._room(len(ids), asked), self.host.batch)
        seed = self._seed([*messages, prefill], config.seed)
        outputs = await self.host.answer(ids, self.mode, seed, sampling)
        opening = renderer.opening(prefill)
        choices = [
            self._choice(output, opening, config.stop_seqs, sampling.max_new_tokens < asked) for output in outputs
        ]
        new = sum(len(output.ids) for output in outputs)
        size = len(ids)
        usage = ModelUsage(input_tokens=size, output_tokens=new, total_tokens=size + new)
        facts = {"mode": self.mode, "template_hash": renderer.template_hash, "seed": seed}
        request = {"ids": ids.tolist(), "sampling": sampling.plain(), "seed": seed}
        call = ModelCall.create(request, {"ids": [list(output.ids) for output in outputs]})
        return ModelOutput(model=self.model_name, choices=choices, usage=usage, metadata={"trimtab": facts}), call

    def max_tokens(self) -> int:
        """Longest answer where the task says nothing: half the context, at most 2048 tokens."""
        context = self.target.context_tokens
        return _LONGEST if context is None else max(1, min(_LONGEST, context // 2))

    def max_connections(self) -> int:
        """Calls at a time: two batches, so that one waits while the other is answered."""
        return 2 * self.host.batch

    def collapse_user_messages(self) -> bool:
        """Many templates want user and assistant to take turns."""
        return True

    async def count_text_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's own tokenizer (Inspect's estimate would fetch another's)."""
        return len(self.target.renderer.encode_text(text))

    def _room(self, size: int, asked: int) -> int:
        context = self.target.context_tokens
        if context is not None and size >= context:
            raise UserError(f"the prompt has {size} tokens and the model's context is {context}; shorten the prompt")
        return asked if context is None else min(asked, context - size)

    def _seed(self, messages: Sequence[Any], seed: int | None) -> int:
        """Equal for equal (seed, sample, epoch, messages): modes are compared on the same random numbers, epochs are
        not repeats, and a retried evaluation draws what it would have drawn."""
        sample, epoch, run = _where()
        said = digest(list(messages))
        nth = self._asked[run, said]
        self._asked[run, said] += 1
        return seed_of("inspect", seed or 0, sample, epoch, said, nth)

    def _choice(self, output: Output, opening: str, stops: list[str] | None, cut: bool) -> ChatCompletionChoice:
        text = self.target.tokenizer.decode(output.ids, skip_special_tokens=False)
        found = [at for stop in stops or () if stop and (at := text.find(stop)) >= 0]
        reason: StopReason = "stop" if found or output.finish == "stop" else "model_length" if cut else "max_tokens"
        content = opening + (text[: min(found)] if found else text)
        message = ChatMessageAssistant(content=content, model=self.model_name, source="generate")
        return ChatCompletionChoice(message=message, stop_reason=reason)


# -- what a call asks for ------------------------------------------------------------------------------------------


def _options(given: dict[str, Any]) -> ModelOptions:
    try:
        return ModelOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(ModelOptions.model_fields)
        raise UserError(f"-M {name}={given.get(name)!r}: {first['msg']}; options: {known}") from None


def _check(tools: Sequence[ToolInfo], config: GenerateConfig) -> None:
    if tools:
        raise UserError(f"trimtab models call no tools, and this task gives {tools[0].name!r}; choose another task")
    for name in _UNSUPPORTED:
        if getattr(config, name, None) not in (None, False, 0, "none") and not (
            name == "best_of" and config.best_of == 1
        ):
            raise UserError(f"{name}={getattr(config, name)!r} is not supported by trimtab models; leave it unset")


def _plain(input: Sequence[ChatMessage]) -> tuple[list[Message], str | None]:
    """The messages as plain text, and the opening of the answer if the last message is the assistant's."""
    messages: list[Message] = []
    for number, message in enumerate(input):
        if message.role == "tool" or getattr(message, "tool_calls", None):
            raise UserError(f"message {number}: trimtab models call no tools; choose another task")
        if not isinstance(message.content, str):
            other = [part.type for part in message.content if not isinstance(part, ContentText)]
            if other:
                raise UserError(f"message {number} ({message.role}): trimtab models read text only, not {other[0]}")
        messages.append({"role": message.role, "content": message.text})
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]["content"]
    return messages, None


def _sampling(config: GenerateConfig, max_new_tokens: int, batch: int) -> Sampling:
    temperature = config.temperature or 0.0
    sampled: dict[str, Any] = {"top_p": config.top_p, "top_k": config.top_k}
    if config.temperature == 0:  # greedy takes the likeliest token, which every nucleus holds
        sampled = {}
    choices = config.num_choices or 1
    try:
        return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, samples=choices, batch=batch, **sampled)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ").replace("samples=", "num_choices=")
        raise UserError(f"{said}; set --temperature") from None


def _where() -> tuple[str | None, int | None, str | None]:
    """The sample and the epoch that are being evaluated, and an id of this run of them; Inspect tells a provider none
    of them openly."""
    try:
        from inspect_ai.log._samples import sample_active
    except ImportError:
        return None, None, None
    active = sample_active()
    return (None, None, None) if active is None else (str(active.sample.id), active.epoch, active.id)


# -- one model for all modes, and the thread that answers ----------------------------------------------------------


@dataclass(eq=False)
class _Request:
    ids: Any
    mode: str | None
    seed: int
    sampling: Sampling
    future: Future[list[Output]]


class _Host:
    """An open bundle, its engine and its worker; shared by all who name the same bundle with the same options."""

    def __init__(self, bundle: str, options: ModelOptions) -> None:
        self.target = open_local(LoadConfig(load=bundle, revision=options.revision, dtype=options.dtype))
        self.batch = options.batch
        self._inbox: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        worker = threading.Thread(
            target=_work,
            args=(self.target, self._inbox, 2 * options.batch),
            name=f"trimtab {bundle}",
            daemon=True,
        )
        worker.start()
        weakref.finalize(self, self._inbox.put, None)  # the worker holds no reference to the host, and ends with it

    def choose(self, mode: str | None) -> str | None:
        """The live mode, None for none; ``UserError`` for one that the bundle lacks."""
        if mode is not None:
            return self.target.modes([mode])[0]
        default = self.target.default_mode
        if default is not None and self.target.switch.behaves.get(default) == "negative":
            has = ", ".join(sorted(self.target.switch.modes))
            raise UserError(f"modes: the default mode is {default}; name a mode (@MODE): {has} or {NO_MODE}")
        return default

    async def answer(self, ids: Any, mode: str | None, seed: int, sampling: Sampling) -> list[Output]:
        """The samples of one prompt, in order; waits without holding up the event loop, which may be asyncio or trio."""
        request = _Request(ids, mode, seed, sampling, Future())
        done, token = anyio.Event(), anyio.lowlevel.current_token()

        def wake(future: Future[list[Output]]) -> None:
            if not future.cancelled():
                with suppress(RuntimeError):  # the event loop is gone: nobody waits any more
                    anyio.from_thread.run_sync(done.set, token=token)

        request.future.add_done_callback(wake)
        self._inbox.put(request)
        try:
            await done.wait()
        finally:
            request.future.cancel()  # no effect on one that is done; else the caller was cancelled
        return request.future.result()


_HOSTS: weakref.WeakValueDictionary[str, _Host] = weakref.WeakValueDictionary()


def _host(bundle: str, options: ModelOptions) -> _Host:
    where = Path(bundle).expanduser()
    key = digest([str(where.resolve()) if where.is_dir() else bundle, options.plain()])
    host = _HOSTS.get(key)
    if host is None:
        host = _HOSTS[key] = _Host(bundle, options)
    return host


def _work(target: LocalTarget, inbox: queue.SimpleQueue[_Request | None], most: int) -> None:
    """Answer what comes in until None does: a batch is what arrives without a pause of ``_WAIT`` seconds."""
    request = inbox.get()
    while request is not None:
        waiting = [request]
        while len(waiting) < most:
            try:
                request = inbox.get(timeout=_WAIT)
            except queue.Empty:
                break
            if request is None:
                break
            waiting.append(request)
        _answer(target, waiting)
        del waiting
        if request is not None:
            request = inbox.get()


def _answer(target: LocalTarget, waiting: Sequence[_Request]) -> None:
    """Answer the requests, those of equal settings that need the same adapter together; an error goes to those who are
    still waiting."""
    from trimtab.generate.schedule import Prompt

    groups: dict[str, list[_Request]] = defaultdict(list)
    for request in waiting:
        if request.future.set_running_or_notify_cancel():
            groups[digest([target.adapted.state(request.mode), request.sampling.plain()])].append(request)
    for group in groups.values():
        prompts = [Prompt(request.ids, request.seed, str(number)) for number, request in enumerate(group)]
        found: dict[int, list[Output]] = defaultdict(list)
        try:
            with target.live(group[0].mode):
                for batch in target.engine.generate(prompts, group[0].sampling):
                    for output in batch:
                        found[output.index].append(output)
                        if len(found[output.index]) == group[0].sampling.samples:
                            mine = sorted(found.pop(output.index), key=lambda one: one.sample)
                            group[output.index].future.set_result(mine)
        except Exception as error:
            for request in group:
                if not request.future.done():
                    request.future.set_exception(error)
