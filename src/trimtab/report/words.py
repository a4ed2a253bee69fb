"""What each lever is, in plain words, for readers of a report who have not read the papers."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab.errors import UserError

LEVERS: dict[str, tuple[str, str, str]] = {
    "timing": (
        "Timing: when safety data enters pretraining",
        "A base model reads its training text within a fixed budget of tokens. This lever changes only the point at "
        "which safety interventions begin: harmful pages rephrased safely, refusal dialogues, and sometimes a tag "
        "on unsafe text. They may start at once, after part of the budget, or never; until then the model reads other, "
        "usually safe-only, text.",
        "An earlier start also means more safety text in total, unless exposure is matched. The source paper "
        "(arXiv 2601.07087) revised its own answer between versions and names no single best start. What a small model "
        "shows need not hold for a large one.",
    ),
    "prefix": (
        "Prefix: how a training answer opens",
        "Fine-tuning data is often cleaned of stock opening sentences. This lever puts one back, such as \u201cBefore "
        "I answer, I will check that this is safe\u201d, at the start of a chosen share of the answers, the ratio, and leaves "
        "the rest of the data as it was. Rows that have a sentence at one ratio have the same one at every higher ratio, "
        "so arms differ in the sentences alone. The model learns the opening with the answer, which may steer what it writes "
        "next; it may also be trained on the opening alone (a primer), or be made to begin with it when it is asked (forced).",
        "The source paper (arXiv 2601.01624) reports gains in safety and mathematics, and little or negative change in "
        "coding and factuality, on reasoning models of 1.5 to 8 billion parameters. Its sentences are not public; these are "
        "our own, and accounts of it differ on whether the sentence stands before the answer or the question. A longer answer "
        "also takes up more of a limit on new tokens.",
    ),
    "mode": (
        "Mode: which behaviour is live",
        "One model is trained on up to three answers to the same prompt: positive (safe and constructive), rejective "
        "(a refusal) and negative (unfiltered, for internal red-teaming). A control token, set by the server, not by "
        "the user, says which answer to give. Rows without a token teach the positive answer, so that a missing token "
        "falls back to it.",
        "The token is a switch, not a lock: whoever holds the weights can set it, or train it away. The source paper "
        "(arXiv 2508.14904) did not test leaks or users who type the token. Switching is never perfect; read the "
        "measured shares.",
    ),
}
"""Lever -> (heading, what it is, its limits). Facts as far as the papers' public accounts go."""


def explain(levers: Sequence[str]) -> list[tuple[str, str, str]]:
    """The texts of ``levers``, in the given order; an unknown lever is a ``UserError``."""
    for lever in levers:
        if lever not in LEVERS:
            raise UserError(f"report: levers: {lever!r} is unknown; known: {', '.join(LEVERS)}")
    return [LEVERS[lever] for lever in dict.fromkeys(levers)]
