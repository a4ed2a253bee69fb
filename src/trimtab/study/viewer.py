"""``trimtab data show``: rows as a model is trained on them, token by token, with what each token is and whether it counts.

Of a study, what is shown is read from the packed rows themselves: what stands here is what was trained on. Of a file or a
named set, rows are rendered for a tokenizer now, through the lever that is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from trimtab.artifact import Artifact
from trimtab.data import sources
from trimtab.data.pack import in_rows
from trimtab.data.render import Renderer
from trimtab.data.sources import SourceConfig
from trimtab.data.store import RowStore
from trimtab.errors import UserError
from trimtab.levers.boilerplate import strip_rows
from trimtab.levers.prefix import PrefixConfig, apply_prefix, trained_with_prefix
from trimtab.models.load import load_tokenizer
from trimtab.study.execute import study_store
from trimtab.study.shipping import read_study
from trimtab.study.steps.chat import PLACES, read_rows
from trimtab.types import IGNORE, SPANS, Row

STYLES: dict[str, str] = {
    "structure": "bright_black", "control": "bold magenta", "prompt": "cyan", "prefix": "bold yellow", "body": "green",
    "think": "blue", "tag": "bold red", "text": "white", "pad": "bright_black",
}  # fmt: skip
"""A colour for each of ``types.SPANS``; what the loss counts is underlined too."""


@dataclass(frozen=True)
class ShownRow:
    """One example: ``tokens`` as text, ``span`` and ``trained`` per token, and a line that says where it comes from."""

    id: str
    about: str
    tokens: Sequence[str]
    span: NDArray[np.uint8]
    trained: NDArray[np.bool_]


@dataclass(frozen=True)
class TrainedOn:
    """What one training stage of one arm was trained on: its artefacts, and the label of the arm."""

    arm: str
    stage: str
    packed: Artifact
    chats: Artifact
    model: Artifact

    def rows(self) -> list[tuple[Row, str | None]]:
        """The examples in the order in which they were packed: the base row, and the sentence that it carries (None: none)."""
        rows, places = read_rows(self.chats), dict(np.load(self.packed.path / PLACES))
        order = in_rows(places["row"]).tolist()
        return [(rows[i][0], rows[i][1] if places["carry"][i] else None) for i in order]


def trained_on(directory: Path, arm: str | None, stage: str | None, prefixed: bool = False) -> TrainedOn:
    """The data of one training stage of one arm of a study.

    arm    its label or id; None: the first, or with ``prefixed`` the first whose rows carry prefixes
    stage  None: the arm's last that trains on chats

    ``UserError`` for a directory that is no study, and for an arm or a stage that it does not have (with those it has).
    """
    study = read_study(directory)
    steps, store = study["steps"], study_store(directory)
    arms = [one for one in study["arms"] if arm is None or arm in (one["id"], one["label"])]
    if not arms:
        known = ", ".join(dict.fromkeys(one["label"] for one in study["arms"]))
        raise UserError(f"--arm {arm!r} is none of this study's arms: {known}")
    found = [(one, name) for one in arms if (name := _trained(one, steps, stage)) is not None]
    if not found:
        has = (
            ", ".join(n for n, id in arms[0]["stages"].items() if tuned(steps, id) is not None)
            or "none that trains on chats"
        )
        raise UserError(f"--stage {stage!r}: arm {arms[0]['label']!r} has no such stage; it has {has}")

    def packed_of(one: dict[str, Any], name: str) -> Artifact:
        return store.open("packed", steps[str(tuned(steps, one["stages"][name]))]["inputs"]["packed"])

    carrying = (pair for pair in found if packed_of(*pair).manifest["facts"]["prefixed"])
    chosen, name = next(carrying, found[0]) if prefixed else found[0]
    packed = packed_of(chosen, name)
    chats = store.open("chats", packed.manifest["inputs"]["chats"])
    return TrainedOn(chosen["label"], name, packed, chats, store.open("sft", str(tuned(steps, chosen["stages"][name]))))


def study_rows(data: TrainedOn) -> Iterator[ShownRow]:
    """The examples of a training stage, in the order in which they were packed."""
    tokenizer = load_tokenizer(data.model.path / "model")
    rows = RowStore.open(data.packed.path / "store")
    places = dict(np.load(data.packed.path / PLACES))
    order, told = in_rows(places["row"]).tolist(), data.rows()
    for number, (index, (base, sentence)) in enumerate(zip(order, told, strict=True), 1):
        row, at, size = (int(places[key][index]) for key in ("row", "at", "size"))
        batch = rows.take(np.array([row]))
        part = np.arange(at, at + size)
        source = rows.sources[int(batch.source_id[0, at])]
        about = (
            f"{data.arm}, stage {data.stage}, part {source}; example {number} of {len(order)}, packed row {row}; "
            + (f"opens with {sentence!r}" if sentence else "no prefix")
        )
        if "skip" in places and (skip := int(places["skip"][index])):
            prompt = int(places["prompt"][index])
            part = np.concatenate([np.arange(prompt, prompt + skip), part])
            about += f"; its prompt ({skip} tokens) stands once in the row, for all its answers"
        ids, span, trained = batch.input_ids[0, part], batch.span_id[0, part], batch.labels[0, part] != IGNORE
        yield _shown(base.id, about, tokenizer, ids, span, trained)


def _trained(arm: dict[str, Any], steps: dict[str, Any], stage: str | None) -> str | None:
    """The stage of an arm that trains on chats: the one of that name, or the last; None where it has none."""
    trained = [name for name, id in arm["stages"].items() if tuned(steps, id) is not None and stage in (None, name)]
    return trained[-1] if trained else None


def tuned(steps: dict[str, Any], id: str) -> str | None:
    """The ``sft`` step that made the weights at the end of a stage (adapters may lie on them); None for another stage."""
    while steps[id]["kind"] == "adapter":
        id = steps[id]["inputs"]["model"]
    return id if steps[id]["kind"] == "sft" else None


def source_rows(source: SourceConfig, model: str, prefix: PrefixConfig, seed: int) -> Iterator[ShownRow]:
    """The rows of a file or set, rendered for a model's tokenizer, with the prefix lever as given."""
    tokenizer = load_tokenizer(model)
    renderer = Renderer(tokenizer)
    rows: list[Row] = list(sources.rows(source))
    if prefix.strip is not None:
        rows, _ = strip_rows(rows, prefix.strip)
    for row in apply_prefix(rows, prefix, seed):
        rendered = renderer.row(row)
        trained = trained_with_prefix(rendered.trained, rendered.span, prefix) if row.prefix else rendered.trained
        about = f"{source.source_label}; " + (f"opens with {row.prefix!r}" if row.prefix else "no prefix")
        yield _shown(row.id, about, tokenizer, rendered.ids, rendered.span, trained)


