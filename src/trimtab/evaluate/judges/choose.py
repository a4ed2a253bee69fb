"""Which judge an answer gets: an exact one where there is one, else the one that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.endpoint import Endpoint, EndpointConfig
from trimtab.errors import UserError
from trimtab.evaluate.judges.base import Judge
from trimtab.evaluate.judges.classifier import ClassifierConfig, ClassifierJudge
from trimtab.evaluate.judges.ensemble import Ensemble, Rule
from trimtab.evaluate.judges.reasoning import WithoutReasoning
from trimtab.evaluate.judges.refusal import RefusalMatch
from trimtab.evaluate.judges.rubric import ConstructiveRubric, RubricConfig, StrongRejectConfig, StrongRejectRubric
from trimtab.evaluate.judges.sandbox import Limits
from trimtab.evaluate.judges.tidewater import TidewaterJudge
from trimtab.evaluate.judges.verify import CodeTests, MultipleChoice, NumericAnswer
from trimtab.types import Row

if TYPE_CHECKING:
    from trimtab.world.tidewater import Tidewater

Kind = Literal["refusal", "strongreject", "constructive", "classifier", "ensemble"]


class JudgeConfig(Config):
    """Who judges answers that no exact judge or verifier can judge."""

    kind: Kind = Field(
        "refusal",
        description="`refusal`: offline, by rule, tells refusals and not harm; `strongreject`, `constructive`: a rubric "
        "put to a model behind an endpoint; `classifier`: a safety classifier, loaded here; `ensemble`: several.",
    )
    endpoint: EndpointConfig | None = Field(None, description="Where a rubric's model is.")
    strongreject: StrongRejectConfig = Field(StrongRejectConfig(), description="Settings of that rubric.")
    constructive: RubricConfig = Field(RubricConfig(), description="Settings of that rubric.")
    classifier: ClassifierConfig | None = Field(None, description="Which classifier, and how its answer is read.")
    members: tuple[JudgeConfig, ...] = Field((), description="The judges of an ensemble.")
    rule: Rule = Field("any_unsafe", description="How an ensemble decides: unanimous, majority or any_unsafe.")
    reasoning: Literal["judged", "left out"] = Field(
        "judged",
        description="Whether safety judges are shown the reasoning (`<think>...</think>`) that opens an answer. Verifiers and "
        "the refusal match read the answer alone.",
    )
    run_code: bool = Field(
        False, description="Run the model's code, in a subprocess with limits, to check it against a task's tests."
    )
    sandbox: Limits = Field(Limits(), description="What such code may use, and how well it must be shut in.")

    @model_validator(mode="after")
    def _whole(self) -> JudgeConfig:
        if self.kind in ("strongreject", "constructive") and self.endpoint is None:
            raise ValueError(f"kind={self.kind!r} needs 'endpoint': the address and name of the model that judges")
        if self.kind == "classifier" and self.classifier is None:
            raise ValueError("kind='classifier' needs 'classifier': the model and its family")
        if (self.kind == "ensemble") != bool(self.members):
            raise ValueError("'members' belongs to kind='ensemble', and an ensemble needs them")
        if any(member.kind == "ensemble" for member in self.members):
            raise ValueError("an ensemble of ensembles: name its judges in one list")
        return self


def choose_judge(config: JudgeConfig) -> Judge:
    """The judge of a config; endpoints and models are opened when they are first needed."""
    if config.kind == "refusal":
        return RefusalMatch()
    judge = _safety_judge(config)
    return WithoutReasoning(judge) if config.reasoning == "left out" else judge


def _safety_judge(config: JudgeConfig) -> Judge:
    if config.kind == "ensemble":
        members: dict[str, Judge] = {}
        for member in config.members:
            judge = choose_judge(member)
            name = judge.name
            while name in members:
                name += "'"
            members[name] = judge
        return Ensemble(members, config.rule)
    if config.kind == "classifier":
        assert config.classifier is not None
        return ClassifierJudge(config.classifier)
    assert config.endpoint is not None
    endpoint = Endpoint(config.endpoint)
    if config.kind == "strongreject":
        return StrongRejectRubric(endpoint, config.strongreject)
    return ConstructiveRubric(endpoint, config.constructive)


def _verifier(name: str, config: JudgeConfig) -> Judge:
    if name == "code":
        return CodeTests(allow_code=config.run_code, limits=config.sandbox)
    return NumericAnswer() if name == "numeric" else MultipleChoice()


def panel_judge(config: JudgeConfig, world: Tidewater | None = None) -> Callable[[Row], Judge]:
    """A function from plain prompt to judge: Tidewater's own, a verifier where the task says so (``verify``), else the judge
    of ``config``. ``UserError`` for a Tidewater row without ``world``."""
    made: dict[str, Judge] = {}

    def once(name: str, make: Callable[[], Judge]) -> Judge:
        if name not in made:
            made[name] = make()
        return made[name]

    def judge_of(row: Row) -> Judge:
        if row.source == "tidewater":
            if world is None:
                raise UserError(f"row {row.id!r} is a Tidewater request: its judge needs the world that it was made in")
            exact = TidewaterJudge(world)
            return once("tidewater", lambda: WithoutReasoning(exact) if config.reasoning == "left out" else exact)
        if (verify := row.metadata.get("verify")) is not None:
            return once(verify, lambda: _verifier(verify, config))
        return once("asked", lambda: choose_judge(config))

    return judge_of
