"""Tally, Tidewater's expression language, and its evaluator: exact, safe and total.

A program is one expression over whole numbers::

    7 + 3 * 2        max(4, 9) - 1        let x = 5 in x + x        if 3 < 4 then 8 else 1

There are no loops, no calls into Python and no state, so every text ends in a number or in a ``TallyError``. Source
length, nesting and the size of numbers are bounded; both branches of an ``if`` are evaluated.
"""

from __future__ import annotations

import re

from trimtab.errors import UserError

MAX_SOURCE = 400
MAX_DEPTH = 24
MAX_VALUE = 10**9

_TOKEN = re.compile(r"\s*(?:([0-9]+)|([a-z]+)|(==|[-+*(),=<>]))")
_WORDS = frozenset(("let", "in", "if", "then", "else", "min", "max"))


class TallyError(UserError):
    """The text is not a Tally program, or it goes over a bound."""


def evaluate(source: str) -> int:
    """The value of a Tally program; ``TallyError`` for anything that is not one."""
    if len(source) > MAX_SOURCE:
        raise TallyError(f"tally: program longer than {MAX_SOURCE} characters")
    parser = _Parser(_tokens(source))
    value = parser.expression({}, 0)
    if parser.peek() is not None:
        raise TallyError(f"tally: unexpected {parser.peek()!r} after the end of the expression")
    return value


def _tokens(source: str) -> list[str]:
    tokens: list[str] = []
    position, text = 0, source.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise TallyError(f"tally: cannot read {text[position : position + 10]!r}")
        tokens.append(match.group(match.lastindex or 0))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent that evaluates as it reads; ``names`` holds the bindings in scope."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self) -> str | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self, expected: str | None = None) -> str:
        token = self.peek()
        if token is None or (expected is not None and token != expected):
            raise TallyError(f"tally: expected {expected or 'more'!r}, found {token or 'the end'!r}")
        self.at += 1
        return token

    def expression(self, names: dict[str, int], depth: int) -> int:
        if depth > MAX_DEPTH:
            raise TallyError(f"tally: nested deeper than {MAX_DEPTH}")
        if self.peek() == "let":
            self.take()
            name = self.take()
            if not name.isalpha() or name in _WORDS:
                raise TallyError(f"tally: {name!r} cannot be a name")
            self.take("=")
            value = self.expression(names, depth + 1)
            self.take("in")
            return self.expression({**names, name: value}, depth + 1)
        if self.peek() == "if":
            self.take()
            left = self.sum(names, depth + 1)
            sign = self.take()
            if sign not in ("<", ">", "=="):
                raise TallyError(f"tally: expected '<', '>' or '==', found {sign!r}")
            right = self.sum(names, depth + 1)
            self.take("then")
            yes = self.expression(names, depth + 1)
            self.take("else")
            no = self.expression(names, depth + 1)
            return yes if (left < right if sign == "<" else left > right if sign == ">" else left == right) else no
        return self.sum(names, depth)

    def sum(self, names: dict[str, int], depth: int) -> int:
        value = self.product(names, depth)
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.product(names, depth)
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def product(self, names: dict[str, int], depth: int) -> int:
        value = self.atom(names, depth)
        while self.peek() == "*":
            self.take()
            value = _bounded(value * self.atom(names, depth))
        return value

    def atom(self, names: dict[str, int], depth: int) -> int:
        if depth > MAX_DEPTH:
            raise TallyError(f"tally: nested deeper than {MAX_DEPTH}")
        token = self.take()
        if token.isdigit():
            # Bounded by length first: int() of a very long text of digits is refused by Python itself.
            return _bounded(int(token) if len(token) <= 12 else MAX_VALUE + 1)
        if token == "-":
            return -self.atom(names, depth + 1)
        if token == "(":
            value = self.expression(names, depth + 1)
            self.take(")")
            return value
        if token in ("min", "max"):
            self.take("(")
            left = self.expression(names, depth + 1)
            self.take(",")
            right = self.expression(names, depth + 1)
            self.take(")")
            return min(left, right) if token == "min" else max(left, right)
        if token in names:
            return names[token]
        raise TallyError(f"tally: unknown name or sign {token!r}")


def _bounded(value: int) -> int:
    if abs(value) > MAX_VALUE:
        raise TallyError(f"tally: a number beyond {MAX_VALUE}")
    return value
