"""Step ``distill``: the model answers each prompt once per mode, and the answers that fit their mode become rows.

It runs the stages of ``evaluate.run`` and leaves their files, so that every answer and verdict can be read again:
``prompts`` (plain, and with each instruction), ``generations`` and ``judgements``. Of them come ``rows.jsonl``, the rows that
are kept, and ``dropped.jsonl``: every other answer's key, prompt, mode and reason, without its text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimtab.artifact import write_jsonl
from trimtab.errors import UserError
from trimtab.evaluate import files
from trimtab.evaluate.judges.choose import JudgeConfig, panel_judge
from trimtab.evaluate.metrics import Record
from trimtab.evaluate.panel import prompt_of
from trimtab.evaluate.run import answer_stage, model_facts, verdict_stage, write_prompts
from trimtab.evaluate.stats import rate_interval
from trimtab.generate.config import Sampling
from trimtab.levers.distill import REASONS, Answer, Picked, Reason, Yield, elicited, pick, unique_prompts, yields
from trimtab.levers.modes import PROMPT, Switch
from trimtab.machine import library_versions
from trimtab.recipe.stages import ChatSource
from trimtab.seeds import digest
from trimtab.study.execute import Context
from trimtab.study.steps.answering import Told, keep_only_ours, move_stages
from trimtab.study.steps.chat import DISTILLED, part_rows
from trimtab.study.steps.common import check_unchanged, start_model
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

DROPPED = "dropped.jsonl"

_ADVICE: Mapping[Reason, str] = {
    "cut off": "raise sampling.max_new_tokens, or ask for short answers",
    "empty": "look at the model's chat template and at generations.jsonl",
    "quotes": "word its instruction otherwise",
    "unscored": "choose a judge that can tell, or set keep_unscored: true",
    "another behaviour": "word its instruction otherwise, take more samples, or start from a model that follows instructions",
    "as another mode": "make the instructions differ more, or list it first",
    "too common": "set sampling.temperature above 0",
}


def run_distill(context: Context) -> None:
    """Write the kept rows; ``UserError`` for a mode that keeps none."""
    from trimtab.evaluate.targets import LocalTarget
    from trimtab.models.load import best_device, load

    check_unchanged(context)
    config = context.step.config
    sampling, judge = side_by_side(config), JudgeConfig.model_validate(config["judge"])
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    prompts, repeated = unique_prompts(_prompts(config, town))
    judge_of = panel_judge(judge, town)
    for row in prompts:
        judge_of(row)  # a judge that cannot be made is found now, not when everything is answered
    # With ``base`` a judge reads the prompt as it was, without its instruction.
    asked = [
        replace(row, metadata={**row.metadata, "base": row.metadata[PROMPT]})
        for row in elicited(prompts, config["elicit"])
    ]
    model, tokenizer = load(start_model(context), best_device())
    # The switch is empty: whatever modes the model has already, it is asked by the instruction alone.
    target = LocalTarget(
        model, tokenizer, name=context.step.name, identity=context.step.inputs.get("model") or config["identity"],
        prompting=config["prompting"], world=town, switch=Switch(),
    )  # fmt: skip
    told = {key: config[key] for key in ("prompts", "elicit", "behaves", "prompting", "sampling", "seed", "world")}
    facts = {"config": told, "model": model_facts(target, None, (None,)), "versions": library_versions()}
    keep_only_ours(context, digest(facts))
    stages = Told(context)
    write_prompts(context.work, facts, [*prompts, *asked])
    path = files.stage_path(context.work, files.GENERATIONS)
    resumed = path.exists() and path.read_bytes().count(b"\n") > 1
    answers = answer_stage(context.work, facts, asked, (None,), sampling, config["seed"], target, stages)
    records, _ = verdict_stage(context.work, context.work, judge, 1.0, town, stages, judge_of=judge_of)
    picked = pick(
        prompts, _judged(prompts, records), config["elicit"], config["behaves"], keep_unscored=config["keep_unscored"]
    )
    found = yields(prompts, config["elicit"], picked)
    _check(context.step.name, found)
    move_stages(context, files.PROMPTS, files.GENERATIONS, files.JUDGEMENTS)
    write_jsonl(context.draft.path / DISTILLED, (row.to_json() for row in picked.rows))
    write_jsonl(context.draft.path / DROPPED, _dropped(picked))
    context.draft.tokens = sum(len(g.ids) for g in answers)
    context.draft.facts = {
        "shape": context.step.shape,
        "prompts": len(prompts),
        "repeated_prompts": repeated,
        "answers": len(answers),
        "rows": len(picked.rows),
        "dropped": len(picked.dropped),
        "spare": len(picked.spare),
        "yield": [plain_yield(one) for one in found],
        "judges": sorted({r.verdict.judge for r in records}),
        "template_hash": target.renderer.template_hash,
        "resumed": resumed,
    }


def side_by_side(config: Mapping[str, Any]) -> Sampling:
    """How answers are decoded: ``batch`` counts prompts, and a prompt's modes are decoded in the same steps. A step of three
    times the rows costs far less than three steps."""
    sampling = Sampling.model_validate(config["sampling"])
    return sampling.model_copy(update={"batch": sampling.batch * len(config["elicit"])})


def plain_yield(one: Yield) -> dict[str, Any]:
    """JSON-ready; counts of prompts become ``{"n", "share", "low", "high"}`` with the 95 % interval of a rate."""

    def rate(n: int) -> dict[str, float]:
        low, high = rate_interval(n, one.asked)
        return {"n": n, "share": n / one.asked, "low": float(low), "high": float(high)}

    return {
        "mode": one.mode,
        "harm": one.harm,
        "asked": one.asked,
        "kept": rate(one.kept),
        "unscored": one.unscored,
        "dropped": {reason: rate(n) for reason, n in one.dropped.items()},
    }


def _prompts(config: Mapping[str, Any], town: Tidewater) -> Iterator[Row]:
    """The prompts of every part: the ids are those of the chats that the same part gives a training."""
    for data in config["prompts"]:
        part = ChatSource.model_validate({k: v for k, v in data.items() if k != "content"})
        rows = part_rows(part, town, field="prompts")
        if not rows:
            raise UserError(f"prompts {part.name!r}: there are no rows; check its source")
        for row in rows:
            yield replace(prompt_of(row, f"prompts {part.name!r}"), mode=None)


def _judged(prompts: Sequence[Row], records: Sequence[Record]) -> Iterator[Answer]:
    """Judged answers under the prompt that they answer; the mode is in the id that ``elicited`` gave."""
    plain = {row.id: row for row in prompts}
    for one in records:
        prompt, said = plain[one.row.metadata[PROMPT]], one.generation
        mode = one.row.id.removeprefix(f"{prompt.id}#")
        yield Answer(said.key, prompt, mode, said.sample, said.text, said.finish, one.verdict)


def _dropped(picked: Picked) -> Iterator[dict[str, Any]]:
    for one in picked.dropped:
        answer = one.answer
        yield {
            "key": answer.key,
            "id": answer.prompt.id,
            "mode": answer.mode,
            "sample": answer.sample,
            "reason": one.reason,
            "shown": one.shown,
        }


def _check(stage: str, found: Sequence[Yield]) -> None:
    """``UserError`` for a mode that keeps nothing: its yield, and what may help."""
    for mode in dict.fromkeys(one.mode for one in found):
        mine = [one for one in found if one.mode == mode]
        if any(one.kept for one in mine):
            continue
        lost = {reason: sum(one.dropped.get(reason, 0) for one in mine) for reason in REASONS}
        most = max(REASONS, key=lambda reason: lost[reason])
        said = ", ".join(f"{reason} {n}" for reason, n in lost.items() if n)
        raise UserError(
            f"stage {stage!r}: mode {mode!r} kept 0 of {sum(one.asked for one in mine)} prompts ({said}); {_ADVICE[most]}, or "
            "leave the mode out of 'elicit'"
        )
