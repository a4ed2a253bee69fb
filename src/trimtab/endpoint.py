"""A client of OpenAI-compatible chat completions: many calls at once, answers in order, and no answer made out of a fault.

Strict about what comes back. An answer is a non-empty text with ``finish_reason`` "stop" or "length"; everything else is
an ``EndpointError`` with a reason of a closed vocabulary (``REASONS``), so that no caller can take a broken reply for an
empty answer. What can only be the user's mistake (no such address, a key that is not accepted) is raised and stops the
run; what may pass becomes an error of that one call.

Trades off: calls run on an event loop in one thread of our own, which costs about a millisecond a call and buys a hard
limit on the whole of a call (a server that sends a byte a second cannot hold it open) and clean cancelling.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from trimtab.config import Config
from trimtab.errors import Fault, UserError
from trimtab.seeds import digest, uniform_of

if TYPE_CHECKING:
    import httpx

REASONS = (
    "timeout", "connection", "http", "endpoint error", "not json", "wrong shape", "no content", "content filter", "refused",
    "truncated", "too large",
)  # fmt: skip
"""Every reason of an ``EndpointError``; "http" is followed by the status: "http 500".

endpoint error  the reply came with status 200 and an error in its body
no content      the message has no text, or an empty one
truncated       no text, because the token limit was reached first (in reasoning, say); with text it is a ``Completion``
refused         the message carries a ``refusal`` of the service
"""
MAX_BYTES = 4 * 2**20
"""Largest reply that is read (bytes, after decompression)."""
MAX_WAIT = 120.0
"""Longest pause before a further try, seconds. Where ``Retry-After`` asks for more, the call is given up."""
CONNECT = 10.0
"""Longest time for making a connection, seconds (within ``timeout``)."""
_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_OURS = ("messages", "model", "stream", "n", "max_tokens", "max_completion_tokens", "temperature", "seed")
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_AHEAD = 4  # calls started ahead of the one that is waited for, in units of the concurrency


class EndpointConfig(Config):
    """Where a chat-completions service is, and how hard it may be asked."""

    url: str = Field(description="base address, for example http://127.0.0.1:8000/v1; /chat/completions is added to it")
    model: str = Field(min_length=1, description="the model's name as the service knows it")
    key_env: str | None = Field(None, description="name of the environment variable that holds the key; null: no key")
    timeout: float = Field(60.0, gt=0, description="seconds for one try of one call, from connecting to the last byte")
    retries: int = Field(4, ge=0, le=20, description="further tries after 408/409/425/429/5xx or a failed connection")
    backoff: float = Field(0.5, gt=0, le=60, description="seconds before the first further try; doubled each time")
    concurrency: int = Field(8, ge=1, le=256, description="calls open at once")
    tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what the service calls the limit on new tokens"
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further fields of every request, for example response_format or top_p"
    )

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("url must look like http://host:port/v1 or https://host/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("url must hold no password, query or fragment; name the key's variable in key_env")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("url is the base address: leave /chat/completions off")
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
            raise ValueError("key_env is the name of an environment variable, such as JUDGE_KEY, not the key")
        return name

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in _OURS:
            if name in extra:
                raise ValueError(f"extra must not set {name!r}: it is set for each call")
        return extra


@dataclass(frozen=True, slots=True)
class Request:
    """One call. ``temperature`` and ``seed`` are left out of the body when None; ``more`` holds further body fields."""

    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A non-empty answer. ``finish`` is "stop" or "length"; ``usage`` holds the token counts that the service gave."""

    text: str
    finish: Literal["stop", "length"]
    usage: Mapping[str, int] = field(default_factory=dict)


class EndpointError(Fault):
    """One call that brought no answer: ``reason`` is of ``REASONS``; ``message`` may add the service's own words."""

    def __init__(self, reason: str, message: str = "") -> None:
        assert reason in REASONS or re.fullmatch(r"http \d{3}", reason), reason
        super().__init__(f"endpoint: {reason}" + (f" ({message})" if message else ""))
        self.reason = reason
        self.message = message


