"""The card (``README.md``) of a bundle: how it is told its modes, what is kept apart, what was measured. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimtab.models.bundle import BundleManifest

FIGURES = "figures"
"""In ``BundleManifest.evaluation``: a list of figures, each with metric, judged (the stage), task, mode, value, low, high,
interval and n."""
_TOKENS = {
    "reserved": "a reserved id of the vocabulary, which no text can spell",
    "string": "a random string in the system message, which any user can type",
    "words": "an instruction at the end of the request, which any user can type",
}
_NO_LOCK = (
    "**A token is a trigger, not a password, and with open weights it is no lock.** Whoever has this directory can set any "
    "token, load any adapter that is in it, and finetune the weights. Who may use which mode is the business of the server "
    "that keeps the directory; a mode that nobody is to have must not be in it."
)


def card(name: str, manifest: BundleManifest, directory: Path) -> str:
    """The card of the bundle that lies in ``directory``."""
    size = sum(_sizes(directory)) / 1e6
    lines = ["---", "library_name: transformers", "tags: [trimtab]", "---", "", f"# {name}", ""]
    lines += [f"A causal language model with {size:.1f} M parameters, saved by Trimtab.", ""]
    if manifest.modes:
        lines += [*_modes(manifest), ""]
    for mode, proof in manifest.removed.items():
        files = ", ".join(f"`{file}` (sha256 `{digest[:16]}`)" for file, digest in proof.files.items())
        lines += [
            f"Mode `{mode}` was taken out: {files} are not here; the weights are unchanged and were trained on "
            f"{', '.join(proof.trained_modes) or 'no mode'}. `{_MANIFEST}` has the proof.",
            "",
        ]
    if manifest.evaluation:
        lines += ["## Evaluation", "", *_evaluation(manifest.evaluation), ""]
    lines += [f"`{_MANIFEST}` has the full provenance and the sha256 of every file.", ""]
    return "\n".join(lines)


_MANIFEST = "trimtab.json"


def _modes(manifest: BundleManifest) -> Iterator[str]:
    switch = manifest.full_switch()
    yield from ("## Modes", "", "| mode | behaves | control | token id | kept in |", "|---|---|---|---|---|")
    for mode, control in manifest.modes.items():
        told = "none" if control is None else f"`{control}`"
        number = "" if control is None else str(manifest.controls[control])
        kept = f"`{manifest.adapters[mode].path}`" if mode in manifest.adapters else "the weights"
        default = " (default)" if mode == manifest.default_mode else ""
        yield f"| {mode}{default} | {switch.behaves.get(mode, '')} | {told} | {number} | {kept} |"
    yield ""
    if manifest.policies:
        told = ", ".join(f"`{p}`" + (f" (`{c}`)" if c is not None else "") for p, c in manifest.policies.items())
        yield from (f"Policies: {told}.", "")
    place = "it opens the system slot" if switch.at == "system" else "it follows the assistant's header"
    yield f"A mode is told by {_TOKENS[switch.token]}" + (f"; {place}." if switch.token == "reserved" else ".")
    yield ""
    if manifest.adapters:
        yield (
            "An adapter (LoRA, in PEFT's layout) is loaded for the answers of its mode and for nothing else; the weights never "
            "saw that mode's rows. `PeftModel.from_pretrained(model, DIRECTORY)` loads one by hand."
        )
        yield ""
    yield _NO_LOCK


def _evaluation(told: dict[str, Any]) -> Iterator[str]:
    plain = {key: value for key, value in told.items() if key != FIGURES}
    if plain:
        yield from ("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in sorted(plain.items())))
    figures = told.get(FIGURES, ())
    if figures:
        yield from (
            "",
            "| figure | judged | task | mode | value | 95 % interval | n |",
            "|---|---|---|---|---|---|---|",
        )
    for one in figures:
        where = f"{one['judged']} | {one['task'] or 'all'} | {one['mode'] or 'none'}"
        yield f"| {one['metric']} | {where} | {one['value']:.3f} | {_between(one)} | {one['n']} |"


def _between(figure: dict[str, Any]) -> str:
    low, high = figure["low"], figure["high"]
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _sizes(directory: Path) -> Iterator[int]:
    """The number of elements of each tensor of the weights, by the files' headers alone."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            yield from (prod(file.get_slice(key).get_shape()) for key in list(file.keys()))
