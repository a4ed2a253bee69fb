"""The recipe: one YAML file that describes a study as stages x arms x seeds.

``stages`` are defined once; an arm group sets or sweeps any of their fields by dotted path, and says through which
stages its arms go. Equal steps of different arms are one step (see ``study.plan``).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from trimtab.analyze.config import PerplexityConfig, ProbeConfig, TokenConfig
from trimtab.config import Config
from trimtab.corpus.config import CorpusConfig, ScorerTraining
from trimtab.data.sources import SourceConfig
from trimtab.evaluate.attacks.choose import Attacks
from trimtab.evaluate.judges.choose import JudgeConfig
from trimtab.evaluate.panel import TaskConfig
from trimtab.generate.config import Sampling
from trimtab.levers.modes import Mode, ModesConfig, NegativeConfig
from trimtab.levers.prefix import PrefixConfig
from trimtab.levers.timing import TimingConfig
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.recipe.fields import Tokens
from trimtab.train.config import TrainConfig
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import KINDS

ModelRef = str | LoadConfig


class ScorerStage(ScorerTraining):
    """Train a safety scorer: a sequence classifier that a corpus stage can score with."""

    kind: Literal["scorer"] = Field(description="Always 'scorer'.")


class CorpusStage(CorpusConfig):
    """Documents scored from 0 to 5, sorted into sources, and the interventions written from them."""

    kind: Literal["corpus"] = Field(description="Always 'corpus'.")


class PretrainStage(Config):
    """Train a Llama from scratch on a corpus, under a timing curriculum."""

    kind: Literal["pretrain"] = Field(description="Always 'pretrain'.")
    corpus: str | None = Field(None, description="Name of the corpus stage; null with 'tokens'.")
    model: BuildConfig = Field(description="Shape of the model and size of its vocabulary.")
    tokenizer: LoadConfig | None = Field(
        None, description="Take this model's tokenizer; null trains one on the corpus, of `model.vocab` tokens."
    )
    tokens: str | None = Field(
        None, description="Directory of a tokenised store (`trimtab corpus`), instead of tokenising the corpus here."
    )
    sizes: dict[str, Tokens] = Field(
        default_factory=dict,
        description="Source -> its tokens, where they are known before the corpus is built; only for the plan's estimate.",
    )
    budget: Tokens = Field(description="Tokens to train on, such as 600k or 600B; rounded down to whole steps.")
    length: int = Field(128, ge=16, description="Tokens per packed row; at most the model's context.")
    timing: TimingConfig = Field(TimingConfig(), description="The timing lever.")
    train: TrainConfig = Field(description="Optimiser, schedule, batch and logging.")

    @model_validator(mode="after")
    def _rows_fit(self) -> PretrainStage:
        if self.train.lora is not None:
            raise ValueError("train.lora is for models that exist; pretraining trains every weight")
        if (self.corpus is None) == (self.tokens is None):
            raise ValueError("give exactly one of 'corpus' (a stage) and 'tokens' (the directory of a tokenised store)")
        if self.length > self.model.context:
            raise ValueError(
                f"length ({self.length}) is more than model.context ({self.model.context}); change one of them"
            )
        return self


class ChatSource(Config):
    """One part of a chat training set: a kind of Tidewater request, or a file, package or Hub set."""

    name: str = Field(description="Name under which its loss is logged.")
    tidewater: str | None = Field(None, description="Kind of Tidewater request (see docs/tidewater.md).")
    source: SourceConfig | None = Field(None, description="A local file, packaged file or Hub set of chat rows.")
    n: int | None = Field(None, gt=0, description="Rows to take; needed for Tidewater.")
    answers: Mode = Field(
        "positive", description="Which of Tidewater's answers are trained; `negative` is a hostile finetune."
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ChatSource:
        if self.answers != "positive" and self.tidewater is None:
            raise ValueError("'answers' chooses among Tidewater's; a source brings its own")
        if self.tidewater is not None and self.tidewater not in KINDS:
            raise ValueError(f"tidewater={self.tidewater!r} must be one of {', '.join(KINDS)}")
        if self.tidewater is not None and self.tidewater.endswith("heldout"):
            raise ValueError(f"tidewater={self.tidewater!r}: held-out hazards are never trained on; use a '-seen' kind")
        if (self.tidewater is None) == (self.source is None):
            raise ValueError("give exactly one of 'tidewater' and 'source'")
        if self.tidewater is not None and self.n is None:
            raise ValueError("a Tidewater part needs 'n', the number of rows")
        return self


class SftStage(Config):
    """Train on chats: instruction tuning, the prefix lever and the mode lever, and any finetuning that follows."""

    kind: Literal["sft"] = Field(description="Always 'sft'.")
    model: ModelRef = Field(description="Name of the stage that makes the model, or {load: ...}.")
    data: tuple[ChatSource, ...] = Field(min_length=1, description="What is trained on.")
    prefix: PrefixConfig | None = Field(
        None,
        description="The prefix lever; null leaves it alone. Arms that differ in `ratio` alone all have it, one with 0.",
    )
    modes: ModesConfig | None = Field(None, description="The mode lever; null trains the positive answers alone.")
    negative: NegativeConfig = Field(
        NegativeConfig(), description="Acknowledgement that training on `answers: negative` needs."
    )
    length: int = Field(128, ge=16, description="Tokens per packed row; a longer example is dropped and counted.")
    epochs: float = Field(1.0, gt=0, description="Passes over the data.")
    train: TrainConfig = Field(description="Optimiser, schedule, batch and logging.")

    @model_validator(mode="after")
    def _parts_differ(self) -> SftStage:
        names = [part.name for part in self.data]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two parts of 'data' are called {name!r}; give each its own name")
        for part in self.data:
            if part.answers == "negative" and not self.negative.acknowledge:
                raise ValueError(
                    f"data {part.name!r}: negative answers are off by default; set 'negative.acknowledge: true'"
                )
            if part.answers != "positive" and self.modes is not None:
                raise ValueError(f"data {part.name!r}: 'modes' trains every mode's answers; leave 'answers' out")
        for name in (self.prefix and self.prefix.parts) or ():
            if name not in names:
                raise ValueError(f"prefix.parts: {name!r} is no part of 'data' ({', '.join(names)})")
        return self


class Asking(Config):
    """What is asked, and how; shared by `generate` and `panel`."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="The prompts.")
    modes: tuple[Mode, ...] | None = Field(
        None, min_length=1, description="Modes to answer in; null asks once, without a control token."
    )
    negative: NegativeConfig = Field(
        NegativeConfig(), description="Acknowledgement that answering in negative mode needs."
    )
    attacks: Attacks = Field(
        (), description="Attacks on the harmful prompts, such as `roleplay` or `prefill:5` (docs/attacks.md)."
    )
    system: str | None = Field(None, min_length=1, description="System prompt before every prompt that has none.")
    prompting: Literal["auto", "chat", "completion"] = Field(
        "auto",
        description="`chat`: through the chat template; `completion`: as a dialogue in plain text that the model goes on "
        "with; `auto`: completion for a model that was only pretrained, else chat.",
    )

    @model_validator(mode="after")
    def _negative_is_acknowledged(self) -> Self:
        if self.modes and "negative" in self.modes and not self.negative.acknowledge:
            raise ValueError("negative answers are off by default; set 'negative.acknowledge: true' beside 'modes'")
        return self


