"""Steps ``chats`` and ``sft``: from chat rows through the prefix and mode levers to a tuned bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import AutoTokenizer

from trimtab.artifact import write_jsonl
from trimtab.data import sources
from trimtab.data.mixture import Mixture, Phase
from trimtab.data.pack import pack_examples
from trimtab.data.render import Rendered, Renderer
from trimtab.data.store import Mixed, RowStore
from trimtab.errors import Fault, UserError
from trimtab.levers.modes import ModesConfig, admit, control_name, mode_rows
from trimtab.levers.prefix import PrefixConfig, apply_prefix
from trimtab.models.bundle import BundleManifest, save_bundle
from trimtab.models.load import load
from trimtab.models.tokens import add_control_tokens, assign_control_tokens, audit, controls_of, merge_adapter
from trimtab.recipe.model import ChatSource
from trimtab.seeds import digest, uniform_of
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged, start_model
from trimtab.train.config import TrainConfig
from trimtab.train.loop import train
from trimtab.train.lora import attach
from trimtab.types import SPAN_ID, Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater


def run_chats(context: Context) -> None:
    """Write ``rows.jsonl`` (the chats as trained on, in order) and ``store/`` (rendered and packed)."""
    check_unchanged(context)
    config = context.step.config
    modes = ModesConfig.model_validate(config["modes"]) if config["modes"] else None
    tokenizer, controls = _tokenizer(context, modes)
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    rows, left_out = build_rows(config, town, modes)
    renderer = Renderer(tokenizer, controls=controls)
    names = [part["name"] for part in config["data"]]
    rendered = []
    for number, row in enumerate(rows):
        wanted = (control_name(row.mode),) if modes and row.mode else ()
        loss_on_prefix = config["prefix"]["loss_on_prefix"]
        rendered.append(_mask_prefix(renderer.row(row, controls=wanted), loss_on_prefix))
        if number % 100 == 0:
            context.progress({"step": number, "total": len(rows)})
    packed = pack_examples(
        rendered, config["length"], [names.index(row.metadata["part"]) for row in rows], pad_id=tokenizer.pad_token_id
    )
    store = RowStore.write(
        context.draft.path / "store",
        packed,
        names,
        vocab=len(tokenizer),
        tokenizer=tokenizer_hash(tokenizer),
        meta={"controls": controls},
    )
    write_jsonl(context.draft.path / "rows.jsonl", [row.to_json() for row in rows])
    context.draft.facts = {
        "rows": len(rows),
        "tokens": store.meta["tokens"],
        "trained_tokens": store.meta["trained_tokens"],
        "packing": dict(packed.counts),
        "prefixed": sum(row.prefix is not None for row in rows),
        "modes": {mode or "none": sum(row.mode == mode for row in rows) for mode in {row.mode for row in rows}},
        "left_out_modes": left_out,
    }


def build_rows(
    config: Mapping[str, Any], town: Tidewater, modes: ModesConfig | None
) -> tuple[list[Row], dict[str, int]]:
    """The chat rows of an SFT stage, levers applied, in a keyed order that does not depend on the levers.

    Each row's ``metadata["part"]`` names the part of ``data`` that it comes from. The second value counts, by mode, the
    rows left out because their mode is not trained. ``UserError`` for a part with fewer rows than its ``n``, and for
    rows of an unknown mode or of a negative mode that is not acknowledged.
    """
    seed = config["seed"]
    rows: list[Row] = []
    for data in config["data"]:
        part = ChatSource.model_validate({k: v for k, v in data.items() if k != "content"})
        if part.tidewater is not None:
            assert part.n is not None
            found = [replace(row, mode=None) for row in town.chats(part.tidewater, part.n, mode=part.answers)]
        else:
            assert part.source is not None
            found = list(sources.rows(part.source))
            if part.n is not None and part.n > len(found):
                raise UserError(f"data {part.name!r}: n={part.n}, but the source has only {len(found)} rows; lower 'n'")
            found = found[: part.n]
        rows += [replace(row, metadata={**row.metadata, "part": part.name}) for row in found]
    rows, left_out = admit(rows, modes)
    rows.sort(key=lambda row: uniform_of("order", seed, row.id))
    if modes is not None:
        rows = list(mode_rows(rows, modes, lambda row, mode: _answer(town, row, mode), seed))
        rows.sort(key=lambda row: uniform_of("order", seed, row.id))
    return list(apply_prefix(rows, PrefixConfig.model_validate(config["prefix"]), seed)), left_out


def _answer(town: Tidewater, request: Row, mode: str) -> str | None:
    return town.answer(request, mode) if request.source == "tidewater" else None


def run_sft(context: Context) -> None:
    """Train on the packed chats; leaves the bundle in ``model/``, and the log."""
    check_unchanged(context)
    config = context.step.config
    settings = TrainConfig.model_validate(config["train"])
    store = RowStore.open(context.inputs["chats"].path / "store")
    controls: dict[str, int] = store.meta["meta"]["controls"]
    model, tokenizer = load(start_model(context))
    # Ids are given in the order of names, so the names go in by the ids that the data has.
    new = [name for name in sorted(controls, key=controls.__getitem__) if name not in controls_of(tokenizer)]
    if new:
        add_control_tokens(tokenizer, model, new, seed=config["seed"])
    assert controls_of(tokenizer) == controls, "the control tokens of the data and of the model differ"
    if tokenizer_hash(tokenizer) != store.meta["tokenizer"]:
        raise UserError(f"stage {context.step.name!r}: the chats were rendered with another tokenizer than the model's")
    limit = getattr(model.config, "max_position_embeddings", store.length)
    if store.length > limit:
        raise UserError(
            f"stage {context.step.name!r}: length ({store.length}) is more than the model's context ({limit})"
        )
    if settings.lora is not None:
        model = attach(model, settings.lora, list(controls.values()), seed=config["seed"])
    mixture = Mixture({"chats": len(store)}, [Phase(0, {"chats": 1.0})], seed=config["seed"])
    total = max(1, round(len(store) * config["epochs"] / settings.rows_per_step))
    result = train(
        model,
        Mixed({"chats": store}, mixture),
        settings,
        total_steps=total,
        seed=config["seed"],
        work=context.work,
        progress=context.progress,
    )
    if settings.lora is not None:
        model = merge_adapter(model)
    modes: dict[str, str | None] = {name.removeprefix("mode:"): name for name in controls}
    problems = audit(tokenizer, model, controls)
    if problems:
        raise Fault(f"stage {context.step.name!r}: control token {problems[0]}; the bundle is not saved")
    manifest = BundleManifest(
        controls=controls,
        modes=modes,
        default_mode="positive" if "positive" in modes else None,
        tokenizer_audit={"problems": problems},
        provenance={"step": context.step.id, "inputs": dict(context.step.inputs), "seed": config["seed"]},
    )
    draft = context.draft
    save_bundle(draft.path / "model", model, tokenizer, manifest)
    shutil.copyfile(context.work / "log.jsonl", draft.path / "log.jsonl")
    draft.tokens = total * settings.rows_per_step * store.length
    draft.facts = {"shape": context.step.shape, "steps": total, "rows": len(store), "resumed": result.began_at > 0}


def _tokenizer(context: Context, modes: ModesConfig | None) -> tuple[Any, dict[str, int]]:
    """The tokenizer that the tuned model will have, and all its controls (name -> id)."""
    if "tokenizer" in context.inputs:
        tokenizer = AutoTokenizer.from_pretrained(context.inputs["tokenizer"].path)
    else:
        tokenizer = load(start_model(context))[1]
    names = [control_name(mode) for mode in modes.names] if modes else []
    assign_control_tokens(tokenizer, [name for name in names if name not in controls_of(tokenizer)])
    return tokenizer, controls_of(tokenizer)


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does: vocabulary, merges, added tokens."""
    return digest(tokenizer.backend_tokenizer.to_str())


def _mask_prefix(rendered: Rendered, loss_on_prefix: bool) -> Rendered:
    if loss_on_prefix:
        return rendered
    return replace(rendered, trained=rendered.trained & (rendered.span != SPAN_ID["prefix"]))
