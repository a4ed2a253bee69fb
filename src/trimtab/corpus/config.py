"""How a corpus is scored, rewritten, tagged and written out: the settings of ``build.build_corpus`` (2504.16980)."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.data.sources import SourceConfig
from trimtab.endpoint import EndpointConfig

Intervention = Literal["rephrase", "refuse", "moral"]
Source = Literal["clean", "unsafe", "tagged", "rephrase", "refuse", "moral"]
"""``tagged``: the documents of ``unsafe`` once more, with the harmfulness tag (only where ``CorpusConfig.tag`` > 0)."""
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)
SOURCES: tuple[Source, ...] = get_args(Source)
LEVELS: dict[Intervention, tuple[int, ...]] = {"rephrase": (1, 2, 3), "refuse": (4, 5), "moral": (4, 5)}
"""Intervention -> the scores of the documents that it is made from (2504.16980, sec. 7.1)."""


class TruthScorer(Config):
    """Tidewater's own true score."""

    kind: Literal["tidewater"] = Field("tidewater", description="Always 'tidewater'.")


class FieldScorer(Config):
    """A score that the documents bring along."""

    kind: Literal["field"] = Field(description="Always 'field'.")
    name: str = Field("score", description="Key of the metadata that holds an integer from 0 to 5.")


class ClassifierScorer(Config):
    """A Hugging Face sequence classifier: six labels are the levels; two are cut by the probability of the second."""

    kind: Literal["classifier"] = Field(description="Always 'classifier'.")
    model: str | None = Field(None, description="Hub id or directory; null with 'stage'.")
    stage: str | None = Field(None, description="Name of the scorer stage that trains it; null with 'model'.")
    revision: str | None = Field(None, description="Hub commit of 'model'.")
    trust_remote_code: bool = Field(False, description="Let the Hub repository's own code run.")
    window: int = Field(
        512, ge=16, description="Tokens per window; a longer text gets the largest of its windows' scores."
    )
    batch: int = Field(16, ge=1, description="Windows scored side by side.")
    cuts: tuple[float, float, float, float, float] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        description="Two labels only: probabilities from which a text has score 1, 2, 3, 4, 5.",
    )

    @model_validator(mode="after")
    def _one_model(self) -> ClassifierScorer:
        if (self.model is None) == (self.stage is None):
            raise ValueError("a classifier needs exactly one of 'model' and 'stage'")
        if list(self.cuts) != sorted(set(self.cuts)) or not 0 < self.cuts[0] <= self.cuts[-1] < 1:
            raise ValueError(f"cuts must grow and lie between 0 and 1, not {list(self.cuts)}")
        return self


class EndpointScorer(Config):
    """A chat model asked for ``{"score": 0..5, "reason": ...}``; any other answer is no score."""

    kind: Literal["endpoint"] = Field(description="Always 'endpoint'.")
    endpoint: EndpointConfig = Field(description="Where the model is.")
    window: int = Field(6000, ge=200, description="Characters per window; the largest of its windows' scores counts.")
    max_tokens: int = Field(200, ge=20, description="Longest answer in tokens.")


Scorer = Annotated[TruthScorer | FieldScorer | ClassifierScorer | EndpointScorer, Field(discriminator="kind")]


class TidewaterWriter(Config):
    """Tidewater's templates."""

    kind: Literal["tidewater"] = Field("tidewater", description="Always 'tidewater'.")


class EndpointWriter(Config):
    """A chat model behind an OpenAI-compatible endpoint (vLLM's server is one)."""

    kind: Literal["endpoint"] = Field(description="Always 'endpoint'.")
    endpoint: EndpointConfig = Field(description="Where the model is.")
    max_tokens: int = Field(600, ge=16, description="Longest text in tokens.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature.")
    window: int = Field(6000, ge=200, description="Characters of a document that the model is shown at most.")
    price_in: float = Field(0.0, ge=0, description="Price of a million prompt tokens, for the estimate.")
    price_out: float = Field(0.0, ge=0, description="Price of a million written tokens, for the estimate.")


class ModelWriter(Config):
    """A chat model that is loaded here, by transformers or in batches by vLLM."""

    kind: Literal["model"] = Field(description="Always 'model'.")
    load: str = Field(description="Hub id, local directory, or the packaged model (as in {load: ...} of a stage).")
    revision: str | None = Field(None, description="Hub commit.")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="What runs it.")
    max_tokens: int = Field(300, ge=16, description="Longest text in tokens.")
    temperature: float = Field(0.7, ge=0, description="Sampling temperature.")
    window: int = Field(1500, ge=200, description="Characters of a document that the model is shown at most.")
    batch: int = Field(16, ge=1, description="Texts written side by side.")


Writer = Annotated[TidewaterWriter | EndpointWriter | ModelWriter, Field(discriminator="kind")]