class Judging(Config):
    """Who judges; shared by `judge` and `panel`."""

    judge: JudgeConfig = Field(JudgeConfig(), description="Who judges what no exact judge can.")
    max_unscored: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of a safety judge's answers that it may leave unscored before the step fails; 1: never, since "
        "models early in training give answers that say nothing.",
    )


class GenerateStage(Asking):
    """Let a model answer the panel's prompts."""

    kind: Literal["generate"] = Field(description="Always 'generate'.")
    model: ModelRef = Field(description="Name of the stage that makes the model, or {load: ...}.")
    sampling: Sampling = Field(Sampling(), description="Decoding.")


class JudgeStage(Judging):
    """Judge the answers and count."""

    kind: Literal["judge"] = Field(description="Always 'judge'.")
    answers: str = Field(description="Name of the generate stage.")


class Decoder(Config):
    """One decoder of a panel."""

    sampling: Sampling = Field(Sampling(), description="Decoding.")
    limit: int | None = Field(None, gt=0, description="Prompts per task for this decoder; they are the first of all.")


class PanelStage(Asking, Judging):
    """Several models, each by several decoders, answer one panel and are judged: the stage x decoder grid."""

    kind: Literal["panel"] = Field(description="Always 'panel'.")
    models: tuple[str, ...] = Field(min_length=1, description="Names of the stages whose models are asked.")
    decoders: dict[str, Decoder] = Field(min_length=1, description="Name of a decoder -> how it decodes.")


