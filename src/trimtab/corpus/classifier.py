"""A Hugging Face sequence classifier as a scorer: six labels are the levels, two are cut by a probability.

Made for heads such as ``locuslab/safety-classifier_gte-large-en-v1.5`` (2504.16980, sec. 3.1). A long text is read in
windows of tokens, an eighth shared with the neighbour, and the highest level counts. Text is text: a "[SEP]" that stands in
a document is spelt out and never becomes the tokenizer's own. Weights run in 32-bit floats: in 16 bits the labels of about
0.2 % of documents depend on what they are batched with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trimtab.artifact import model_files
from trimtab.corpus.config import ClassifierScorer
from trimtab.corpus.lazy import Lazy
from trimtab.corpus.scorers import Scored, highest
from trimtab.corpus.windows import OVERLAP
from trimtab.errors import Fault, UserError
from trimtab.seeds import digest


class Classifier(Lazy):
    """The scorer of a ``ClassifierScorer``; ``directory`` is that of its stage. The model is loaded at the first score."""

    reads_text = True

    def __init__(self, config: ClassifierScorer, directory: Path | None = None) -> None:
        self.config = config
        self.where: str = str(directory) if directory is not None else str(config.model)
        self.name = f"classifier {config.stage or config.model}"
        path = Path(self.where).expanduser()
        if path.is_dir():
            self.where = str(path)
        elif directory is not None or path.is_absolute() or self.where.startswith((".", "~")):
            raise UserError(f"score: no directory {self.where}; give the classifier's directory or Hub id")
        content = _content(path) if path.is_dir() else f"{self.where}@{config.revision or 'main'}"
        self.identity = digest({"scorer": "classifier", "model": content, **_settings(config)})

    def score(self, texts: Sequence[str], metadata: Sequence[Mapping[str, Any]] = ()) -> list[Scored]:
        """One score per text. ``UserError`` for a model that is no such head, ``Fault`` for numbers that are not finite."""
        _, tokenizer, head = self.opened
        if not texts:
            return []
        spelt = tokenizer(
            [text.encode("utf-8", "replace").decode("utf-8") for text in texts], truncation=True,
            max_length=self.config.window, stride=self.config.window // OVERLAP, return_overflowing_tokens=True,
            split_special_tokens=True,
        )  # fmt: skip
        owner = spelt.pop("overflow_to_sample_mapping")
        parts: list[list[Scored]] = [[] for _ in texts]
        # Windows of one length side by side: little padding. The order within a text does not matter.
        order = sorted(range(len(owner)), key=lambda i: (-len(spelt["input_ids"][i]), i))
        for start in range(0, len(order), self.config.batch):
            batch = order[start : start + self.config.batch]
            shares = self._shares({name: [column[i] for i in batch] for name, column in spelt.items()})
            for i, share in zip(batch, shares, strict=True):
                parts[owner[i]].append(head.read(share))
        return [highest(windows) for windows in parts]

    def _shares(self, columns: dict[str, list[list[int]]]) -> list[list[float]]:
        """The probability of every label, window by window."""
        import torch

        model, tokenizer, head = self.opened
        inputs = tokenizer.pad(columns, padding_side="right", return_tensors="pt").to(model.device)
        with torch.inference_mode():
            logits = model(**inputs).logits.double()
        if not bool(torch.isfinite(logits).all()):
            raise Fault(f"{self.where}: the classifier's scores are not finite (NaN); its weights are broken")
        return list((logits.sigmoid() if head.several else logits.softmax(-1)).tolist())

    @cached_property
    def opened(self) -> tuple[Any, Any, _Head]:
        """(model, tokenizer, how its labels are read)."""
        import torch

        model, tokenizer = self._load()
        head = _Head(model.config, self.config.cuts, self.where)
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        context = min((int(n) for n in limits if n and 0 < n < 10**9), default=None)
        if context is not None and self.config.window > context:
            raise UserError(f"score: window={self.config.window} is more than the {context} tokens of {self.where}")
        if not tokenizer.is_fast:
            raise UserError(f"score: {self.where} has no fast tokenizer (tokenizer.json), which windows are cut with")
        if tokenizer.pad_token_id is None:
            raise UserError(f"score: the tokenizer of {self.where} has no padding token; set pad_token in its settings")
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer, head

    def _load(self) -> tuple[Any, Any]:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        config = self.config
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if Path(self.where).is_dir():
            options["local_files_only"] = True
        elif config.revision is not None:
            options["revision"] = config.revision
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            AutoConfig.from_pretrained(self.where, **options)  # says first, and best, that code would have to run
            tokenizer = AutoTokenizer.from_pretrained(self.where, **options)
            result: Any = AutoModelForSequenceClassification.from_pretrained(
                self.where, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            hint = "; it needs code of its own: set trust_remote_code" if "trust_remote_code" in str(error) else ""
            raise UserError(f"score: {self.where}: no sequence classifier could be loaded ({line}){hint}") from None
        finally:
            if shown:
                logging.enable_progress_bar()
        model, info = result
        if lacking := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise Fault(f"{self.where}: the weights lack {', '.join(lacking[:3])}; it is no whole sequence classifier")
        return model, tokenizer


class _Head:
    """How a head's probabilities are read as a level.

    Six labels: the likeliest, of equals the higher; a label whose name ends in a digit from 0 to 5 is that level if all
    six do, else its place counts. Two labels: the number of cuts that the probability of the second reaches.
    """

    def __init__(self, config: Any, cuts: Sequence[float], where: str) -> None:
        self.cuts = cuts
        self.several = config.problem_type == "multi_label_classification"
        names = [str(config.id2label[i]) for i in range(config.num_labels)]
        if len(names) not in (2, 6):
            raise UserError(
                f"score: {where} has {len(names)} labels ({', '.join(names[:8])}); a scorer has six, the levels 0 to 5, or "
                "two, safe and unsafe"
            )
        named = [int(found[1]) for name in names if (found := re.search(r"(?<!\d)([0-5])$", name))]
        self.levels = named if sorted(named) == [0, 1, 2, 3, 4, 5] else list(range(len(names)))
        self.names = names

    def read(self, share: Sequence[float]) -> Scored:
        if len(share) == 2:
            return Scored(sum(share[1] >= cut for cut in self.cuts), f"{self.names[1]} {share[1]:.3f}")
        best = max(range(6), key=lambda i: (share[i], self.levels[i]))
        return Scored(self.levels[best], f"{self.names[best]} {share[best]:.3f}")


def _settings(config: ClassifierScorer) -> dict[str, Any]:
    """What decides a score beside the model."""
    return {"window": config.window, "cuts": list(config.cuts)}


def _content(directory: Path) -> str:
    """Digest of a model directory's files, cards and hidden ones left out."""
    if not (directory / "config.json").is_file():
        raise UserError(f"score: no config.json in {directory}; it is not a model directory in Hub layout")
    return digest(model_files(directory))
