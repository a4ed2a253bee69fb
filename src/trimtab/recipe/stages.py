"""The stages of a recipe: what each kind of stage is told. A field that names another stage holds its name."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trimtab.analyze.config import AuditConfig, MarginConfig, PerplexityConfig, ProbeConfig, TokenConfig
from trimtab.config import Config
from trimtab.corpus.config import CorpusConfig, ScorerTraining
from trimtab.data.sources import SourceConfig
from trimtab.evaluate.attacks.choose import Attacks
from trimtab.evaluate.judges.choose import JudgeConfig
from trimtab.evaluate.panel import TaskConfig
from trimtab.generate.config import Sampling
from trimtab.levers.modes import MODES, RESERVED_NAMES, Behaviour, ModesConfig, Name, NegativeConfig
from trimtab.levers.prefix import PrefixConfig
from trimtab.levers.timing import TimingConfig
from trimtab.models.config import BuildConfig, LoadConfig
from trimtab.recipe.fields import Tokens
from trimtab.train.config import LoraSettings, TrainConfig
from trimtab.world.tidewater import KINDS, POLICIES

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
    stage: str | None = Field(None, description="Name of an earlier distill stage: the answers that it kept.")
    answers: Behaviour = Field(
        "positive", description="Which of Tidewater's answers are trained; `negative` is a hostile finetune."
    )
    policy: str | None = Field(None, description="Tidewater only: the quay whose law holds; null: as the kind has it.")

    @model_validator(mode="after")
    def _one_origin(self) -> ChatSource:
        if self.answers != "positive" and self.tidewater is None:
            raise ValueError("'answers' chooses among Tidewater's; a source brings its own")
        if self.tidewater is not None and self.tidewater not in KINDS:
            raise ValueError(f"tidewater={self.tidewater!r} must be one of {', '.join(KINDS)}")
        if self.tidewater is not None and self.tidewater.endswith("heldout"):
            raise ValueError(f"tidewater={self.tidewater!r}: held-out hazards are never trained on; use a '-seen' kind")
        if sum(given is not None for given in (self.tidewater, self.source, self.stage)) != 1:
            raise ValueError("give exactly one of 'tidewater', 'source' and 'stage'")
        if self.tidewater is not None and self.n is None:
            raise ValueError("a Tidewater part needs 'n', the number of rows")
        if self.policy is not None and (self.tidewater is None or self.policy not in POLICIES):
            raise ValueError(f"policy={self.policy!r} is for Tidewater, one of {', '.join(POLICIES)}")
        return self


class AdapterConfig(Config):
    """How the modes that are kept apart are trained, on top of the finished weights."""

    lora: LoraSettings = Field(
        LoraSettings(train_control_rows=False),
        description="The adapter. Without trained rows of the embedding any server of LoRA adapters can use it.",
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate; null: that of 'train'.")
    epochs: float | None = Field(None, gt=0, description="Passes over its rows; null: as many as 'epochs'.")


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
    adapter: AdapterConfig = Field(
        AdapterConfig(), description="The adapter of the modes that are kept apart (`modes.negative.kept`)."
    )
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
        if self.modes is not None and self.modes.shared and self.prefix is not None:
            raise ValueError("'modes.shared' and 'prefix' do not go together yet; leave one of them out")
        for name in (self.prefix and self.prefix.parts) or ():
            if name not in names:
                raise ValueError(f"prefix.parts: {name!r} is no part of 'data' ({', '.join(names)})")
        return self


class DpoStage(Config):
    """Direct preference optimisation through TRL (extra `dpo`): the baseline that the mode lever is compared with.

    A killed step starts anew: TRL's training has no checkpoints here.
    """

    kind: Literal["dpo"] = Field(description="Always 'dpo'.")
    model: ModelRef = Field(
        description="Name of the stage that makes the model, or {load: ...}; it is the reference too."
    )
    data: tuple[ChatSource, ...] = Field(
        min_length=1,
        description="Where the pairs come from: Tidewater's preferences, sets of `prompt`, `chosen`, `rejected`, or rows with "
        "`mode: positive` and `mode: negative` to one prompt.",
    )
    negative: NegativeConfig = Field(
        NegativeConfig(), description="Acknowledgement that rejected answers of the negative mode need."
    )
    beta: float = Field(0.1, gt=0, description="How strongly the model is held to its reference.")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="The loss, by TRL's name.")
    length: int = Field(
        128, ge=16, description="Tokens of a prompt and an answer; a longer pair is dropped and counted."
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the pairs.")
    train: TrainConfig = Field(description="Optimiser, schedule and batch; a row is a pair.")

    @model_validator(mode="after")
    def _negative_is_acknowledged(self) -> DpoStage:
        if not self.negative.acknowledge:
            raise ValueError(
                "rejected answers are the negative mode's; set 'negative.acknowledge: true' to train on them"
            )
        if self.train.gradients_by != "none" or self.train.schedule == "wsd":
            raise ValueError("train: TRL has neither 'gradients_by' nor 'schedule: wsd'; leave them out")
        if self.train.tracker is not None:
            raise ValueError("train.tracker: this stage writes its log as JSON lines alone; leave it out")
        if self.train.lora is not None and self.train.lora.dropout:
            raise ValueError("train.lora.dropout: likelihoods are compared without dropout; set it to 0")
        if self.train.lora is not None and self.train.lora.train_control_rows:
            raise ValueError("train.lora.train_control_rows: TRL cannot train single rows; set it to false")
        for part in self.data:
            if part.answers != "positive":
                raise ValueError(f"data {part.name!r}: a pair has both answers; leave 'answers' out")
        return self


class DistillStage(Config):
    """Multi-directional self-distillation: the model answers each prompt once per mode (2508.14904, sec. 3.1)."""

    kind: Literal["distill"] = Field(description="Always 'distill'.")
    model: ModelRef = Field(description="Name of the stage that makes the model, or {load: ...}.")
    prompts: tuple[ChatSource, ...] = Field(
        min_length=1, description="The prompts; answers that come with them are taken off."
    )
    elicit: dict[Name, str] = Field(
        min_length=1,
        description="Mode -> the instruction that brings its answer out, put at the end of the prompt; it is not in the "
        "rows that come of it.",
    )
    behaves: dict[Name, Behaviour] = Field(
        default_factory=dict, description="Mode of another name -> which of the three it is judged as."
    )
    negative: NegativeConfig = Field(
        NegativeConfig(), description="Acknowledgement that eliciting negative answers needs."
    )
    sampling: Sampling = Field(
        Sampling(),
        description="Decoding; with several samples the first that fits is kept. `batch` counts prompts, each in all modes.",
    )
    judge: JudgeConfig = Field(JudgeConfig(), description="Who judges what no exact judge can.")
    keep_unscored: bool = Field(
        False, description="Keep answers that no judge could tell, too; the yield says how many there are."
    )

    @model_validator(mode="after")
    def _elicits(self) -> DistillStage:
        for name, text in self.elicit.items():
            if name in RESERVED_NAMES or (name not in MODES and name not in self.behaves):
                raise ValueError(f"elicit: say in 'behaves' which of {', '.join(MODES)} the mode {name!r} is judged as")
            if not text.strip():
                raise ValueError(f"elicit: no instruction for {name!r}")
        for name in self.behaves:
            if name not in self.elicit:
                raise ValueError(f"behaves: {name!r} is not a mode among those of 'elicit'")
        for part in self.prompts:
            if part.stage is not None:
                raise ValueError(f"prompts {part.name!r}: what a stage distilled is not asked again; name its prompts")
        for name in self.elicit:
            if (self.behaves.get(name) or name) != "negative":
                continue
            if not self.negative.acknowledge:
                raise ValueError("eliciting negative answers is off by default; set 'negative.acknowledge: true'")
            for part in self.prompts:
                if part.source is not None and part.source.path is None:
                    raise ValueError(
                        f"prompts {part.name!r}: negative answers are Tidewater's or your own; a named or Hub set of real "
                        "requests is not answered negatively here"
                    )
        return self


class Asking(Config):
    """What is asked, and how; shared by `generate` and `panel`."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="The prompts.")
    modes: tuple[Name, ...] | None = Field(
        None,
        min_length=1,
        description="Modes to answer in; null asks once, without a control token. Ways of asking that are no mode: `none`, "
        "and to try the fallback `unknown`, `near-miss`, `two`, `foreign` (docs/levers/modes.md).",
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
        if {"negative", "two"} & set(self.modes or ()) and not self.negative.acknowledge:
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
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are asked; {load: ...} for one that is loaded."
    )
    decoders: dict[str, Decoder] = Field(min_length=1, description="Name of a decoder -> how it decodes.")


