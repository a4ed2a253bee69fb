"""Ways to spell a token so that a filter misses it and a tokenizer, a normaliser or a decoder may yet make it whole.

Each is a function of the text, the token's id and random numbers; they can be put one upon the other.
"""

from __future__ import annotations

import base64
import codecs
import html
import json
import unicodedata
from collections.abc import Callable
from urllib.parse import quote

import numpy as np

Spelling = Callable[[str, int, np.random.Generator], str]
_UNSEEN = "\u200b\u200c\u200d\u2060\ufeff\u180e\u034f\u2061"
_MARKS = "\u0301\u0300\u0308\u0323\u0327\u0338\u20d2\ufe0f"
_BIDI = (("\u202e", "\u202c"), ("\u2067", "\u2069"), ("\u202d", "\u202c"), ("\u200f", "\u200e"))
_CONTROL = "\x00\x01\x08\x0b\x1b\x7f\x85"
_LIKE = {
    "a": "аɑα", "c": "сϲ", "d": "ԁ", "e": "еҽ", "g": "ɡ", "h": "һ", "i": "іıι", "j": "ј", "k": "κ", "l": "ӏⅼ", "m": "ⅿ",
    "n": "ո", "o": "оοօ", "p": "рρ", "r": "г", "s": "ѕ", "t": "т", "u": "υս", "v": "ѵν", "x": "х", "y": "у", "z": "ᴢ",
    "0": "Оο", "1": "ǀ", "<": "‹〈＜˂", ">": "›〉＞˃", "|": "ǀ∣│｜", ":": "∶：꞉", "_": "＿ˍ", "[": "［❲", "]": "］❳",
}  # fmt: skip
_COMPATIBLE = {"<": "﹤", ">": "﹥", "|": "︱", ":": "﹕", "_": "﹍", "-": "﹣", "[": "﹇", "]": "﹈"}
"""Compatibility forms: NFKC, which some tokenizers apply, turns most of them into the plain character."""


def _some(rng: np.random.Generator, text: str) -> np.ndarray:
    """Which characters are changed: one at least."""
    chosen = rng.random(len(text)) < rng.uniform(0.1, 1)
    if text:
        chosen[rng.integers(len(text))] = True
    return chosen


def _each(change: Callable[[str, np.random.Generator], str]) -> Spelling:
    """A spelling that changes some characters, each on its own."""

    def spell(text: str, number: int, rng: np.random.Generator) -> str:
        return "".join(change(c, rng) if yes else c for c, yes in zip(text, _some(rng, text)))

    return spell


def _after(these: str) -> Spelling:
    """A spelling that puts one of these characters behind some."""
    return _each(lambda c, rng: c + these[rng.integers(len(these))])


def _wide(c: str, rng: np.random.Generator) -> str:
    return chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c


def _letter(c: str, rng: np.random.Generator) -> str:
    """A letter or digit of the mathematical alphabets, whose compatible form is the plain one."""
    first = (0x1D400, 0x1D434 - 0, 0x1D5A0, 0x1D670)[rng.integers(4)]
    if c.isascii() and c.isalpha() and c != "h":  # an italic h is elsewhere
        return chr(first + (ord(c) - ord("A") if c.isupper() else 26 + ord(c) - ord("a")))
    return chr(0x1D7CE + ord(c) - ord("0")) if c.isascii() and c.isdigit() else _COMPATIBLE.get(c, c)


def _like(c: str, rng: np.random.Generator) -> str:
    found = _LIKE.get(c.lower(), c)
    return found[rng.integers(len(found))]


def _case(text: str, number: int, rng: np.random.Generator) -> str:
    return (text.upper(), text.lower(), text.swapcase(), text.title())[rng.integers(4)]


def _entities(c: str, rng: np.random.Generator) -> str:
    named = html.escape(c) if c in "<>&" else {"|": "&vert;", ":": "&colon;", "_": "&lowbar;"}.get(c, f"&#{ord(c)};")
    return (named, f"&#{ord(c)};", f"&#x{ord(c):x};")[rng.integers(3)]


def _json(c: str, rng: np.random.Generator) -> str:
    escaped = json.dumps(c)[1:-1]
    return escaped if len(escaped) > 1 else f"\\u{ord(c):04x}"


def _byte(c: str, rng: np.random.Generator) -> str:
    return "".join((f"\\x{b:02x}", f"<0x{b:02X}>", f"\\{b:03o}")[rng.integers(3)] for b in c.encode(errors="replace"))


def _digits(text: str, number: int, rng: np.random.Generator) -> str:
    return (f"{number}", f"<{number}>", f"[token id {number}]", f"<|{number}|>", f"\\u{number:04x}")[rng.integers(5)]


def _nested(text: str, number: int, rng: np.random.Generator) -> str:
    at = int(rng.integers(1, max(2, len(text))))
    return text[:at] + text + text[at:]


def _bidi(text: str, number: int, rng: np.random.Generator) -> str:
    start, end = _BIDI[rng.integers(len(_BIDI))]
    return start + (text[::-1] if rng.random() < 0.5 else text) + end


def _blanks(c: str, rng: np.random.Generator) -> str:
    return c + (" ", "\u00a0", "\t", "\n", "\u2009", "\u3000", "\u2581")[rng.integers(7)]


def _apart(text: str, number: int, rng: np.random.Generator) -> str:
    at = int(rng.integers(1, max(2, len(text))))
    return f"a = '{text[:at]}'; b = '{text[at:]}'; a + b"


def _normal(text: str, number: int, rng: np.random.Generator) -> str:
    return unicodedata.normalize(("NFC", "NFD", "NFKC", "NFKD")[rng.integers(4)], text)


def _surrogates(text: str, number: int, rng: np.random.Generator) -> str:
    at = int(rng.integers(len(text) + 1))
    return text[:at] + chr(int(rng.integers(0xD800, 0xE000))) + text[at:]


def _twice(text: str, number: int, rng: np.random.Generator) -> str:
    return text * int(rng.integers(2, 5))


SPELLINGS: dict[str, Spelling] = {
    "full-width": _each(_wide), "zero-width": _after(_UNSEEN), "soft-hyphen": _after("\u00ad"), "case": _case,
    "accents": _after(_MARKS), "homoglyphs": _each(_like), "compatible": _each(_letter), "normal-form": _normal,
    "html": _each(_entities), "json": _each(_json), "bytes": _each(_byte),
    "percent": lambda text, number, rng: quote(text.encode(errors="replace"), safe=""),
    "base64": lambda text, number, rng: base64.b64encode(text.encode(errors="replace")).decode(),
    "hex": lambda text, number, rng: text.encode(errors="replace").hex(" " if rng.random() < 0.5 else ":"),
    "rot13": lambda text, number, rng: codecs.encode(text, "rot13"),
    "digits": _digits, "nested": _nested, "twice": _twice, "bidi": _bidi, "blanks": _each(_blanks), "apart": _apart,
    "control-characters": _after(_CONTROL), "surrogates": _surrogates,
}  # fmt: skip
"""Name -> spelling. A token may go through several; ``plain`` is none of them."""
