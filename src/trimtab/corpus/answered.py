"""Whether a chat model behind an endpoint answered: a corpus that an outage has thinned must not pass for a finished one.

A document whose score or text did not come is dropped with its reason, as any other that is of no use. Here those are
counted whose reason lies with the endpoint: no answer came, or a judge's answer is no score. Above
``CorpusConfig.max_unanswered`` the build ends with an error and the parts in question are taken as not done, so the same
command asks again for what failed and for nothing else. What a writer wrote badly is the model's work and is not counted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.corpus.config import INTERVENTIONS, CorpusConfig, EndpointScorer, EndpointWriter, Intervention
from trimtab.corpus.documents import Document
from trimtab.corpus.lazy import Lazy
from trimtab.corpus.parts import metadata_of, reopen, rows_in
from trimtab.corpus.read import DROPPED
from trimtab.corpus.scorers import REASONS, Scored, Scorer, read_score
from trimtab.corpus.writers import Writer, Written
from trimtab.errors import Fault

IN_A_ROW = 100
"""So many questions one after the other without a usable answer end a build at once: at a minute each, an outage at the
beginning of a large corpus would otherwise be found out after weeks."""
_NEXT = "mend it and run again: what came is kept, and only the rest is asked again (or raise max_unanswered)"


def unanswered(reason: str) -> bool:
    """Whether a reason says that the endpoint gave no answer, or a judge's answer that is no score."""
    return reason.startswith("endpoint: ") or reason in REASONS


class WatchedScorer(Lazy):
    """A scorer that raises ``Fault`` as soon as ``IN_A_ROW`` texts in a row got no usable answer."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.streak = scorer, _Streak("score")
        self.name, self.identity, self.reads_text = scorer.name, scorer.identity, scorer.reads_text

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        found = self.scorer.score(texts, metadata)
        for scored in found:
            self.streak.of(scored.reason if scored.score is None else "")
        return found


class WatchedWriter(Lazy):
    """The same for a writer."""

    def __init__(self, writer: Writer) -> None:
        self.writer, self.streak = writer, _Streak("write")
        self.identity, self.moral_from = writer.identity, writer.moral_from

    def write(self, kind: Intervention, documents: Sequence[Document]) -> Iterator[Written]:
        for written in self.writer.write(kind, documents):
            self.streak.of(written.reason)
            yield written


class _Streak:
    def __init__(self, field: str) -> None:
        self.field, self.length = field, 0

    def of(self, reason: str) -> None:
        self.length = self.length + 1 if unanswered(reason) else 0
        if self.length >= IN_A_ROW:
            raise Fault(
                f"{self.field}: the endpoint gave no usable answer {IN_A_ROW} times in a row (the last: {reason}); {_NEXT}"
            )


def check_answered(config: CorpusConfig, place: Path) -> None:
    """``Fault`` if more than ``max_unanswered`` of what the scorers, or the writer, were asked has no usable answer; the
    parts in which something has none are reopened then. ``place`` holds ``parts`` and ``run`` of a finished pipeline."""
    if not any(isinstance(part, EndpointScorer | EndpointWriter) for part in (*config.score, config.write)):
        return
    asked: Counter[str] = Counter()
    failed: dict[str, Counter[str]] = {"score": Counter(), "write": Counter()}
    reopened = set()
    for file in sorted((place / "parts").glob("[0-9]*/*.parquet")):
        for field, reason in _questions(file, config):
            asked[field] += 1
            if reason is not None and unanswered(reason):
                failed[field][reason] += 1
                reopened.add(int(file.parent.name))
        if not file.stem.startswith(DROPPED):
            asked.update(_kept(file, config))
    over = [name for name, reasons in failed.items() if reasons.total() > config.max_unanswered * asked[name]]
    if not over:
        return
    for rank in reopened:
        reopen(place, rank)
    said = "; ".join(
        f"{name}: {failed[name].total():,} of {asked[name]:,} texts got no usable answer from the endpoint (most often: "
        f"{failed[name].most_common(1)[0][0]})"
        for name in over
    )
    raise Fault(f"{said}, more than the share of {config.max_unanswered:g} that max_unanswered allows; {_NEXT}")


def _questions(file: Path, config: CorpusConfig) -> Iterator[tuple[str, str | None]]:
    """(``score`` or ``write``, why there was no answer) of the rows that were dropped: what each was asked for."""
    if not file.stem.startswith(DROPPED):
        return
    writing = file.stem in {dropped_name(kind) for kind in INTERVENTIONS}
    for stored in metadata_of(file):
        reason = str(json.loads(stored)["drop_reason"])
        head, _, rest = reason.partition(": ")
        scoring = head in ("no score", "no score after writing")
        if scoring or head.startswith("still unsafe"):
            yield "score", rest if scoring else None
        if writing:
            yield "write", None if scoring else reason


def _kept(file: Path, config: CorpusConfig) -> dict[str, int]:
    """How often scorers and writer were asked for the rows of a source."""
    rows, kind = rows_in(file), file.stem
    if kind in ("clean", "unsafe"):
        return {"score": rows}
    if kind not in INTERVENTIONS:
        return {}
    return {"score": rows * config.rescore, "write": rows * (kind not in config.ready)}


def dropped_name(kind: Intervention | None, ready: bool = False) -> str:
    """The file of a part for what is dropped: of documents (None), of what is written, of what came ready. In the order of
    the names, documents come first."""
    if kind is None:
        return f"{DROPPED}-1-documents"
    return f"{DROPPED}-r-{kind}" if ready else f"{DROPPED}-{INTERVENTIONS.index(kind) + 2}-{kind}"


def forget_junk(answers: Path) -> None:
    """Strike out the kept answers of judges that are no score, so that they are asked for again.

    The key is overwritten in place with zeros: what another process has read of the file's places stays true.
    """
    for path in sorted(answers.glob("answers-*.jsonl")):
        with path.open("rb") as file:
            places = list(_junk(file))
        if places:
            descriptor = os.open(path, os.O_WRONLY)
            try:
                for at, length in places:
                    os.pwrite(descriptor, b"0" * length, at)
            finally:
                os.close(descriptor)


def _junk(lines: Iterable[bytes]) -> Iterator[tuple[int, int]]:
    """(offset, length) of the keys of junk."""
    at = 0
    for line in lines:
        try:
            data = json.loads(line)
            key, text, cut = data["key"].encode("utf-8"), data["text"], data["cut"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # damaged, or being written: whoever reads the answers says so
        if (cut or read_score(text).score is None) and key.strip(b"0"):
            yield at + line.index(key), len(key)
        at += len(line)
