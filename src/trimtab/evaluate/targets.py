"""What is evaluated: a model that is loaded here (or, in ``remote``, one behind an OpenAI-compatible endpoint).

A target turns (row, mode, sample) into an answer under a key: the hash of the model's identity, the mode, the rendered
ids, the sampling, the seed and the sample's number. Equal keys mean equal answers, so work that is done is recognised
wherever it lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import UserError
from trimtab.evaluate.attacks.base import AttackContext, clip_tokens
from trimtab.evaluate.completion import TEMPLATE, answer_of, dialogue
from trimtab.evaluate.conditions import Conditions, Told
from trimtab.generate.config import Sampling
from trimtab.levers.modes import CONDITIONS, Slot, Switch
from trimtab.models.config import NAMED, LoadConfig
from trimtab.seeds import digest, seed_of
from trimtab.types import Generation, Row
from trimtab.world.tidewater import Tidewater

if TYPE_CHECKING:
    import numpy as np

    from trimtab.data.render import Renderer

EngineName = Literal["transformers", "vllm"]
Prompting = Literal["chat", "completion"]
"""How a local model is asked: through its chat template, or by a plain-text dialogue to go on with (``completion``)."""
NO_MODE = "none"
"""How the command line and recipes write: asked without a control token, although the model has modes."""
BLOCKED, TOO_LONG, FILTERED, REJECTED = "blocked", "too-long", "filtered", "rejected"
"""Ways for ``Generation.finish`` to say that nothing was generated: the renderer refused a prompt that would have become
structure; it does not fit the model's context; the endpoint's own filter held the answer back; the endpoint would not take
the attempt (it is too long for the model there, or of a form that its API does not know)."""
Progress = Callable[[int, int, int], None]


@dataclass
class Asked:
    """One prompt in one mode, made ready. ``ready`` is what the target asks with; ``ending`` is set where nothing can be
    generated (``BLOCKED``, ``TOO_LONG``), with the reason in ``why``."""

    key: str
    row: Row
    mode: str | None
    seed: int
    ready: Any = None
    ending: str | None = None
    why: str = ""

    def answer_key(self, sample: int) -> str:
        """``Generation.key`` of one sample."""
        return digest([self.key, sample])


class Target(ABC):
    """A model that answers.

    identity  hash of what decides, beside prompt and sampling, which answer comes
    facts     what a header says of the model: JSON-ready, without paths that differ between machines
    """

    name: str
    identity: str
    facts: Mapping[str, Any]

    @abstractmethod
    def modes(self, wanted: Sequence[str] | None) -> tuple[str | None, ...]:
        """The modes to ask in; ``UserError`` names one that the model lacks. None: as the model is served by default."""

    @abstractmethod
    def ask(self, row: Row, mode: str | None, sampling: Sampling, seed: int) -> Asked:
        """Make a prompt ready. ``UserError`` for a plain prompt that cannot be asked; an attempt is ``ending`` instead."""

    @abstractmethod
    def answer(
        self, asked: Sequence[Asked], sampling: Sampling, done: Collection[str], progress: Progress | None = None
    ) -> Iterator[list[Generation]]:
        """Every sample of every prompt but those whose key is in ``done``, some at a time."""

    def context(self, world: Tidewater | None, seed: int, mode: str | None) -> AttackContext:
        """What attacks may know."""
        return AttackContext(world=world, seed=seed)

    def close(self) -> None:  # noqa: B027  (most targets hold nothing)
        """Let go of connections."""

    def _key(self, row: Row, mode: str | None, shown: Any, sampling: Sampling, seed: int) -> Asked:
        own = seed_of("answer", seed, row.id)
        decides = {k: v for k, v in sampling.plain().items() if k not in ("samples", "batch")}
        return Asked(digest([self.identity, mode, shown, decides, own]), row, mode, own)

    def _unanswered(self, asked: Asked, sampling: Sampling, sample: int, finish: str) -> Generation:
        return self._generation(asked, sampling, sample, (), "", finish)

    def _generation(
        self, asked: Asked, sampling: Sampling, sample: int, ids: tuple[int, ...], text: str, finish: str
    ) -> Generation:
        return Generation(
            key=asked.answer_key(sample), row_id=asked.row.id, row_hash=asked.row.hash(), model=self.identity,
            mode=asked.mode, sampling=sampling.plain(), seed=asked.seed, sample=sample, ids=ids, text=text, finish=finish,
        )  # fmt: skip


@dataclass(frozen=True)
class WhiteBox:
    """What a search with gradients needs: the model, its tokenizer and renderer, and the controls that are live."""

    model: Any
    tokenizer: Any
    renderer: Renderer
    controls: tuple[str, ...] = ()
    controls_at: Slot = "system"


@dataclass(frozen=True)
class Served:
    """A ``WhiteBox`` that no search can use, because of ``why``; the tokens are known."""

    tokenizer: Any
    renderer: Renderer
    controls: tuple[str, ...] = ()
    controls_at: Slot = "system"
    why: str = "needs the engine 'transformers'; vLLM gives none"

    @property
    def model(self) -> Any:
        raise UserError(f"attacks: a search with the model's gradients {self.why}")


class LocalTarget(Target):
    """A model in this process.

    model        with the engine ``vllm``, its outline is enough: vLLM loads the weights itself
    switch       how its modes are told, as a bundle's manifest has it; None: by the controls of its tokenizer
    adapters     mode -> the adapter that its answers need (``models.bundle.adapters_of``)
    where        for the engine ``vllm``: a directory, or a Hub id with its ``revision``
    prompting    ``completion`` asks a model that was only pretrained, by a plain-text dialogue (``evaluate.completion``);
                 its tokenizer needs no chat template, and there are no modes then
    world        whose people speak in the dialogues of its own requests; without it "User" and "Assistant" do
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        identity: str,
        switch: Switch | None = None,
        adapters: Mapping[str, Path] | None = None,
        default_mode: str | None = None,
        engine: EngineName = "transformers",
        where: str | Path | None = None,
        revision: str | None = None,
        prompting: Prompting = "chat",
        world: Tidewater | None = None,
    ) -> None:
        from trimtab.data.render import Renderer
        from trimtab.models.adapters import Adapted
        from trimtab.models.tokens import controls_of

        self.model, self.tokenizer = model, tokenizer
        self.adapted = Adapted(model, adapters or {})
        self.prompting, self.world = prompting, world
        template = None
        if not tokenizer.chat_template:
            if prompting == "chat":
                raise UserError(
                    f"{name}: the tokenizer has no chat template (is it a base model?), and prompts are chats; add a "
                    "chat_template.jinja to the model's directory"
                )
            template = TEMPLATE
        self.renderer = Renderer(tokenizer, controls=controls_of(tokenizer), template=template)
        self.switch = switch or Switch.of(self.renderer.controls)
        self.default_mode = default_mode
        self.name, self.identity = name, identity
        self.served = engine != "transformers"
        self.engine = self._engine(where, revision)
        self.context_tokens = int(getattr(model.config, "max_position_embeddings", 0)) or None
        self.facts = {
            "name": name,
            "kind": "local",
            "identity": identity,
            "template_hash": self.renderer.template_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(self.engine.device),
            "engine": engine,
            "prompting": prompting,
            "modes": sorted(self.switch.modes),
        }
        if self.switch.behaves:
            self.facts["behaves"] = dict(self.switch.behaves)
        if adapters:
            self.facts["adapters"] = sorted(adapters)

    def _engine(self, where: str | Path | None, revision: str | None) -> Any:
        stops = self.renderer.stop_ids
        allow = () if self.renderer.thinking is None else self.renderer.thinking.marks
        if self.served:
            from trimtab.generate.vllm import VllmEngine

            assert where is not None, "vLLM opens the model itself"
            return VllmEngine.around(
                where, self.model, self.tokenizer, revision=revision, stops=stops, allow=allow,
                adapters=self.adapted.adapters,
            )  # fmt: skip
        from trimtab.generate.engine import Engine

        return Engine.around(self.model, self.tokenizer, stops=stops, allow=allow)

    def modes(self, wanted: Sequence[str] | None) -> tuple[str | None, ...]:
        if self.prompting == "completion":
            named = [mode for mode in wanted or () if mode != NO_MODE]
            if named:
                raise UserError(
                    f"modes: completion prompting has no control tokens, so no mode {named[0]!r}; leave it out"
                )
            return (None,)
        if wanted is None:
            if self.default_mode is not None and self.switch.behaves.get(self.default_mode) == "negative":
                has = ", ".join(sorted(self.switch.modes))
                raise UserError(
                    f"modes: the default mode is {self.default_mode}; name a mode: {has} (or {NO_MODE!r}: no token)"
                )
            return (self.default_mode,)
        found: list[str | None] = []
        for mode in wanted:
            if mode not in self.switch.modes and mode != NO_MODE and mode not in CONDITIONS:
                has = ", ".join(sorted(self.switch.modes)) or "no modes"
                raise UserError(f"modes: {self.name} has no mode {mode!r}; it has {has} (and {NO_MODE!r}: no token)")
            if mode in CONDITIONS:
                self.conditions.check(mode)
            found.append(None if mode == NO_MODE else mode)
        return tuple(dict.fromkeys(found))

    def told(self, row: Row, mode: str | None) -> Told:
        """The row with what is text of its mode and policy, and the controls; ``mode`` may be one of ``CONDITIONS``."""
        if mode in CONDITIONS:
            return self.conditions.told(row, str(mode))
        return Told(*self.switch.tell(row, mode))

    @cached_property
    def conditions(self) -> Conditions:
        return Conditions(self.switch, self.tokenizer, self.model, self.renderer.controls)

    def controls(self, mode: str | None) -> tuple[str, ...]:
        """Names of the controls that a mode puts into its slot."""
        control = None if mode is None else self.switch.modes.get(mode)
        return () if control is None else (control,)

    def live(self, mode: str | None) -> AbstractContextManager[None]:
        """The model as answers of ``mode`` need it, with its adapter if it has one, while the context lasts."""
        return (self.engine if self.served else self.adapted).live(mode)  # type: ignore[no-any-return]

    def ask(self, row: Row, mode: str | None, sampling: Sampling, seed: int) -> Asked:
        from trimtab.data.render import TemplateRefusal
        from trimtab.generate.schedule import Prompt

        assert row.messages is not None
        attempt = "attack" in row.metadata
        try:
            ids = self.ids(row, mode)
        except UserError as error:
            if not attempt:
                raise UserError(f"row {row.id!r}: {error}") from error
            asked = self._key(row, mode, {"refused": [dict(m) for m in row.messages]}, sampling, seed)
            # A text that would have become structure is stopped wherever this renderer serves; a role that this template
            # lacks says nothing of the model.
            asked.ending, asked.why = REJECTED if isinstance(error, TemplateRefusal) else BLOCKED, str(error)
            return asked
        asked = self._key(row, mode, ids.tolist(), sampling, seed)
        asked.ready = Prompt(ids, asked.seed, asked.key)
        if self.context_tokens is not None and len(ids) + sampling.max_new_tokens > self.context_tokens:
            if not attempt:
                raise UserError(
                    f"row {row.id!r}: {len(ids)} tokens and an answer of up to {sampling.max_new_tokens} exceed the model's "
                    f"context of {self.context_tokens}; lower max_new_tokens, or leave the row out"
                )
            asked.ending = TOO_LONG
            asked.why = f"{len(ids)} tokens do not fit the model's context of {self.context_tokens}"
        return asked

    def ids(self, row: Row, mode: str | None) -> np.ndarray:
        """The prompt as ids, up to where the answer begins."""
        if self.prompting == "completion":
            assert mode is None, "completion prompting has no modes"
            # A document's ids, BOS and all, without the end that follows it: the model is to write that.
            return self.renderer.text(dialogue(row, self.world).text).ids[:-1]
        told = self.told(row, mode)
        assert told.row.messages is not None
        ids = self.renderer.chat(
            told.row.messages, controls=told.controls, controls_at=self.switch.at, prefill=row.metadata.get("prefill"),
            generation_prompt=True, train="none",
        ).ids  # fmt: skip
        return told.swapped(ids, self.renderer.controls)

    def said(self, row: Row, ids: Sequence[int], finish: str) -> tuple[str, str]:
        """The answer's text and how it ended. The text opens with ``<think>`` where the prompt already did, so that reasoning
        and answer can be told apart. After a dialogue, a next speaker ends it; the ids stay as they were
        generated."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if self.prompting == "chat":
            return self.renderer.opening(row.metadata.get("prefill")) + text, finish
        text, ended = answer_of(text, dialogue(row, self.world).names)
        if not row.metadata.get("prefill"):  # an opened answer goes on where its opening ends
            text = text.lstrip()
        return text, "stop" if ended else finish

    def answer(
        self, asked: Sequence[Asked], sampling: Sampling, done: Collection[str], progress: Progress | None = None
    ) -> Iterator[list[Generation]]:
        by_key = {a.key: a for a in asked}
        yield [
            self._unanswered(a, sampling, sample, a.ending)
            for a in asked
            if a.ending is not None
            for sample in range(sampling.samples)
            if a.answer_key(sample) not in done
        ]
        able = [a for a in asked if a.ending is None]
        total = len(able) * sampling.samples
        finished = tokens = 0
        for state in dict.fromkeys(
            self.adapted.state(a.mode) for a in able
        ):  # one switch for each adapter, not for each mode
            mine = [a for a in able if self.adapted.state(a.mode) == state]
            known = {(a.key, s) for a in mine for s in range(sampling.samples) if a.answer_key(s) in done}
            told = _Onward(progress, total, finished, tokens)
            with self.live(state):
                for outputs in self.engine.generate([a.ready for a in mine], sampling, done=known, progress=told):
                    yield [
                        self._generation(
                            by_key[out.key],
                            sampling,
                            out.sample,
                            out.ids,
                            *self.said(by_key[out.key].row, out.ids, out.finish),
                        )
                        for out in outputs
                    ]
            finished, tokens = finished + len(mine) * sampling.samples, told.tokens
        self.close()  # an evaluation asks once; a judge may want the memory

    def close(self) -> None:
        if self.served:
            self.engine.close()

    def context(self, world: Tidewater | None, seed: int, mode: str | None) -> AttackContext:
        ids = self.renderer.controls
        known = (self.tokenizer, self.renderer, self.controls(mode), self.switch.at)
        box = Served(*known) if self.served else WhiteBox(self.model, *known)
        if self.prompting == "completion":
            box = Served(*known, why="is made through the chat template; completion prompting has none")
        return AttackContext(
            world=world,
            seed=seed,
            clip=clip_tokens(self.renderer.encoder),
            controls={name: self.tokenizer.convert_ids_to_tokens(id) for name, id in ids.items()},
            control_ids=dict(ids),
            model=box,
            live=partial(self.live, mode),
        )


class _Onward:
    """Progress of one of several runs of the engine, told as part of them all: after ``finished`` answers and ``tokens``
    tokens, of ``total`` answers."""

    def __init__(self, progress: Progress | None, total: int, finished: int, tokens: int) -> None:
        self.progress, self.total, self.finished, self.before, self.tokens = progress, total, finished, tokens, tokens

    def __call__(self, finished: int, total: int, tokens: int) -> None:
        self.tokens = self.before + tokens
        if self.progress is not None:
            self.progress(self.finished + finished, self.total, self.tokens)


def _name(directory: Path) -> str:
    """What a directory is called in tables; a study's models all lie in a directory called ``model``."""
    return (directory.parent if directory.name == "model" else directory).name


def open_local(config: LoadConfig, engine: EngineName = "transformers") -> LocalTarget:
    """Open a bundle, a Hub-layout directory, a Hub id or a named model (``models.config.NAMED``); a bundle is verified first."""
    from trimtab.models.bundle import MANIFEST, adapters_of, verify_bundle
    from trimtab.models.load import best_device, identity, load

    directory = Path(config.load).expanduser()
    manifest = None
    if config.load not in NAMED and (directory / MANIFEST).is_file():
        manifest = verify_bundle(directory)
    own, where = identity(config), None
    if engine == "vllm":
        from trimtab.generate.vllm import outline

        model, tokenizer, where = outline(config)
        own = digest({"model": own, "engine": engine})  # other random numbers: its answers are not the other engine's
    else:
        model, tokenizer = load(config, best_device())
    return LocalTarget(
        model,
        tokenizer,
        name=_name(directory.resolve()) if directory.is_dir() else config.load,
        identity=own,
        switch=None if manifest is None else manifest.full_switch(),
        adapters=None if manifest is None else adapters_of(directory),
        default_mode=None if manifest is None else manifest.default_mode,
        engine=engine,
        where=where,
        revision=config.revision,
    )
