"""Token analysis: what every trained token of a set of rows does to a model, and a table of it (2601.01624).

Each row is read alone, as packed training reads it (attention never crosses rows). A token that is not trained, or that
opens its row, has no values. Rows longer than the model's context, and rows in which no token is trained, are left out and
counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.analyze.config import MEASURED, TokenConfig
from trimtab.analyze.token_gradients import Parameters, TokenGradients, TokenRow
from trimtab.data.render import Rendered, Renderer
from trimtab.errors import Fault, UserError
from trimtab.types import SPANS, Row

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenTable:
    """N tokens of n rows, row by row in reading order.

    rows       ids of the rows
    row        int32[N], index into ``rows``; position  int32[N], in the row
    offset     int32[N], position within the run of tokens of one span that it stands in
    token_id   int32[N]; text  the string of every id that occurs; span  uint8[N], index into ``types.SPANS``
    trained    bool[N]
    values     measure -> float64[N], NaN where there is none
    grad_se    float64[N], standard error of ``grad_norm``, if that was measured
    method     how it was measured; left_out  reason -> rows
    """

    rows: tuple[str, ...]
    row: NDArray[np.int32]
    position: NDArray[np.int32]
    offset: NDArray[np.int32]
    token_id: NDArray[np.int32]
    span: NDArray[np.uint8]
    trained: NDArray[np.bool_]
    values: Mapping[str, Floats]
    grad_se: Floats | None
    text: Mapping[int, str]
    method: Mapping[str, Any]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write ``tokens.parquet``: one row per token; the rest of the table goes into the file's metadata."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = pa.array(self.rows, pa.string())
        kinds = sorted(self.text)
        strings = pa.array([self.text[id] for id in kinds], pa.string())
        columns: dict[str, Any] = {
            "row_id": pa.DictionaryArray.from_arrays(pa.array(self.row), names),
            "position": self.position,
            "token_id": self.token_id,
            "token": pa.DictionaryArray.from_arrays(np.searchsorted(kinds, self.token_id).astype(np.int32), strings),
            "span": pa.DictionaryArray.from_arrays(self.span.astype(np.int8), pa.array(SPANS)),
            "offset": self.offset,
            "trained": self.trained,
        }
        measured = dict(self.values) | ({} if self.grad_se is None else {"grad_se": self.grad_se})
        columns |= {name: pa.array(v.astype(np.float32), from_pandas=True) for name, v in measured.items()}
        facts = {"rows": list(self.rows), "method": dict(self.method), "left_out": dict(self.left_out)}
        table = pa.table(columns).replace_schema_metadata({"trimtab": json.dumps(facts)})
        pq.write_table(table, path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> TokenTable:
        """What ``write`` wrote (values in float32); ``UserError`` for no such file, ``Fault`` for another kind of file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        try:
            table = pq.read_table(path)
            facts = json.loads(table.schema.metadata[b"trimtab"])
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
            raise Fault(f"{path}: it is not a table of tokens, or is damaged; measure again") from None

        def numbers(name: str, dtype: Any) -> NDArray[Any]:
            return table[name].to_numpy().astype(dtype)

        places = {name: i for i, name in enumerate(facts["rows"])}
        spans = {name: i for i, name in enumerate(SPANS)}
        ids = numbers("token_id", np.int32)
        return cls(
            rows=tuple(facts["rows"]),
            row=np.array([places[name] for name in table["row_id"].to_pylist()], np.int32),
            position=numbers("position", np.int32),
            offset=numbers("offset", np.int32),
            token_id=ids,
            span=np.array([spans[name] for name in table["span"].to_pylist()], np.uint8),
            trained=numbers("trained", bool),
            values={name: numbers(name, np.float64) for name in MEASURED if name in table.column_names},
            grad_se=numbers("grad_se", np.float64) if "grad_se" in table.column_names else None,
            text=dict(zip(ids.tolist(), table["token"].to_pylist())),
            method=facts["method"],
            left_out=facts["left_out"],
        )


