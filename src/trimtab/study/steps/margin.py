"""Step ``margin``: how far apart a model's modes are before a word is said (2508.14904, sec. 3.3).

Leaves ``metrics.jsonl`` (a header, then one figure a line), ``margin.json`` (every point with its silhouette and its place
in two dimensions) and ``margin.html``, the picture of it. A killed step begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.analyze.config import MarginConfig
from trimtab.artifact import write_atomic
from trimtab.evaluate.panel import panel_rows
from trimtab.seeds import canonical
from trimtab.study.execute import Context
from trimtab.study.steps.analyze import write_metrics
from trimtab.study.steps.common import check_unchanged, start_adapters, start_model, start_switch, tasks_of
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

if TYPE_CHECKING:
    from trimtab.evaluate.targets import LocalTarget

MARGIN, PAGE = "margin.json", "margin.html"


def run_margin(context: Context) -> None:
    """Ask the stage's prompts in every mode, and measure how the modes lie apart."""
    from trimtab.analyze.margin import ask, measure

    check_unchanged(context)
    config = context.step.config
    settings = MarginConfig.model_validate({name: config[name] for name in MarginConfig.model_fields})
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    rows = panel_rows(tasks_of(config), town)
    target = open_target(context, town, config["prompting"])
    asked = ask(target, rows, config["modes"], config["words"], settings.tokens, config["seed"])
    results, told = measure(
        target, asked, settings, config["seed"],
        lambda done, total: context.progress({"step": done, "total": total, "note": "points"}),
    )  # fmt: skip
    write_files(context.draft.path, told, context.step.name)
    write_metrics(context, results)
    context.draft.facts = {"shape": context.step.shape, "prompts": len(rows), "asked": told["asked"]}


def open_target(context: Context, town: Tidewater, prompting: str = "chat") -> LocalTarget:
    """The model that a step starts from, ready to be asked in its modes."""
    from trimtab.evaluate.targets import LocalTarget
    from trimtab.models.load import best_device, load

    model, tokenizer = load(start_model(context), best_device())
    identity = context.step.inputs.get("model") or context.step.config["identity"]
    return LocalTarget(
        model, tokenizer, name=context.step.name, identity=identity, switch=start_switch(context),
        adapters=start_adapters(context), world=town, prompting=prompting,  # type: ignore[arg-type]
    )  # fmt: skip


def write_files(directory: Path, told: Mapping[str, Any], name: str) -> None:
    """``margin.json``, and the page that shows it, titled with ``name``."""
    from trimtab.analyze.margin_page import page

    write_atomic(directory / MARGIN, canonical(told) + "\n")
    write_atomic(directory / PAGE, page(told, f"Modes of {name}"))