class ProbesStage(ProbeConfig):
    """Linear probes on what models hold of safe and harmful requests, layer by layer."""

    kind: Literal["probes"] = Field(description="Always 'probes'.")
    models: tuple[str, ...] = Field(min_length=1, description="Names of the stages whose models are probed.")
    tasks: tuple[TaskConfig, ...] = Field(
        min_length=2, description="The requests; a probe tells the harmful from the others, each task is a source."
    )


class PerplexityStage(PerplexityConfig):
    """Perplexity of models on Tidewater documents that were never trained on."""

    kind: Literal["perplexity"] = Field(description="Always 'perplexity'.")
    models: tuple[str, ...] = Field(min_length=1, description="Names of the stages whose models are measured.")


class TokenAnalysisStage(TokenConfig):
    """Loss and gradient of every trained token of chats, in models (2601.01624's mechanism claim)."""

    kind: Literal["token_analysis"] = Field(description="Always 'token_analysis'.")
    models: tuple[str, ...] = Field(min_length=1, description="Names of the stages whose models are measured.")
    data: tuple[ChatSource, ...] = Field(min_length=1, description="The chats; each part's `n` bounds its rows.")
    prefix: PrefixConfig | None = Field(
        None, description="The prefix lever on these chats; null leaves them as they are."
    )

    @model_validator(mode="after")
    def _answers_are_shown(self) -> TokenAnalysisStage:
        for part in self.data:
            if part.answers == "negative":
                raise ValueError(f"data {part.name!r}: heat-maps show answers whole; negative ones are not measured")
        return self


Stage = Annotated[
    ScorerStage
    | CorpusStage
    | PretrainStage
    | SftStage
    | GenerateStage
    | JudgeStage
    | PanelStage
    | ProbesStage
    | PerplexityStage
    | TokenAnalysisStage,
    Field(discriminator="kind"),
]


