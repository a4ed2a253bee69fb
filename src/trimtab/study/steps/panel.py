"""Steps ``generate`` and ``judge``: a model answers the panel's prompts, and the answers are judged and counted.

Both run the stages of ``evaluate.run`` and leave its files: ``prompts``, ``attacks`` and ``generations`` in the one
artefact, ``judgements`` and ``metrics`` in the other. They are written in the step's working directory first, so a
killed run keeps what it has; the finished files equal an uninterrupted run's.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import UserError
from trimtab.evaluate import files
from trimtab.evaluate.judges.choose import JudgeConfig
from trimtab.evaluate.run import answer_stage, attack_stage, judge_stage, model_facts, prompt_rows, write_prompts
from trimtab.generate.config import Sampling
from trimtab.levers.prefix import PrefixConfig, force_prefix
from trimtab.machine import library_versions
from trimtab.seeds import digest
from trimtab.study.execute import Context
from trimtab.study.steps.answering import Told, keep_only_ours, move_stages
from trimtab.study.steps.common import check_unchanged, start_adapters, start_model, start_switch, tasks_of
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


def run_generate(context: Context) -> None:
    """Every prompt, plain and attacked, answered once per mode and sample."""
    from trimtab.evaluate.targets import LocalTarget
    from trimtab.models.load import best_device, load

    check_unchanged(context)
    config = context.step.config
    sampling = Sampling.model_validate(config["sampling"])
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    model, tokenizer = load(start_model(context), best_device())
    name = context.step.inputs.get("model") or config["identity"]
    prompting = config.get("prompting", "chat")
    target = LocalTarget(
        model, tokenizer, name=context.step.name, identity=name, prompting=prompting, world=town,
        switch=start_switch(context), adapters=start_adapters(context),
    )  # fmt: skip
    try:
        modes = target.modes(config["modes"])
    except UserError as error:
        raise UserError(f"stage {context.step.name!r}: {error}; train it with 'modes', or set 'modes: null'") from None
    rows = prompt_rows(tasks_of(config), town, config["system"])
    prefix = PrefixConfig.restored(config.get("prefix"))
    if prefix is not None:
        rows = [force_prefix(row, prefix, config["seed"]) for row in rows]
    asked = {k: config[k] for k in ("tasks", "attacks", "modes", "system", "sampling", "seed", "world")}
    asked["prompting"] = prompting
    if prefix is not None:
        asked["prefix"] = config["prefix"]
    facts = {"config": asked, "model": model_facts(target, config["system"], modes), "versions": library_versions()}
    keep_only_ours(context, digest(facts))
    stages = Told(context)
    write_prompts(context.work, facts, rows)
    attacks = [attack["name"] for attack in config["attacks"]]
    rows += attack_stage(context.work, facts, rows, attacks, target, town, config["seed"], modes[0], stages)
    path = files.stage_path(context.work, files.GENERATIONS)
    resumed = path.exists() and path.read_bytes().count(b"\n") > 1
    answers = answer_stage(context.work, facts, rows, modes, sampling, config["seed"], target, stages)
    move_stages(context, files.PROMPTS, files.ATTACKS, files.GENERATIONS)
    context.draft.tokens = sum(len(g.ids) for g in answers)
    context.draft.facts = {
        "shape": context.step.shape,
        "answers": len(answers),
        "template_hash": target.renderer.template_hash,
        "resumed": resumed,
    }


def run_judge(context: Context) -> None:
    """A verdict on every answer, and every metric with its interval."""
    answers: Path = context.inputs["answers"].path
    asked = context.inputs["answers"].manifest["config"]
    town = Tidewater(TidewaterConfig.model_validate(asked["world"]))
    judge = JudgeConfig.model_validate(context.step.config["judge"])
    keep_only_ours(context, digest([context.step.id, library_versions()]))
    records = judge_stage(answers, context.work, judge, context.step.config["max_unscored"], town, Told(context))
    move_stages(context, files.JUDGEMENTS, files.METRICS)
    context.draft.facts = {"judges": sorted({r.verdict.judge for r in records}), "answers": len(records)}
