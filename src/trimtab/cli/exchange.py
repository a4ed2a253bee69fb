"""``trimtab import`` and ``trimtab export``: answers from other evaluation tools, artefacts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.errors import UserError


def register(app: typer.Typer) -> None:
    @app.command("import")
    def import_(
        source: Annotated[
            Path, typer.Argument(metavar="FILE_OR_DIR", help="Inspect logs (.eval, .json) or lm-eval samples_*.jsonl.")
        ],
        out: Annotated[Path, typer.Option(metavar="DIR", help="Where the evaluation goes.")],
        harm: Annotated[
            str | None, typer.Option(metavar="CLASS", help="What the prompts are: harmful, benign or contrast.")
        ] = None,
        category: Annotated[
            str, typer.Option(metavar="FIELD", help="Field of a sample's metadata with its topic.")
        ] = "category",
        score: Annotated[
            str | None, typer.Option(metavar="NAME", help="The score to read verdicts from; NAME.KEY for a part of it.")
        ] = None,
        score_range: Annotated[
            str | None,
            typer.Option(metavar="LOW,HIGH", help="Range of a numeric score; what lies outside is unscored."),
        ] = None,
        unsafe_at_least: Annotated[float | None, typer.Option(help="Scores from here up mean unsafe.")] = None,
        unsafe_at_most: Annotated[float | None, typer.Option(help="Scores up to here mean unsafe.")] = None,
        unsafe_values: Annotated[
            str | None, typer.Option(metavar="A,B", help="Values that mean unsafe; with --safe-values.")
        ] = None,
        safe_values: Annotated[str | None, typer.Option(metavar="A,B", help="Values that mean safe.")] = None,
        correct: Annotated[bool, typer.Option("--correct", help="The score says right or wrong (C/I, 1/0).")] = False,
        filter_: Annotated[str | None, typer.Option("--filter", metavar="NAME", help="lm-eval: which filter.")] = None,
    ) -> None:
        """Bring answers made by Inspect or lm-evaluation-harness into an evaluation, with their scores as verdicts."""
        from trimtab.evaluate.interop.imports import import_config, import_evaluation, tally

        options = {
            "harm": harm,
            "category": category,
            "filter": filter_,
            "score": score,
            "score_range": None if score_range is None else _pair(score_range),
            "unsafe_at_least": unsafe_at_least,
            "unsafe_at_most": unsafe_at_most,
            "unsafe_values": _words(unsafe_values),
            "safe_values": _words(safe_values),
            "correct": correct,
        }
        evaluation, notes = import_evaluation(source, out, import_config(**options))
        print(tally(evaluation))
        for note in notes:
            print(f"note: {note}")

    @app.command()
    def export(
        source: Annotated[Path, typer.Argument(metavar="DIR", help="An evaluation, a bundle, or a study.")],
        out: Annotated[
            Path,
            typer.Option(metavar="PATH", help="Where it goes: a directory; for an evaluation also a .json file."),
        ],
        without: Annotated[
            str | None, typer.Option(metavar="MODE", help="Bundle: leave this mode's adapter out, and prove it.")
        ] = None,
        arm: Annotated[str | None, typer.Option(metavar="LABEL", help="Study: the arm whose bundle is wanted.")] = None,
        stage: Annotated[
            str | None, typer.Option(metavar="NAME", help="Study: the stage that made it; the arm's last if not given.")
        ] = None,
        format: Annotated[
            str | None, typer.Option(help="Evaluation: jbb, JailbreakBench-style artefacts (the default).")
        ] = None,
        judging: Annotated[
            str | None, typer.Option(metavar="NAME", help="Evaluation: a second judging's verdicts.")
        ] = None,
        attack: Annotated[
            str | None, typer.Option(metavar="NAME", help="Evaluation: one attack alone; `direct` for none.")
        ] = None,
        mode: Annotated[
            str | None, typer.Option(metavar="MODE", help="Evaluation: one mode alone; `none` for no token.")
        ] = None,
        attack_type: Annotated[
            str | None, typer.Option(metavar="TYPE", help="Evaluation: white_box, black_box, transfer or manual.")
        ] = None,
    ) -> None:
        """Write what other tools read: an evaluation's attacks, a bundle without one of its modes, an arm's bundle of a study.

        Artefacts of an evaluation hold the model's answers: handle with care.
        """
        from trimtab.models.bundle import MANIFEST
        from trimtab.study.execute import STUDY

        kind = next(
            (k for k, name in (("bundle", MANIFEST), ("study", STUDY)) if (source / name).is_file()), "evaluation"
        )
        options = {
            "bundle": {"--without": without},
            "study": {"--arm": arm, "--stage": stage},
            "evaluation": {
                "--format": format, "--judging": judging, "--attack": attack, "--mode": mode, "--attack-type": attack_type,
            },
        }  # fmt: skip
        for other, names in options.items():
            given = [name for name, value in names.items() if value is not None]
            if given and other != kind:
                theirs = ", ".join(options[kind])
                raise UserError(
                    f"{given[0]} is for a{'n' * (other[0] == 'e')} {other}, and {source} is not one; it takes {theirs}"
                )
        if kind == "bundle":
            _without(source, without, out)
        elif kind == "study":
            _arm(source, arm, stage, out)
        else:
            _artefacts(source, out, format or "jbb", judging, attack=attack, mode=mode, attack_type=attack_type)


def _artefacts(source: Path, out: Path, format: str, judging: str | None, **chosen: str | None) -> None:
    from trimtab.evaluate.files import open_evaluation
    from trimtab.evaluate.interop.jbb import write_artefacts

    if format != "jbb":
        raise UserError(f"--format: {format!r} is not known; use jbb")
    for path in write_artefacts(open_evaluation(source, judging), out, **chosen):
        print(path)


def _without(source: Path, mode: str | None, out: Path) -> None:
    from trimtab.machine import quieten
    from trimtab.models.adapters import told, without_mode

    if mode is None:
        raise UserError(f"{source} is a bundle: name the mode to leave out (--without MODE)")
    quieten()
    print(told(out, mode, without_mode(source, mode, out)))


def _arm(source: Path, arm: str | None, stage: str | None, out: Path) -> None:
    from trimtab.study.shipping import export_arm

    if arm is None:
        raise UserError(f"{source} is a study: name the arm whose bundle is wanted (--arm LABEL)")
    manifest = export_arm(source, arm, stage, out)
    modes = ", ".join(manifest.modes) or "none"
    print(
        f"{out}: {len(manifest.files)} files, verified; modes: {modes}; {len(manifest.evaluation.get('figures', ()))} figures"
    )


def _words(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(word.strip() for word in text.split(",") if word.strip())


def _pair(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--score-range: {text!r} must be LOW,HIGH, such as 0,1") from None
