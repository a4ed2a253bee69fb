"""``trimtab chat``: a conversation with a local model in a mode, in the terminal or through a pipe.

What a person types is text and stays text: it goes through the same renderer as every prompt, so that no spelling of a
token becomes one; what comes back never holds a control, and characters that would steer a terminal are shown and not
sent. A mode that behaves negatively is live only where that was acknowledged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count

from rich.console import Console

from trimtab.errors import UserError
from trimtab.evaluate.targets import NO_MODE, LocalTarget
from trimtab.generate.config import Sampling
from trimtab.generate.schedule import Prompt
from trimtab.seeds import seed_of
from trimtab.types import Message, Row

HELP = "/mode NAME, /reset, /quit"


class Conversation:
    """What was said so far, and the mode that answers next.

    mode    None: the default of the model; ``none``: no token
    policy  a policy of the model, if it has some

    ``UserError`` for a mode or a policy that the model lacks, and for one that behaves negatively without ``acknowledged``.
    """

    def __init__(
        self,
        target: LocalTarget,
        sampling: Sampling,
        *,
        mode: str | None = None,
        policy: str | None = None,
        system: str | None = None,
        seed: int = 0,
        acknowledged: bool = False,
    ) -> None:
        self.target, self.sampling, self.seed, self.acknowledged = target, sampling, seed, acknowledged
        self.system, self.policy = system, policy
        policies = target.switch.policies
        if policy is not None and policy not in policies:
            has = ", ".join(policies) or "no policies"
            raise UserError(f"--policy: {target.name} has no policy {policy!r}; it has {has}")
        self.mode: str | None = None
        self.choose(target.modes(None)[0] or NO_MODE if mode is None else mode)
        self.reset()

    def choose(self, mode: str) -> None:
        """Let ``mode`` answer from now on; what was said stays."""
        switch = self.target.switch
        if mode != NO_MODE and mode not in switch.modes:
            has = ", ".join((*switch.modes, NO_MODE))
            raise UserError(f"mode: {self.target.name} has no mode {mode!r}; it has {has}")
        if switch.behaves.get(mode) == "negative" and not self.acknowledged:
            raise UserError(
                f"mode: {mode!r} complies with harmful requests and is for internal red-teaming; to talk to it, say "
                "--acknowledge-negative"
            )
        self.mode = None if mode == NO_MODE else mode

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[Message] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.turns = count()

    def say(self, text: str, show: Callable[[str], None] = lambda piece: None) -> str:
        """The answer to ``text``; ``show`` gets it piece by piece. A turn that fails, or is stopped, is not kept.

        ``UserError`` for a text that cannot be rendered and for a conversation that fills the model's context.
        """
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        row = Row("chat", tuple(asked), policy=self.policy)
        ids, sampling, room = self.target.ids(row, self.mode), self.sampling, self.target.context_tokens
        if room is not None:
            if len(ids) >= room:
                raise UserError(
                    f"the conversation has {len(ids)} tokens and the model's context is {room}; begin anew (/reset)"
                )
            sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, room - len(ids))})
        engine, said, shown = self.target.engine, list[int](), ""

        def watch(_: str, token: int) -> None:
            nonlocal shown
            said.append(token)
            whole = self.target.said(row, said, "length")[0].rstrip("\ufffd")  # a character may take several tokens
            if whole.startswith(shown):
                show(whole[len(shown) :])
                shown = whole

        prompt = Prompt(ids, seed_of("chat", self.seed, next(self.turns)), "chat")
        engine.watch = watch
        try:
            with self.target.live(self.mode):
                (output,) = [one for some in engine.generate([prompt], sampling) for one in some]
        finally:
            engine.watch = None
        answer = self.target.said(row, output.ids, output.finish)[0]
        if answer.startswith(shown):
            show(answer[len(shown) :])
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer


def talk(conversation: Conversation, prompt: str | None = None) -> None:
    """Answer ``prompt`` and return; without one, talk until the input ends.

    In a terminal, mistakes are told and the conversation goes on. Through a pipe, each line is a turn or a command, answers
    are all that is printed, and the first mistake ends it: what follows was meant for another mode.
    """
    console = Console(highlight=False, soft_wrap=True)

    def show(piece: str) -> None:
        console.out(visible(piece), end="", highlight=False)
        console.file.flush()

    if prompt is not None:
        conversation.say(prompt, show)
        console.out()
        return
    terminal = sys.stdin.isatty()
    if terminal:
        name, mode = conversation.target.name, conversation.mode or NO_MODE
        console.print(f"{name}, mode {mode}. {HELP}", style="dim", markup=False)
    for line in _lines(console, conversation, terminal):
        try:
            if _command(conversation, line):
                continue
            conversation.say(line, show)
            console.out()
        except UserError as error:
            if not terminal:
                raise
            console.print(str(error), style="red", markup=False)
        except KeyboardInterrupt:
            if not terminal:
                raise
            console.print(" stopped", style="dim")


def _lines(console: Console, conversation: Conversation, terminal: bool) -> Iterator[str]:
    """What is typed, without blank lines, up to the end of the input or ``/quit``."""
    while True:
        line = ""
        with suppress(EOFError, KeyboardInterrupt):
            line = _typed(console, conversation) if terminal else sys.stdin.readline()
        if line == "" or line.strip() == "/quit":
            return
        if line.strip():
            yield line.rstrip("\r\n")


def _typed(console: Console, conversation: Conversation) -> str:
    mode = conversation.mode or NO_MODE
    return console.input(f"[bold]{mode}>[/bold] ") + "\n"  # an empty line is not the end of the input


def _command(conversation: Conversation, line: str) -> bool:
    """Do what a line that opens with a slash says; whether it was one."""
    if not line.startswith("/"):
        return False
    word, _, rest = line.strip().partition(" ")
    if word == "/mode" and rest.strip():
        conversation.choose(rest.strip())
    elif word == "/reset" and not rest:
        conversation.reset()
    else:
        raise UserError(f"{line.strip()!r} is no command; there are {HELP}")
    return True


def visible(text: str) -> str:
    """Text without what could steer a terminal: control characters are named."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"⟨U+{ord(c):04X}⟩" for c in text)
