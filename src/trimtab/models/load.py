"""Open a model that exists: a Hub-layout directory, a Hub id, or one that is known by name (the packaged SmolLM2, the
R1 stand-in). One door for all.

Weights come from safetensors only (a pickle can run code) and no remote code is executed. Whatever is missing or does
not fit is an error: no weight is ever left at a random value.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.artifact import model_files
from trimtab.errors import Fault, UserError
from trimtab.models import smollm2, stand_in
from trimtab.models.config import R1_STAND_IN, SMOLLM2, LoadConfig
from trimtab.seeds import digest

if TYPE_CHECKING:
    import torch

_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load(model: LoadConfig | str | Path, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """``(model, tokenizer)``: the model in eval mode on ``device`` (default: CPU), the tokenizer padding on the left.

    A padding token that equals the end token is replaced by a distinct one where the vocabulary has one. ``UserError``
    names a wrong directory or id, ``Fault`` a damaged file or a missing network.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = as_config(model)
    where, options = resolve(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        with no_bars():
            result: Any = AutoModelForCausalLM.from_pretrained(
                where, dtype=config.dtype, use_safetensors=True, output_loading_info=True, **options
            )
        loaded, info = result
    except SafetensorError as error:
        raise Fault(f"{where}: a weight file is damaged ({error}); fetch or make the model again") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise explained(error, config, where) from None
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            names = ", ".join(map(str, sorted(info[kind], key=str)[:3]))
            raise Fault(f"{where}: {kind.replace('_', ' ')} in the weights ({names}); the model is not whole")
    tokenizer.padding_side = "left"
    separate_pad(loaded, tokenizer)
    return loaded.to(device or "cpu").eval(), tokenizer


def load_tokenizer(model: LoadConfig | str | Path) -> Any:
    """The tokenizer of a model alone; errors as for ``load``."""
    from transformers import AutoTokenizer

    config = as_config(model)
    where, options = resolve(config)
    try:
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        raise explained(error, config, where) from error


def as_config(model: LoadConfig | str | Path) -> LoadConfig:
    """A path or an id as settings, the rest at their defaults."""
    return model if isinstance(model, LoadConfig) else LoadConfig.model_validate({"load": str(model)})


def best_device() -> str:
    """``cuda`` where there is one, else ``cpu``; what generation runs on (training asks Accelerate)."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def identity(model: LoadConfig | str | Path) -> str:
    """A hash of what would be loaded, without loading it and without torch: goes into step hashes.

    Packaged: the GGUF's sha256 and the version of the conversion. Stand-in: its settings and version. Directory: the
    sha256 of every file but cards and hidden ones. Hub id: ``id@revision`` (without a revision ``main``, which may move: pin it).
    """
    config = as_config(model)
    if config.load == SMOLLM2:
        return smollm2.content_identity()
    if config.load == R1_STAND_IN:
        return stand_in.content_identity()
    where = _local(config)
    if where is None:
        return digest({"hub": f"{config.load}@{config.revision or 'main'}"})
    return digest({"files": model_files(where)})


def separate_pad(model: Any, tokenizer: Any) -> None:
    """Make the padding token differ from every end token, if the vocabulary has a token for it (in place)."""
    ends = stop_ids(model, tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_added_vocab()
        taken = ends | {tokenizer.bos_token_id}
        found = next((name for name in _PADS if name in vocabulary and vocabulary[name] not in taken), None)
        if found is not None:
            tokenizer.pad_token = found
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: the tokenizer's end token and those of the generation settings."""
    ends: set[int] = set()
    settings = getattr(model, "generation_config", None)
    for value in (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
        ends |= set(value) if isinstance(value, list | tuple | set) else {value} if value is not None else set()
    return frozenset(ends)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' progress bars off the terminal; ours, if any, are the caller's to draw."""
    from transformers.utils import logging as hf_logging

    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def resolve(config: LoadConfig) -> tuple[Path | str, dict[str, Any]]:
    """The directory or Hub id meant, and the options with which transformers opens it."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if config.load == SMOLLM2:
        where: Path | None = smollm2.smollm2_directory()
    else:
        where = stand_in.stand_in_directory() if config.load == R1_STAND_IN else _local(config)
    if where is not None:
        return where, options | {"local_files_only": True}
    if config.revision is not None:
        options["revision"] = config.revision
    return config.load, options


def _local(config: LoadConfig) -> Path | None:
    """The directory meant, or None if ``load`` is a Hub id (``name`` or ``owner/name``)."""
    path = Path(config.load).expanduser()
    if path.is_dir():
        if config.revision is not None:
            raise UserError(f"revision={config.revision!r} belongs to a Hub id; load={config.load!r} is a directory")
        if not (path / "config.json").is_file():
            raise UserError(f"load={config.load!r}: no config.json there; it is not a model directory in Hub layout")
        return path
    if path.is_absolute() or config.load.startswith((".", "~")) or config.load.count("/") > 1:
        raise UserError(f"load={config.load!r}: no such directory")
    return None


def explained(error: Exception, config: LoadConfig, where: Path | str) -> Fault | UserError:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(where, Path):
        return Fault(f"{where}: cannot be loaded ({line}); fetch or make the model again")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    network = any(word in str(error).lower() for word in ("connect", "offline", "internet", "resolve", "timed out"))
    if offline or network:
        why = "HF_HUB_OFFLINE is set" if offline else "the Hub cannot be reached"
        return Fault(
            f"load={config.load!r}: {why} and the model is not in the local cache; "
            f"fetch it where there is a network (`hf download {config.load}`) or give a directory"
        )
    return UserError(f"load={config.load!r}: {line}; check the id and the revision")
