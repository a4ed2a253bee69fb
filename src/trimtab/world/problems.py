"""Word problems and Tally programs: every one that exists, split into training and evaluation by its numbers.

A sum or program belongs to the evaluation split with probability a quarter, decided by its content alone, so that no
text of the training side (raw documents included) ever holds one that is evaluated.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from trimtab.seeds import rng_of, uniform_of
from trimtab.world import lexicon as lex
from trimtab.world import text as tx
from trimtab.world.tally import evaluate
from trimtab.world.text import pick
from trimtab.world.town import Town

Sum = tuple[str, int, int]
EVAL_SHARE = 0.25


def result(sum_: Sum) -> int:
    sign, m, n = sum_
    return m + n if sign == "+" else m - n if sign == "-" else m * n


class Problems:
    """The sums and programs of one town."""

    def __init__(self, town: Town) -> None:
        self.town, self.config = town, town.config

    @cached_property
    def sums(self) -> dict[str, list[Sum]]:
        """Split -> (sign, m, n), shuffled; products keep to small numbers."""
        top = self.config.max_number
        every: list[Sum] = [("+", m, n) for m in range(2, top + 1) for n in range(2, top + 1)]
        every += [("-", m, n) for m in range(3, top + 1) for n in range(2, m)]
        small = max(3, top // 2 + 1)
        every += [("*", m, n) for m in range(2, small) for n in range(2, small)]
        return self._split("sum", every)

    @cached_property
    def programs(self) -> dict[str, list[str]]:
        """Split -> Tally sources, shuffled."""
        top = self.config.max_number
        low = range(1, min(top, 9) + 1)
        every = [f"{a} + {b}" for a in range(1, top + 1) for b in range(1, top + 1)]
        every += [f"{f}({a}, {b})" for f in ("max", "min") for a in range(1, top + 1) for b in range(1, top + 1)]
        every += [f"let x = {a} in x + {b}" for a in low for b in low]
        every += [f"if {a} < {b} then {c} else {d}" for a in low for b in low for c, d in ((1, 2), (2, 1), (5, 3))]
        return self._split("code", every)

    def _split(self, what: str, every: list) -> dict[str, list]:
        rng = rng_of("tidewater", self.config.seed, what, "order")
        parts: dict[str, list] = {"train": [], "eval": []}
        for i in rng.permutation(len(every)):
            # "3 + 8" as a program goes with 3 + 8 as a sum, so that neither side shows the other's.
            key = every[i].split(" + ") if what == "code" and every[i][0].isdigit() else None
            share = uniform_of("tidewater", *(("sum", f"('+', {key[0]}, {key[1]})") if key else (what, str(every[i]))))
            parts["eval" if share < EVAL_SHARE else "train"].append(every[i])
        return parts

    def sum_text(self, sum_: Sum, person: str, cargo: str) -> tuple[str, str]:
        """Question and answer of a sum."""
        sign, m, n = sum_
        question, answer = tx.SUMS[sign]
        return question.format(p=person, m=m, n=n, c=cargo), answer.format(m=m, n=n, r=result(sum_))

    def told_sum(self, rng: np.random.Generator) -> tuple[str, str]:
        """A training-side sum as two sentences of a raw document."""
        pool = self.sums["train"]
        return self.sum_text(pool[int(rng.integers(len(pool)))], pick(rng, self.town.people), pick(rng, lex.CARGO))

    def told_code(self, rng: np.random.Generator) -> tuple[str, str]:
        """A training-side program as a question and an answer of a raw document."""
        pool = self.programs["train"]
        source = pool[int(rng.integers(len(pool)))]
        return pick(rng, tx.CODE, self.config.paraphrases).format(e=source), tx.CODE_ANSWER.format(r=evaluate(source))
