"""The steps of the stages that look at models: what they answer, how that is judged, and what is inside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.analyze.config import AuditConfig, MarginConfig, PerplexityConfig, ProbeConfig, TokenConfig
from trimtab.errors import UserError
from trimtab.evaluate.attacks.choose import choose_attack
from trimtab.evaluate.panel import at_most
from trimtab.models.config import HARM_TAGS
from trimtab.recipe.stages import (
    Asking,
    AuditStage,
    Decoder,
    GenerateStage,
    JudgeStage,
    MarginStage,
    ModelRef,
    PanelStage,
    PerplexityStage,
    ProbesStage,
    TokenAnalysisStage,
)
from trimtab.study import estimate
from trimtab.study.building import Building
from trimtab.study.graph import Cell
from trimtab.study.stored import vocabulary

GridStage = PanelStage | ProbesStage | PerplexityStage | MarginStage | AuditStage | TokenAnalysisStage


class Measuring(Building):
    """Stages ``generate``, ``judge``, ``panel``, ``probes``, ``perplexity``, ``margin``, ``audit`` and ``token_analysis``."""

    def grid(self, name: str, stage: GridStage) -> None:
        """The steps of a stage that looks at several models: one per model, or per model and decoder."""
        for model in stage.models:
            called = model if isinstance(model, str) else model.load.rsplit("/", 1)[-1]
            self.model(name, model)  # is it there?
            if isinstance(stage, PanelStage):
                for decoder, how in stage.decoders.items():
                    place = f"{name}/{called}/{decoder}"
                    answers = self.answers(place, _asked(stage, model, how), f"stages.{name}.tasks")
                    self.ends[f"{place} answers"] = answers
                    self.ends[place] = self.judge(place, stage, answers)
                    self.cells[place] = Cell(name, called, decoder)
            else:
                measures = {
                    "probes": self.probes,
                    "perplexity": self.perplexity,
                    "token_analysis": self.tokens_of,
                    "margin": self.margin,
                    "audit": self.audit,
                }
                place = f"{name}/{called}"
                self.ends[place] = measures[stage.kind](place, name, model, stage)  # type: ignore[operator]
                self.cells[place] = Cell(name, called)

    def judge(self, name: str, stage: JudgeStage | PanelStage, answers: str) -> str:
        config = {"judge": stage.judge.plain(), "max_unscored": stage.max_unscored}
        return self.step("judge", name, config, {"answers": answers})

    def of(self, name: str, model: ModelRef, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Config and inputs of a step that looks at one model."""
        told, inputs = self.model(name, model)
        return {**config, **told}, inputs

    def probes(self, place: str, name: str, model: ModelRef, stage: ProbesStage) -> str:
        config = {key: getattr(stage, key) for key in ProbeConfig.model_fields} | {
            "tasks": self.rows(f"stages.{name}.tasks", stage.tasks, "eval"),
            "world": self.recipe.world.plain(),
            "prompting": self.prompting("auto", model),
            "seed": self.seed,
        }
        return self.step("probes", place, *self.of(name, model, config))

    def perplexity(self, place: str, name: str, model: ModelRef, stage: PerplexityStage) -> str:
        config = {key: getattr(stage, key) for key in PerplexityConfig.model_fields} | {
            "world": self.recipe.world.plain(),
            "seed": self.seed,
        }
        return self.step("perplexity", place, *self.of(name, model, config))

    def tokens_of(self, place: str, name: str, model: ModelRef, stage: TokenAnalysisStage) -> str:
        config = {key: getattr(stage, key) for key in TokenConfig.model_fields} | {
            "measures": list(stage.measures),
            "data": self.rows(f"stages.{name}.data", stage.data, "train"),
            "prefix": stage.prefix.plain() if stage.prefix is not None else None,
            "world": self.recipe.world.plain(),
            "seed": self.seed,
        }
        return self.step("token_analysis", place, *self.of(name, model, config))

    def margin(self, place: str, name: str, model: ModelRef, stage: MarginStage) -> str:
        config = {key: getattr(stage, key) for key in MarginConfig.model_fields} | {
            "tasks": self.rows(f"stages.{name}.tasks", stage.tasks, "eval"),
            "modes": list(stage.modes),
            "words": dict(stage.words),
            "world": self.recipe.world.plain(),
            "prompting": self.prompting("auto", model),
            "seed": self.seed,
        }
        return self.step("margin", place, *self.of(name, model, config))

    def audit(self, place: str, name: str, model: ModelRef, stage: AuditStage) -> str:
        config = {key: getattr(stage, key) for key in AuditConfig.model_fields} | {
            "world": self.recipe.world.plain(),
            "seed": self.seed,
        }
        return self.step("audit", place, *self.of(name, model, config))

    def generate(self, name: str, stage: GenerateStage) -> str:
        return self.answers(name, stage, f"stages.{name}.tasks")

    def answers(self, place: str, stage: GenerateStage, tasks: str) -> str:
        """A ``generate`` step; ``place`` is its name, ``tasks`` the field that lists its tasks."""
        model_config, inputs = self.model(place, stage.model)
        if stage.sampling.safebeam is not None and (where := self.spelling(stage.model)) is not None:
            known = vocabulary(where)
            if known is not None and not known.added & set(HARM_TAGS):
                raise UserError(
                    f"{tasks.removesuffix('.tasks')}: SafeBeam needs a model trained with the harmfulness tag, and the tokenizer "
                    f"of {place!r}, {where}, has no added token {' or '.join(HARM_TAGS)}; choose another decoder"
                )
        shape = self.shape(stage.model)
        tokens = estimate.answer_tokens(stage)
        config = {
            "world": self.recipe.world.plain(),
            "tasks": self.rows(tasks, stage.tasks, "eval"),
            "modes": list(stage.modes) if stage.modes else None,
            "attacks": [{"name": a.name, "id": a.id} for a in map(choose_attack, stage.attacks)],
            "system": stage.system,
            "prompting": self.prompting(stage.prompting, stage.model),
            "sampling": stage.sampling.plain(),
            "seed": self.seed,
        }
        opening = self.openings.get(stage.model) if isinstance(stage.model, str) else None
        if opening is not None and opening.at_inference == "forced":
            config["prefix"] = opening.written()
        return self.step(
            "generate",
            place,
            config | model_config,
            inputs,
            tokens=tokens,
            flops=tokens * estimate.generate_flops(shape),
            shape=estimate.shape_of(shape, False),
        )


def _asked(stage: PanelStage, model: ModelRef, how: Decoder) -> GenerateStage:
    """What one model is asked by one decoder of a panel."""
    asked = {field: getattr(stage, field) for field in Asking.model_fields}
    asked["tasks"] = tuple(at_most(task, how.limit) for task in stage.tasks)
    return GenerateStage(kind="generate", model=model, sampling=how.sampling, **asked)