def _shown(
    id: str, about: str, tokenizer: Any, ids: NDArray[Any], span: NDArray[np.uint8], trained: NDArray[np.bool_]
) -> ShownRow:
    """Tokens as text: decoded together up to each, so that characters of several tokens come out whole with the last."""
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        kept = whole.rstrip("\ufffd") if end < len(ids) else whole
        texts.append(kept[len(done) :] if kept.startswith(done) else "")
        done = kept if kept.startswith(done) else done
    counts = Counter(SPANS[s] for s in np.asarray(span)[np.asarray(trained, bool)])
    about += "; trained: " + (", ".join(f"{name} {n}" for name, n in counts.items()) or "nothing")
    return ShownRow(id, about, texts, np.asarray(span, np.uint8), np.asarray(trained, bool))


def print_rows(
    rows: Iterator[ShownRow], n: int, *, row: str | None = None, prefixed: bool = False, tokens: bool = False
) -> None:
    """Print ``n`` rows, or the one with the id ``row``; ``prefixed``: only those that carry a prefix; ``tokens``: with a bar
    between tokens. Where there are no colours, a line for each run of tokens that are alike says the same.
    ``UserError`` where there is no row."""
    console = Console(highlight=False)
    chosen = (
        one
        for one in rows
        if (row is None or one.id == row) and (not prefixed or (one.span == SPANS.index("prefix")).any())
    )
    found = list(islice(chosen, n if row is None else 1))
    if not found:
        what = f"no row has the id {row!r}" if row is not None else "no row is left" + " with a prefix" * prefixed
        raise UserError(f"data show: {what}; try another arm, or a higher ratio")
    _legend(console, found)
    for one in found:
        console.print()
        console.print(Text(one.id, style="bold"), Text(f"  {one.about}", style="dim"), sep="")
        if console.color_system is not None or tokens:
            console.print(_coloured(one, tokens), soft_wrap=True)
        else:
            _segments(console, one)


def _legend(console: Console, rows: Sequence[ShownRow]) -> None:
    used = sorted({int(span) for one in rows for span in one.span})
    line = Text()
    for span in used:
        line.append(SPANS[span], STYLES[SPANS[span]]).append("  ")
    console.print(line.append("the loss counts", "underline").append("  (the rest is masked)", "dim"))


def _coloured(one: ShownRow, bars: bool) -> Text:
    text = Text()
    for number, (token, span, trained) in enumerate(zip(one.tokens, one.span, one.trained, strict=True)):
        if bars and number:
            text.append("│", "bright_black")
        text.append(_visible(token), f"{STYLES[SPANS[span]]}{' underline' if trained else ''}")
    return text


def _segments(console: Console, one: ShownRow) -> None:
    """A line for each run of tokens that are alike."""
    for (span, trained), run in groupby(range(len(one.tokens)), lambda i: (int(one.span[i]), bool(one.trained[i]))):
        at = list(run)
        said = _visible("".join(one.tokens[i] for i in at)).replace("\n", "")
        line = Text(f"  {SPANS[span]:<10}{len(at):>5} token{'s' if len(at) > 1 else ' '}  ")
        line.append("trained  " if trained else "masked   ", "bold" if trained else "dim").append(
            said, STYLES[SPANS[span]]
        )
        line.truncate(max(60, console.width), overflow="ellipsis")
        console.print(line, no_wrap=True)


def _visible(text: str) -> str:
    """White space that matters and control characters made visible; a line end also ends the line."""
    marked = text.replace("\n", "⏎\n").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in marked)