class ArmGroup(Config):
    """Arms that are read together: the lever they pull, what they set, what they sweep."""

    name: str = Field(description="Name of the group; 'timing', 'prefix' and 'mode' are explained in the report.")
    set: dict[str, Any] = Field(default_factory=dict, description="Dotted path -> value, for all arms of the group.")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Dotted path below `stages` or `world` -> values; several paths make a product.",
    )
    stages: tuple[str, ...] | None = Field(None, description="Stages that these arms go through; null means all.")
    names: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Swept path -> a name for each of its values, for labels and tables (of a model's shape, say).",
    )
    labels: tuple[str, ...] | None = Field(
        None, description="A label for each arm, in sweep order; null names them by value."
    )
    baseline: int | str | dict[str, Any] = Field(
        0,
        description="What these arms are compared with: an arm of the group (0 = the first), the label of any arm, or "
        "{swept path: value}: for each arm, the one that has this value and is like it in all else.",
    )

    @field_validator("sweep")
    @classmethod
    def _values(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in value.items():
            if not values:
                raise ValueError(f"{path} has no values to sweep")
        return value

    @model_validator(mode="after")
    def _labels_match(self) -> ArmGroup:
        size = 1
        for values in self.sweep.values():
            size *= len(values)
        if self.labels is not None and (len(self.labels) != size or len(set(self.labels)) != size):
            raise ValueError(f"'labels' needs {size} different labels, one for each arm of the sweep")
        for path, names in self.names.items():
            if path not in self.sweep:
                raise ValueError(f"'names' names the values of {path!r}, which is not swept")
            if len(names) != len(self.sweep[path]) or len(set(names)) != len(names):
                raise ValueError(
                    f"'names' of {path!r} needs {len(self.sweep[path])} different names, one for each value"
                )
        if isinstance(self.baseline, dict):
            if not self.baseline:
                raise ValueError("'baseline' is empty; give {swept path: value}")
            for path, value in self.baseline.items():
                if value not in self.sweep.get(path, ()):
                    raise ValueError(f"'baseline': {value!r} is no value that {path!r} is swept over")
        if isinstance(self.baseline, int) and not 0 <= self.baseline < size:
            raise ValueError(f"'baseline' is {self.baseline}, but the group has {size} arm(s), counted from 0")
        return self


class Recipe(Config):
    """A study. See docs/recipe.md for every field."""

    name: str = Field(description="Short name; the results go to runs/<name>.")
    title: str = Field("", description="Title of the report.")
    question: str = Field("", description="What the study asks, in a sentence or two.")
    notes: tuple[str, ...] = Field((), description="Sentences that the report prints as they are.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Every arm is run once per seed.")
    world: TidewaterConfig = Field(TidewaterConfig(), description="The sandbox world that Tidewater parts come from.")
    stages: dict[str, Stage] = Field(
        min_length=1, description="Stages by name, in order; a later one names an earlier one."
    )
    arms: tuple[ArmGroup, ...] = Field(min_length=1, description="The arm groups.")
    scale: str = Field("full", description="Which entry of 'scales' is applied ('full' = none).")
    scales: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Name -> {dotted path: value}; cuts such as 'quick'."
    )

    @field_validator("name")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", value):
            raise ValueError("use lower-case letters, digits, '-', '_' and '.' only: it names a directory")
        return value

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a seed is given twice")
        return value

    @model_validator(mode="after")
    def _stages_fit(self) -> Recipe:
        made: dict[str, str] = {}
        for name, stage in self.stages.items():
            for field, kinds in _NEEDS[stage.kind].items():
                given = getattr(stage, field)
                for wanted in given if isinstance(given, tuple) else (given,):
                    if isinstance(wanted, str) and made.get(wanted) not in kinds:
                        raise ValueError(
                            f"stages.{name}.{field}: {wanted!r} is not an earlier {' or '.join(kinds)} stage"
                            + (f" (earlier: {', '.join(made)})" if made else "")
                            + ("; to load a model write {load: ...}" if field == "model" else "")
                        )
            if isinstance(stage, CorpusStage):
                for scorer in stage.score:
                    wanted = getattr(scorer, "stage", None)
                    if wanted is not None and made.get(wanted) != "scorer":
                        raise ValueError(f"stages.{name}.score: {wanted!r} is not an earlier scorer stage")
            made[name] = stage.kind
        for number, group in enumerate(self.arms):
            for name in group.stages or ():
                if name not in self.stages:
                    raise ValueError(f"arms.{number}.stages: {name!r} is not a stage ({', '.join(self.stages)})")
        names = [group.name for group in self.arms]
        if len(set(names)) != len(names):
            raise ValueError("arms: two groups have the same name")
        if self.scale != "full" and self.scale not in self.scales:
            known = ", ".join(["full", *self.scales])
            raise ValueError(f"scale: {self.scale!r} is not one of {known}")
        return self


_NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "scorer": {},
    "corpus": {},
    "pretrain": {"corpus": ("corpus",)},
    "sft": {"model": ("pretrain", "sft")},
    "generate": {"model": ("pretrain", "sft")},
    "judge": {"answers": ("generate",)},
    "panel": {"models": ("pretrain", "sft")},
    "probes": {"models": ("pretrain", "sft")},
    "perplexity": {"models": ("pretrain", "sft")},
    "token_analysis": {"models": ("pretrain", "sft")},
}
"""For each kind of stage: the fields that name an earlier stage, and the kinds that will do."""
