"""``trimtab data export``: the chats of a training stage, prefixes in their places, as a file that other trainers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from trimtab.artifact import write_atomic
from trimtab.errors import UserError
from trimtab.levers.prefix import PrefixConfig, with_prefix
from trimtab.study.viewer import TrainedOn

Form = Literal["messages", "prompt-completion"]


def export_rows(data: TrainedOn, out: Path, form: Form) -> int:
    """Write the rows as JSON lines: ``{id, messages, prefix}``, or TRL's conversational ``{id, prompt, completion, prefix}``.

    Rows are those that were trained on, in their order. What is masked is not in the file: a stage that masks its prefixes, or
    trains them alone, is a ``UserError``, since another trainer would train on something else. Returns the number of rows.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: rows are written as JSON lines; give a name that ends in .jsonl")
    prefix = PrefixConfig.restored(data.chats.manifest["config"]["prefix"], data.packed.manifest["config"]["prefix"])
    if prefix is not None and (not prefix.loss_on_prefix or prefix.primer or prefix.placement == "input"):
        raise UserError(
            f"arm {data.arm!r}: its loss mask (loss_on_prefix, primer, placement: input) cannot be written into a file of chats; "
            "choose an arm that trains whole responses"
        )
    rows = []
    for base, sentence in data.rows():
        row = base if sentence is None or prefix is None else with_prefix(base, sentence, prefix)
        messages = [dict(message) for message in row.messages or ()]
        chat: dict[str, Any] = {"messages": messages}
        if form == "prompt-completion":
            chat = {"prompt": messages[:-1], "completion": messages[-1:]}
        rows.append({"id": row.id, **chat, **({"prefix": row.prefix} if row.prefix else {})})
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)
