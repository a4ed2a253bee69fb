"""``trimtab data``: look at training rows token by token, and take boilerplate openings off a set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.data.sources import SourceConfig


def register(app: typer.Typer) -> None:
    data = typer.Typer(
        help="Training rows: look at them token by token; take boilerplate openings off.", no_args_is_help=True
    )
    app.add_typer(data, name="data")

    @data.command()
    def show(
        what: Annotated[
            str, typer.Argument(metavar="STUDY|FILE|SET", help="A study's directory, a file of rows, or a named set.")
        ],
        n: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
        row: Annotated[str | None, typer.Option("--row", metavar="ID", help="The row with this id alone.")] = None,
        arm: Annotated[
            str | None, typer.Option("--arm", metavar="LABEL", help="Of a study: which arm; else the first.")
        ] = None,
        stage: Annotated[
            str | None, typer.Option("--stage", metavar="NAME", help="Of a study: which training stage; else the last.")
        ] = None,
        model: Annotated[
            str, typer.Option("--model", metavar="MODEL", help="Of a file or set: whose tokenizer and chat template.")
        ] = "smollm2-135m-instruct",
        prefix: Annotated[
            list[str] | None,
            typer.Option(
                "--prefix",
                metavar="FIELD=VALUE",
                help="Of a file or set: a setting of the prefix lever, such as ratio=0.5; may be repeated.",
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="Of a file or set: the seed of the lever's draws.")] = 0,
        prefixed: Annotated[bool, typer.Option("--prefixed", help="Only rows that carry a prefix.")] = False,
        tokens: Annotated[bool, typer.Option("--tokens", help="A bar between tokens.")] = False,
    ) -> None:
        """Print rows as a model is trained on them: spans in colour, what the loss counts underlined."""
        from trimtab.levers.prefix import PrefixConfig
        from trimtab.settings import load_settings
        from trimtab.study.viewer import print_rows, source_rows, study_rows, trained_on

        directory = Path(what).expanduser()
        if directory.is_dir():
            if prefix:
                raise UserError("--prefix is for a file or a set; a study's rows are shown as they were trained")
            rows = study_rows(trained_on(directory, arm, stage, prefixed))
        else:
            if arm or stage:
                raise UserError("--arm and --stage are for a study's directory")
            settings = load_settings(None, prefix or (), PrefixConfig, "prefix", option="--prefix")
            rows = source_rows(_source(what), model, settings, seed)
        print_rows(rows, n, row=row, prefixed=prefixed, tokens=tokens)

    @data.command()
    def export(
        study: Annotated[Path, typer.Argument(metavar="STUDY", help="A study's directory.")],
        out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the rows go (.jsonl).")],
        arm: Annotated[str | None, typer.Option("--arm", metavar="LABEL", help="Which arm; else the first.")] = None,
        stage: Annotated[
            str | None, typer.Option("--stage", metavar="NAME", help="Which training stage; else the last.")
        ] = None,
        form: Annotated[
            str, typer.Option("--form", help="`messages`, or `prompt-completion` as TRL trains on completions.")
        ] = "messages",
    ) -> None:
        """Write the chats that an arm was trained on, prefixes in their places, for another trainer."""
        from trimtab.study.rows_out import export_rows
        from trimtab.study.viewer import trained_on

        if form not in ("messages", "prompt-completion"):
            raise UserError(f"--form {form!r} is neither 'messages' nor 'prompt-completion'")
        n = export_rows(trained_on(study, arm, stage), out, form)  # type: ignore[arg-type]
        print(f"{n} rows\n{out}")

    @data.command()
    def strip(
        what: Annotated[str, typer.Argument(metavar="FILE|SET", help="A file of chat rows, or a named set.")],
        out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the stripped rows go (.jsonl).")],
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="FIELD=VALUE", help="rules, common or most; may be repeated."),
        ] = None,
    ) -> None:
        """Take boilerplate openings off the responses of a set, and say what went."""
        from trimtab.levers.boilerplate import StripConfig
        from trimtab.settings import load_settings
        from trimtab.study.strip import strip_file

        strip_file(_source(what), load_settings(None, settings or (), StripConfig, "strip"), out)


def _source(what: str) -> SourceConfig:
    """A file of rows, or a named set."""
    from pydantic import ValidationError

    from trimtab.data.sources import SourceConfig
    from trimtab.settings import explain

    raw = {"path": what} if Path(what).expanduser().is_file() or Path(what).suffix else {"name": what}
    try:
        return SourceConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{what}: {explain(error, raw, SourceConfig)}") from None
