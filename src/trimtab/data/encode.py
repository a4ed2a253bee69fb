"""Text to ids without structure: no text, however spelled, can become an added token.

The tokenizer is rebuilt from its own JSON twice: once as it is (for structure, which the template wrote) and once with
its added tokens and post-processor taken out (for text, which anybody may have written). A subword model can still hold
an added token in its vocabulary (Unigram pieces, ``ignore_merges``); text that yields such an id is cut inside the
offending token and the parts are encoded apart, until none is left. What cannot be cut (a character that only
``<unk>`` covers) raises: silence would put a special id into a prompt.

Trade-off: added tokens that are blank and not special (runs of spaces or newlines, as in GPT-NeoX and Gemma) stay
available to text. They carry no structure, and cutting them would change every indented line.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from trimtab.errors import UserError

Offsets = list[tuple[int, int]]
_BLANK = " \t\r\n\u2581"


class TextEncoder:
    """The two encoders of one fast tokenizer: ``encode`` for text, ``structure`` for what the template writes.

    ``head`` says whether the piece stands where the tokenizer would put its prefix space (SentencePiece's leading
    ``▁``): at the very start, or, unless the scheme is "first", right after an added token.

    added    every id that counts as an added token (all special ids included)
    guarded  the ids that text can never yield: ``added`` less the blank non-special ones
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__}: only fast tokenizers (tokenizer.json) render safely; "
                "load it with AutoTokenizer and use_fast=True"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec.update(truncation=None, padding=None, post_processor=None)
        added: list[dict[str, Any]] = spec["added_tokens"]
        blank = [t for t in added if not t["special"] and not t["content"].strip(_BLANK)]
        self.added = frozenset(t["id"] for t in added) | frozenset(tokenizer.all_special_ids)
        self.special = frozenset(t["id"] for t in added if t["special"]) | frozenset(tokenizer.all_special_ids)
        self.guarded = self.added - {t["id"] for t in blank}
        self.surfaces: dict[int, str] = {t["id"]: t["content"] for t in added}

        # Blank tokens are found here and not by the bare tokenizer, which would number its added tokens anew.
        self._blank_ids: dict[str, int] = {t["content"]: t["id"] for t in blank}
        longest_first = sorted(self._blank_ids, key=len, reverse=True)
        self._blanks = re.compile("|".join(map(re.escape, longest_first))) if blank else None

        bare = {**spec, "added_tokens": []}
        self._full = Tokenizer.from_str(json.dumps(spec))
        self._text = Tokenizer.from_str(json.dumps(bare))
        inner, self.first_only = _without_prefix_space(spec)
        if inner == spec:  # no prefix space anywhere: position does not matter
            self._full_inner, self._text_inner = self._full, self._text
        else:
            self._full_inner = Tokenizer.from_str(json.dumps(inner))
            self._text_inner = Tokenizer.from_str(json.dumps({**inner, "added_tokens": []}))

    def encode(self, text: str, *, head: bool = True) -> list[int]:
        """Ids of ``text`` alone; never one of ``guarded``. ``UserError`` for text no vocabulary entry can spell."""
        if self._blanks is not None:
            return self.encode_with_offsets(text, head=head)[0]
        ids = self._run(self._text if head else self._text_inner, text).ids
        return ids if self.guarded.isdisjoint(ids) else self._cut(text, head)[0]

    def encode_with_offsets(self, text: str, *, head: bool = True) -> tuple[list[int], Offsets]:
        """As ``encode``, with the (start, end) characters of ``text`` that each id stands for."""
        if self._blanks is None:
            return self._cut(text, head)
        ids: list[int] = []
        offsets: Offsets = []
        start = 0
        for found in [*self._blanks.finditer(text), None]:
            end = found.start() if found else len(text)
            part_ids, part_offsets = self._cut(text[start:end], head)
            ids += part_ids
            offsets += [(a + start, b + start) for a, b in part_offsets]
            if found:
                ids.append(self._blank_ids[found[0]])
                offsets.append(found.span())
                start, head = found.end(), not self.first_only
        return ids, offsets

    def structure(self, text: str, *, head: bool = True) -> tuple[list[int], Offsets]:
        """Ids and offsets of a piece of template text, added tokens parsed. Never call it on a user's text."""
        full = self._run(self._full, text)
        if head or self._full_inner is self._full:
            return full.ids, full.offsets
        inner = self._run(self._full_inner, text)
        if self.first_only:
            return inner.ids, inner.offsets
        # The prefix space is missing only up to the first added token; after it the tokenizer puts one again.
        i = next((k for k, token in enumerate(inner.ids) if token in self.added), len(inner.ids))
        j = next((k for k, token in enumerate(full.ids) if token in self.added), len(full.ids))
        return inner.ids[:i] + full.ids[j:], inner.offsets[:i] + full.offsets[j:]

    def _run(self, tokenizer: Tokenizer, text: str) -> Any:
        try:
            return tokenizer.encode(text, add_special_tokens=False)
        except UnicodeEncodeError as error:
            raise UserError(
                f"text is not valid Unicode (lone surrogate at character {error.start}); clean it"
            ) from error
        except Exception as error:  # the Rust side raises bare Exception, e.g. for a model without <unk>
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise UserError("text is not valid Unicode (it holds a lone surrogate); clean it") from error
            raise UserError(f"the tokenizer cannot encode this text ({error}); use one with byte fallback") from error

    def _cut(self, text: str, head: bool) -> tuple[list[int], Offsets]:
        """Encode, cutting inside every guarded id that appears, until none is left."""
        encoding = self._run(self._text if head else self._text_inner, text)
        bad = [k for k, token in enumerate(encoding.ids) if token in self.guarded]
        if not bad:
            return encoding.ids, encoding.offsets
        cuts: set[int] = set()
        for k in bad:
            start, end = encoding.offsets[k]
            if end - start >= 2:
                cuts.add(start + 1)
            elif len(text) > 1:  # one character: put it alone
                cuts.update(c for c in (start, end) if 0 < c < len(text))
        if not cuts:
            return self._cut_character(text, head)
        ids: list[int] = []
        offsets: Offsets = []
        edges = [0, *sorted(cuts), len(text)]
        for start, end in pairwise(edges):
            part_ids, part_offsets = self._cut(text[start:end], head and start == 0)
            ids += part_ids
            offsets += [(a + start, b + start) for a, b in part_offsets]
        return ids, offsets

    def _cut_character(self, char: str, head: bool) -> tuple[list[int], Offsets]:
        """One character that a normaliser blew up into an added token's text, or that only ``<unk>`` covers."""
        normalizer = self._text_inner.normalizer
        spelled = normalizer.normalize_str(char) if normalizer is not None else char
        if len(spelled) <= len(char) or char in spelled:
            raise UserError(
                f"character {char!r} ({' '.join(f'U+{ord(c):04X}' for c in char)}) has no token of its own in this "
                "tokenizer (only a special token such as <unk>); remove it, or use a tokenizer with byte fallback"
            )
        ids: list[int] = []
        for k, part in enumerate(spelled):
            ids += self._cut(part, head and k == 0)[0]
        return ids, [(0, len(char))] * len(ids)


def _without_prefix_space(spec: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tokenizer JSON with every prefix space switched off, and whether a Metaspace had the scheme "first"."""
    first = False

    def mend(node: Any) -> Any:
        nonlocal first
        if node is None:
            return None
        node = dict(node)
        for key in ("normalizers", "pretokenizers"):
            if key in node:
                node[key] = [kept for kept in map(mend, node[key]) if kept is not None]
        if node["type"] == "Prepend":
            return None
        if node["type"] == "Metaspace":
            first = first or node.get("prepend_scheme") == "first"
            node["prepend_scheme"] = "never"
        if node["type"] == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    inner = deepcopy({k: v for k, v in spec.items() if k in ("normalizer", "pre_tokenizer")})
    return {**spec, "normalizer": mend(inner["normalizer"]), "pre_tokenizer": mend(inner["pre_tokenizer"])}, first
