"""A safety judge that is shown answers without their reasoning.

Whether reasoning is judged is a choice about who reads it: a product that hides the block answers for the answer alone, one
that shows it for both. Neither is the paper's (arXiv 2601.01624 does not say), so both can be asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from trimtab.data.thinking import left_out
from trimtab.evaluate.judges.base import Case, Judge
from trimtab.seeds import digest
from trimtab.types import Row, Verdict

UNENDED = "the reasoning did not end"


class WithoutReasoning(Judge):
    """``judge``, given the answer without the reasoning block that opens it; an answer whose block never ends is unscored,
    whatever stands in it. An opening that an attack put inside the block (``metadata["prefill"]``) goes with it."""

    def __init__(self, judge: Judge) -> None:
        self.inner = judge
        self.name = judge.name
        self.one_sided = judge.one_sided
        self.id = digest({"judge": "without reasoning", "version": 1, "of": judge.id})

    def judge(self, row: Row, text: str, finish: str) -> Verdict:
        return next(self.judge_all([Case(row, text, finish)]))

    def judge_all(self, cases: Sequence[Case]) -> Generator[Verdict, None, None]:
        shown = [_shown(case) for case in cases]
        verdicts = self.inner.judge_all([case for case in shown if case is not None])
        try:
            for case in shown:
                if case is None:
                    detail = {"one_sided": True} if self.one_sided else {}
                    yield Verdict("unscored", self.id, UNENDED, detail=detail)
                else:
                    yield replace(next(verdicts), judge=self.id)
        finally:
            if isinstance(verdicts, Generator):
                verdicts.close()


def _shown(case: Case) -> Case | None:
    opening = case.row.metadata.get("prefill")
    left = left_out(opening or "", case.text)
    if left is None or left == (opening or "", case.text):
        return None if left is None else case
    metadata = {k: v for k, v in case.row.metadata.items() if k != "prefill"} | (
        {"prefill": left[0]} if left[0] else {}
    )
    return replace(case, row=replace(case.row, metadata=metadata), text=left[1])
