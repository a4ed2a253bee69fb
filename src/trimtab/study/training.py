"""The steps of the stages that make corpora, train models or have them write data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.corpus.config import INTERVENTIONS, ClassifierScorer, ModelWriter, TidewaterWriter, TruthScorer
from trimtab.data.sources import source_identity
from trimtab.errors import UserError
from trimtab.models.config import HARM_TAG
from trimtab.models.load import identity
from trimtab.models.minilm import encoder_identity
from trimtab.models.shape import shape_of as model_shape
from trimtab.recipe.stages import (
    ChatSource,
    CorpusStage,
    DistillStage,
    DpoStage,
    ModelRef,
    PretrainStage,
    ScorerStage,
    SftStage,
)
from trimtab.seeds import digest
from trimtab.study import estimate
from trimtab.study.building import Building
from trimtab.study.curricula import Curriculum, Sizes, curriculum, total_steps, trunk_key
from trimtab.study.exposure import estimate_sizes
from trimtab.study.stored import TOKENIZER, stored_sizes, stored_tokens, vocabulary


class Training(Building):
    """Stages ``scorer``, ``corpus``, ``pretrain``, ``sft``, ``dpo`` and ``distill``."""

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
        self.fits(name, stage.model, stage.length)
        chats_inputs = model_inputs
        if isinstance(stage.model, str) and stage.model in self.tokenizers:
            chats_inputs = {"tokenizer": self.tokenizers[stage.model]}
            if stage.modes is None:  # no token is added: what is tuned next has this tokenizer still
                self.tokenizers[name] = self.tokenizers[stage.model]
        modes = stage.modes
        chats_config = {
            "world": self.recipe.world.plain(),
            "data": self.rows(f"stages.{name}.data", stage.data, "train"),
            "prefix": stage.prefix.written() if stage.prefix else None,
            "modes": modes.plain() if modes else None,
            "length": stage.length,
            "seed": self.seed,
        } | model_config
        chats_inputs = chats_inputs | self.distilled(name, stage.data)
        chosen = {"prefix": stage.prefix.chosen() if stage.prefix else None}

        def packed(names: Sequence[str] | None) -> str:
            chats = self.step(
                "chats", name, {**chats_config, "names": None if names is None else list(names)}, chats_inputs
            )
            return self.step("packed", name, chosen, {"chats": chats})

        self.openings[name] = stage.prefix or (self.openings.get(stage.model) if isinstance(stage.model, str) else None)
        shape = self.shape(stage.model)
        tokens = round(estimate.chat_tokens(stage, len(modes.inside) if modes else 0) * stage.epochs)
        self.shapes[name] = shape
        self.spelt[name] = self.spelling(stage.model)
        tuned = self.step(
            "sft",
            name,
            {"train": stage.train.plain(), "epochs": stage.epochs, "seed": self.seed} | model_config,
            model_inputs | {"packed": packed(modes.inside if modes else None)},
            tokens=tokens,
            flops=tokens * estimate.train_flops(shape, stage.length),
            shape=estimate.shape_of(shape, stage.train.lora is not None),
        )
        if modes is None or not modes.separate:
            return tuned
        epochs = stage.adapter.epochs or stage.epochs
        tokens = round(estimate.chat_tokens(stage, 1) * epochs)
        train = stage.train.model_copy(update={"lora": stage.adapter.lora, "lr": stage.adapter.lr or stage.train.lr})
        for mode in modes.separate:  # one adapter each, so that each can be left out alone
            tuned = self.step(
                "adapter",
                name,
                {"train": train.plain(), "epochs": epochs, "seed": self.seed, "modes": [mode]},
                {"model": tuned, "packed": packed([mode])},
                tokens=tokens,
                flops=tokens * estimate.train_flops(shape, stage.length),
                shape=estimate.shape_of(shape, True),
            )
        return tuned

    def dpo(self, name: str, stage: DpoStage) -> str:
        model_config, inputs = self.model(name, stage.model)
        self.fits(name, stage.model, stage.length)
        if isinstance(stage.model, str) and stage.model in self.tokenizers:
            self.tokenizers[name] = self.tokenizers[stage.model]
        shape = self.shape(stage.model)
        self.shapes[name], self.spelt[name] = shape, self.spelling(stage.model)
        self.openings[name] = self.openings.get(stage.model) if isinstance(stage.model, str) else None
        once = 2 * estimate.parts_tokens(stage.data, isinstance(stage.model, str))
        tokens = round(once * stage.epochs)
        # The reference reads every pair, once.
        read = min(once, tokens) * estimate.generate_flops(shape, stage.length / 2)
        config = {
            "world": self.recipe.world.plain(),
            "data": self.rows(f"stages.{name}.data", stage.data, "train"),
            **{key: getattr(stage, key) for key in ("beta", "loss", "length", "epochs")},
            "train": stage.train.plain(),
            "seed": self.seed,
        }
        return self.step(
            "dpo",
            name,
            config | model_config,
            inputs | self.distilled(name, stage.data),
            tokens=tokens,
            flops=tokens * estimate.train_flops(shape, stage.length) + read,
            shape=estimate.shape_of(shape, stage.train.lora is not None),
        )

    def distill(self, name: str, stage: DistillStage) -> str:
        model_config, inputs = self.model(name, stage.model)
        shape = self.shape(stage.model)
        prompts = sum(estimate.rows_of(part) for part in stage.prompts)
        tokens = prompts * len(stage.elicit) * stage.sampling.samples * stage.sampling.max_new_tokens
        config = {
            "world": self.recipe.world.plain(),
            "prompts": self.rows(f"stages.{name}.prompts", stage.prompts, "train"),
            "elicit": dict(stage.elicit),
            "behaves": dict(stage.behaves),
            "sampling": stage.sampling.plain(),
            "judge": stage.judge.plain(),
            "keep_unscored": stage.keep_unscored,
            "prompting": self.prompting("auto", stage.model),
            "seed": self.seed,
        }
        return self.step(
            "distill", name, config | model_config, inputs, tokens=tokens, flops=tokens * estimate.generate_flops(shape),
            shape=estimate.shape_of(shape, False),
        )  # fmt: skip

    def distilled(self, name: str, parts: Sequence[ChatSource]) -> dict[str, str]:
        """The distill steps that parts of a data set come from, as inputs."""
        return {f"distill:{part.stage}": self.end_of(name, part.stage) for part in parts if part.stage is not None}

    def fits(self, name: str, model: ModelRef, length: int) -> None:
        limit = model_shape(self.shape(model))
        if limit is not None and length > limit.context:
            raise UserError(
                f"stages.{name}.length: {length} tokens are more than the model's context of {limit.context}"
            )


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
