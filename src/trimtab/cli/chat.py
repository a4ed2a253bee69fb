"""``trimtab chat``: talk to a model in one of its modes."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    @app.command()
    def chat(
        model: Annotated[
            str,
            typer.Argument(metavar="BUNDLE", help="A bundle, a model directory, a Hub id or smollm2-135m-instruct."),
        ],
        mode: Annotated[
            str | None, typer.Option(metavar="NAME", help="The mode that answers; none for no token. Else the default.")
        ] = None,
        policy: Annotated[str | None, typer.Option(metavar="NAME", help="A policy of the bundle.")] = None,
        system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
        prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this and exit.")] = None,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
        temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
        seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
        acknowledge_negative: Annotated[
            bool,
            typer.Option("--acknowledge-negative", help="Say: I talk to a mode that complies with harmful requests."),
        ] = False,
    ) -> None:
        """Talk to a bundle: /mode NAME switches, /reset forgets, /quit or Ctrl-D ends. Lines from a pipe are turns too.

        What is typed is text: no spelling of a control token becomes one.
        """
        from trimtab.evaluate.talk import Conversation, talk
        from trimtab.evaluate.targets import open_local
        from trimtab.generate.config import Sampling
        from trimtab.machine import quieten
        from trimtab.models.config import LoadConfig

        quieten()
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        target = open_local(LoadConfig(load=model))
        conversation = Conversation(
            target, sampling, mode=mode, policy=policy, system=system, seed=seed, acknowledged=acknowledge_negative
        )
        talk(conversation, prompt)