class Endpoint:
    """A chat-completions service. Use it as a context manager, or ``close`` it; both may be left out in a short process.

    identity  hash of address, model and ``extra``: what decides, beside the request, which answer comes. Never of the key.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._key = _key(config.key_env)
        parts = urlsplit(config.url)
        self.identity = digest(
            {"endpoint": parts.netloc.lower() + parts.path, "model": config.model, "extra": config.extra}
        )
        self._loopback = parts.hostname in _LOOPBACK
        self._reached = False  # until something was, a connection that cannot be made means a wrong address
        self._thread: _Loop | None = None
        self._client: httpx.AsyncClient | None = None
        self._slots: asyncio.Semaphore | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self.config.url}, {self.config.model!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; a later call opens them again."""
        thread, client, self._thread, self._client = self._thread, self._client, None, None
        if thread is not None and client is not None:
            thread.stop(client.aclose())

    def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int,
        temperature: float | None = None,
        seed: int | None = None,
        **more: Any,
    ) -> Completion:
        """One answer. Raises ``EndpointError`` when the call brings none, and what ``complete_all`` raises."""
        done = next(self.complete_all([Request(messages, max_tokens, temperature, seed, more)]))
        if isinstance(done, EndpointError):
            raise done
        return done

    def complete_all(self, requests: Iterable[Request]) -> Generator[Completion | EndpointError, None, None]:
        """One answer or error per request, in order, each as soon as it and those before it are known.

        ``requests`` is read a little ahead only. ``UserError`` is for what every call would meet: the address or the
        model is unknown (404, 405), the key is not accepted (401, 403), the account is empty (402), or we are sent
        elsewhere (3xx). ``Fault``: no connection could ever be made.
        """
        self._open()
        assert self._thread is not None
        todo = iter(requests)
        under_way: deque[concurrent.futures.Future[Completion | EndpointError]] = deque()
        try:
            while True:
                while len(under_way) < _AHEAD * self.config.concurrency and (request := next(todo, None)) is not None:
                    under_way.append(self._thread.submit(self._call(request)))
                if not under_way:
                    return
                done = under_way[0].result()
                under_way.popleft()
                yield done
        finally:
            for future in under_way:
                future.cancel()

    # ---- one call

    async def _call(self, request: Request) -> Completion | EndpointError:
        body = self._body(request)
        assert self._slots is not None
        async with self._slots:  # held through the pauses too: a service that says 429 is not to be asked more
            for tried in range(self.config.retries + 1):
                done, may_pass, asked = await self._try(body)
                if not may_pass or tried == self.config.retries:
                    break
                # Spread by a fixed number of the call, so that calls refused together do not come back together.
                jitter = 0.5 + uniform_of("backoff", zlib.crc32(body), tried) / 2
                pause = asked if asked is not None else min(self.config.backoff * 2**tried, MAX_WAIT) * jitter
                if pause > MAX_WAIT:
                    break
                await asyncio.sleep(pause)
        if isinstance(done, EndpointError) and done.reason == "connection" and not self._reached:
            raise Fault(f"endpoint: nothing answers at {self.config.url}; is the server running, and the url right?")
        return done

    def _body(self, request: Request) -> bytes:
        config = self.config
        body = {
            **config.extra,
            **request.more,
            "model": config.model,
            "messages": [dict(m) for m in request.messages],
            config.tokens_field: request.max_tokens,
        }
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.seed is not None:
            body["seed"] = request.seed
        return json.dumps(body, allow_nan=False).encode("ascii")

    async def _try(self, body: bytes) -> tuple[Completion | EndpointError, bool, float | None]:
        """(what came, whether a further try may help, seconds that the service asks us to wait)."""
        import httpx

        assert self._client is not None
        try:
            async with (
                asyncio.timeout(self.config.timeout),
                self._client.stream("POST", f"{self.config.url}/chat/completions", content=body) as response,
            ):
                self._reached = True
                parts, size = [], 0
                async for part in response.aiter_bytes():
                    parts.append(part)
                    size += len(part)
                    if size > MAX_BYTES:
                        return EndpointError("too large", f"over {MAX_BYTES} bytes"), False, None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return EndpointError("connection", type(error).__name__), True, None
        except (TimeoutError, httpx.TimeoutException):
            return EndpointError("timeout", f"{self.config.timeout:g} s"), False, None
        except httpx.DecodingError:
            return EndpointError("not json", "a body that cannot be decompressed"), False, None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            self._reached = True
            # Only the kind: an error of the transport may quote the request's header, which holds the key.
            return EndpointError("connection", type(error).__name__), True, None
        status = response.status_code
        if status == 200:
            return _read(b"".join(parts)), False, None
        data = _json(b"".join(parts))
        if status in (400, 403) and _filtered(data):
            return EndpointError("content filter", f"http {status}"), False, None
        said = self._said(data)
        self._stop(status, said, data)
        return EndpointError(f"http {status}", said), status in _TRANSIENT, _retry_after(response.headers)

    def _stop(self, status: int, said: str, data: Any) -> None:
        """Raise for what every call would meet."""
        where = f"endpoint {self.config.url}"
        if status in (401, 403):
            named = f"the key in {self.config.key_env}" if self.config.key_env else "a call without a key (set key_env)"
            raise UserError(f"{where} does not accept {named} for {self.config.model!r} (http {status})")
        if status in (404, 405):
            hint = f"; it says: {said}" if said else ""
            raise UserError(
                f"{where}: http {status}; check url (often it ends in /v1) and model {self.config.model!r}{hint}"
            )
        if status == 402 or (status == 429 and _code(data) == "insufficient_quota"):
            raise UserError(f"{where}: the account has no credit left (http {status})")
        if 300 <= status < 400:
            raise UserError(f"{where} sends us elsewhere (http {status}); give the final address as url")

    def _said(self, data: Any) -> str:
        """The service's own message, on one short line, without the key."""
        error = data.get("error", data) if isinstance(data, dict) else data
        text = error.get("message") if isinstance(error, dict) else error
        if not isinstance(text, str):
            return ""
        if self._key:
            text = text.replace(self._key, "[key]")
        line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
        return line[:200]

    # ---- the thread

    def _open(self) -> None:
        if self._thread is not None:
            return
        try:
            import httpx
        except ImportError:
            raise UserError("endpoint: httpx is not installed; run: pip install httpx") from None
        config = self.config
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "trimtab"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(config.timeout, connect=CONNECT, pool=None),
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            follow_redirects=False,  # a redirect could take the prompt, and the key, to another host
            trust_env=not self._loopback,  # a proxy is for the way out, not for this machine
        )
        self._slots = asyncio.Semaphore(config.concurrency)
        self._thread = _Loop()


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="trimtab-endpoint", daemon=True)
        self.thread.start()

    def submit(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what runs, do ``last``, end the thread."""

        async def wind_up() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await last

        self.submit(wind_up()).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"key_env: the environment variable {name} is not set (it should hold the endpoint's key)")
    if not all("!" <= c <= "~" for c in key):
        raise UserError(
            f"key_env: the environment variable {name} holds signs that no key has (a space, a line break?)"
        )
    return key


def _json(body: bytes) -> Any:
    """The body as JSON, or None: a deep nest ends the parser (RecursionError), a long number too (ValueError)."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _read(body: bytes) -> Completion | EndpointError:
    """The answer in a reply of status 200; strict, see ``REASONS``."""
    data = _json(body)
    if data is None:
        return EndpointError("not json")
    if not isinstance(data, dict):
        return EndpointError("wrong shape", "not an object")
    if data.get("error"):
        return EndpointError("content filter" if _filtered(data) else "endpoint error")
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return EndpointError("wrong shape", "choices")
    finish, message = choices[0].get("finish_reason"), choices[0].get("message")
    if finish == "content_filter":
        return EndpointError("content filter")
    if not isinstance(message, dict) or message.get("role", "assistant") != "assistant":
        return EndpointError("wrong shape", "message")
    if message.get("refusal"):
        return EndpointError("refused")
    if finish not in ("stop", "length"):
        return EndpointError("wrong shape", "finish_reason")
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        return EndpointError("wrong shape", "content")
    if not content or not content.strip():
        return EndpointError("truncated" if finish == "length" else "no content")
    counts = data.get("usage")
    usage = {k: v for k, v in counts.items() if type(v) is int} if isinstance(counts, dict) else {}
    # A lone surrogate is legal in JSON and in no file: it would break whoever stores the answer.
    return Completion(content.encode("utf-8", "replace").decode("utf-8"), finish, usage)


def _filtered(data: Any) -> bool:
    """Whether an error says that a content filter stopped the call (what Azure and OpenRouter send)."""
    error = data.get("error") if isinstance(data, dict) else None
    metadata = error.get("metadata") if isinstance(error, dict) else None
    return _code(data) == "content_filter" or (isinstance(metadata, dict) and "flagged_input" in metadata)


def _code(data: Any) -> Any:
    error = data.get("error") if isinstance(data, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a ``Retry-After`` header (a number, or a date), or None."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0) if value else None
    except (ValueError, OverflowError):
        return None