def analyze_tokens(
    model: Any,
    renderer: Renderer,
    rows: Iterable[Row],
    config: TokenConfig,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    parameters: Parameters = "all",
    render: Callable[[Row], Rendered] | None = None,
) -> TokenTable:
    """Measure every trained token of ``rows``.

    parameters  "all", or "trainable": the gradient with respect to those that require one, such as LoRA adapters alone
    render      how a row becomes ids; ``renderer.row`` if not given. What it marks as trained is measured

    ``UserError`` for no rows, rows of which none has a trained token or none fits the model, rows that share an id, and for
    what ``TokenGradients`` cannot measure.
    """
    given = list(rows)
    if not given:
        raise UserError("rows: the set is empty")
    twice = [name for name, times in Counter(row.id for row in given).items() if times > 1]
    if twice:
        raise UserError(f"row {twice[0]!r}: the id is given to several rows; ids tell them apart in the table")
    limit = getattr(model.config, "max_position_embeddings", None)
    left_out: Counter[str] = Counter()
    kept: list[tuple[str, Rendered, NDArray[np.int64]]] = []
    for row in given:
        rendered = (render or renderer.row)(row)
        at = np.flatnonzero(rendered.trained[1:]) + 1
        if limit is not None and len(rendered.ids) > limit:
            left_out["too long"] += 1
        elif not len(at):
            left_out["nothing trained"] += 1
        else:
            kept.append((row.id, rendered, at))
    if not kept:
        said = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise UserError(
            f"rows: none can be measured ({said}); a row needs an answer, and to fit the context of {limit} tokens"
        )
    gradients = TokenGradients(model, parameters)
    found = gradients.measure(
        [TokenRow(r.ids, at, r.span[at]) for _, r, at in kept],
        projections=config.projections if "grad_norm" in config.measures and not config.exact else None,
        exact=config.exact and "grad_norm" in config.measures,
        seed=seed,
        batch=config.batch,
        progress=progress,
    )
    sizes = [len(r.ids) for _, r, _ in kept]
    starts = np.cumsum([0, *sizes])
    where = np.concatenate([start + at for start, (_, _, at) in zip(starts, kept)])

    def spread(values: Floats | None) -> Floats | None:
        if values is None:
            return None
        whole = np.full(starts[-1], np.nan)
        whole[where] = values
        return whole

    measured = {name: spread(getattr(found, name)) for name in config.measures}
    ids = np.concatenate([r.ids for _, r, _ in kept])
    return TokenTable(
        rows=tuple(name for name, _, _ in kept),
        row=np.repeat(np.arange(len(kept), dtype=np.int32), sizes),
        position=np.concatenate([np.arange(size, dtype=np.int32) for size in sizes]),
        offset=np.concatenate([_offsets(r.span) for _, r, _ in kept]),
        token_id=ids,
        span=np.concatenate([r.span for _, r, _ in kept]),
        trained=np.concatenate([r.trained for _, r, _ in kept]),
        values={name: value for name, value in measured.items() if value is not None},
        grad_se=spread(found.grad_se),
        text=token_strings(renderer.tokenizer, np.unique(ids).tolist()),
        method={
            "exact": config.exact,
            "projections": None if config.exact or "grad_norm" not in config.measures else config.projections,
            "parameters": parameters,
            "parameters_measured": gradients.size,
            "tied_output": gradients.tied,
            "seed": seed,
        },
        left_out=dict(left_out),
    )


def token_strings(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """What each id reads as: text with its leading space, control characters escaped; a part of a character, of which
    there is no text, as the tokenizer spells it, in angle brackets."""
    found = {}
    for id in ids:
        spelt = str(tokenizer.convert_ids_to_tokens(id))
        text = tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "\N{REPLACEMENT CHARACTER}" in text or not text:
            text = f"<{spelt}>"
        elif spelt.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):  # SentencePiece eats it
            text = f" {text}"
        found[id] = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return found


def _offsets(span: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Position of each token within its run of equal spans."""
    column = np.arange(len(span))
    begins = np.r_[True, span[1:] != span[:-1]]
    return (column - np.maximum.accumulate(np.where(begins, column, 0))).astype(np.int32)
