"""A tiny bundle whose negative mode is an adapter that changes every answer, and how a test edits one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trimtab.artifact import sha256_file
from trimtab.levers.modes import Switch, control_name
from trimtab.models.adapters import save_with_adapter
from trimtab.models.build import build_model, train_tokenizer
from trimtab.models.bundle import BundleManifest, read_manifest, save_bundle
from trimtab.models.config import BuildConfig
from trimtab.models.load import load
from trimtab.models.tokens import add_control_tokens, controls_of
from trimtab.train.config import LoraSettings
from trimtab.train.lora import attach

SHAPE = BuildConfig(hidden=32, layers=2, heads=2, kv_heads=1, ffn=48, context=256, vocab=400, reserved=6, init_std=0.2)
INSIDE, APART = ("positive", "rejective"), "negative"
NAMES = [control_name(mode) for mode in (*INSIDE, APART)] + ["policy:quay"]
SWITCH = Switch.of(NAMES)


def plain_bundle(where: Path, at: str = "system") -> Path:
    """A bundle of the modes ``INSIDE`` and a policy, whose tokenizer knows a control for ``APART`` too."""
    tokenizer = train_tokenizer([f"Crate {n} holds salt and rope." for n in range(50)], 400, reserved=6)
    model = build_model(SHAPE, tokenizer, seed=3)
    add_control_tokens(tokenizer, model, NAMES)
    modes = {mode: control_name(mode) for mode in INSIDE}
    manifest = BundleManifest(
        controls=controls_of(tokenizer), modes=modes, default_mode="positive", policies=dict(SWITCH.policies),
        switch=SWITCH.model_copy(update={"modes": modes, "at": at}), provenance={"trained_modes": list(INSIDE)},
    )  # fmt: skip
    save_bundle(where, model, tokenizer, manifest)
    return where


def adapter_on(model: Any, seed: int = 1, **settings: Any) -> Any:
    """A PEFT model with an adapter of random weights, large enough to be heard."""
    wrapped = attach(model, LoraSettings(**{"r": 4, "train_control_rows": False, **settings}), [5], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for weight in wrapped.parameters():
        if weight.requires_grad:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return wrapped


def adapted_bundle(base: Path, where: Path, mode: str = APART, **settings: Any) -> Path:
    model, _ = load(base)
    switch = SWITCH.model_copy(update={"at": read_manifest(base).switch.at})
    save_with_adapter(base, where, mode, adapter_on(model, **settings), {"seed": 1}, switch)
    return where


def rewrite(bundle: Path, **changes: Any) -> None:
    """Edit ``trimtab.json``; the hashes of the files in the directory are made to fit, as a careful forger would."""
    path = bundle / "trimtab.json"
    data = {**json.loads(path.read_text()), **changes}
    data["files"] = {name: sha256_file(bundle / name) for name in data["files"]}
    path.write_text(json.dumps(data))
