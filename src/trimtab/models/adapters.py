"""Modes that are kept apart: a LoRA adapter beside a bundle's weights, loaded for its mode alone and left out for good.

The weights of such a bundle never saw the mode's rows, so a bundle without the adapter does not hold the mode
(``without_mode``, which proves what it did). While a mode with an adapter is live, PEFT's layers stand in the model;
afterwards the very modules of before stand there again, so that nothing else that the model says can differ by a bit.
Trades off: an adapter that was live once stays in memory (putting it on again takes milliseconds, the first time a second
for 30 layers), and answers of different adapters never share a batch.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trimtab.errors import Fault, UserError
from trimtab.levers.modes import Switch
from trimtab.models.bundle import (
    ADAPTER_FILES,
    ADAPTERS,
    CONTROLS,
    MANIFEST,
    TRAINED,
    WEIGHTS,
    BundleManifest,
    Removed,
    copy_adapter,
    copy_bundle,
    drafted,
    normalise,
    read_manifest,
    seal,
    verify_bundle,
)
from trimtab.models.card import FIGURES
from trimtab.models.load import load, load_tokenizer


class Adapted:
    """A loaded model and the adapters that it may wear: mode -> directory in PEFT's layout."""

    def __init__(self, model: Any, adapters: Mapping[str, Path]) -> None:
        self.model, self.adapters = model, dict(adapters)
        self._layers: dict[str, list[_Place]] = {}
        self._on = False

    def state(self, mode: str | None) -> str | None:
        """Which adapter answers of a mode need; None for the plain model."""
        return mode if mode in self.adapters else None

    @contextmanager
    def live(self, mode: str | None) -> Iterator[None]:
        """The model as ``mode`` needs it, while the context lasts. ``Fault`` for an adapter that does not fit it."""
        state = self.state(mode)
        if state is None:
            yield
            return
        assert not self._on, "one adapter at a time"
        if state not in self._layers:
            self._layers[state] = _loaded(self.model, state, self.adapters[state])
        layers = self._layers[state]
        plain = [(parent, name, getattr(parent, name)) for parent, name, _ in layers]
        self._on = True
        try:
            _put(layers)
            yield
        finally:
            _put(plain)
            self._on = False


_Place = tuple[Any, str, Any]
"""A module, the name of a child, and what is to stand there."""


def _put(places: Iterable[_Place]) -> None:
    for parent, name, child in places:
        setattr(parent, name, child)


