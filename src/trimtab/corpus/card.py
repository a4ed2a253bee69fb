"""The data card of a corpus, made from its manifest alone: figures and origins, never a sample of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.corpus.config import (
    ClassifierScorer,
    CorpusConfig,
    EndpointScorer,
    EndpointWriter,
    FieldScorer,
    ModelWriter,
    Scorer,
    TruthScorer,
    Writer,
)
from trimtab.corpus.read import DROPPED, SOURCES
from trimtab.data.sources import SourceConfig

LEVELS = ("safe", "minimal", "slight", "moderate", "clear", "highly unsafe")
"""What the scores 0 to 5 mean (2504.16980, app. C.1)."""
_BAR = 40
_ABOUT = {
    "clean": "text scored 0, as it was",
    "unsafe": "text scored 1-5, as it was",
    "tagged": "the same texts, with the places of the harmfulness tag in their metadata",
    "rephrase": "safe retellings of text scored 1-3",
    "refuse": "dialogues that refuse, made from text scored 4-5",
    "moral": "articles on why it is refused, made from text scored 4-5",
}


def histogram(scores: Mapping[str, int]) -> list[str]:
    """One line per score: number, meaning, count, share and a bar (the longest has 40 signs)."""
    total, most = sum(scores.values()), max(scores.values(), default=0)
    lines = []
    for level, meaning in enumerate(LEVELS):
        n = scores.get(str(level), 0)
        share = n / total if total else 0.0
        bar = "#" * (max(1, round(_BAR * n / most)) if n else 0)
        lines.append(f"{level}  {meaning:<13} {n:>12,}  {share:>6.1%}  {bar}".rstrip())
    return lines


def table(manifest: Mapping[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(source, rows, words, repeats, licences, what it is) of every source that has rows."""
    return [
        (name, f"{entry['rows']:,}", f"{entry['words']:,}", f"{entry['repeats']:,}", _listed(entry["licences"]), about)
        for name, about in _ABOUT.items()
        if (entry := manifest["sources"].get(name)) is not None
    ]


def drops(manifest: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(reason, rows), the most frequent first."""
    return sorted(manifest["counts"].items(), key=lambda item: (-item[1], item[0]))


def origins(manifest: Mapping[str, Any]) -> list[str]:
    """Where the documents and ready interventions come from, a line each."""
    config = CorpusConfig.model_validate(manifest["config"])
    lines = [_origin(source) for source in config.documents]
    if not lines:
        world = manifest["world"]
        lines = [
            f"Tidewater, the sandbox world (seed {world['seed']}, {world['documents']:,} documents): all of it fiction"
        ]
    return lines + [f"{name}, made elsewhere: {_origin(source)}" for name, source in sorted(config.ready.items())]


def makers(manifest: Mapping[str, Any]) -> list[str]:
    """Who scored, who wrote, and how texts were tagged."""
    config = CorpusConfig.model_validate(manifest["config"])
    scored = "; ".join(map(_scorer, config.score))
    lines = [f"scored by {scored}" + ("; the highest score counts" if len(config.score) > 1 else "")]
    lines.append("nothing was written" if config.write is None else f"written by {_writer(config.write)}")
    if config.write is not None or config.ready:
        again = f"scored too; what scored above {config.accept} was left out" if config.rescore else "not scored again"
        lines.append(f"interventions were {again}")
    if config.tag:
        lines.append(f"tagged: before each word but the first, with chance {config.tag:g}")
    return lines


def data_card(manifest: Mapping[str, Any]) -> str:
    """``README.md`` of a corpus: the head that Hub tools read, figures, origins, reasons, intended use."""
    present = [name for name in SOURCES if name in manifest["sources"]]
    lines = ["---", "configs:"]
    for name in present:
        lines += [f"- config_name: {name}", f"  data_files: {name}/*.parquet"]
    lines += ["---", "", "# A pretraining corpus with safety interventions", ""]
    lines += ["Scored from 0 to 5, sorted into sources, rewritten and tagged after arXiv 2504.16980 with Trimtab.", ""]
    lines += [
        "## Sources",
        "",
        "| source | rows | words | repeats | licence | what it is |",
        "|---|--:|--:|--:|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in table(manifest)]
    lines += [
        "",
        "Columns are `text`, `id` and `metadata` (a JSON object). Repeats are rows whose text an earlier row has.",
    ]
    lines += ["", "## Scores of the documents", "", "```", *histogram(manifest["scores"]), "```", ""]
    lines += ["## Where they come from", "", *(f"- {line}" for line in origins(manifest)), ""]
    lines += ["## Who made it", "", *(f"- {line}" for line in makers(manifest)), f"- seed {manifest['seed']}", ""]
    lines += ["## What was left out", ""]
    lines += [f"- {reason}: {n:,}" for reason, n in drops(manifest)] or ["Nothing."]
    if manifest[DROPPED]["rows"]:
        lines += ["", f"{manifest[DROPPED]['rows']:,} rows are kept in `{DROPPED}/`, each with its reason."]
    lines += [
        "",
        "## Intended use",
        "",
        "Pretraining of language models in studies of safety. `unsafe`, `tagged` and `dropped` hold text that was scored as "
        "unsafe, word for word: train on it only where a study asks for it, and do not publish it without a look. Scores are "
        "a model's or a rule's opinion; a low one is no promise. `manifest.json` has the sha256 of every file.",
        "",
    ]
    return "\n".join(lines)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "not stated"


def _origin(source: SourceConfig) -> str:
    if source.hub is not None:
        said = f"{source.hub} at {source.revision}"
    elif source.package is not None:
        said = f"{source.package.member} of {source.package.requirement}"
    else:
        said = source.source_label
    parts = [", ".join(source.folders)] if source.folders else []
    parts += [f"{key} {value}" for key in ("limit", "take") if (value := getattr(source, key)) is not None]
    return f"{said} ({'; '.join(parts)})" if parts else said


def _scorer(scorer: Scorer) -> str:
    match scorer:
        case TruthScorer():
            return "Tidewater's own rules"
        case FieldScorer():
            return f"whoever made the documents (their field {scorer.name!r})"
        case ClassifierScorer():
            pinned = f" at {scorer.revision}" if scorer.revision else ""
            return (
                f"the classifier {scorer.model}{pinned}" if scorer.model else f"a classifier of stage {scorer.stage!r}"
            )
        case EndpointScorer():
            return f"the chat model {scorer.endpoint.model}"


def _writer(writer: Writer) -> str:
    match writer:
        case EndpointWriter():
            return f"the chat model {writer.endpoint.model} (temperature {writer.temperature:g})"
        case ModelWriter():
            pinned = f" at {writer.revision}" if writer.revision else ""
            return f"the chat model {writer.load}{pinned} (temperature {writer.temperature:g})"
    return "Tidewater's templates"
