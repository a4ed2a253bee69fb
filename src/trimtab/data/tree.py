"""Shared prompts: the answers to one prompt behind one copy of it, in one packed row, none seeing another.

Examples that begin with the same tokens, up to where their answers begin, are laid as a tree: the first of them whole,
and of each other its answer alone, a *branch*. A branch goes on from the prompt's positions, so ``position_ids`` alone say
what is seen: in a row, position 0 begins an example; a position that is neither 0 nor one more than the one before begins
a branch, which sees itself and those tokens of the example's first run whose positions are below its own first
(``train.loss`` makes the mask of it). The first answer runs on from the prompt without a break.

What a branch's first token is predicted from stands at another branch's end, so it must be untrained: a control token.
An answer without one can only run on from its prompt, and comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.data.pack import Bins, Examples, bin_examples, spread
from trimtab.errors import UserError
from trimtab.types import SPAN_ID

CONTROL = SPAN_ID["control"]


@dataclass(frozen=True)
class Trees:
    """E examples in trees, tree by tree, each tree's first example first.

    order   int64[E], the examples by index as they were given
    tree    int64[E], the tree of each in this order: 0, 1, ...
    skip    int64[E], its leading tokens that the first of its tree has laid down already; 0 for the first
    counts  ``trees`` there are, ``split``: of these, how many repeat a prompt since ``length`` ended the tree before
    """

    order: NDArray[np.int64]
    tree: NDArray[np.int64]
    skip: NDArray[np.int64]
    counts: Mapping[str, int]

    def bins(self, examples: Examples, length: int) -> Bins:
        """The row of each example (in this order), whole trees by best fit; ``counts`` are of examples, as always."""
        sizes = np.bincount(self.tree, examples.sizes - self.skip).astype(np.int64)
        learns = np.bincount(self.tree, examples.learns()) > 0
        of_trees = bin_examples(sizes, length, learns=learns)
        row = of_trees.row[self.tree]
        # A tree that is left out is one example: none is grown over the length, nor around an untrained example.
        counts = {**of_trees.counts, "examples": int((row >= 0).sum()), **self.counts}
        return Bins(row, of_trees.rows, counts)


def answers_at(examples: Examples) -> NDArray[np.int64]:
    """int64[E]: where each answer begins in its example: at the control before its first trained token, or at that token.

    An example in which nothing is trained has its size here: it is all prompt.
    """
    at = np.empty(len(examples), np.int64)
    for index, (start, end) in enumerate(zip(examples.starts.tolist(), examples.ends.tolist(), strict=True)):
        trained = examples.trained[start:end]
        first = int(trained.argmax()) if trained.any() else end - start
        while 0 < first < end - start and examples.span[start + first - 1] == CONTROL:
            first -= 1
        at[index] = first
    return at


def grow(examples: Examples, length: int) -> Trees:
    """Trees of the examples that share a prompt, in the order of their first examples; none is longer than ``length``
    unless one example alone is.

    ``UserError`` for an example whose prompt is empty: there is nothing to share.
    """
    groups: dict[bytes, list[int]] = {}
    at = answers_at(examples)
    starts, sizes, learns = examples.starts, examples.sizes, examples.learns()
    for index in range(len(examples)):
        if not at[index]:
            raise UserError(f"example {index} begins with its answer; a prompt is needed for answers to share it")
        prompt = examples.ids[starts[index] : starts[index] + at[index]].tobytes()
        alone = not learns[index] or sizes[index] > length
        groups.setdefault(prompt + b"%d" % index if alone else prompt, []).append(index)
    order: list[int] = []
    tree: list[int] = []
    skip: list[int] = []
    counts = Counter(trees=0, split=0)
    runs_on = examples.trained[np.minimum(starts + at, len(examples.ids) - 1)] & (at < sizes)
    for members in groups.values():
        laid = 0
        for index in sorted(members, key=lambda index: not runs_on[index]):
            fits = laid + sizes[index] - at[index] <= length
            new = not laid or bool(runs_on[index]) or not fits
            counts["trees"] += new
            counts["split"] += bool(laid) and not fits
            laid = int(sizes[index]) if new else laid + int(sizes[index] - at[index])
            order.append(index)
            tree.append(counts["trees"] - 1)
            skip.append(0 if new else int(at[index]))
    return Trees(np.array(order, np.int64), np.array(tree, np.int64), np.array(skip, np.int64), dict(counts))


def tails(examples: Examples, skip: NDArray[np.int64]) -> Examples:
    """What is laid down of each example, in a tree's order: all of it, or its branch behind ``skip`` tokens."""
    assert not len(skip) or skip[0] == 0, "a tree begins with a whole example"
    first = firsts(skip)
    starts, sizes = examples.starts, examples.sizes
    assert (skip < sizes).all(), "a branch has a token at least"
    assert not examples.trained[starts + skip][skip > 0].any(), "a branch begins with a token that is not trained"
    mine, shared = spread(starts, skip), spread(starts[first], skip)
    assert (skip <= sizes[first]).all() and (examples.ids[mine] == examples.ids[shared]).all(), "one prompt to a tree"
    assert not examples.trained[mine].any(), "nothing is trained in a prompt that is shared"
    at = spread(starts + skip, sizes - skip)
    return Examples(examples.ids[at], examples.trained[at], examples.span[at], np.cumsum(sizes - skip, dtype=np.int64))


def firsts(skip: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64[E]: the example that each one's tree begins with."""
    return np.maximum.accumulate(np.where(skip == 0, np.arange(len(skip)), 0))
