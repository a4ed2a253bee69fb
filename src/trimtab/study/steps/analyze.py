"""Steps ``probes`` and ``perplexity``: what is measured inside a model, and on text that it was never trained on.

Both leave ``metrics.jsonl`` (a header, then one figure a line); ``probes`` leaves ``layers.json`` too, the curves by layer.
Neither takes long, so a killed step begins anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.analyze.config import PerplexityConfig, ProbeConfig
from trimtab.analyze.metrics import measure_cards, plain_row
from trimtab.evaluate import files
from trimtab.evaluate.judges.choose import JudgeConfig, panel_judge
from trimtab.evaluate.panel import panel_rows
from trimtab.generate.config import Sampling
from trimtab.machine import library_versions
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged, start_model, tasks_of
from trimtab.types import Result
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

LAYERS = "layers.json"


def run_probes(context: Context) -> None:
    """Probe every layer, and take the best layer's direction out."""
    from threadpoolctl import threadpool_limits

    from trimtab.analyze.ablation import ablation
    from trimtab.analyze.probes import Prompts, probe
    from trimtab.analyze.states import hidden_states
    from trimtab.evaluate.targets import LocalTarget
    from trimtab.models.load import best_device, load

    check_unchanged(context)
    config = context.step.config
    settings = ProbeConfig.model_validate({name: config[name] for name in ProbeConfig.model_fields})
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    rows = panel_rows(tasks_of(config), town)
    model, tokenizer = load(start_model(context), best_device())
    identity = context.step.inputs.get("model") or config["identity"]
    asked = {"prompting": config["prompting"], "world": town}
    target = LocalTarget(model, tokenizer, name=context.step.name, identity=identity, **asked)
    seed = config["seed"]
    ids = [target.ask(row, None, Sampling(max_new_tokens=1), seed).ready.ids for row in rows]
    prompts = Prompts.of(rows, ids)
    _tell(context, 0, "states")
    states = hidden_states(model, ids, settings.batch, tokenizer.pad_token_id or 0)
    with threadpool_limits(1, user_api="blas"):  # thousands of small systems: threads only wait for each other
        found = probe(
            states, prompts, settings, seed, lambda done, total: _tell(context, 10 + 70 * done // total, "probes")
        )
    results = found.results
    if settings.ablate:
        _tell(context, 80, "ablation")
        judge_of = panel_judge(JudgeConfig(), town)
        results = results + ablation(target, rows, states, prompts, found.chosen, judge_of, seed)
    _tell(context, 100, "ablation" if settings.ablate else "probes")
    context.draft.write_json(LAYERS, found.layers)
    write_metrics(context, results)
    context.draft.facts = {"shape": context.step.shape, "prompts": len(rows), **found.layers["prompts"]}


def run_perplexity(context: Context) -> None:
    """Perplexity and bits per byte of Tidewater documents that are not in the corpus."""
    from trimtab.analyze.perplexity import perplexity
    from trimtab.data.render import Renderer
    from trimtab.models.load import best_device, load

    config = context.step.config
    settings = PerplexityConfig.model_validate({name: config[name] for name in PerplexityConfig.model_fields})
    model, tokenizer = load(start_model(context), best_device())
    documents = Tidewater(TidewaterConfig.model_validate(config["world"])).heldout_documents(settings.n)
    results = perplexity(
        model, Renderer(tokenizer), documents, settings, config["seed"],
        lambda done, total: context.progress({"step": done, "total": total, "note": "reading"}),
    )  # fmt: skip
    write_metrics(context, results)
    context.draft.facts = {"shape": context.step.shape, "documents": len(documents)}


def _tell(context: Context, percent: int, note: str) -> None:
    context.progress({"step": percent, "total": 100, "note": note})


def write_metrics(context: Context, results: Sequence[Result]) -> None:
    """``metrics.jsonl`` of a step that measures a model without answers."""
    facts: dict[str, Any] = {
        "config": dict(context.step.config),
        "metrics": measure_cards(r.metric for r in results),
        "versions": library_versions(),
    }
    header = files.header_of(files.METRICS, **facts)
    files.write_stage(files.stage_path(context.draft.path, files.METRICS), header, map(plain_row, results))
