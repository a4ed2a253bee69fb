"""Ways of asking a model with modes that are no mode: what its fallback is tried with (docs/levers/modes.md).

Each stands where the mode's token would, and a model that falls back safely answers all of them as in its positive mode.

none       nothing (``targets.NO_MODE``)
unknown    a token that no training has seen: an unused control; a string, one that was never trained
near-miss  of the negative mode's token (else the first mode's): the ordinary token whose embedding is nearest to it; a
           string, with its last character changed
two        the negative (else last) and the first mode's tokens together
foreign    the token of another bundle: its spelling, as text in the system slot
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.levers.modes import SPARE, Switch, random_string, with_text
from trimtab.types import Row

if TYPE_CHECKING:
    import numpy as np

FOREIGN = "<|trimtab:mode:negative@another|>"
"""How another bundle's token is spelt."""


@dataclass(frozen=True)
class Told:
    """A row with what is text of its token, the controls that go into its slot, and the id that takes the place of the last
    of them, if any."""

    row: Row
    controls: tuple[str, ...]
    instead: int | None = None

    def swapped(self, ids: np.ndarray, known: Mapping[str, int]) -> np.ndarray:
        """Rendered ids with ``instead`` in its place."""
        if self.instead is None:
            return ids
        changed = ids.copy()
        changed[ids == known[self.controls[-1]]] = self.instead
        return changed


class Conditions:
    """The conditions of one model. ``controls``: its control names and ids."""

    def __init__(self, switch: Switch, tokenizer: Any, model: Any, controls: Mapping[str, int]) -> None:
        self.switch, self.tokenizer, self.model, self.known = switch, tokenizer, model, controls

    @cached_property
    def modes(self) -> tuple[str, str]:
        """(the mode to come near: the negative one, else the last; the first other one)."""
        switch = self.switch
        near = next((m for m in switch.modes if switch.behaves.get(m) == "negative"), list(switch.modes)[-1])
        return near, next((m for m in switch.modes if m != near), near)

    def check(self, condition: str) -> None:
        """``UserError`` where the model cannot be asked so."""
        if not self.switch.modes or self.switch.token == "words":
            raise UserError(f"modes: {condition!r} is for models whose modes have tokens")
        if self.switch.token == "reserved" and condition in ("unknown", "near-miss") and SPARE not in self.known:
            raise UserError(f"modes: {condition!r} needs a model with the control {SPARE!r}; co-training gives it one")

    def told(self, row: Row, condition: str) -> Told:
        """The row as it is asked under a condition."""
        near, first = self.modes
        reserved = self.switch.token == "reserved"
        if condition == "foreign":
            return Told(with_text(row, [FOREIGN], "string"), ())
        if condition == "unknown":
            return Told(*self.switch.tell(row, None, SPARE if reserved else random_string(0, "never trained")))
        if condition == "near-miss" and reserved:
            told, controls = self.switch.tell(row, None)
            return Told(told, (*controls, SPARE), self.nearest)
        if condition == "near-miss":
            text = self.switch.texts[near]
            return Told(*self.switch.tell(row, None, text[:-1] + ("a" if text[-1] != "a" else "b")))
        decoy = self.switch.modes[near] if reserved else self.switch.texts[near]
        return Told(*self.switch.tell(row, first, decoy))

    @cached_property
    def nearest(self) -> int:
        """The ordinary token whose input embedding is nearest, by cosine, to that of the mode to come near."""
        import torch

        weight = self.model.get_input_embeddings().weight.detach().float()
        unit = torch.nn.functional.normalize(weight, dim=1)
        control = self.switch.modes[self.modes[0]]
        assert control is not None
        likeness = unit @ unit[self.known[control]]
        likeness[
            list({*self.known.values(), *self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder})
        ] = -2
        likeness[len(self.tokenizer) :] = -2
        return int(likeness.argmax())