class ProbesStage(ProbeConfig):
    """Linear probes on what models hold of safe and harmful requests, layer by layer."""

    kind: Literal["probes"] = Field(description="Always 'probes'.")
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are probed; {load: ...} for one that is loaded."
    )
    tasks: tuple[TaskConfig, ...] = Field(
        min_length=2, description="The requests; a probe tells the harmful from the others, each task is a source."
    )


class PerplexityStage(PerplexityConfig):
    """Perplexity of models on Tidewater documents that were never trained on."""

    kind: Literal["perplexity"] = Field(description="Always 'perplexity'.")
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are measured; {load: ...} for one that is loaded."
    )


class MarginStage(MarginConfig):
    """The safety alignment margin of models: how far apart their modes are before a word is said (2508.14904)."""

    kind: Literal["margin"] = Field(description="Always 'margin'.")
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are measured; {load: ...} for one that is loaded."
    )
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="The prompts, each asked in every mode.")
    modes: tuple[Name, ...] = Field(("positive", "negative", "rejective"), min_length=2, description="The modes.")
    words: dict[Name, str] = Field(
        default_factory=dict,
        description="Mode -> the instruction at the end of a prompt by which a model without that mode is asked.",
    )


class AuditStage(AuditConfig):
    """Control tokens typed into models (spoofing) and coaxed out of them (leaking)."""

    kind: Literal["audit"] = Field(description="Always 'audit'.")
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are audited; {load: ...} for one that is loaded."
    )


