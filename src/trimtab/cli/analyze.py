"""``trimtab analyze``: what a model makes of single tokens, and how far its modes lie apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.cli.options import listed


def register(app: typer.Typer) -> None:
    analyze = typer.Typer(no_args_is_help=True)
    app.add_typer(analyze, name="analyze")

    @analyze.callback()
    def group() -> None:
        """Look into a model: its tokens one by one, or its modes."""

    @analyze.command()
    def tokens(
        model: Annotated[
            str, typer.Argument(metavar="MODEL", help="A bundle, a model directory, a Hub id or smollm2-135m-instruct.")
        ],
        data: Annotated[
            list[str],
            typer.Option(
                metavar="FILE|SET|tidewater:KIND",
                help="Rows with answers: a file, a named set or Tidewater's; repeat it.",
            ),
        ],
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go: a new directory.")],
        prefix: Annotated[
            Literal["safety", "reasoning", "factuality", "coding"] | None,
            typer.Option(help="Open answers with a sentence of this set."),
        ] = None,
        ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the answers that --prefix opens.")] = 1.0,
        measures: Annotated[
            list[str] | None,
            typer.Option(metavar="NAMES", help="loss, logit_grad, head_grad, grad_norm; all if not given."),
        ] = None,
        projections: Annotated[int, typer.Option("--projections", "-k", help="Passes behind grad_norm.")] = 64,
        exact: Annotated[bool, typer.Option("--exact", help="One backward pass per token instead.")] = False,
        limit: Annotated[int | None, typer.Option(min=1, help="Rows of each set, the first ones.")] = None,
        batch: Annotated[int, typer.Option(help="Tokens read side by side.")] = 2048,
        seed: Annotated[int, typer.Option(help="Seed of projections, prefixes and resamples.")] = 0,
        revision: Annotated[str | None, typer.Option(metavar="COMMIT", help="Hub commit of MODEL.")] = None,
        top: Annotated[int, typer.Option(min=0, help="Tokens to print.")] = 20,
    ) -> None:
        """Loss and gradient of every trained token: tokens.parquet, ranking.json and heatmap.html."""
        from trimtab.study.token_files import analyze_to, print_ranking

        settings: dict[str, Any] = {"projections": projections, "exact": exact, "batch": batch}
        if measures:
            settings["measures"] = listed(measures)
        opened = {} if prefix is None else {"capability": prefix, "ratio": ratio}
        analyze_to(
            {"load": model, "revision": revision}, data, out, settings=settings, prefix=opened, seed=seed, limit=limit
        )
        print_ranking(out, top)
        print(out)

    @analyze.command()
    def margin(
        model: Annotated[
            str, typer.Argument(metavar="MODEL", help="A bundle, a model directory, a Hub id or smollm2-135m-instruct.")
        ],
        task: Annotated[
            list[str],
            typer.Option(metavar="NAME|FILE", help="Prompts: a task or group (`trimtab tasks`), or a file; repeat it."),
        ],
        out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go: a new directory.")],
        mode: Annotated[
            list[str] | None, typer.Option(metavar="NAMES", help="Modes to compare; all of the model's if not given.")
        ] = None,
        words: Annotated[
            Path | None,
            typer.Option(
                metavar="FILE",
                help="Instructions (.yaml, mode: text) that ask for modes which the model does not have.",
            ),
        ] = None,
        features: Annotated[
            list[str] | None, typer.Option(metavar="NAMES", help="logits, hidden; logits if not given.")
        ] = None,
        distances: Annotated[
            list[str] | None, typer.Option(metavar="NAMES", help="euclidean, cosine; both if not given.")
        ] = None,
        tokens: Annotated[int, typer.Option(help="First tokens of an answer.")] = 1,
        layers: Annotated[
            list[str] | None, typer.Option(metavar="NUMBERS", help="Layers of hidden; all if not given.")
        ] = None,
        limit: Annotated[int, typer.Option(min=1, help="Prompts of each task.")] = 50,
        batch: Annotated[int, typer.Option(help="Prompts read side by side.")] = 64,
        seed: Annotated[int, typer.Option(help="Seed of the resamples.")] = 0,
        revision: Annotated[str | None, typer.Option(metavar="COMMIT", help="Hub commit of MODEL.")] = None,
    ) -> None:
        """How far apart a model's modes are before a word is said (2508.14904): margin.json and margin.html."""
        from trimtab.study.margin_files import margin_to, print_margins

        settings: dict[str, Any] = {"tokens": tokens, "batch": batch}
        given = {"features": listed(features), "distances": listed(distances), "layers": listed(layers)}
        settings |= {name: values for name, values in given.items() if values}
        margin_to(
            {"load": model, "revision": revision}, task, out, settings=settings, modes=listed(mode), words=words, seed=seed,
            limit=limit,
        )  # fmt: skip
        print_margins(out)
        print(out)
