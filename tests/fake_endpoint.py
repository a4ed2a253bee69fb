"""A small OpenAI-compatible server on this machine, made to misbehave on purpose. Standard library only.

    with FakeEndpoint(lambda body: "an answer") as fake:
        Endpoint(EndpointConfig(url=fake.url, model="m"))

The callable gets the request's body (parsed) and returns what is sent back: a text (a well-formed completion), a dict
(sent as JSON with status 200), ``(status, dict | text | bytes)``, or a ``Reply`` for delays, drips and headers. It runs in
one thread per connection, so it must be safe to call at once. ``fake.seen`` holds (path, headers, body) of every request.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Reply:
    """What is sent: ``delay`` seconds before anything, ``drip`` seconds between single bytes of the body (``drip_head``: of
    all, from the status line on), ``hangup`` closes the connection without an answer, ``cut`` promises that many bytes
    more than are sent."""

    body: Any = ""
    status: int = 200
    delay: float = 0.0
    drip: float = 0.0
    drip_head: bool = False
    hangup: bool = False
    cut: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def raw(self) -> bytes:
        if isinstance(self.body, bytes):
            return self.body
        return (
            self.body.encode("utf-8", "surrogatepass") if isinstance(self.body, str) else json.dumps(self.body).encode()
        )


def chat(content: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    """The body of a well-formed completion (as well-formed as its arguments are)."""
    return {
        "id": "c",
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


Answer = Callable[[dict[str, Any]], Any]


class FakeEndpoint:
    """The server; ``url`` is its base address. Any path but /v1/chat/completions is a 404."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reply(self, path: str, headers: dict[str, str], body: bytes) -> Reply:
        data = json.loads(body)
        with self._lock:
            self.seen.append((path, headers, data))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if path != "/v1/chat/completions":
                return Reply({"error": {"message": "no such route"}}, 404)
            made = self.answer(data)
            if isinstance(made, str):
                made = chat(made)
            reply = made if isinstance(made, Reply) else Reply(*made[::-1]) if isinstance(made, tuple) else Reply(made)
            self._over.wait(reply.delay)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1

    def settle(self, quiet: float = 0.5, most: float = 10.0) -> None:
        """Wait until nothing has come in for ``quiet`` seconds and nothing is being answered."""
        until, seen, since = time.monotonic() + most, -1, time.monotonic()
        while time.monotonic() < until and time.monotonic() - since < quiet:
            with self._lock:
                if self._at_once or len(self.seen) != seen:
                    seen, since = len(self.seen), time.monotonic()
            time.sleep(0.02)

    def pause(self, seconds: float) -> None:
        self._over.wait(seconds)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is what many tests are about."""


def _handler(fake: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10
        wbufsize = -1  # one packet per reply
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = fake.reply(self.path, dict(self.headers.items()), body)
            if reply.hangup:
                self.close_connection = True
                return
            raw = reply.raw()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw) + reply.cut))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.drip_head:
                raw = b"".join([*self._headers_buffer, b"\r\n", raw])
                self._headers_buffer = []
            else:
                self.end_headers()
            if reply.drip:
                for at in range(len(raw)):
                    self.wfile.write(raw[at : at + 1])
                    self.wfile.flush()
                    fake.pause(reply.drip)
            else:
                self.wfile.write(raw)
            self.close_connection = self.close_connection or bool(reply.cut)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def free_address() -> str:
    """A base address at which nothing listens."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether ``true()`` came true within ``seconds``."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