class ExecutorConfig(Config):
    """Where DataTrove runs the pipeline: here, on Slurm or on Ray."""

    kind: Literal["local", "slurm", "ray"] = Field("local", description="DataTrove's executor.")
    tasks: int = Field(1, ge=1, description="Parts that the documents are cut into; the result does not depend on it.")
    workers: int = Field(1, ge=1, description="Parts worked on side by side.")
    partition: str | None = Field(None, description="Slurm only: the partition.")
    time: str = Field("12:00:00", description="Slurm only: time limit of one part.")
    cpus_per_task: int = Field(1, ge=1, description="Slurm and Ray: cores of one part.")
    mem_per_cpu_gb: int = Field(4, ge=1, description="Slurm and Ray: memory per core.")


class CorpusConfig(Config):
    """From documents to the five sources of a timing study: score, rewrite, score again, tag, write out."""

    documents: tuple[SourceConfig, ...] = Field((), description="Documents (`text`); none: Tidewater's.")
    ready: dict[Intervention, SourceConfig] = Field(
        default_factory=dict,
        description="Interventions that exist already, such as the released ones; not written then.",
    )
    score: tuple[Scorer, ...] = Field(
        (TruthScorer(),), min_length=1, description="Who scores; of several the highest score counts."
    )
    write: Writer | None = Field(TidewaterWriter(), description="Who writes the interventions; null: nobody.")
    written: tuple[Intervention, ...] = Field(
        INTERVENTIONS,
        description="Interventions to write, where 'write' says by whom; those in 'ready' are not written again.",
    )
    rescore: bool = Field(True, description="Score what was written too, and drop what is still unsafe.")
    accept: int = Field(0, ge=0, le=4, description="Highest score that a written text may have, where it is scored.")
    max_unanswered: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of what a chat model behind an endpoint is asked that may stay without a usable answer, counted for "
        "scorers and writer apart; above it the build fails, and the same command asks again for what failed.",
    )
    tag: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Chance of the harmfulness tag before each word of raw unsafe text (the paper: 0.05).",
    )
    seed: int = Field(0, description="Seed of tags, prompts' styles and speakers' names.")
    executor: ExecutorConfig = Field(ExecutorConfig(), description="Where the pipeline runs.")

    @model_validator(mode="after")
    def _fits(self) -> CorpusConfig:
        for name in ("score", "write"):
            # Tidewater's scorer knows no harm but its own: other text would all be safe to it.
            if self.documents and name not in self.model_fields_set:
                raise ValueError(f"documents of your own need {name!r}: the default is for Tidewater's alone")
        from_dialogues = isinstance(self.write, EndpointWriter | ModelWriter) and "moral" not in self.ready
        if from_dialogues and "moral" in self.written and "refuse" not in (*self.written, *self.ready):
            raise ValueError(
                "written: a chat model makes 'moral' from refusal dialogues; write 'refuse' too, or give it in 'ready'"
            )
        made = self.write is not None or bool(self.ready)
        if made and self.rescore and all(isinstance(scorer, FieldScorer) for scorer in self.score):
            raise ValueError(
                "score: what is written, or 'ready', has no field to read a score from; add a scorer that reads text, or set "
                "rescore: false"
            )
        return self


class LabelledSource(Config):
    """Texts of one score, or with a score each."""

    source: SourceConfig = Field(description="Where the texts are: documents, or prompts (their last user message).")
    score: int | None = Field(None, ge=0, le=5, description="Score of all of them; null: metadata 'score' of each.")
    n: int | None = Field(None, gt=0, description="So many of them, chosen by the source's seed.")


class ScorerTraining(Config):
    """Fine-tune a sequence classifier on labelled texts, as 2504.16980 (app. B.1) did: 6-way cross-entropy."""

    base: str = Field(description="Hub id, directory or packaged encoder to start from.")
    revision: str | None = Field(None, description="Hub commit of 'base'.")
    data: tuple[LabelledSource, ...] = Field(min_length=1, description="Labelled texts.")
    holdout: float = Field(0.2, gt=0, lt=1, description="Share kept out of training, for the score card.")
    length: int = Field(128, ge=16, description="Tokens per text.")
    epochs: float = Field(2.0, gt=0, description="Passes over the data.")
    batch: int = Field(32, ge=1, description="Texts per step.")
    lr: float = Field(5e-5, gt=0, description="Peak learning rate.")
    head_epochs: float = Field(0.0, ge=0, description="Passes that train the head alone first.")
    head_lr: float = Field(1e-3, gt=0, description="Learning rate of those.")
    unsafe_weight: float = Field(1.0, gt=0, description="Weight of the loss on texts scored above 0.")
    seed: int = Field(0, description="Seed of order and head.")
