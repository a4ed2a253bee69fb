"""Step ``audit``: can a control token be typed into a model, or coaxed out of it?

Leaves ``metrics.jsonl`` (a header, then one figure a line) and ``audit.json``, tables by way and examples. A killed step
begins anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.analyze.config import AuditConfig
from trimtab.artifact import write_atomic
from trimtab.seeds import canonical
from trimtab.study.execute import Context
from trimtab.study.steps.analyze import write_metrics
from trimtab.study.steps.common import check_unchanged
from trimtab.study.steps.margin import open_target
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

AUDIT = "audit.json"


def run_audit(context: Context) -> None:
    """Spoof, coax, and look at the tokenizer."""
    from trimtab.analyze.audit.whole import audit

    check_unchanged(context)
    config = context.step.config
    settings = AuditConfig.model_validate({name: config[name] for name in AuditConfig.model_fields})
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    target = open_target(context, town)
    results, told = audit(
        target, settings, town, config["seed"],
        lambda what, done, total: context.progress({"step": done, "total": total, "note": what}),
    )  # fmt: skip
    write_audit(context.draft.path, told)
    write_metrics(context, results)
    context.draft.facts = {"shape": context.step.shape, "problems": told["problems"]}


def write_audit(directory: Path, told: Mapping[str, Any]) -> None:
    write_atomic(directory / AUDIT, canonical(told) + "\n")
