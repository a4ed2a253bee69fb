"""Steps ``chats`` and ``packed``: from chat rows through the prefix and mode levers to packed rows to train on.

``chats`` builds the rows, renders each as it is and (where the prefix lever is pulled) with its sentence, and decides which
examples share a row, reserving for each the longer of its two forms. ``packed`` only chooses between the two forms and
masks. So ratios share all that is slow, see the same examples in the same step, and differ in nothing but the prefixes.

With ``modes.shared`` the rows go tree by tree: the answers to one prompt share its copy in a packed row (``data.tree``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from trimtab.artifact import Artifact, read_jsonl, write_jsonl
from trimtab.data import sources
from trimtab.data.pack import Bins, Examples, bin_examples, fill_rows, offsets
from trimtab.data.render import Rendered, Renderer
from trimtab.data.store import RowStore
from trimtab.data.tree import Trees, firsts, grow, tails
from trimtab.errors import UserError
from trimtab.levers.boilerplate import StripConfig, strip_rows
from trimtab.levers.modes import DECOY, FALLBACK, MODES, ModesConfig, Switch, admit, mode_rows
from trimtab.levers.prefix import (
    PrefixConfig,
    base_hash,
    carried,
    sentence_of,
    trained_with_prefix,
    with_prefix,
)
from trimtab.models.load import load
from trimtab.models.tokens import assign_control_tokens, controls_of
from trimtab.recipe.stages import ChatSource
from trimtab.seeds import uniform_of
from trimtab.study.execute import Context
from trimtab.study.steps.common import check_unchanged, start_model, tokenizer_hash
from trimtab.types import Row
from trimtab.world.config import TidewaterConfig
from trimtab.world.tidewater import Tidewater

FORMS = "forms.npz"
"""Both forms of every example, as flat arrays, and the row that it goes into."""
ROWS = "rows.jsonl"
DISTILLED = "rows.jsonl"
"""Of a ``distill`` step: the rows that it kept."""
PLACES = "places.npz"
"""Of every example: its packed row (-1: left out), first token, number of tokens, and whether it carries its sentence; with
shared prompts also how many tokens of its prompt stand elsewhere in the row (``skip``), and where (``prompt``)."""


def run_chats(context: Context) -> None:
    """Write ``rows.jsonl`` (the base chats in order, each with the sentence that it may carry) and ``forms.npz``.

    Where prompts are shared, the order is that of the trees.
    """
    check_unchanged(context)
    config = context.step.config
    modes = ModesConfig.model_validate(config["modes"]) if config["modes"] else None
    prefix = PrefixConfig.restored(config["prefix"])
    tokenizer, controls = _tokenizer(context, modes)
    town = Tidewater(TidewaterConfig.model_validate(config["world"]))
    switch = modes.switch(config["seed"]) if modes else Switch()
    rows, counted = build_rows(
        config, town, modes, names=config["names"], surfaces=_surfaces(tokenizer, switch), distilled=context.inputs
    )
    renderer = Renderer(tokenizer, controls=controls)
    if prefix is not None:
        counted["sentences"] = _sentence_tokens(renderer, prefix, config["length"], context.step.name)
    sentences = [None if prefix is None else sentence_of(row, prefix, config["seed"]) for row in rows]
    plain: list[Rendered] = []
    opened: list[Rendered] = []
    for number, (row, sentence) in enumerate(zip(rows, sentences, strict=True)):
        told, wanted = switch.tell(row, row.mode, row.metadata.get(DECOY)) if modes else (row, ())
        plain.append(renderer.row(told, controls=wanted, controls_at=switch.at))
        if sentence is not None:
            assert prefix is not None
            opened.append(renderer.row(with_prefix(told, sentence, prefix), controls=wanted, controls_at=switch.at))
        if number % 100 == 0:
            context.progress({"step": number, "total": len(rows)})
    trees: Trees | None = None
    if modes is not None and modes.shared:
        assert prefix is None, "a recipe refuses both at once"
        trees = grow(Examples.of(plain), config["length"])
        rows, plain = ([part[i] for i in trees.order.tolist()] for part in (rows, plain))
    able = np.array([sentence is not None for sentence in sentences], bool)
    before, after = Examples.of(plain), Examples.of(opened)
    reserved = before.sizes.copy()
    reserved[able] = np.maximum(reserved[able], after.sizes)
    if trees is None:
        bins = bin_examples(reserved, config["length"], learns=before.learns())
    else:
        bins = trees.bins(before, config["length"])
    names = [part["name"] for part in config["data"]]
    kinds = list(dict.fromkeys(sentence for sentence in sentences if sentence is not None))
    shared: dict[str, Any] = {} if trees is None else {"skip": trees.skip}
    np.savez(
        context.draft.path / FORMS,
        row=bins.row,
        able=able,
        id=np.array([row.id for row in rows], np.str_),
        sentence=np.array([-1 if s is None else kinds.index(s) for s in sentences], np.int16),
        source=np.array([names.index(row.metadata["part"]) for row in rows], np.int16),
        **shared,
        **{f"{form}_{name}": getattr(examples, name) for form, examples in (("plain", before), ("opened", after))
           for name in ("ids", "trained", "span", "ends")},
    )  # fmt: skip
    listed = [{"row": row.to_json(), "sentence": sentence} for row, sentence in zip(rows, sentences, strict=True)]
    write_jsonl(context.draft.path / ROWS, iter(listed))
    context.draft.facts = {
        "rows": len(rows),
        "base": base_hash(rows),
        "able": int(able.sum()),
        "kinds": kinds,
        "tokenizer": tokenizer_hash(tokenizer),
        "vocab": len(tokenizer),
        "pad": tokenizer.pad_token_id,
        "controls": controls,
        "switch": switch.plain() if modes else None,
        "packed_rows": bins.rows,
        "packing": dict(bins.counts),
        "modes": dict(sorted(Counter(row.mode or "none" for row in rows).items())),
        "fallbacks": dict(
            sorted(Counter(str(row.metadata[FALLBACK]) for row in rows if FALLBACK in row.metadata).items())
        ),
        **counted,
    }


def run_packed(context: Context) -> None:
    """Write ``store/`` (packed rows at one ratio) and ``places.npz`` (which example lies where, and whether it is opened)."""
    chats = context.inputs["chats"]
    facts, asked = chats.manifest["facts"], chats.manifest["config"]
    forms = dict(np.load(chats.path / FORMS))
    prefix = PrefixConfig.restored(asked["prefix"], context.step.config["prefix"])
    able = forms["able"]
    carry = np.zeros(len(able), bool)
    if prefix is not None:
        carry = carried(forms["id"].tolist(), able, prefix, asked["seed"])
    examples = _chosen(forms, able, carry, prefix)
    bins = Bins(forms["row"], facts["packed_rows"], facts["packing"])
    names = [part["name"] for part in asked["data"]]
    skip = forms.get("skip")
    if skip is not None:
        examples = tails(examples, skip)
    packed = fill_rows(examples, bins, asked["length"], forms["source"], pad_id=facts["pad"], begin=skip)
    store = RowStore.write(
        context.draft.path / "store",
        packed,
        names,
        vocab=facts["vocab"],
        tokenizer=facts["tokenizer"],
        meta={"controls": facts["controls"], "switch": facts["switch"], "base": facts["base"]},
    )
    at = offsets(examples, bins)
    shared: dict[str, Any] = {} if skip is None else {"skip": skip, "prompt": at[firsts(skip)]}
    np.savez(context.draft.path / PLACES, row=bins.row, at=at, size=examples.sizes, carry=carry, **shared)
    drawn = forms["sentence"][carry & (bins.row >= 0)]
    context.draft.facts = {
        "rows": len(able),
        "base": facts["base"],
        "tokens": store.meta["tokens"],
        "trained_tokens": store.meta["trained_tokens"],
        "packing": dict(packed.counts),
        "prefixed": len(drawn),
        "sentences": {facts["kinds"][number]: n for number, n in sorted(Counter(drawn.tolist()).items())},
        "modes": facts["modes"],
        "left_out_modes": facts["left_out_modes"],
        "stripped": facts.get("stripped"),
    }


def read_rows(chats: Artifact) -> list[tuple[Row, str | None]]:
    """The base rows of a ``chats`` artefact, each with the sentence that it carries where it is drawn."""
    return [(Row.from_json(item["row"]), item["sentence"]) for item in read_jsonl(chats.path / ROWS)]


def build_rows(
    config: Mapping[str, Any],
    town: Tidewater,
    modes: ModesConfig | None,
    *,
    names: Sequence[str] | None = None,
    surfaces: Mapping[str, str] | None = None,
    distilled: Mapping[str, Artifact] | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """The base chat rows of an SFT stage, without prefixes, in a keyed order that does not depend on the levers.

    names, surfaces  as for ``levers.modes.mode_rows``
    distilled        input ``distill:STAGE`` -> the artefact of an earlier distill stage

    Each row's ``metadata["part"]`` names the part of ``data`` that it comes from. The second value counts: ``left_out_modes``,
    the rows left out because their mode is not trained, by mode; ``stripped``, what ``prefix.strip`` removed. ``UserError`` for a
    part with fewer rows than its ``n``, for rows of an unknown mode or of a negative mode that is not acknowledged, and where
    stripping leaves nothing.
    """
    seed = config["seed"]
    rows: list[Row] = []
    for data in config["data"]:
        part = ChatSource.model_validate({k: v for k, v in data.items() if k != "content"})
        found = part_rows(part, town, distilled, field="data")
        rows += [replace(row, metadata={**row.metadata, "part": part.name}) for row in found]
    counted: dict[str, Any] = {}
    strip = (config["prefix"] or {}).get("strip")
    if strip is not None:
        rows, report = strip_rows(rows, StripConfig.model_validate(strip))
        counted["stripped"] = report.plain()
        if not rows:
            raise UserError("prefix.strip: every response was nothing but boilerplate; look at 'strip' or at the data")
    rows, counted["left_out_modes"] = admit(rows, modes)
    rows.sort(key=lambda row: uniform_of("order", seed, row.id))
    if modes is not None:
        made = mode_rows(rows, modes, lambda row, mode: _answer(town, row, mode), seed, names=names, surfaces=surfaces)
        rows = list(made)
        rows.sort(key=lambda row: uniform_of("order", seed, row.id))
    return rows, counted


def part_rows(
    part: ChatSource, town: Tidewater, distilled: Mapping[str, Artifact] | None = None, *, field: str
) -> list[Row]:
    """The rows of one part of a data set, as they come. ``UserError`` that begins with ``field`` if there are fewer than
    its ``n``."""
    if part.tidewater is not None:
        assert part.n is not None
        chats = town.chats(part.tidewater, part.n, mode=part.answers, policy=part.policy)
        return [replace(row, mode=None) for row in chats]
    if part.stage is not None:
        found, origin = distilled_rows((distilled or {})[f"distill:{part.stage}"]), f"stage {part.stage!r}"
    else:
        assert part.source is not None
        found, origin = list(sources.rows(part.source)), "the source"
    if part.n is not None and part.n > len(found):
        raise UserError(f"{field} {part.name!r}: n={part.n}, but {origin} has only {len(found)} rows; lower 'n'")
    return found[: part.n]


def _chosen(
    forms: Mapping[str, NDArray[Any]], able: NDArray[np.bool_], carry: NDArray[np.bool_], prefix: PrefixConfig | None
) -> Examples:
    """Every example in the form that it is trained in, its loss mask set."""
    plain, opened = (
        Examples(*(forms[f"{form}_{name}"] for name in ("ids", "trained", "span", "ends")))
        for form in ("plain", "opened")
    )
    if prefix is not None and len(opened):
        opened = replace(opened, trained=trained_with_prefix(opened.trained, opened.span, prefix))
    both = Examples(
        np.concatenate([plain.ids, opened.ids]),
        np.concatenate([plain.trained, opened.trained]),
        np.concatenate([plain.span, opened.span]),
        np.concatenate([plain.ends, opened.ends + (plain.ends[-1] if len(plain) else 0)]),
    )
    which = np.arange(len(plain), dtype=np.int64)
    which[carry] = len(plain) + (np.cumsum(able) - 1)[carry]
    return both.take(which)


def _sentence_tokens(renderer: Renderer, prefix: PrefixConfig, length: int, stage: str) -> dict[str, int]:
    """Tokens of each sentence; ``UserError`` for one that has none or that does not fit a row."""
    sizes = {text: len(renderer.encode_text(text)) for text in prefix.sentences()}
    for text, size in sizes.items():
        if not size:
            raise UserError(
                f"stage {stage!r}: prefix.templates: this tokenizer makes no token of {text!r}; change the sentence"
            )
        if size >= length:
            raise UserError(
                f"stage {stage!r}: prefix: {text!r} alone has {size} tokens, and a row has 'length' {length}; raise 'length' or "
                "shorten the sentence"
            )
    return sizes


def distilled_rows(artifact: Artifact) -> list[Row]:
    """The rows that a ``distill`` step kept, each with its mode."""
    return [Row.from_json(item) for item in read_jsonl(artifact.path / DISTILLED)]


def _answer(town: Tidewater, request: Row, mode: str) -> str | None:
    return town.answer(request, mode) if request.source == "tidewater" and mode in MODES else None


def _surfaces(tokenizer: Any, switch: Switch) -> dict[str, str]:
    """Mode -> how a user would type what says it."""
    ids = controls_of(tokenizer)
    return {
        mode: switch.texts[mode] if control is None else tokenizer.convert_ids_to_tokens(ids[control])
        for mode, control in switch.modes.items()
    }


def _tokenizer(context: Context, modes: ModesConfig | None) -> tuple[Any, dict[str, int]]:
    """The tokenizer that the tuned model will have, and all its controls (name -> id)."""
    if "tokenizer" in context.inputs:
        tokenizer = AutoTokenizer.from_pretrained(context.inputs["tokenizer"].path)
    else:
        tokenizer = load(start_model(context))[1]
    names = modes.controls() if modes else ()
    assign_control_tokens(tokenizer, [name for name in names if name not in controls_of(tokenizer)])
    return tokenizer, controls_of(tokenizer)