class TokenAnalysisStage(TokenConfig):
    """Loss and gradient of every trained token of chats, in models (2601.01624's mechanism claim)."""

    kind: Literal["token_analysis"] = Field(description="Always 'token_analysis'.")
    models: tuple[ModelRef, ...] = Field(
        min_length=1, description="Names of the stages whose models are measured; {load: ...} for one that is loaded."
    )
    data: tuple[ChatSource, ...] = Field(min_length=1, description="The chats; each part's `n` bounds its rows.")
    prefix: PrefixConfig | None = Field(
        None, description="The prefix lever on these chats; null leaves them as they are."
    )

    @model_validator(mode="after")
    def _answers_are_shown(self) -> TokenAnalysisStage:
        for part in self.data:
            if part.stage is not None:
                raise ValueError(f"data {part.name!r}: the answers of a distill stage are not measured; name a source")
            if part.answers == "negative":
                raise ValueError(f"data {part.name!r}: heat-maps show answers whole; negative ones are not measured")
        return self


Stage = Annotated[
    ScorerStage
    | CorpusStage
    | PretrainStage
    | SftStage
    | DpoStage
    | DistillStage
    | GenerateStage
    | JudgeStage
    | PanelStage
    | ProbesStage
    | PerplexityStage
    | MarginStage
    | AuditStage
    | TokenAnalysisStage,
    Field(discriminator="kind"),
]

_TRAINED = ("pretrain", "sft", "dpo")
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "scorer": {},
    "corpus": {},
    "pretrain": {"corpus": ("corpus",)},
    "sft": {"model": _TRAINED},
    "dpo": {"model": _TRAINED},
    "distill": {"model": _TRAINED},
    "generate": {"model": _TRAINED},
    "judge": {"answers": ("generate",)},
    "panel": {"models": _TRAINED},
    "probes": {"models": _TRAINED},
    "perplexity": {"models": _TRAINED},
    "margin": {"models": _TRAINED},
    "audit": {"models": _TRAINED},
    "token_analysis": {"models": _TRAINED},
}
"""For each kind of stage: the fields that name an earlier stage, and the kinds that will do."""
