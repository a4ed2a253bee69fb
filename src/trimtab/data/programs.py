"""Small Python tasks with tests, for models that cannot do HumanEval: families of one-line functions, their numbers drawn.

Every task asks for one function by name and says what it returns; ``metadata`` has its tests in HumanEval's form (``test``
defines ``check(candidate)``, ``entry_point`` names the function). What the tests expect is reckoned here by a function of our
own, not by the solution that the training set answers with. The two sets share no task: the numbers and words of a family
are put into one drawn order, of which each set has its own part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.setcard import prompt_row
from trimtab.seeds import uniform_of
from trimtab.types import Row

EVALUATED, TRAINED = 15, 30
"""Tasks of each family in each set."""


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of task. In its texts {k} is what is drawn from ``pool``.

    asks    what the function returns, after "that returns"
    body    the expression that a solution returns
    solve   (k, argument) -> what is expected
    cases   k -> arguments that are tried
    """

    name: str
    argument: str
    asks: str
    body: str
    solve: Callable[[Any, Any], Any]
    cases: Callable[[Any], Sequence[Any]]
    pool: Sequence[Any]


_NUMBERS = range(2, 62)
_SMALL = range(2, 52)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ("ash", "bay", "cod", "dew", "elm", "fir", "gum", "hay", "ivy", "jar", "kin", "log", "map", "net", "oak", "pen",
          "rye", "sun", "tar", "urn", "van", "web", "yam", "zip", "arc", "bud", "cap", "den", "eel", "fog", "gap", "hut",
          "ink", "jug", "keg", "lid", "mud", "nut", "orb", "pad", "rug", "sap", "tin", "use", "vat", "wax", "yak", "zoo",
          "ant", "bee", "cot", "dot", "egg", "fin", "gem", "hem", "ice", "jaw", "key", "lap")  # fmt: skip


def _around(k: int) -> list[Any]:
    return [0, 1, k - 1, k, k + 1, 3 * k, -k]


def _lists(k: int) -> list[Any]:
    return [[], [k], [k - 1, k, k + 1], [k + 5, 2, k + 9, -k]]


def _long(k: int) -> list[Any]:
    return [list(range(k + 3)), list(range(k)), [4, 1], []]


def _texts(k: str) -> list[Any]:
    return ["", k, f"{k}x{k}", "a quick brown fox", f"no {k} here, or {k}?"]


FAMILIES: tuple[Family, ...] = (
    Family("add_{k}", "x", "x plus {k}", "x + {k}", lambda k, x: x + k, _around, _NUMBERS),
    Family("minus_{k}", "x", "x minus {k}", "x - {k}", lambda k, x: x - k, _around, _NUMBERS),
    Family("times_{k}", "x", "x times {k}", "x * {k}", lambda k, x: x * k, _around, _NUMBERS),
    Family("remainder_{k}", "x", "the remainder of x divided by {k}", "x % {k}", lambda k, x: x - k * (x // k), _around,
           _NUMBERS),
    Family("is_multiple_of_{k}", "x", "True if x is a multiple of {k}, and False if not", "x % {k} == 0",
           lambda k, x: x in range(-k * abs(x), k * abs(x) + 1, k), _around, _NUMBERS),
    Family("above_{k}", "x", "'yes' if x is above {k}, and 'no' if not", "'yes' if x > {k} else 'no'",
           lambda k, x: "no" if x <= k else "yes", _around, _NUMBERS),
    Family("fizz_{k}", "x", "'fizz' if x is a multiple of {k}, and x if not", "'fizz' if x % {k} == 0 else x",
           lambda k, x: x if x - k * (x // k) else "fizz", _around, _NUMBERS),
    Family("at_most_{k}", "x", "x, or {k} if x is larger than {k}", "min(x, {k})", lambda k, x: k if x > k else x, _around,
           _NUMBERS),
    Family("at_least_{k}", "x", "x, or {k} if x is smaller than {k}", "max(x, {k})", lambda k, x: k if x < k else x, _around,
           _NUMBERS),
    Family("total_plus_{k}", "numbers", "the sum of the list numbers, plus {k}", "sum(numbers) + {k}",
           lambda k, x: sum([*x, k]), _lists, _NUMBERS),
    Family("sum_above_{k}", "numbers", "the sum of those of the list numbers that are above {k}",
           "sum(n for n in numbers if n > {k})", lambda k, x: sum(n * (n > k) for n in x), _lists, _NUMBERS),
    Family("count_{k}", "numbers", "how often {k} is in the list numbers", "numbers.count({k})",
           lambda k, x: len([n for n in x if n == k]), _lists, _NUMBERS),
    Family("largest_or_{k}", "numbers", "the largest of the list numbers, or {k} if it is empty",
           "max(numbers, default={k})", lambda k, x: sorted(x)[-1] if x else k, _lists, _NUMBERS),
    Family("smallest_or_{k}", "numbers", "the smallest of the list numbers, or {k} if it is empty",
           "min(numbers, default={k})", lambda k, x: sorted(x)[0] if x else k, _lists, _NUMBERS),
    Family("first_{k}", "items", "the first {k} elements of the list items", "items[:{k}]",
           lambda k, x: [v for i, v in enumerate(x) if i < k], _long, _SMALL),
    Family("without_first_{k}", "items", "the list items without its first {k} elements", "items[{k}:]",
           lambda k, x: [v for i, v in enumerate(x) if i >= k], _long, _SMALL),
    Family("repeat_{k}", "text", "text repeated {k} times", "text * {k}", lambda k, x: "".join(x for _ in range(k)),
           lambda k: ["", "a", "go "], _SMALL),
    Family("start_with_{k}", "text", "text with '{k}' put before it", "'{k}' + text", lambda k, x: f"{k}{x}", _texts, _WORDS),
    Family("count_letter_{k}", "text", "how many times the letters '{k}' are in text", "text.count('{k}')",
           lambda k, x: len(x.split(k)) - 1, _texts, [a + b for a in _LETTERS for b in "aeo" if a not in "aeo"]),
    Family("has_{k}", "text", "True if '{k}' is in text, and False if not", "'{k}' in text", lambda k, x: x.find(k) >= 0,
           _texts, _WORDS),
)  # fmt: skip


def programs(split: str) -> Iterator[Row]:
    """The tasks of ``split`` ("eval" or "train"), family by family; those of the training split have a solution as answer."""
    source = "programs" if split == "eval" else "programs-train"
    for family in FAMILIES:
        for k in chosen(family, split):
            entry = family.name.format(k=k)
            text = f"Write a Python function `{entry}({family.argument})` that returns {family.asks.format(k=k)}."
            row = prompt_row(
                source, entry, text, "benign", family.name.format(k="").strip("_").replace("_", " "),
                {"entry_point": entry, "test": _test(family, k)},
            )  # fmt: skip
            yield row if split == "eval" else row.with_answer(solution(family, k))


def chosen(family: Family, split: str) -> list[Any]:
    """What {k} is in the tasks of one split."""
    order = sorted(family.pool, key=lambda k: uniform_of("programs", family.name, str(k)))
    return order[:EVALUATED] if split == "eval" else order[EVALUATED : EVALUATED + TRAINED]


def solution(family: Family, k: Any) -> str:
    """A right answer: one block of code."""
    entry = family.name.format(k=k)
    return f"```python\ndef {entry}({family.argument}):\n    return {family.body.format(k=k)}\n```"


def _test(family: Family, k: Any) -> str:
    lines = [f"    assert candidate({case!r}) == {family.solve(k, case)!r}" for case in family.cases(k)]
    return "\n".join(("def check(candidate):", *lines))
