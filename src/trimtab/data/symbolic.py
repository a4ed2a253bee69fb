"""GSM8K-style problems with worked answers, made by the ``gsm_symbolic`` generator of the package reasoning-gym.

The idea is GSM-Symbolic's (2410.05229): templates of GSM8K's problems with names and numbers drawn anew. The package is an
extra (``pip install 'trimtab[reasoning]'``). A problem is a function of (package version, seed, index), so the pin of a set is
its version and seed. The generator seeds each problem with seed + index: the two sets' seeds lie further apart than they have
rows, and no question of one is in the other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trimtab.data.setcard import PromptSet, prompt_row
from trimtab.errors import UserError
from trimtab.types import Row

PACKAGE = "reasoning-gym"
_APART = 10_000_000  # between the seeds
_NOISE = re.compile(r"\d\.\d{5}")  # a worked answer in which a float shows its last digits


@dataclass(frozen=True, kw_only=True)
class SymbolicCard(PromptSet):
    """One of the two sets. ``worked``: rows have the worked answer, and none has a question of the other set."""

    seed: int
    worked: bool

    def found(self) -> Iterator[Row]:
        self._version()
        others = {question for question, *_ in _problems(EVALUATION)} if self.worked else set()
        for index, (question, answer, steps) in enumerate(_problems(self, others)):
            assert question not in others, "training and evaluation share no question"
            row = prompt_row(self.name, str(index), question, "benign", "grade-school maths", {"answer": answer})
            yield row.with_answer(f"{steps}\nThe answer is {answer}.") if self.worked else row

    @property
    def pins(self) -> dict[str, Any]:
        return {"package": f"{PACKAGE}=={self._version()}", "seed": self.seed, "rows": self.rows}

    @property
    def origin(self) -> str:
        return f"the generator of {PACKAGE} (extra 'reasoning')"

    @property
    def revision(self) -> str:
        return f"seed {self.seed} of the installed version"

    def _version(self) -> str:
        try:
            return version(PACKAGE)
        except PackageNotFoundError:
            raise UserError(
                f"set {self.name!r} needs the package {PACKAGE}: pip install 'trimtab[reasoning]'"
            ) from None


def _problems(
    card: SymbolicCard, others: set[str] | frozenset[str] = frozenset()
) -> Iterator[tuple[str, int | float, str]]:
    """(question, answer, steps) of ``card.rows`` problems, no question twice.

    Left out are questions in ``others``, answers with more than two decimals (a model that rounds would be wrong), and
    problems whose steps hold a float's noise or do not end in the answer.
    """
    create = importlib.import_module("reasoning_gym").create_dataset
    drawn = create("gsm_symbolic", seed=card.seed, size=2 * card.rows)
    seen = set(others)
    found = 0
    for index in range(2 * card.rows):
        problem = drawn[index]
        question, said = problem["question"].strip(), Fraction(problem["answer"].replace(",", ""))
        steps, _, last = problem["metadata"]["answer_cot"].rpartition("####")
        whole = Fraction(last.strip().replace(",", "")) == said and (said * 100).denominator == 1
        if not whole or not steps.strip() or _NOISE.search(steps) or question in seen:
            continue
        seen.add(question)
        yield question, int(said) if said.denominator == 1 else float(said), re.sub(r"\n\s*\n", "\n", steps.strip())
        found += 1
        if found == card.rows:
            return


EVALUATION = SymbolicCard(
    name="gsm-symbolic",
    about="Grade-school word problems of the kind of GSM8K, with names and numbers drawn anew (2410.05229).",
    licence="Apache-2.0",
    rows=500,
    harm="benign",
    category="always 'grade-school maths'",
    seed=_APART,
    worked=False,
)
TRAINING = SymbolicCard(
    name="gsm-symbolic-train",
    about="Problems like those of `gsm-symbolic`, none of them the same, each with the generator's worked answer, which ends "
    "in 'The answer is N.': chats to train on.",
    licence="Apache-2.0",
    rows=4000,
    harm="benign",
    category="always 'grade-school maths'",
    seed=2 * _APART,
    worked=True,
)
SYMBOLIC_CARDS: dict[str, SymbolicCard] = {card.name: card for card in (EVALUATION, TRAINING)}
