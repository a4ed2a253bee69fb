"""Boilerplate openings of responses: found, taken off, and reported.

Cleaning of SFT data usually takes off sentences such as "Sure! Here is a step-by-step explanation:". The prefix lever
(arXiv 2601.01624) needs them gone before it puts its own there, and a user needs to see what went. An opening is
boilerplate by *rule* (a form of words that says nothing of the subject) or because it is *common* (many responses of the
set begin with it word for word). Sentences with a digit or with code are never taken: they may be the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import Field

from trimtab.config import Config
from trimtab.data.thinking import split_block
from trimtab.types import Row

How = Literal["rule", "common"]
FEWEST = 5
"""Rows that must share an opening before it can count as common, however small the set."""

_SENTENCE = re.compile(r"\s*([^\n]*?(?:[.!?:…](?=[\s*_\"')]|\Z)[*_\"')]*|(?=\n)|\Z))\s*")
_CONTENT = re.compile(r"[\d`=<>{}\\]")


def _any(*forms: str) -> str:
    return f"(?:{'|'.join(forms)})"


_REST = r"[^.!?:]*"
_THING = _any(
    "answer", "solution", "explanation", "response", "version", "breakdown", "overview", "summary", "walk-?through", "reasoning",
    "list", "guide", "example", "code", "function", "program", "implementation", "rewrite", "result", "analysis", "outline",
    "step", "way", "approach", "take", "draft",
) + "s?"  # fmt: skip
_YES = _any(
    "sure(?: thing)?", "certainly", "of course", "absolutely", "definitely", "gladly", "no problem", "ok(?:ay)?", "alright",
    "all right",
)  # fmt: skip
_AGREED = _any(_YES, "yes", "right", "great", "well")  # of themselves these may be the answer
_SHOWN = _any(r"here(?:'s|’s| is| are)", "below (?:is|are)", "the following (?:is|are)", "this is", "what follows is")
_HERE = rf"{_SHOWN}\b{_REST}\b{_THING}\b{_REST}"
_WILLING = (
    r"(?:(?:i'?m|i am|i'?d be|i would be) )?(?:(?:more than )?happy|glad|delighted|pleased) to "
    rf"(?:help|assist|explain|answer){_REST}"
)
_VERB = _any(
    "explain", "walk", "work", "think", "break", "start", "begin", "go", "take", "set out", "reason", "help", "solve", "show",
    "trace", "recall", "answer", "look", "consider", "check",
)  # fmt: skip
_LET = (
    _any("let me", "let us", "let'?s", "i will", "i'?ll", "i can", "we will", "we'?ll")
    + rf" (?:now |first |just |quickly |try to )*{_VERB}\b{_REST}"
)
_PRAISE = r"(?:great|good|excellent|interesting|nice) question"
_THANKS = rf"(?:thanks?(?: you)?(?: so much)? for {_REST}|(?:(?:that'?s |what )?an? )?{_PRAISE}{_REST})"
_STEPS = r"(?:(?:let'?s think )?step[- ]by[- ]step|first(?:ly)?|to begin(?: with)?|before (?:i|we) answer)"
_RULES = re.compile(
    _any(
        _YES,
        rf"{_AGREED}[,!. ]+{_any(_HERE, _WILLING, _LET)}",
        _HERE,
        _WILLING,
        _LET,
        _THANKS,
        rf"{_STEPS}(?:,? {_LET})?",
    )
    + r"[.!?:…,]*[*_\"')]*",
    re.IGNORECASE,
)


class StripConfig(Config):
    """What counts as a boilerplate opening."""

    rules: bool = Field(True, description="Take off what the rules know: 'Sure!', 'Here is a clear explanation:', ...")
    common: float = Field(
        0.02,
        ge=0,
        le=1,
        description=f"Also take off an opening sentence that this share of the responses (and at least {FEWEST}) begins with "
        "word for word; 0 for none.",
    )
    most: int = Field(2, ge=1, le=5, description="Sentences that may be taken off one response.")


@dataclass
class StripReport:
    """What was removed. ``openings``: text -> (rows it was taken from, how it was found); ``emptied``: ids of rows that were
    nothing but boilerplate and are left out."""

    rows: int = 0
    changed: int = 0
    openings: dict[str, tuple[int, How]] = field(default_factory=dict)
    emptied: list[str] = field(default_factory=list)

    def plain(self, most: int = 50) -> dict[str, Any]:
        """JSON-ready, the ``most`` frequent openings."""
        ranked = sorted(self.openings.items(), key=lambda item: (-item[1][0], item[0]))
        return {
            "rows": self.rows,
            "changed": self.changed,
            "emptied": len(self.emptied),
            "emptied_ids": self.emptied[:20],
            "different": len(ranked),
            "openings": [{"text": text, "rows": n, "found": how} for text, (n, how) in ranked[:most]],
        }


def strip_rows(rows: Iterable[Row], config: StripConfig) -> tuple[list[Row], StripReport]:
    """Rows with the boilerplate openings of their last responses taken off, in order, and what was removed.

    Rows without a response pass through. A response that is nothing but boilerplate leaves its row out (counted in the report).
    A prefix that a row names (``Row.prefix``) goes too. A reasoning block (``<think>``) stays; the answer after it is looked at.
    """
    rows = list(rows)
    report = StripReport(rows=len(rows))
    common = _common(rows, config)
    kept = []
    for row in rows:
        if row.messages is None or row.messages[-1]["role"] != "assistant":
            kept.append(row)
            continue
        content = row.messages[-1]["content"]
        at = _answer_at(content)
        removed, rest = _opening(content[at:], row.prefix, common, config)
        if not removed:
            kept.append(row)
            continue
        report.changed += 1
        for text, how in removed:
            report.openings[text] = report.openings.get(text, (0, how))[0] + 1, how
        if not rest.strip():
            report.emptied.append(row.id)
            continue
        bare = {**row.messages[-1], "content": content[:at] + rest}
        kept.append(replace(row, messages=(*row.messages[:-1], bare), prefix=None))  # type: ignore[arg-type]
    return kept, report


def _answer_at(content: str) -> int:
    """Where the answer begins: behind its reasoning block, if it has one."""
    block = split_block(content)
    return 0 if block is None else block.answer_at


def _opening(
    text: str, prefix: str | None, common: frozenset[str], config: StripConfig
) -> tuple[list[tuple[str, How]], str]:
    """The sentences that are boilerplate, from the first on, and what is left of the text."""
    removed: list[tuple[str, How]] = []
    if prefix and text.startswith(prefix):
        removed.append((prefix, "rule"))
        text = text[len(prefix) :].lstrip()
    while len(removed) < config.most and text.strip():
        found = _SENTENCE.match(text)
        sentence = found[1].strip() if found else ""
        if not sentence or found is None:
            break
        if config.rules and not _CONTENT.search(sentence) and _RULES.fullmatch(sentence):
            how: How = "rule"
        elif sentence in common:
            how = "common"
        else:
            break
        removed.append((sentence, how))
        text = text[found.end() :]
    return removed, text


def _common(rows: Sequence[Row], config: StripConfig) -> frozenset[str]:
    """Opening sentences that many responses share word for word and that many different texts follow."""
    if not config.common:
        return frozenset()
    count: Counter[str] = Counter()
    rests: dict[str, set[str]] = {}
    total = 0
    for row in rows:
        if row.messages is None or row.messages[-1]["role"] != "assistant":
            continue
        total += 1
        content = row.messages[-1]["content"]
        found = _SENTENCE.match(content, _answer_at(content))
        if found and (sentence := found[1].strip()) and not _CONTENT.search(sentence):
            count[sentence] += 1
            rests.setdefault(sentence, set()).add(content[found.end() :].strip())
    least = max(FEWEST, config.common * total)
    # A whole answer that recurs ("I can't help with that.") is no opening: something must follow, and not always the same.
    return frozenset(s for s, n in count.items() if n >= least and len(rests[s] - {""}) > n / 2)
