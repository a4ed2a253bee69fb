"""From a recipe to a plan: a DAG of steps, each named by the hash of its config, its code and its inputs.

Equal work is one step. Pretraining is cut wherever an arm's curriculum changes, so arms that read the same rows up to
some step share that trunk: a segment's identity holds only the part of the curriculum that it has seen. Torch-free, so
that planning and a rerun with nothing to do take a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from trimtab.analyze.config import PerplexityConfig, ProbeConfig, TokenConfig
from trimtab.corpus.config import INTERVENTIONS, ClassifierScorer, ModelWriter, TidewaterWriter, TruthScorer
from trimtab.data.sources import source_identity
from trimtab.errors import UserError
from trimtab.evaluate.attacks.choose import choose_attack
from trimtab.evaluate.panel import TaskConfig, at_most
from trimtab.levers.prefix import PrefixConfig
from trimtab.models.config import HARM_TAG, HARM_TAGS, BuildConfig, LoadConfig
from trimtab.models.load import identity
from trimtab.models.minilm import encoder_identity
from trimtab.models.shape import shape_of as model_shape
from trimtab.recipe.load import ArmRecipe
from trimtab.recipe.model import (
    Asking,
    ChatSource,
    CorpusStage,
    Decoder,
    GenerateStage,
    JudgeStage,
    ModelRef,
    PanelStage,
    PerplexityStage,
    PretrainStage,
    ProbesStage,
    Recipe,
    ScorerStage,
    SftStage,
    Stage,
    TokenAnalysisStage,
)
from trimtab.seeds import digest
from trimtab.study import estimate
from trimtab.study.curricula import Curriculum, Sizes, curriculum, cuts_of, total_steps, trunk_key
from trimtab.study.exposure import estimate_sizes
from trimtab.study.naming import name_of
from trimtab.study.stored import TOKENIZER, stored_sizes, stored_tokens, vocabulary
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


@dataclass(frozen=True)
class Step:
    """One piece of work. ``tokens`` are trained, or generated at most; ``flops`` follow from them."""

    id: str
    kind: str
    name: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    tokens: int
    flops: float
    shape: str

    @property
    def short(self) -> str:
        return f"{self.kind}-{self.id[:16]}"


@dataclass(frozen=True)
class Cell:
    """Where a stage stands in the grid of a panel (or in a row of it, for measurements without a decoder)."""

    stage: str
    model: str
    decoder: str | None = None


@dataclass(frozen=True)
class PlannedArm:
    """One arm at one seed: which step stands at the end of each of its stages, and all steps on the way."""

    id: str
    label: str
    group: str
    seed: int
    against: str | None
    settings: Mapping[str, Any]
    stages: Mapping[str, str]
    cells: Mapping[str, Cell]
    steps: tuple[str, ...]


@dataclass
class Plan:
    """Steps in an order in which each follows its inputs, the arms made of them, and their curricula."""

    recipe: Recipe
    steps: dict[str, Step] = field(default_factory=dict)
    arms: list[PlannedArm] = field(default_factory=list)
    curricula: dict[str, Curriculum] = field(default_factory=dict)

    def arms_of(self, step_id: str) -> list[PlannedArm]:
        return [arm for arm in self.arms if step_id in arm.steps]

    def unshared(self) -> list[Step]:
        """The steps as they would be trained if every arm did all of its own."""
        return [self.steps[step] for arm in self.arms for step in arm.steps]


def make_plan(recipe: Recipe, arms: Sequence[ArmRecipe]) -> Plan:
    """The plan of a recipe; ``UserError`` for a schedule that cannot be, before anything is done."""
    plan = Plan(recipe)
    cuts = cuts_of(arms)
    for arm in arms:
        for seed in recipe.seeds:
            builder = _ArmBuilder(plan, arm.recipe, _at_seed(arm.id, seed, recipe), seed, cuts)
            for name in arm.stages:
                builder.add(name, arm.recipe.stages[name])
            plan.arms.append(
                PlannedArm(
                    id=_at_seed(arm.id, seed, recipe),
                    label=arm.label,
                    group=arm.group,
                    seed=seed,
                    against=_at_seed(arm.against, seed, recipe) if arm.against else None,
                    settings=arm.settings,
                    stages=builder.ends,
                    cells=builder.cells,
                    steps=tuple(dict.fromkeys(builder.used)),
                )
            )
    for one in plan.curricula.values():
        one.check(one.sizes)
    return plan


def _at_seed(arm: str, seed: int, recipe: Recipe) -> str:
    return arm if len(recipe.seeds) == 1 else f"{arm}@{seed}"


class _ArmBuilder:
    """Walks one arm's stages and adds their steps to the plan (an equal step that is there already is used again)."""

    def __init__(self, plan: Plan, recipe: Recipe, arm: str, seed: int, cuts: Mapping[str, set[int]]) -> None:
        self.plan, self.recipe, self.arm, self.seed, self.cuts = plan, recipe, arm, seed, cuts
        self.ends: dict[str, str] = {}
        self.cells: dict[str, Cell] = {}
        self.used: list[str] = []
        self.tokenizers: dict[str, str] = {}
        self.pretrained: set[str] = set()
        self.spelt: dict[str, str | None] = {}  # stage -> where its tokenizer is, if it is there already
        self.shapes: dict[str, BuildConfig | LoadConfig] = {}
        self.openings: dict[str, PrefixConfig | None] = {}  # stage -> the prefix lever of the model that it makes

    def add(self, name: str, stage: Stage) -> None:
        match stage:
            case ScorerStage():
                end = self.scorer(name, stage)
            case CorpusStage():
                end = self.corpus(name, stage)
            case PretrainStage():
                end = self.pretrain(name, stage)
            case SftStage():
                end = self.sft(name, stage)
            case GenerateStage():
                end = self.generate(name, stage)
            case JudgeStage():
                end = self.judge(name, stage, self.end_of(name, stage.answers))
            case PanelStage() | ProbesStage() | PerplexityStage() | TokenAnalysisStage():
                return self.grid(name, stage)
        self.ends[name] = end

    def grid(self, name: str, stage: PanelStage | ProbesStage | PerplexityStage | TokenAnalysisStage) -> None:
        """The steps of a stage that looks at several models: one per model, or per model and decoder."""
        for model in stage.models:
            self.end_of(name, model)
            if isinstance(stage, PanelStage):
                for decoder, how in stage.decoders.items():
                    place = f"{name}/{model}/{decoder}"
                    answers = self.answers(place, _asked(stage, model, how), f"stages.{name}.tasks")
                    self.ends[f"{place} answers"] = answers
                    self.ends[place] = self.judge(place, stage, answers)
                    self.cells[place] = Cell(name, model, decoder)
            else:
                measures = {"probes": self.probes, "perplexity": self.perplexity, "token_analysis": self.tokens_of}
                place = f"{name}/{model}"
                self.ends[place] = measures[stage.kind](place, name, model, stage)  # type: ignore[operator]
                self.cells[place] = Cell(name, model)

    def judge(self, name: str, stage: JudgeStage | PanelStage, answers: str) -> str:
        config = {"judge": stage.judge.plain(), "max_unscored": stage.max_unscored}
        return self.step("judge", name, config, {"answers": answers})

    def probes(self, place: str, name: str, model: str, stage: ProbesStage) -> str:
        config = {key: getattr(stage, key) for key in ProbeConfig.model_fields} | {
            "tasks": self.rows(f"stages.{name}.tasks", stage.tasks, "eval"),
            "world": self.recipe.world.plain(),
            "prompting": self.prompting("auto", model),
            "seed": self.seed,
        }
        return self.step("probes", place, config, {"model": self.end_of(name, model)})

    def perplexity(self, place: str, name: str, model: str, stage: PerplexityStage) -> str:
        config = {key: getattr(stage, key) for key in PerplexityConfig.model_fields} | {
            "world": self.recipe.world.plain(),
            "seed": self.seed,
        }
        return self.step("perplexity", place, config, {"model": self.end_of(name, model)})

    def tokens_of(self, place: str, name: str, model: str, stage: TokenAnalysisStage) -> str:
        config = {key: getattr(stage, key) for key in TokenConfig.model_fields} | {
            "measures": list(stage.measures),
            "data": self.rows(f"stages.{name}.data", stage.data, "train"),
            "prefix": stage.prefix.plain() if stage.prefix is not None else None,
            "world": self.recipe.world.plain(),
            "seed": self.seed,
        }
        return self.step("token_analysis", place, config, {"model": self.end_of(name, model)})

    def prompting(self, wanted: str, model: ModelRef) -> str:
        """``auto`` resolved: a model that was only pretrained knows no chat template."""
        if wanted != "auto":
            return wanted
        return "completion" if isinstance(model, str) and model in self.pretrained else "chat"

    def scorer(self, name: str, stage: ScorerStage) -> str:
        config = {"config": {k: v for k, v in stage.plain().items() if k != "kind"}}
        content = [source_identity(part.source) for part in stage.data]
        models = {"models": [_named(f"stages.{name}.base", stage.base, stage.revision)]}
        return self.step("scorer", name, config | {"content": content} | models, {})

    def corpus(self, name: str, stage: CorpusStage) -> str:
        plain = {k: v for k, v in stage.plain().items() if k not in ("kind", "executor")}
        content = [source_identity(source) for source in (*stage.documents, *stage.ready.values())]
        inputs, models = {}, []
        for number, scorer in enumerate(stage.score):
            if isinstance(scorer, ClassifierScorer) and scorer.stage is not None:
                inputs[f"scorer:{scorer.stage}"] = self.end_of(name, scorer.stage)
            elif isinstance(scorer, ClassifierScorer):
                models.append(_named(f"stages.{name}.score.{number}.model", scorer.model or "", scorer.revision))
        config: dict[str, Any] = {"config": plain | {"content": content}, "executor": stage.executor.plain()}
        if isinstance(stage.write, ModelWriter):
            models.append(_named(f"stages.{name}.write.load", stage.write.load, stage.write.revision))
        if models:
            config["models"] = models
        if _needs_town(stage):
            config["world"] = self.recipe.world.plain()
        return self.step("corpus", name, config, inputs)

    def end_of(self, name: str, needed: str) -> str:
        if needed not in self.ends:
            raise UserError(f"stage {name!r} needs stage {needed!r}: list it in the arm group's 'stages' too")
        return self.ends[needed]

    def pretrain(self, name: str, stage: PretrainStage) -> str:
        length, per_step, total = stage.length, stage.train.rows_per_step, total_steps(name, stage)
        plan = curriculum(name, stage, total * per_step)
        made, text, tokenizer, tokens = self.text(name, stage)
        self.plan.curricula.setdefault(
            digest([name, stage.timing.plain(), total * per_step, text]),
            Curriculum(name, stage.timing, total * per_step, length, tokens, self.sizes(stage), []),
        ).arms.append(self.arm)
        points = sorted(self.cuts[trunk_key(self.recipe, stage)] | {0, total})
        previous: str | None = None
        for first, last in itertools.pairwise(points):
            seen = [[row, weights] for row, weights in plan if row < last * per_step]
            share = f"{100 * first / total:.3g}-{100 * last / total:.3g} %"
            trained = (last - first) * per_step * length
            inputs = text | ({"previous": previous} if previous else {})
            previous = self.step(
                "pretrain",
                f"{name} {share}",
                {
                    "model": stage.model.plain(),
                    "length": length,
                    "train": stage.train.plain(),
                    "phases": seen,
                    "from": first,
                    "to": last,
                    "total_steps": total,
                    "seed": self.seed,
                }
                | made,
                inputs,
                tokens=trained,
                flops=trained * estimate.train_flops(stage.model, length),
                shape=estimate.shape_of(stage.model, stage.train.lora is not None),
            )
        assert previous is not None
        self.tokenizers[name], self.shapes[name] = tokenizer, stage.model
        self.pretrained.add(name)
        self.spelt[name] = str(Path(stage.tokens) / TOKENIZER) if stage.tokens is not None else None
        return previous

    def text(self, name: str, stage: PretrainStage) -> tuple[dict[str, Any], dict[str, str], str, str | None]:
        """What a pretraining reads: (part of its config, inputs, tokenizer's step, tokens' step if there is one)."""
        if stage.tokens is not None:
            store = stored_tokens(f"stages.{name}", stage)
            tokenizer = self.step("tokenizer", name, {"store": store}, {})
            return {"store": store}, {"tokenizer": tokenizer}, tokenizer, None
        assert stage.corpus is not None
        corpus = self.end_of(name, stage.corpus)
        if stage.tokenizer is not None:
            known = vocabulary(stage.tokenizer.load)
            if known is not None and (size := known.size + (HARM_TAG not in known.added)) > stage.model.vocab:
                raise UserError(
                    f"stages.{name}.model.vocab: {stage.model.vocab}, but the tokenizer has {size} tokens, the harmfulness tag "
                    "among them; raise it"
                )
            ref = {"load": stage.tokenizer.plain(), "identity": identity(stage.tokenizer)}
            tokenizer = self.step("tokenizer", name, ref, {})
        else:
            tokenizer = self.step("tokenizer", name, {"vocab": stage.model.vocab}, {"corpus": corpus})
        config = {"length": stage.length, "seed": 0}
        tokens = self.step("tokens", name, config, {"corpus": corpus, "tokenizer": tokenizer})
        return {}, {"tokens": tokens, "tokenizer": tokenizer}, tokenizer, tokens

    def sizes(self, stage: PretrainStage) -> Sizes:
        """How many tokens each source has, as far as it is known before they are counted."""
        if stage.tokens is not None:
            return Sizes(stored_sizes(Path(stage.tokens)), exact=True)
        assert stage.corpus is not None
        corpus = self.recipe.stages[stage.corpus]
        assert isinstance(corpus, CorpusStage)
        there = _sources(corpus)
        if stage.sizes or corpus.documents or corpus.ready:
            return Sizes(stage.sizes, exact=False, unknown=there)
        found = estimate_sizes(self.recipe.world, corpus.tag)
        return Sizes({name: size for name, size in found.items() if name in there}, exact=False)

    def sft(self, name: str, stage: SftStage) -> str:
        model_config, model_inputs = self.model(name, stage.model)
        limit = model_shape(self.shape(stage.model))
        if limit is not None and stage.length > limit.context:
            raise UserError(
                f"stages.{name}.length: {stage.length} tokens are more than the model's context of {limit.context}"
            )
        chats_inputs = model_inputs
        if isinstance(stage.model, str) and stage.model in self.tokenizers:
            chats_inputs = {"tokenizer": self.tokenizers[stage.model]}
            if stage.modes is None:  # no token is added: what is tuned next has this tokenizer still
                self.tokenizers[name] = self.tokenizers[stage.model]
        chats_config = {
            "world": self.recipe.world.plain(),
            "data": self.rows(f"stages.{name}.data", stage.data, "train"),
            "prefix": stage.prefix.written() if stage.prefix else None,
            "modes": stage.modes.plain() if stage.modes else None,
            "length": stage.length,
            "seed": self.seed,
        }
        chats = self.step("chats", name, chats_config | model_config, chats_inputs)
        chosen = {"prefix": stage.prefix.chosen() if stage.prefix else None}
        packed = self.step("packed", name, chosen, {"chats": chats})
        self.openings[name] = stage.prefix or (self.openings.get(stage.model) if isinstance(stage.model, str) else None)
        shape = self.shape(stage.model)
        tokens = round(estimate.chat_tokens(stage) * stage.epochs)
        self.shapes[name] = shape
        self.spelt[name] = self.spelling(stage.model)
        return self.step(
            "sft",
            name,
            {"train": stage.train.plain(), "epochs": stage.epochs, "seed": self.seed} | model_config,
            model_inputs | {"packed": packed},
            tokens=tokens,
            flops=tokens * estimate.train_flops(shape, stage.length),
            shape=estimate.shape_of(shape, stage.train.lora is not None),
        )

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

    def rows(
        self, path: str, parts: Sequence[ChatSource | TaskConfig], split: Literal["train", "eval"]
    ) -> list[dict[str, Any]]:
        """Parts of a data set or a panel as config, with the identity of what files and packages hold; ``UserError``
        that names the part, if the town has fewer requests than it asks for."""
        plain = []
        for number, part in enumerate(parts):
            if part.tidewater is not None:
                try:
                    _there(self.recipe.world, part.tidewater, part.n or 1, split)
                except UserError as error:
                    raise UserError(f"{path}.{number}: {error}") from None
            content = {"content": source_identity(part.source)} if part.source else {}
            plain.append(part.plain() | content)
        return plain

    def model(self, name: str, ref: ModelRef) -> tuple[dict[str, Any], dict[str, str]]:
        """How a step's config and inputs name the model it starts from."""
        if isinstance(ref, str):
            return {}, {"model": self.end_of(name, ref)}
        return {"load": ref.plain(), "identity": identity(ref)}, {}

    def spelling(self, ref: ModelRef) -> str | None:
        """Where a model's tokenizer is loaded from; None for one that is made in the study."""
        return self.spelt[ref] if isinstance(ref, str) else ref.load

    def shape(self, ref: ModelRef) -> BuildConfig | LoadConfig:
        return self.shapes[ref] if isinstance(ref, str) else ref

    def step(
        self,
        kind: str,
        name: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        *,
        tokens: int = 0,
        flops: float = 0.0,
        shape: str = "",
    ) -> str:
        id = name_of(kind, config, inputs)
        self.plan.steps.setdefault(id, Step(id, kind, name, config, inputs, tokens, flops, shape))
        self.used.append(id)
        return id


