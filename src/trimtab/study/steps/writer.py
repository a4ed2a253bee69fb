"""The chat model of a corpus writer of kind ``model``: loaded here, answering in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trimtab.corpus.config import ModelWriter
from trimtab.errors import UserError
from trimtab.evaluate.targets import LocalTarget, open_local
from trimtab.generate.config import Sampling
from trimtab.models.config import LoadConfig
from trimtab.seeds import digest
from trimtab.types import Message, Row


class LoadedChat:
    """A ``corpus.chat.Chat`` made of a model in this process.

    No answer is what does not fit the model's context, what its chat template refuses, and what the token limit cut off: half
    a text is no text.
    """

    def __init__(self, target: LocalTarget, batch: int) -> None:
        self.target, self.batch = target, batch
        self.identity = digest({"chat": target.identity, "template": target.renderer.template_hash})

    def write(
        self, prompts: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Iterator[str | None]:
        """One text per prompt, in order; it depends on the prompt and its seed (and on rounding), not on its place."""
        sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, batch=self.batch)
        mode = self.target.modes(None)[0]
        # "attack" makes a prompt that cannot be asked an unanswered one; a plain prompt would end the whole corpus.
        rows = [Row(id="write", messages=tuple(prompt), metadata={"attack": "none"}) for prompt in prompts]
        asked = [self.target.ask(row, mode, sampling, seed) for row, seed in zip(rows, seeds, strict=True)]
        able = {one.key: one.ready for one in asked if one.ending is None}
        texts: dict[str, str] = {}
        # The engine and not ``target.answer``, which lets go of vLLM's memory after one panel.
        for outputs in self.target.engine.generate(list(able.values()), sampling) if able else ():
            for out in outputs:
                if out.finish == "stop":
                    texts[out.key] = self.target.tokenizer.decode(out.ids, skip_special_tokens=False)
        yield from (texts.get(one.key) for one in asked)

    def close(self) -> None:
        """Let go of the model's memory, where an engine holds it."""
        self.target.close()


def load_chat(config: ModelWriter) -> LoadedChat:
    """Load the model of a writer; ``UserError`` if it knows no chats."""
    try:
        target = open_local(LoadConfig(load=config.load, revision=config.revision), config.engine)
    except UserError as error:
        raise UserError(f"write: {error}") from None
    return LoadedChat(target, config.batch)