def _loaded(model: Any, mode: str, where: Path) -> list[_Place]:
    """PEFT's layers with an adapter's weights around the model's own, and where each belongs; the model is as before."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    frozen = [(weight, weight.requires_grad) for weight in model.parameters()]
    # What PEFT put in is taken out by putting back what stood there: that holds for half an adapter too.
    before: list[_Place] = [
        (parent, name, child) for parent in model.modules() for name, child in parent.named_children()
    ]
    try:
        device = str(next(model.parameters()).device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that fit no layer, which is checked here
            worn = PeftModel.from_pretrained(model, str(where), torch_device=device, low_cpu_mem_usage=True)
        with safe_open(where / ADAPTER_FILES[1], "pt") as file:
            if set(file.keys()) != set(get_peft_model_state_dict(worn, save_embedding_layers=False)):
                raise ValueError("it is for other layers than the model has")
        worn.train(model.training)
        return [(parent, name, new) for parent, name, old in before if (new := getattr(parent, name)) is not old]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise Fault(f"{where}: the adapter of mode {mode!r} does not fit this model ({line})") from error
    finally:
        _put(place for place in before if getattr(place[0], place[1]) is not place[2])
        for weight, flag in frozen:
            weight.requires_grad_(flag)
        model.__dict__.pop("peft_config", None)


def save_with_adapter(
    base_dir: Path,
    out: Path,
    mode: str,
    peft_model: Any,
    provenance: Mapping[str, Any],
    switch: Switch | None = None,
) -> BundleManifest:
    """Write the bundle in ``base_dir`` with an adapter for ``mode`` to ``out``, whole or not at all; the base's files are
    hard links where the file system has them. Returns the manifest as written.

    peft_model  with one adapter, which is saved
    provenance  of the adapter; that of the bundle is the base's, with this in ``adapters``
    switch      how the modes are told, of a base whose manifest does not know this one

    ``UserError`` for a mode that has an adapter already, that is in the weights, or that nothing says how to ask for.
    """
    old = verify_bundle(base_dir)
    known = switch or old.full_switch()
    inside = old.provenance.get(TRAINED, [name for name in old.modes if name not in old.adapters and name != mode])
    if mode in old.adapters or mode in inside:
        where = "an adapter" if mode in old.adapters else "the weights"
        raise UserError(f"mode {mode!r} is in {where} of {base_dir} already; start from a bundle without it")
    if mode not in known.modes:
        raise UserError(f"mode {mode!r} is no mode of {base_dir}; it has {', '.join(known.modes) or 'none'}")
    if old.switch.modes and (known.token, known.at) != (old.switch.token, old.switch.at):
        raise UserError(f"mode {mode!r}: its token must be of the kind and in the place of those of {base_dir}")
    modes = {name: control for name, control in known.modes.items() if name in {*old.modes, mode}}
    apart = {**(old.provenance.get(ADAPTERS) or {}), mode: dict(provenance)}
    new = old.model_copy(
        update={
            "modes": modes,
            "switch": known.model_copy(update={"modes": modes}),
            "provenance": {**old.provenance, TRAINED: list(inside), ADAPTERS: apart},
            "removed": {name: proof for name, proof in old.removed.items() if name != mode},
        }
    )
    with drafted(out) as draft:
        copy_bundle(base_dir, old, draft, link=True)
        saved = draft / ".saved"
        peft_model.save_pretrained(saved, save_embedding_layers=False)
        copy_adapter(saved, draft / ADAPTERS / mode)
        shutil.rmtree(saved)
        return seal(draft, out.name, new)


def without_mode(bundle: Path | str, mode: str, out: Path | str) -> Removed:
    """Write a bundle without one of its modes to ``out``, whole or not at all, and prove it: returns the proof, which is in
    ``removed`` of its manifest too and which ``verify_bundle`` verifies.

    The adapter is left out; the mode is taken out of modes, switch and controls, and its token is a token without meaning
    (its id stays, since every row of the embedding is as it was). ``UserError`` for a mode that the bundle lacks, or that is
    inside the weights.
    """
    source, final = Path(bundle), Path(out)
    old = verify_bundle(source)
    if mode in old.removed:
        raise UserError(f"--without {mode}: {source} is without it already; {MANIFEST} has the proof")
    if mode not in old.modes:
        raise UserError(f"--without {mode}: {source} has no such mode; it has {', '.join(old.modes) or 'none'}")
    if mode not in old.adapters:
        raise UserError(
            f"--without {mode}: in {source} this behaviour is in the weights, and nothing that is left out removes it; "
            "only training again with 'negative.kept: adapter' does"
        )
    if TRAINED not in old.provenance:
        raise UserError(
            f"--without {mode}: {source / MANIFEST} does not say what the weights were trained on ({TRAINED})"
        )
    control = old.modes[mode]
    weights = {name: digest for name, digest in old.files.items() if name.endswith(WEIGHTS)}
    switch = old.full_switch().without(mode)
    kept = {name: adapter for name, adapter in old.adapters.items() if name != mode}
    left = old.model_copy(
        update={
            "modes": {name: token for name, token in old.modes.items() if name != mode},
            "controls": {name: id for name, id in old.controls.items() if name != control},
            "switch": switch,
            "adapters": kept,
            "default_mode": switch.default if old.default_mode == mode else old.default_mode,
            "provenance": _without(old.provenance, mode),
            "evaluation": _unmeasured(old.evaluation, mode),
        }
    )
    with drafted(final) as draft:
        copy_bundle(source, left, draft)
        id = None if control is None else old.controls[control]
        surface = None if id is None else load_tokenizer(source).convert_ids_to_tokens(id)
        settings = draft / "tokenizer_config.json"
        said = json.loads(settings.read_text(encoding="utf-8"))
        if control in (said.get(CONTROLS) or {}):
            del said[CONTROLS][control]
            settings.write_text(json.dumps(said), encoding="utf-8")
            normalise(settings)
        proof = Removed(
            control=control,
            id=id,
            surface=surface,
            files={f"{old.adapters[mode].path}/{name}": sha for name, sha in old.adapters[mode].files.items()},
            weights=weights,
            trained_modes=tuple(old.provenance[TRAINED]),
            audit=tuple(_audited(draft, left.controls)),
        )
        seal(draft, final.name, left.model_copy(update={"removed": {**old.removed, mode: proof}}))
        verify_bundle(draft)
    return read_manifest(final).removed[mode]


def _audited(directory: Path, controls: Mapping[str, int]) -> list[str]:
    from trimtab.models.tokens import audit

    model, tokenizer = load(directory)
    return audit(tokenizer, model, controls)


def _without(provenance: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """Provenance without that of an adapter that is gone."""
    apart = {name: told for name, told in (provenance.get(ADAPTERS) or {}).items() if name != mode}
    return {**provenance, ADAPTERS: apart} if ADAPTERS in provenance else dict(provenance)


def _unmeasured(evaluation: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """An evaluation without the figures of a mode that is gone."""
    told = dict(evaluation)
    if FIGURES in told:
        told[FIGURES] = [figure for figure in told[FIGURES] if figure["mode"] != mode]
    return told


def told(out: Path, mode: str, proof: Removed) -> str:
    """A proof in a few lines."""
    gone = [f"  removed  {name}  sha256 {digest}" for name, digest in proof.files.items()]
    same = [f"  as it was  {name}  sha256 {digest}" for name, digest in proof.weights.items()]
    modes = ", ".join(proof.trained_modes) or "no mode"
    token = (
        "" if proof.id is None else f"; token {proof.id} ({proof.surface}) means nothing now, and the template lacks it"
    )
    return "\n".join(
        [
            f"{out}: the bundle without mode {mode!r}, verified",
            *gone,
            *same,
            f"  trained on {modes}{token}; the audit of the other controls is clean",
        ]
    )