def _asked(stage: PanelStage, model: str, how: Decoder) -> GenerateStage:
    """What one model is asked by one decoder of a panel."""
    asked = {field: getattr(stage, field) for field in Asking.model_fields}
    asked["tasks"] = tuple(at_most(task, how.limit) for task in stage.tasks)
    return GenerateStage(kind="generate", model=model, sampling=how.sampling, **asked)


def _needs_town(stage: CorpusStage) -> bool:
    """Whether a corpus is made of Tidewater, in its documents, its scores or its writer."""
    town = (TruthScorer, TidewaterWriter)
    return not stage.documents or any(isinstance(part, town) for part in (*stage.score, stage.write))


def _sources(stage: CorpusStage) -> tuple[str, ...]:
    """The sources that a corpus may have, by its settings alone."""
    written = (kind for kind in INTERVENTIONS if stage.write is not None or kind in stage.ready)
    return ("clean", "unsafe", *(("tagged",) if stage.tag else ()), *written)


def _named(path: str, load: str, revision: str | None) -> dict[str, str | None]:
    """A model that a corpus or a scorer names itself, with the hash of what a directory holds; ``UserError`` names the field."""
    try:
        return {"load": load, "revision": revision, "identity": encoder_identity(load, revision)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@cache
def _town(world: TidewaterConfig) -> Tidewater:
    return Tidewater(world)


@cache
def _there(world: TidewaterConfig, kind: str, n: int, split: Literal["train", "eval"]) -> None:
    """``UserError`` if the town has no ``n`` requests of a kind; asked once however many arms ask."""
    _town(world).requests(kind, n, split=split)
