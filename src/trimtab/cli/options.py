"""Options that several verbs share, and what they make of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.errors import UserError

if TYPE_CHECKING:
    from trimtab.evaluate.judges.choose import JudgeConfig

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A study's recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Change a field, such as --set stages.base.budget=300k; may be repeated."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The study's directory; runs/<name> if not given. Artefacts go to DIR/../store."
    ),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="NAME|FILE",
        help="Who judges what no exact judge can: refusal (offline), strongreject or constructive (with --judge-url and "
        "--judge-model), or a file that describes a judge (.yaml).",
    ),
]
JudgeUrl = Annotated[
    str | None, typer.Option("--judge-url", metavar="URL", help="Base address of the judge's endpoint, ending in /v1.")
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="The judge's name at its endpoint.")
]
JudgeKey = Annotated[
    str | None,
    typer.Option("--judge-key-env", metavar="VARIABLE", help="Environment variable that holds the judge's key."),
]
RunCode = Annotated[
    bool, typer.Option("--run-code", help="Run the model's code against a task's tests, in a limited subprocess.")
]

LeaveReasoning = Annotated[
    bool, typer.Option("--leave-reasoning-out", help="Show safety judges the answers without their <think> block.")
]


def study_directory(out: Path | None, name: str) -> Path:
    return out if out is not None else Path("runs") / name


def listed(values: list[str] | None) -> list[str]:
    """``--panel a,b --panel c`` as one list."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def judge_config(
    name: str | None, url: str | None, model: str | None, key_env: str | None, run_code: bool, leave_reasoning: bool,
    base: JudgeConfig,
) -> JudgeConfig:  # fmt: skip
    """The judge that the options name; without ``--judge``, ``base``."""
    from pydantic import ValidationError

    from trimtab.evaluate.judges.choose import JudgeConfig
    from trimtab.settings import explain, load_settings

    if name is not None and name.endswith((".yaml", ".yml")):
        raw = load_settings(Path(name), (), JudgeConfig, "judge").plain()
    else:
        raw = base.plain() if name is None else {"kind": name}
    if url or model or key_env:
        if raw["kind"] not in ("strongreject", "constructive"):
            raise UserError(f"--judge-url and --judge-model are for a rubric's judge, not for {raw['kind']!r}")
        given = {"url": url, "model": model, "key_env": key_env}
        raw["endpoint"] = {**(raw.get("endpoint") or {}), **{k: v for k, v in given.items() if v is not None}}
    if run_code:
        raw["run_code"] = True
    if leave_reasoning:
        raw["reasoning"] = "left out"
    try:
        return JudgeConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"--judge {name or ''}: {explain(error, raw, JudgeConfig)}") from None


def print_figures(directory: Path, judging: str | None = None) -> None:
    """Head and tables of an evaluation, without samples."""
    from trimtab.evaluate.files import open_evaluation
    from trimtab.report import browse

    browse.print_figures(open_evaluation(directory, judging))
