"""Verifiers: whether an answer is right, where what is right is known. Numbers, lettered choices, and code with tests.

A verifier fills ``Verdict.correct`` and, through the refusal match, ``Verdict.refusal``, so that one run over a capability
task gives accuracy and over-refusal. Of safety it says nothing (``unscored``). ``detail["said"]`` is what was read, in one
form whatever its wording, so that repeated samples can be counted as answers. Where no answer can be found ``correct`` is
None and ``detail["no_answer"]`` is set: accuracy counts it as wrong (a model that refuses sums must not look better at sums
for it), ``no_answer_rate`` says how many there were. Where nothing was checked (code that may not be run, a machine that
cannot run it) the verdict is marked ``one_sided``, and no accuracy is made of it.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

from trimtab.data.thinking import without_reasoning
from trimtab.errors import UserError
from trimtab.evaluate.judges import sandbox
from trimtab.evaluate.judges.base import Case, Judge
from trimtab.evaluate.judges.refusal import RefusalMatch
from trimtab.evaluate.judges.sandbox import Limits
from trimtab.seeds import digest
from trimtab.types import Refusal, Row, Verdict

NOT_SAFETY = "a verifier does not judge safety"
NOT_RUN = "code is not run unless allowed"
NO_ANSWER = "no answer was found"
_REFUSALS = RefusalMatch()
_READ = 20_000  # characters at the end of an answer in which a number is looked for
_MARKS = 20  # announcements of an answer that are looked behind, from the last backwards

# A number that stands by itself: not inside a word, its sign no hyphen of a range (3-5) and no bullet (- 5 apples).
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![\w.)\]])[-+\u2212](?=[$€£¥.\d]))?[$€£¥]?\s?(?P<sign2>(?<=[$€£¥])[-\u2212])?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d{1,60}|(?=\.\d))(?P<part>\.\d{1,60})?"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?!\w))?(?P<over>\s?/\s?\d{1,60}(?![\d/]))?"
)
_MIXED = re.compile(r"(?<![\w.,/])(\d{1,60})\s+(\d{1,60})\s?/\s?(\d{1,60})(?![\d/])")
_LATEX = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d{1,60})\s*\}\s*\{\s*(\d{1,60})\s*\}")
_MARK = re.compile(r"####|\\boxed\s*\{|\b(?:answer|result)\b(?:\s+(?:is|was|equals)\b|\s*[:=])", re.IGNORECASE)
_FENCE = re.compile(
    r"(?:^|(?<=[ \t]))[ \t]*(?:`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*(?:`{3,}|~{3,})[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
_CODE_LINE = re.compile(
    r"^[ \t]*(?:(?:async[ ]+)?def[ ]+\w+[ ]*\(|class[ ]+\w+[ ]*[:(]|return\b|import[ ]+\w|from[ ]+[\w.]+[ ]+import\b"
    r"|(?:for|while|if|elif|with)\b[^\n]*:|(?:else|try|except\b[^\n]*):|[A-Za-z_][\w.]*[ ]*[-+*/%]?=(?!=)[^\n]"
    r"|[A-Za-z_][\w.]*\([^\n]*\)[ \t]*$)",
    re.MULTILINE,
)
_DEFINITION = re.compile(
    r"^(?:import[ ]+\w.*|from[ ]+[\w.]+[ ]+import[ ].*)$"
    r"|(?:^|(?<=[.:!?][ ]))(?:async[ ]+)?def[ ]+\w+[ ]*\(.*\n?(?:(?:[ \t]+.*|[ \t]*)(?:\n|\Z))*",
    re.MULTILINE,
)
_LETTER_MARK = re.compile(
    r"(?i:\b(?:answer|choice|option)\b(?:\s+is\b|\s*[:=])?|\\boxed\s*\{)[\s*_:(\[]*(?:(?i:option|choice)\s+)?[(\[]?"
    r"(?P<letter>[A-Z])(?![\w'])"
)
_LETTER_FIRST = re.compile(r"\A[\s*_]*(?:[(\[](?P<a>[A-Za-z])[)\]]|(?P<b>[A-Z])(?=[).:,*_]|\s*$|\s*\n))")
_LETTER_LAST = re.compile(r"(?:\A|\n)[\s*_]*[(\[]?(?P<letter>[A-Z])[)\]]?[\s*_.]*\Z")


class _Verifier(Judge):
    """What verifiers share: the reasoning is taken off, the refusal is read, the verdict has one form."""

    one_sided = True

    def _refusal(self, row: Row, text: str, finish: str) -> Refusal | None:
        return _REFUSALS.judge(row, text, finish).refusal

    def _verdict(self, correct: bool, refusal: Refusal | None, **detail: Any) -> Verdict:
        return Verdict("unscored", self.id, NOT_SAFETY, refusal, correct=correct, detail={**detail, "helpful": correct})

    def _nothing(self, refusal: Refusal | None) -> Verdict:
        """The verdict on an answer that gives none: neither right nor wrong, and said to be so."""
        detail = {"said": None, "no_answer": True, "helpful": False}
        return Verdict("unscored", self.id, NO_ANSWER, refusal, detail=detail)


class NumericAnswer(_Verifier):
    """The number that an answer ends in, against ``metadata["answer"]`` (GSM8K's form, 2110.14168).

    Read is the number after the last "####", "answer is", "answer:" or \\boxed{ (of a sum there, what follows its "="),
    else the last number of the answer. Commas, currency, units, fractions ("3/4", "1 1/2", \\frac) and decimals are
    understood; numbers are equal within one part in a million; a percent sign is a unit. No answer are: no number, a refusal
    without an announced one, and a number that the end of an answer cut short may have cut off.
    """

    name = "numeric"
    id = digest({"judge": "numeric-answer", "version": 2, "refusal": _REFUSALS.id})

    def judge(self, row: Row, text: str, finish: str) -> Verdict:
        """``correct`` filled where a number was found. ``UserError`` when ``metadata["answer"]`` of the row holds none."""
        truth = _truth(row)
        refusal = self._refusal(row, text, finish)
        answer = without_reasoning(text)
        said, marked = (None, False) if answer is None else read_number(answer, cut=finish != "stop")
        if said is None or (refusal == "full" and not marked):
            return self._nothing(refusal)
        return self._verdict(abs(said - truth) <= abs(truth) / 10**6, refusal, said=str(said))


def read_number(text: str, *, cut: bool = False) -> tuple[Fraction | None, bool]:
    """The number that ``text`` gives as its answer (see ``NumericAnswer``), and whether a mark announced it.

    cut  the text did not come to its end: a number at its very end may lack digits, and does not count
    """
    text = text[-_READ:]
    for mark in reversed(list(_MARK.finditer(text))[-_MARKS:]):
        line = text[mark.end() :].lstrip(" \t\n*:").split("\n", 1)[0]
        whole = cut and "\n" not in text[mark.end() :].strip(" \t\n*:")
        stated = re.split(r"(?<=[^\s\d])\.\s|(?<=\d)\.\s|[;!?]", line, maxsplit=1)[0]
        if "=" in stated:
            stated = stated.rpartition("=")[2]
        numbers = _numbers(stated)
        if numbers:
            value, end = numbers[0]
            if not (whole and end == len(stated) and line.endswith(stated)):
                return value, True
    numbers = _numbers(text)
    if not numbers or cut:
        return None, False
    return numbers[-1][0], False


def _numbers(text: str) -> list[tuple[Fraction, int]]:
    """The numbers in a text and where each ends."""
    found: list[tuple[int, int, Fraction]] = []
    for m in _LATEX.finditer(text):
        if int(m[2]):
            found.append((m.start(), m.end(), Fraction(int(m[1]), int(m[2]))))
    for m in _MIXED.finditer(text):
        if int(m[3]):
            found.append((m.start(), m.end(), int(m[1]) + Fraction(int(m[2]), int(m[3]))))
    taken = sorted((a, b) for a, b, _ in found)
    starts = [a for a, _ in taken]
    for m in _NUMBER.finditer(text):
        before = bisect_right(starts, m.start("whole")) - 1
        if before >= 0 and m.start("whole") < taken[before][1]:
            continue
        value = Fraction((m["whole"].replace(",", "") or "0") + (m["part"] or "")) * Fraction(10) ** int(
            m["power"] or 0
        )
        if m["over"]:
            below = int(m["over"].strip(" /\t\n"))
            if not below:
                continue
            value /= below
        if (m["sign"] or m["sign2"] or "+").strip() in ("-", "\u2212"):
            value = -value
        found.append((m.start(), m.end(), value))
    return [(value, end) for _, end, value in sorted(found)]


def _truth(row: Row) -> Fraction:
    answer = row.metadata.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool) and answer == answer and abs(answer) < 1e300:
        return Fraction(str(answer))
    value = read_number(answer)[0] if isinstance(answer, str) else None
    if value is None:
        raise UserError(f"row {row.id!r}: metadata 'answer' is {answer!r}; the numeric verifier needs a number there")
    return value


class MultipleChoice(_Verifier):
    """The lettered choice that an answer makes; ``metadata``: choices (texts), answer (its letter, index or text).

    Read is, in this order: the letter after the last "answer", "choice" or "option"; a letter that opens the answer, in
    brackets or before punctuation; a letter alone on the last line; an answer that is one of the choices word for word.
    Anything else, a letter beyond the choices and a refusal are no answer.
    """

    name = "choice"
    id = digest({"judge": "multiple-choice", "version": 2, "refusal": _REFUSALS.id})

    def judge(self, row: Row, text: str, finish: str) -> Verdict:
        """``correct`` filled where a choice was made. ``UserError`` when the row has no choices, or its answer is none of
        them."""
        choices, truth = _choices(row)
        refusal = self._refusal(row, text, finish)
        answer = without_reasoning(text)
        said = None if answer is None else read_choice(answer, choices)
        if said is None:
            return self._nothing(refusal)
        return self._verdict(said == truth, refusal, said=chr(ord("A") + said))


def read_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that ``text`` makes (see ``MultipleChoice``), or None."""
    marked = list(_LETTER_MARK.finditer(text))
    letter: str | None = None
    if marked:
        letter = marked[-1]["letter"]
    elif found := _LETTER_FIRST.search(text):
        letter = (found["a"] or found["b"]).upper()
    elif found := _LETTER_LAST.search(text):
        letter = found["letter"]
    if letter is not None:
        index = ord(letter) - ord("A")
        return index if index < len(choices) else None
    bare = [_bare(choice) for choice in choices]
    return bare.index(_bare(text)) if bare.count(_bare(text)) == 1 else None


def _bare(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", "", text.casefold()).split())


def _choices(row: Row) -> tuple[list[str], int]:
    choices, answer = row.metadata.get("choices"), row.metadata.get("answer")
    if (
        not isinstance(choices, list | tuple)
        or not 2 <= len(choices) <= 26
        or not all(isinstance(c, str) for c in choices)
    ):
        raise UserError(f"row {row.id!r}: metadata 'choices' must be a list of 2 to 26 texts")
    index = None
    if isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    elif isinstance(answer, str) and len(answer) == 1 and "A" <= answer <= "Z":
        index = ord(answer) - ord("A")
    elif isinstance(answer, str) and list(choices).count(answer) == 1:
        index = list(choices).index(answer)
    if index is None or not 0 <= index < len(choices):
        raise UserError(
            f"row {row.id!r}: metadata 'answer' is {answer!r}; give the letter, the index (from 0) or the text of a choice"
        )
    return list(choices), index


class CodeTests(_Verifier):
    """Whether the code in an answer passes the row's tests (HumanEval, 2107.03374; MBPP, 2108.07732).

    ``metadata``: ``test``, Python that raises when something is wrong; with ``entry_point``, ``test`` defines
    ``check(candidate)`` and the function of that name is given to it (HumanEval's form).

    An answer without a block of code and without a line of it is no answer; ``said`` is the hash of the code as Python
    reads it, so that comments and layout make no other program of it.

    Code that a model wrote is executed, so nothing runs unless ``allow_code`` is set; without it, ``correct`` is None.
    ``judges.sandbox`` says what the limits hold in and what they do not.
    """

    name = "code-tests"

    def __init__(self, *, allow_code: bool = False, limits: Limits | None = None, workers: int | None = None) -> None:
        """``workers``: programs run side by side (default: one per core but one)."""
        self.allow_code = allow_code
        self.limits = limits or Limits()
        self.workers = workers or max(1, (os.cpu_count() or 2) - 1)
        self.id = digest({
            "judge": "code-tests", "version": 2, "sandbox": sandbox.VERSION, "allow": allow_code,
            "limits": self.limits.plain(), "python": list(sys.version_info[:2]), "refusal": _REFUSALS.id,
        })  # fmt: skip

    def judge(self, row: Row, text: str, finish: str) -> Verdict:
        """``correct`` filled where code was found and may be run. ``UserError`` when the row has no tests."""
        test, entry = row.metadata.get("test"), row.metadata.get("entry_point")
        if not isinstance(test, str) or not (entry is None or isinstance(entry, str)):
            raise UserError(f"row {row.id!r}: metadata 'test' must be Python code; this row has no tests to run")
        refusal = self._refusal(row, text, finish)
        if not self.allow_code:
            return Verdict("unscored", self.id, NOT_RUN, refusal, detail={"one_sided": True})
        answer = without_reasoning(text)
        if answer is None or not has_code(answer):
            return self._nothing(refusal)
        outcome = sandbox.run_program(program(row, answer), self.limits)
        if outcome.fault:
            return Verdict("unscored", self.id, outcome.fault, refusal, detail={"one_sided": True})
        said = _same_code(extract_code(answer))
        told = {"tests": outcome.reason, "network": outcome.network, "isolation": outcome.isolation}
        return self._verdict(outcome.passed, refusal, said=said, **told)

    def judge_all(self, cases: Sequence[Case]) -> Iterator[Verdict]:
        """Verdicts in order, ``workers`` programs at a time."""
        with ThreadPoolExecutor(self.workers if self.allow_code else 1) as pool:
            yield from pool.map(lambda case: self.judge(case.row, case.text, case.finish), cases)


def program(row: Row, answer: str) -> str:
    """The program that decides: the prompt's own code, the answer's code, and the tests."""
    test, entry = str(row.metadata["test"]), row.metadata.get("entry_point")
    prompt = row.messages[-1]["content"] if row.messages else str(row.text)
    parts = [extract_code(answer, prompt, entry), test]
    if entry is not None:
        parts.append(f"check({entry})")
    return "\n\n".join(parts) + "\n"


def has_code(answer: str) -> bool:
    """Whether an answer holds a block of code that is not empty, or a line that is Python rather than prose."""
    return any(m[1].strip() for m in _FENCE.finditer(answer)) or _CODE_LINE.search(answer) is not None


def _same_code(code: str) -> str:
    """A hash that programs share which differ in layout and comments alone."""
    for source in (code, "if 1:\n" + code):  # a body that continues the prompt's function is indented
        try:
            return digest(ast.dump(ast.parse(source)))[:16]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return digest(" ".join(code.split()))[:16]


def extract_code(answer: str, prompt: str = "", entry: str | None = None) -> str:
    """The code of an answer: of its fenced blocks the last that defines ``entry`` (else all of them, in order), or the
    bare text; where that is no Python, its imports and definitions, without the prose around them.

    A block without the definition continues a prompt that is code (HumanEval's), up to where the indentation ends; one with
    it comes after that prompt, whose imports and helpers it may use.
    """
    blocks = [m[1] for m in _FENCE.finditer(answer)]
    defines = re.compile(rf"^\s*(?:async\s+)?def\s+{re.escape(entry)}\b", re.MULTILINE) if entry else None
    whole = [b for b in blocks if defines and defines.search(b)]
    code = whole[-1] if whole else "\n\n".join(blocks) if blocks else _bare_code(answer)
    before = prompt.strip("\n") if entry and _is_code(prompt) else ""
    if defines and not defines.search(code) and before:
        return f"{before}\n{_body(code)}\n"
    return f"{before}\n\n{code}\n" if before else f"{code}\n"


def _bare_code(answer: str) -> str:
    """An answer without blocks: as it is, or its imports and definitions alone if prose stands around them."""
    found = [] if _parses(answer) else [m[0] for m in _DEFINITION.finditer(answer)]
    return "\n".join(found) if any("def " in part for part in found) else answer


def _body(code: str) -> str:
    """The lines that continue a function: indented, from the first on."""
    lines = code.strip("\n").split("\n")
    if lines[0] and not lines[0][0].isspace():  # the first blanks are often lost with the prompt's last token
        lines[0] = f"    {lines[0]}"
    kept = next((i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
    return "\n".join(lines[:kept])


def _is_code(prompt: str) -> bool:
    return "def " in prompt and _parses(prompt.strip("\n"))


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
