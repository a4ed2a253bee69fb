"""The life of a control token: add -> initialise -> train its rows -> merge -> audit.

A control token is a reserved id of the vocabulary (``special=True, normalized=False``), never a string that a user
could type (DESIGN, decisions 5 and 6). Reserved tokens that the tokenizer already carries are used first, then spare
rows of a padded embedding; the embedding grows only when neither is left. Tied embeddings stay tied.

Names map to ids through the tokenizer itself (``controls_of``), so that a saved directory says what its ids mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Literal

import torch
from tokenizers import AddedToken
from torch import nn

from trimtab.data.encode import TextEncoder
from trimtab.errors import Fault, UserError
from trimtab.seeds import rng_of

Init = Literal["mean", "description", "copy"]
KEY = "trimtab_controls"
"""Where the names live in ``tokenizer_config.json``."""

_RESERVED = re.compile(
    r"<\|?(reserved(_special_token)?_?\d+|control_\d+|unused_?\d+|extra_id_\d+|dummy_\d+)\|?>|\[(unused|control_)\d+\]",
    re.IGNORECASE,
)
_FLAGS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
_NOISE = 0.02
"""Noise of a new row, in standard deviations of the trained rows: tells two tokens apart, moves neither."""


# ---------------------------------------------------------------------- add and initialise


def controls_of(tokenizer: Any) -> dict[str, int]:
    """Control names and ids that ``add_control_tokens`` gave this tokenizer (kept when it is saved and loaded)."""
    return dict(tokenizer.init_kwargs.get(KEY) or {})


def add_control_tokens(
    tokenizer: Any,
    model: Any,
    names: Sequence[str],
    *,
    init: Init = "mean",
    descriptions: Mapping[str, str] | None = None,
    copy_from: str | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """Give every name an id of its own and initialise its rows, input and (untied) output; changes both arguments.

    init  mean         the mean of the ordinary vocabulary's rows
          description  the mean of the rows of ``descriptions[name]``
          copy         the row of the token ``copy_from``
    Every row gets a little noise keyed by (seed, name), so that no two are equal. Returns name -> id for ``names``.
    Raises ``UserError`` for a name already there, a missing description or an unknown token to copy.
    """
    _check_names(names, controls_of(tokenizer))
    encoder = TextEncoder(tokenizer)
    sources = _sources(tokenizer, encoder, names, init, descriptions, copy_from)
    if hasattr(model, "peft_config"):
        raise UserError("model: add control tokens before the adapter is put on (or merge it first)")

    given = assign_control_tokens(tokenizer, names)
    rows_needed = max([*tokenizer.get_vocab().values(), *given.values()]) + 1
    if model.get_input_embeddings().weight.shape[0] < rows_needed:
        model.resize_token_embeddings(rows_needed, mean_resizing=False)
    for weight in _embeddings(model):
        _initialise(weight, given, sources, seed)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        with torch.no_grad():
            for name, token in given.items():
                bias[token] = bias[list(sources[name])].mean()
    return given


def assign_control_tokens(tokenizer: Any, names: Sequence[str]) -> dict[str, int]:
    """Give every name an id of its own, reserved tokens first; changes the tokenizer only.

    For rendering data before the model is at hand: ``add_control_tokens`` gives the same ids to the same names. Errors
    as there; no names is no change.
    """
    taken = controls_of(tokenizer)
    if not names:
        return {}
    _check_names(names, taken)
    free = [token for token in _free_reserved(tokenizer) if token not in taken.values()]
    given = {name: free.pop(0) if free else _add_surface(tokenizer, name) for name in names}
    tokenizer.init_kwargs[KEY] = {**taken, **given}
    return given


def _check_names(names: Sequence[str], taken: Mapping[str, int]) -> None:
    if not names:
        raise UserError("names: at least one control token name is needed")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", name):
            raise UserError(f"names: {name!r} may hold only letters, digits and _ . : -")
        if name in taken:
            raise UserError(f"names: {name!r} is already a control token of this tokenizer (id {taken[name]})")
    if len(set(names)) < len(names):
        raise UserError("names: the same name is given twice")


def _sources(
    tokenizer: Any,
    encoder: TextEncoder,
    names: Sequence[str],
    init: str,
    descriptions: Mapping[str, str] | None,
    copy_from: str | None,
) -> dict[str, list[int]]:
    """The ids whose rows each new row is the mean of."""
    if (descriptions is not None) != (init == "description"):
        raise UserError("descriptions: goes with init='description', and init='description' needs it")
    if (copy_from is not None) != (init == "copy"):
        raise UserError("copy_from: goes with init='copy', and init='copy' needs it")
    if init == "mean":
        ordinary = sorted(set(tokenizer.get_vocab().values()) - encoder.added)
        return dict.fromkeys(names, ordinary)
    if init == "copy":
        vocab = tokenizer.get_vocab()
        if copy_from not in vocab:
            raise UserError(f"copy_from: {copy_from!r} is not a token of this tokenizer")
        return {name: [vocab[copy_from]] for name in names}
    if init != "description":
        raise UserError(f"init: {init!r} is not one of mean, description, copy")
    assert descriptions is not None
    found: dict[str, list[int]] = {}
    for name in names:
        found[name] = encoder.encode(descriptions[name]) if descriptions.get(name) else []
        if not found[name]:
            raise UserError(f"descriptions: no description for {name!r}")
    return found


def _free_reserved(tokenizer: Any) -> list[int]:
    """Reserved added tokens with the right flags that neither the template nor the tokenizer itself uses."""
    used = set(tokenizer.all_special_ids) - {  # reserved ones may be listed as extra special tokens
        i for i, t in tokenizer.added_tokens_decoder.items() if _RESERVED.fullmatch(t.content)
    }
    named = {t for k, t in tokenizer.special_tokens_map.items() if isinstance(t, str)}
    template = str(tokenizer.chat_template or "")
    return [
        i
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if _RESERVED.fullmatch(token.content)
        and i not in used
        and token.content not in named
        and token.content not in template
        and all(getattr(token, flag) == wanted for flag, wanted in _FLAGS.items())
    ]


def _add_surface(tokenizer: Any, name: str) -> int:
    surface = f"<|trimtab:{name}|>"
    if surface in tokenizer.get_vocab():
        raise UserError(f"names: the tokenizer already has a token {surface}; choose another name")
    tokenizer.add_tokens([AddedToken(surface, **_FLAGS)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(surface))


def _tied(model: Any) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _embeddings(model: Any) -> list[nn.Parameter]:
    """The matrices whose rows are tokens, [rows, hidden]: input, and output where it is not tied."""
    output = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight]
    return weights if output is None or _tied(model) else [*weights, output.weight]


@torch.no_grad()
def _initialise(weight: nn.Parameter, given: Mapping[str, int], sources: Mapping[str, list[int]], seed: int) -> None:
    new = set(given.values())
    rows = {name: weight[[i for i in ids if i not in new]].float().mean(0) for name, ids in sources.items()}
    spread = float(weight[sorted({i for ids in sources.values() for i in ids})].float().std())
    for name, token in given.items():
        noise = rng_of("control-token", seed, name).standard_normal(weight.shape[1])
        row = rows[name] + _NOISE * spread * torch.from_numpy(noise).to(weight.device, torch.float32)
        weight[token] = row.to(weight.dtype)


# ---------------------------------------------------------------------- train


class TrainableRows(AbstractContextManager["TrainableRows"]):
    """Training of chosen embedding rows; made by ``trainable_rows``.

    As a context it masks the gradient of every other row, so that full training leaves them alone. Weight decay acts
    without a gradient: put ``parameters`` into a group with ``weight_decay=0`` (``check`` says so when it is not).
    With LoRA, give ``peft_kwargs`` to ``LoraConfig`` instead and enter no context. Parameters must be whole (one
    process or DDP, not sharded by FSDP).
    """

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.ids = sorted(set(ids))
        self.parameters: list[nn.Parameter] = _embeddings(model)
        rows = min(weight.shape[0] for weight in self.parameters)
        if not self.ids or self.ids[0] < 0 or self.ids[-1] >= rows:
            raise UserError(f"ids: each must be a row of the embedding (0 to {rows - 1}), and there must be one")
        name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        indices: dict[str, list[int]] | list[int] = self.ids
        if len(self.parameters) > 1:
            out = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
            indices = {name.rsplit(".", 1)[-1]: self.ids, out.rsplit(".", 1)[-1]: self.ids}
        self.peft_kwargs: dict[str, Any] = {"trainable_token_indices": indices}
        self._hooks: list[Any] = []

    def __enter__(self) -> TrainableRows:
        for weight in self.parameters:
            weight.requires_grad_(True)
            self._hooks.append(weight.register_hook(self._mask))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _mask(self, gradient: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(gradient)
        kept[self.ids] = gradient[self.ids]
        return kept

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """``UserError`` if the optimizer would decay the rows that are not trained."""
        held = {id(weight) for weight in self.parameters}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(p) in held for p in group["params"]):
                raise UserError("weight_decay: must be 0 for the embeddings while only some of their rows are trained")


def trainable_rows(model: Any, ids: Sequence[int]) -> TrainableRows:
    """A handle for training only these rows: a context for full training, ``.peft_kwargs`` for LoRA."""
    return TrainableRows(model, ids)


# ---------------------------------------------------------------------- merge


@torch.no_grad()
def merge_adapter(model: Any) -> Any:
    """The plain model with LoRA and trained rows merged in, tied as before; consumes the PEFT model.

    The sums are made, and compared with the unmerged model, in float32, and rounded once to the dtype of the base: in
    bfloat16 small adapters would be lost to rounding, and the comparison with them. Raises ``Fault`` if the logits of the
    merged model differ from those of the unmerged one by more than float32's rounding.
    """
    if not hasattr(model, "peft_config"):
        raise UserError("model: it has no adapter to merge")
    base = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype
    tied = bool(getattr(base.config, "tie_word_embeddings", False))
    probe = _probe_ids(model)
    training = model.training
    model.float().eval()
    before = model(input_ids=probe).logits
    merged = model.merge_and_unload(safe_merge=True)
    if tied:
        merged.tie_weights()
        if not _tied(merged):
            raise Fault("merge: the embeddings are tied in the config but came apart in the merge")
    after = merged(input_ids=probe).logits
    allowed = 1e-3 * max(1.0, float(before.abs().max()))
    worst = float((before - after).abs().max())
    if not worst <= allowed:
        raise Fault(f"merge: logits differ by {worst:.3g} (allowed {allowed:.3g}); the adapter was not merged rightly")
    return merged.to(dtype).train(training)


def _probe_ids(model: Any) -> torch.Tensor:
    """[2, 32] ids: a spread of the vocabulary, and the rows that an adapter trains."""
    weight = model.get_input_embeddings().weight
    trained: list[int] = []
    for config in model.peft_config.values():
        indices = getattr(config, "trainable_token_indices", None) or []
        trained += [i for ids in (indices.values() if isinstance(indices, dict) else [indices]) for i in ids]
    spread = rng_of("merge-probe").integers(0, weight.shape[0], 64).tolist()
    ids = [*dict.fromkeys(trained), *spread][:64]
    return torch.tensor(ids, device=weight.device).reshape(2, 32)


# ---------------------------------------------------------------------- audit


def audit(tokenizer: Any, model: Any | None, controls: Mapping[str, int]) -> list[str]:
    """What is wrong with these control tokens, one line each; empty if nothing is. Run it at training and at load.

    The tokenizer: flags, one id, round trip, hidden by ``skip_special_tokens``, no second meaning, no look-alike that
    a normaliser turns into it. The model (unless None): the rows exist, are finite, are not zero, equal no other row.
    """
    problems: list[str] = []
    names: dict[int, str] = {}
    for name, token in controls.items():
        if token in names:
            problems.append(f"{name}: shares id {token} with {names[token]}")
        names.setdefault(token, name)
        problems += [f"{name}: {problem}" for problem in _token_problems(tokenizer, token)]
        if model is not None:
            problems += [f"{name}: {problem}" for problem in _row_problems(model, token)]
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) and model is not None and not _tied(model):
        problems.append("model: tie_word_embeddings is set, but input and output embeddings are apart")
    return problems


def _token_problems(tokenizer: Any, token: int) -> list[str]:
    added = tokenizer.added_tokens_decoder.get(token)
    if added is None:
        return [f"id {token} is not an added token"]
    surface = added.content
    found = [
        f"flag {flag} is {getattr(added, flag)}, must be {wanted}"
        for flag, wanted in _FLAGS.items()
        if getattr(added, flag) != wanted
    ]

    def ids_of(text: str) -> list[int]:
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return list(encoding.ids)

    if ids_of(surface) != [token]:
        found.append(f"{surface} encodes to {ids_of(surface)}, not to [{token}]")
    if ids_of(f"a{surface}b").count(token) != 1:
        found.append(f"{surface} is lost between letters")
    if tokenizer.decode([token], skip_special_tokens=False) != surface:
        found.append(f"{surface} does not round-trip")
    if surface in tokenizer.decode([token], skip_special_tokens=True):
        found.append(f"{surface} is shown even with skip_special_tokens=True")
    roles = [key for key, text in tokenizer.special_tokens_map.items() if text == surface]
    if roles:
        found.append(f"{surface} is the tokenizer's {roles[0]}")
    if surface in str(tokenizer.chat_template or ""):
        found.append(f"{surface} stands in the chat template")
    for kind, text in _look_alikes(surface):
        if token in ids_of(text):
            found.append(f"{surface} can be typed as {text!r} ({kind})")
    return found


def _look_alikes(surface: str) -> list[tuple[str, str]]:
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in surface)
    middle = len(surface) // 2
    candidates = [
        ("full width", wide),
        ("upper case", surface.upper()),
        ("zero width inside", surface[:middle] + "\u200b" + surface[middle:]),
        ("soft hyphen inside", surface[:middle] + "\u00ad" + surface[middle:]),
        ("accent inside", surface[:middle] + "\u0301" + surface[middle:]),
        ("control character inside", surface[:middle] + "\x00" + surface[middle:]),
    ]
    return [(kind, text) for kind, text in candidates if text != surface]


@torch.no_grad()
def _row_problems(model: Any, token: int) -> list[str]:
    found: list[str] = []
    for weight, side in zip(_embeddings(model), ("input", "output")):
        if token >= weight.shape[0]:
            found.append(f"id {token} has no {side} row ({weight.shape[0]} rows)")
            continue
        row = weight[token]
        if not bool(torch.isfinite(row).all()):
            found.append(f"its {side} row is not finite")
        elif not bool(row.any()):
            found.append(f"its {side} row is zero (not initialised)")
        else:
            equal = (weight == row).all(dim=1)
            equal[token] = False
            if bool(equal.any()):
                found.append(f"its {side} row equals that of id {int(equal.nonzero()[0, 0])}")
    return found
