"""endpoint: order and streaming, strict replies, what is tried again, what stops a run, and a key that stays unseen."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest
from pydantic import ValidationError

from fake_endpoint import Answer, FakeEndpoint, Reply, chat, free_address, wait_until
from trimtab import endpoint as endpoints
from trimtab.endpoint import MAX_BYTES, REASONS, Completion, Endpoint, EndpointConfig, EndpointError, Request
from trimtab.errors import Fault, UserError

KEY = "sk-tidewater-0123456789"


def ask(text: str = "hello") -> Request:
    return Request([{"role": "user", "content": text}], 8)


def said(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint(EndpointConfig(url=url, model="m", **{"backoff": 0.001, "timeout": 5.0, **changes}))


def once(answer: Answer, **changes: Any) -> tuple[Completion | EndpointError, int]:
    """What one call gives, and how often the server was asked."""
    with FakeEndpoint(answer) as fake, endpoint(fake.url, **changes) as there:
        return next(there.complete_all([ask()])), len(fake.seen)


# ---- order, streaming, load


def test_answers_come_in_order_whatever_the_order_of_replies() -> None:
    def answer(body: dict[str, Any]) -> Reply:
        i = int(said(body))
        return Reply(chat(f"<{i}>"), status=400 if i % 7 == 3 else 200, delay=(i % 5) * 0.004)

    with FakeEndpoint(answer) as fake, endpoint(fake.url, concurrency=6) as there:
        out = list(there.complete_all(ask(str(i)) for i in range(60)))
        assert 2 <= fake.most_at_once <= 6
    for i, done in enumerate(out):
        if i % 7 == 3:
            assert isinstance(done, EndpointError) and done.reason == "http 400"
        else:
            assert isinstance(done, Completion) and done.text == f"<{i}>"


def test_an_answer_is_given_out_before_later_ones_are_known() -> None:
    go = threading.Event()

    def answer(body: dict[str, Any]) -> str:
        if said(body) != "0":
            assert go.wait(10)
        return said(body)

    with FakeEndpoint(answer) as fake, endpoint(fake.url, concurrency=4) as there:
        answers = there.complete_all(ask(str(i)) for i in range(8))
        first = next(answers)
        assert isinstance(first, Completion) and first.text == "0" and not go.is_set()
        go.set()
        assert [a.text for a in answers if isinstance(a, Completion)] == [str(i) for i in range(1, 8)]


def test_requests_are_read_only_a_little_ahead_and_leaving_early_cancels() -> None:
    read = itertools.count()
    taken = 0

    def endless() -> Iterator[Request]:
        nonlocal taken
        while True:
            taken = next(read)
            yield ask(str(taken))

    with FakeEndpoint(said) as fake, endpoint(fake.url, concurrency=2) as there:
        answers = there.complete_all(endless())
        assert [next(answers) for _ in range(3)] and taken <= 3 + 4 * 2
        answers.close()
        assert wait_until(lambda: fake._at_once == 0)
        seen = len(fake.seen)
        assert seen <= taken + 1
        assert there.complete([{"role": "user", "content": "again"}], max_tokens=3).text == "again"


def test_a_closed_endpoint_drops_what_runs_and_can_be_used_again() -> None:
    with FakeEndpoint(lambda body: Reply(chat("late"), delay=5 if said(body) == "slow" else 0)) as fake:
        there = endpoint(fake.url)
        answers = there.complete_all([ask("quick"), ask("slow")])
        next(answers)
        start = time.monotonic()
        there.close()
        assert time.monotonic() - start < 2
        answers.close()
        assert isinstance(next(there.complete_all([ask("quick")])), Completion)
        there.close()
        there.close()


def test_the_body_holds_what_was_asked_for_and_nothing_else() -> None:
    with FakeEndpoint(lambda body: "ok") as fake:
        there = endpoint(fake.url, extra={"top_p": 0.5}, tokens_field="max_completion_tokens")
        messages = [{"role": "user", "content": "grüße \ud800"}]
        done = there.complete(messages, max_tokens=7, temperature=0.0, seed=2**62, stop=["x"])
        next(there.complete_all([ask()]))
        there.close()
        assert done == Completion("ok", "stop", {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
        first, second = (body for _, _, body in fake.seen)
        assert first == {
            "model": "m", "messages": messages, "max_completion_tokens": 7, "temperature": 0.0, "seed": 2**62,
            "stop": ["x"], "top_p": 0.5,
        }  # fmt: skip
        assert "temperature" not in second and "seed" not in second
        assert "authorization" not in {name.lower() for name in fake.seen[0][1]}


# ---- what comes back


NO_ANSWER: list[tuple[str, Any, str]] = [
    ("not json", b"<html>busy</html>", "not json"),
    ("empty body", b"", "not json"),
    ("cut json", json.dumps(chat("hello"))[:-9], "not json"),
    ("not utf-8", b'{"choices": "\xff\xfe"}', "not json"),
    ("deep nest", "[" * 200_000, "not json"),
    ("long number", '{"a": ' + "9" * 9000 + "}", "not json"),
    ("bad gzip", Reply(b"no gzip", headers={"Content-Encoding": "gzip"}), "not json"),
    ("list", [chat("hello")], "wrong shape"),
    ("text", '"hello"', "wrong shape"),
    ("no choices", {"id": "c"}, "wrong shape"),
    ("null choices", {"choices": None}, "wrong shape"),
    ("empty choices", {"choices": []}, "wrong shape"),
    ("two choices", {"choices": chat("a")["choices"] * 2}, "wrong shape"),
    ("choice is text", {"choices": ["hello"]}, "wrong shape"),
    ("no message", {"choices": [{"finish_reason": "stop", "text": "hello"}]}, "wrong shape"),
    ("other role", chat("hello", role="user"), "wrong shape"),
    ("no finish", chat("hello", finish=None), "wrong shape"),
    ("unknown finish", chat("hello", finish="tool_calls"), "wrong shape"),
    ("finish of a wrong type", chat("hello", finish=["stop"]), "wrong shape"),
    ("content is a list", chat([{"type": "text", "text": "hello"}]), "wrong shape"),
    ("content is a number", chat(0), "wrong shape"),
    ("content is false", chat(False), "wrong shape"),
    ("null content", chat(None), "no content"),
    ("empty content", chat(""), "no content"),
    ("blank content", chat(" \n"), "no content"),
    ("thought to the limit", chat(None, finish="length", reasoning_content="hmm"), "truncated"),
    ("refusal", chat(None, refusal="I can't help with that."), "refused"),
    ("refusal beside text", chat("hello", refusal="no"), "refused"),
    ("filter", chat("hel", finish="content_filter"), "content filter"),
    ("error in a 200", {"error": {"message": "overloaded", "code": 502}}, "endpoint error"),
    ("filter in a 200", {"error": {"code": "content_filter"}}, "content filter"),
    ("filter as 400", (400, {"error": {"code": "content_filter"}}), "content filter"),
    ("filter as 403", (403, {"error": {"metadata": {"flagged_input": "..."}}}), "content filter"),
    ("bad request", (400, {"error": {"message": "too long"}}), "http 400"),
    ("204", (204, b""), "http 204"),
    ("huge", Reply(json.dumps(chat("x" * (MAX_BYTES + 1)))), "too large"),
    (
        "bomb",
        Reply(gzip.compress(json.dumps(chat("x" * (3 * MAX_BYTES))).encode()), headers={"Content-Encoding": "gzip"}),
        "too large",
    ),
]


@pytest.mark.parametrize(("made", "reason"), [x[1:] for x in NO_ANSWER], ids=[x[0] for x in NO_ANSWER])
def test_what_is_no_answer_is_an_error_with_a_reason(made: Any, reason: str) -> None:
    if isinstance(made, str):
        made = made.encode()
    done, asked = once(lambda body: made if isinstance(made, dict | tuple | Reply) else Reply(made))
    assert isinstance(done, EndpointError) and done.reason == reason and asked == 1
    assert reason in REASONS or reason.startswith("http ")
    assert "\n" not in str(done) and len(str(done)) < 300


def test_what_is_an_answer() -> None:
    assert once(lambda body: chat(" a ", finish="length"))[0] == Completion(
        " a ", "length", {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    )
    odd = {
        **chat("a", refusal=None),
        "usage": {"prompt_tokens": "3", "cost": 0.5, "completion_tokens": 2},
        "error": None,
    }
    assert once(lambda body: odd)[0] == Completion("a", "stop", {"completion_tokens": 2})
    lone, _ = once(lambda body: Reply(b'{"choices":[{"message":{"content":"a\\ud800b"},"finish_reason":"stop"}]}'))
    assert isinstance(lone, Completion) and lone.text.encode("utf-8") == b"a?b"


def test_complete_raises_what_complete_all_gives() -> None:
    with FakeEndpoint(lambda body: chat(None)) as fake, endpoint(fake.url) as there:
        with pytest.raises(EndpointError, match="no content") as caught:
            there.complete([{"role": "user", "content": "x"}], max_tokens=3)
        assert isinstance(caught.value, Fault) and caught.value.reason == "no content"


# ---- time


@pytest.mark.parametrize(
    "reply",
    [
        Reply(chat("late"), delay=0.5),
        Reply(chat("late"), drip=0.004),
        Reply(chat("late"), drip=0.004, drip_head=True),
        Reply(chat("late"), cut=5, delay=0.5),
    ],
    ids=["silent", "body drips", "head drips", "short"],
)
def test_the_whole_of_a_call_is_timed_and_a_timeout_is_not_tried_again(reply: Reply) -> None:
    start = time.monotonic()
    done, asked = once(lambda body: reply, timeout=0.1)
    assert isinstance(done, EndpointError) and done.reason == "timeout" and asked == 1
    assert time.monotonic() - start < 2


# ---- tried again


@pytest.mark.parametrize(
    "failure", [(500, "x"), (429, {}), (503, b""), (408, ""), Reply(hangup=True), Reply("{}", cut=9)]
)
def test_what_may_pass_is_tried_again(failure: Any) -> None:
    tries = itertools.count()
    done, asked = once(lambda body: failure if next(tries) < 2 else "got through", retries=3)
    assert isinstance(done, Completion) and done.text == "got through" and asked == 3


@pytest.mark.parametrize(
    ("failure", "reason"), [((500, ""), "http 500"), ((429, {}), "http 429"), (Reply(hangup=True), "connection")]
)
def test_tries_are_bounded_and_then_an_error_of_that_call(failure: Any, reason: str) -> None:
    with FakeEndpoint(lambda body: failure if said(body) == "bad" else "ok") as fake:
        with endpoint(fake.url, retries=2) as there:
            good, bad, after = there.complete_all([ask("good"), ask("bad"), ask("good")])
        assert isinstance(good, Completion) and isinstance(after, Completion)
        assert isinstance(bad, EndpointError) and bad.reason == reason
        assert sum(said(body) == "bad" for _, _, body in fake.seen) == 3


def test_retry_after_is_honoured_as_seconds_and_as_a_date() -> None:
    for value, least in (("0.3", 0.3), (formatdate(time.time() + 3, usegmt=True), 0.5)):
        times: list[float] = []

        def answer(body: dict[str, Any], times: list[float] = times, value: str = value) -> Any:
            times.append(time.monotonic())
            return Reply({}, 429, headers={"Retry-After": value}) if len(times) == 1 else "ok"

        done, _ = once(answer)
        assert isinstance(done, Completion) and least <= times[1] - times[0] < 5


@pytest.mark.parametrize("value", ["9999", formatdate(time.time() + 9999, usegmt=True)], ids=["seconds", "date"])
def test_a_pause_that_is_too_long_is_not_waited_for(value: str) -> None:
    done, asked = once(lambda body: Reply({}, 429, headers={"Retry-After": value}))
    assert isinstance(done, EndpointError) and done.reason == "http 429" and asked == 1


def test_a_retry_after_that_makes_no_sense_is_passed_over() -> None:
    tries = itertools.count()
    done, _ = once(lambda body: "ok" if next(tries) else Reply({}, 429, headers={"Retry-After": "-3 soon"}))
    assert isinstance(done, Completion)


# ---- what stops the run


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((401, {"error": {"message": f"bad key {KEY}"}}), "does not accept"),
        ((403, {}), "does not accept"),
        ((404, {"error": {"message": "model m not found"}}), "model m not found"),
        ((405, ""), "check url"),
        ((402, {}), "credit"),
        ((429, {"error": {"code": "insufficient_quota"}}), "credit"),
        (Reply("", 302, headers={"Location": "http://127.0.0.1:9/elsewhere"}), "elsewhere"),
    ],
)
def test_what_every_call_would_meet_stops_the_run_with_one_line(made: Any, words: str) -> None:
    with FakeEndpoint(lambda body: made if said(body) == "stop" else "ok") as fake, endpoint(fake.url) as there:
        answers = there.complete_all([ask("a"), ask("stop"), *(ask("b") for _ in range(5))])
        assert isinstance(next(answers), Completion), "what came before is not lost"
        with pytest.raises(UserError, match=words) as caught:
            next(answers)
        assert "\n" not in str(caught.value) and fake.url in str(caught.value) and KEY not in str(caught.value)


def test_a_typing_error_in_the_path_stops_the_run() -> None:
    with (
        FakeEndpoint(lambda body: "ok") as fake,
        endpoint(fake.url.replace("/v1", "/v2")) as there,
        pytest.raises(UserError, match="check url"),
    ):
        next(there.complete_all([ask()]))


def test_a_server_that_hangs_up_from_the_start_is_no_wrong_address() -> None:
    done, asked = once(lambda body: Reply(hangup=True), retries=1)
    assert isinstance(done, EndpointError) and done.reason == "connection" and asked == 2


def test_an_address_where_nothing_ever_answered_is_a_fault() -> None:
    with endpoint(free_address(), retries=1) as there, pytest.raises(Fault, match="nothing answers at http://127"):
        next(there.complete_all([ask()]))


def test_a_host_that_never_connects_is_a_fault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "CONNECT", 0.2)
    with socket.socket() as full:  # a queue of one that nobody serves: the third connection hangs
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        others = [socket.socket() for _ in range(2)]
        for other in others:
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        with endpoint(url, retries=0) as there, pytest.raises(Fault, match="nothing answers"):
            next(there.complete_all([ask()]))
        for other in others:
            other.close()


# ---- the key


def test_the_key_is_sent_and_seen_nowhere(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("TIDE_KEY", KEY + "\n")
    caplog.set_level(logging.DEBUG)
    answers: dict[str, Any] = {
        "ok": "ok",
        "echo": (400, {"error": {"message": f"wrong key Bearer {KEY}\nhere"}}),
        "text": (500, f"Authorization: {KEY}"),
        "hangup": Reply(hangup=True),
        "junk": b"\0",
        "stop": (401, {"error": {"message": f"Incorrect API key {KEY}"}}),
    }
    with FakeEndpoint(lambda body: answers[said(body)]) as fake:
        there = endpoint(fake.url, key_env="TIDE_KEY", retries=1)
        seen = [repr(there), str(there), repr(there.config), json.dumps(there.config.plain()), there.identity]
        for name in answers:
            try:
                done = next(there.complete_all([ask(name)]))
                seen += [repr(done), str(done)]
            except UserError as error:
                seen.append(str(error))
        there.close()
        assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers, _ in fake.seen)
    everything = "\n".join([*seen, *(r.getMessage() for r in caplog.records)])
    assert KEY not in everything and "Authorization" not in everything.replace("ok", "")
    assert "wrong key Bearer [key] here" in everything and "the key in TIDE_KEY" in everything


def test_a_key_that_is_missing_or_broken_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_KEY", raising=False)
    for value, words in (
        (None, "TIDE_KEY is not set"),
        (" \n", "not set"),
        ("sk-a\nsk-b", "no key has"),
        ("sk-ä", "no key"),
    ):
        if value is not None:
            monkeypatch.setenv("TIDE_KEY", value)
        with pytest.raises(UserError, match=words) as caught:
            endpoint("http://127.0.0.1:9/v1", key_env="TIDE_KEY")
        assert "sk-" not in str(caught.value)


def test_identity_is_of_address_model_and_decoding_and_not_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_KEY", KEY)
    base = endpoint("https://Judge.example/v1/")
    same = [
        endpoint("https://judge.example/v1", key_env="TIDE_KEY"),
        endpoint("https://judge.example/v1", timeout=1.0, retries=0, concurrency=1, backoff=9.0),
    ]
    assert {base.identity} == {other.identity for other in same}
    others = [
        endpoint("https://judge.example/v2"),
        endpoint("https://judge.example:8000/v1"),
        endpoint("https://other.example/v1"),
        endpoint("https://judge.example/v1", extra={"top_p": 0.5}),
        Endpoint(EndpointConfig(url="https://judge.example/v1", model="n")),
    ]
    assert len({base.identity, *(other.identity for other in others)}) == 6


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("url", "judge.example/v1", "must look like"),
        ("url", "ftp://judge.example", "must look like"),
        ("url", f"https://user:{KEY}@judge.example/v1", "no password"),
        ("url", "https://judge.example/v1?key=1", "no password, query"),
        ("url", "https://judge.example/v1/chat/completions", "leave /chat/completions off"),
        ("key_env", KEY, "not the key"),
        ("extra", {"messages": []}, "messages"),
        ("extra", {"stream": True}, "stream"),
        ("model", "", "model"),
        ("retries", -1, "retries"),
        ("timeout", 0, "timeout"),
        ("concurrency", 0, "concurrency"),
    ],
)
def test_settings_that_cannot_be_meant(field: str, value: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        EndpointConfig(**{"url": "https://judge.example/v1", "model": "m", field: value})


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(once(lambda body: "ok")[0], Completion)


def test_imports_are_light() -> None:
    code = (
        "import sys, trimtab.endpoint, trimtab.evaluate.judges.rubric, trimtab.evaluate.judges.ensemble; "
        "sys.exit(sorted(m for m in ('torch', 'transformers', 'httpx') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
