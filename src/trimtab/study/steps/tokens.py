"""Step ``token_analysis``: which tokens pull on a model.

Leaves ``tokens.parquet`` (every token with its values), ``ranking.json`` (means by span, token and position),
``heatmap.html`` (a few rows) and ``metrics.jsonl`` (a header, then one figure a line). A killed step begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.analyze.config import TokenConfig
from trimtab.artifact import write_atomic
from trimtab.levers.prefix import PrefixConfig, apply_prefix, trained_with_prefix
from trimtab.models.config import LoadConfig
from trimtab.seeds import canonical
from trimtab.study.execute import Context
from trimtab.study.steps.analyze import write_metrics
from trimtab.study.steps.chat import build_rows
from trimtab.study.steps.common import check_unchanged, start_model
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

if TYPE_CHECKING:
    from trimtab.analyze.tokens import TokenTable
    from trimtab.data.render import Rendered

TABLE, RANKING, HEATMAP = "tokens.parquet", "ranking.json", "heatmap.html"


def run_token_analysis(context: Context) -> None:
    """Measure the trained tokens of the stage's chats, the prefix lever applied, in one model."""
    from trimtab.analyze.token_report import results

    check_unchanged(context)
    config = context.step.config
    seed = config["seed"]
    settings = TokenConfig.model_validate({name: config[name] for name in TokenConfig.model_fields})
    prefix = PrefixConfig() if config["prefix"] is None else PrefixConfig.model_validate(config["prefix"])
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    rows, _ = build_rows({"data": config["data"], "seed": seed, "prefix": prefix.plain()}, town, None)

    def tell(done: int, total: int) -> None:
        context.progress({"step": done, "total": total, "note": "passes"})

    table = measured(start_model(context), rows, prefix, settings, seed, tell)
    write_files(context.draft.path, table, settings, seed, context.step.name)
    write_metrics(context, results(table, seed, draws=settings.bootstrap))
    context.draft.facts = {
        "shape": context.step.shape,
        "rows": len(table.rows),
        "left_out": dict(table.left_out),
        **table.method,
    }


def measured(
    model: LoadConfig | Path,
    rows: Iterable[Row],
    prefix: PrefixConfig,
    settings: TokenConfig,
    seed: int,
    progress: Callable[[int, int], None],
) -> TokenTable:
    """The tokens of ``rows``, opened as ``prefix`` says, in a model that is loaded for it."""
    from trimtab.analyze.tokens import analyze_tokens
    from trimtab.data.render import Renderer
    from trimtab.models.load import best_device, load

    loaded, tokenizer = load(model, best_device())
    renderer = Renderer(tokenizer)

    def render(row: Row) -> Rendered:
        rendered = renderer.row(row)
        if row.prefix is None:
            return rendered
        return replace(rendered, trained=trained_with_prefix(rendered.trained, rendered.span, prefix))

    opened = apply_prefix(rows, prefix, seed)
    return analyze_tokens(loaded, renderer, opened, settings, seed, progress, render=render)


def write_files(directory: Path, table: TokenTable, settings: TokenConfig, seed: int, name: str) -> None:
    """The table, what is read from it, and the page that shows a few rows, titled with ``name``."""
    from trimtab.analyze.heatmap import heatmap
    from trimtab.analyze.token_report import ranking

    read = ranking(table, seed, draws=settings.bootstrap, sequences=settings.sequences)
    table.write(directory / TABLE)
    write_atomic(directory / RANKING, canonical(read) + "\n")
    write_atomic(directory / HEATMAP, heatmap(read, f"Tokens of {name}"))
