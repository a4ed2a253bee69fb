"""Fine-tune a sequence classifier that scores text from 0 (safe) to 5, as 2504.16980 (app. B.1) did.

Six-way cross-entropy, which did better there than regression; the loss on texts scored above 0 may weigh more; the head may
be trained alone first. What comes out is a Hub-layout directory that ``corpus.classifier`` and transformers open unchanged.

The labels are the user's, and the scores mean no more than they do. Trained on *requests* (as without a Hub it has to be), a
classifier tells talk of harmful requests from other talk; it has seen no harmful page, as the paper's has. Of a text longer
than ``length`` tokens, one window is read in each pass: any, if its score is 0, since the highest of a text's windows is its
score; else the first. Every choice is keyed, so the same settings on the same machine give the same weights. One process; a
killed training starts again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.corpus.config import ClassifierScorer, LabelledSource, ScorerTraining
from trimtab.data.sources import rows
from trimtab.errors import Fault, UserError
from trimtab.models.config import LoadConfig
from trimtab.models.load import explained, no_bars, resolve
from trimtab.models.minilm import LAYERS, minilm_directory
from trimtab.seeds import rng_of, seed_of, uniform_of
from trimtab.types import Row

if TYPE_CHECKING:
    import torch

LEVELS = 6
WARMUP = 0.06
"""Share of the steps in which the learning rate grows; it then falls to 0 in a straight line."""
WEIGHT_DECAY = 1e-3
"""The paper's."""
_GROUP = 16
"""Batches whose texts are sorted by length together, so that little is padded."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Labelled:
    """The labelled texts: rows with ``text`` and ``metadata["score"]``, for training and held out; and what was left out.

    ``repeats`` are texts that came twice (the higher score is kept, as the highest level wins everywhere).
    """

    train: list[Row]
    holdout: list[Row]
    repeats: int


def labelled_texts(config: ScorerTraining) -> Labelled:
    """Read the sources and hold out the texts whose keyed number is below ``holdout``: equal texts are on one side.

    ``UserError`` for a text without a score from 0 to 5, or where training or hold-out would lack safe or unsafe texts.
    """
    best: dict[str, Row] = {}
    repeats = 0
    for part in config.data:
        for row in _scored(part):
            text = row.text or ""
            known = best.get(text)
            repeats += known is not None
            if known is None or known.metadata["score"] < row.metadata["score"]:
                best[text] = row
    sides: tuple[list[Row], list[Row]] = ([], [])
    for text, row in best.items():
        sides[uniform_of("scorer", config.seed, "holdout", text) < config.holdout].append(row)
    for name, side in zip(("for training", "held out"), sides):
        unsafe = sum(row.metadata["score"] > 0 for row in side)
        if not 0 < unsafe < len(side):
            raise UserError(
                f"scorer: of {len(side)} texts {name} {unsafe} are scored above 0; 'data' must hold enough of both"
            )
    return Labelled(*sides, repeats)


def _scored(part: LabelledSource) -> Iterator[Row]:
    source = part.source
    if part.n is not None:
        if source.take is not None:
            raise UserError(f"scorer: {source.source_label!r} has both 'n' and the source's 'take'; leave one out")
        source = source.model_copy(update={"take": part.n})
    for row in rows(source):
        text = row.text
        if row.messages is not None:
            text = next((message["content"] for message in reversed(row.messages) if message["role"] == "user"), None)
        if not text or not text.strip():
            raise UserError(f"scorer: row {row.id!r} of {source.source_label!r} has no text and no user message")
        score = row.metadata.get("score") if part.score is None else part.score
        if type(score) is not int or not 0 <= score < LEVELS:
            raise UserError(
                f"scorer: row {row.id!r} of {source.source_label!r} has score {score!r} in its metadata; set 'score' for "
                "the whole source, or give each row an integer from 0 to 5"
            )
        yield Row(id=row.id, text=text, source=row.source, category=row.category, metadata={"score": score})


def train_scorer(config: ScorerTraining, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Train on ``config.data`` and write the classifier to ``out``; returns ``{facts, card}``, both JSON-ready.

    facts     texts per score for training and held out, repeats, steps, tokens, last loss
    card      ``corpus.scorecard`` on the texts held out, whole, in windows of ``length``
    progress  gets ``{step, total, loss}``

    ``UserError`` for data or a base that will not do, ``Fault`` for a loss that is not finite.
    """
    import torch

    from trimtab.corpus.classifier import Classifier
    from trimtab.corpus.scorecard import score_card

    data = labelled_texts(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("scorer", config.seed, "head"))
        model, tokenizer = load_encoder(config)
        facts = _fit(model, tokenizer, data.train, config, progress)
    with no_bars():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    for name, side in (("train", data.train), ("holdout", data.holdout)):
        counts = Counter(row.metadata["score"] for row in side)
        facts[name] = {str(level): counts[level] for level in range(LEVELS)}
    scorer = Classifier(ClassifierScorer(kind="classifier", model=str(out), window=config.length))
    card = {**score_card(scorer, data.holdout), "scorer": config.base}
    return {"facts": facts | {"repeats": data.repeats}, "card": card}


def load_encoder(config: ScorerTraining) -> tuple[Any, Any]:
    """(classifier in 32-bit floats with a new head of six labels, tokenizer); the head is drawn from torch's generator.

    ``UserError`` for a base that is none or a ``length`` that it cannot read, ``Fault`` for one whose weights are not whole.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    where: Path | str
    settings: dict[str, Any] = {"num_labels": LEVELS}
    load = LoadConfig(load=config.base, revision=config.revision)
    if config.base in LAYERS:
        if config.revision is not None:
            raise UserError(f"scorer: base {config.base!r} is packaged and takes no 'revision'")
        where, options = minilm_directory(), {"trust_remote_code": False, "local_files_only": True}
        settings["num_hidden_layers"] = LAYERS[config.base]
    else:
        where, options = resolve(load)
    try:
        with no_bars(), _quiet():
            shape = AutoConfig.from_pretrained(where, **settings, **options)
            tokenizer = AutoTokenizer.from_pretrained(where, **options)
            result: Any = AutoModelForSequenceClassification.from_pretrained(
                where, config=shape, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise explained(error, load, where) from None
    model, info = result
    inside = f"{model.base_model_prefix}."
    if lacking := sorted(name for name in _names(info) if name.startswith(inside)):
        raise Fault(f"{where}: the weights lack {', '.join(lacking[:3])}; it is no whole encoder")
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise UserError(f"scorer: {config.base} has no fast tokenizer with a padding token, which scoring needs")
    context = getattr(model.config, "max_position_embeddings", None) or config.length
    if config.length > context:
        raise UserError(f"scorer: length={config.length} is more than the {context} tokens that {config.base} reads")
    model.config.id2label = {level: f"score_{level}" for level in range(LEVELS)}
    model.config.label2id = {f"score_{level}": level for level in range(LEVELS)}
    model.config.problem_type = "single_label_classification"
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = context
    return model, tokenizer


def _names(info: dict[str, Any]) -> Iterator[str]:
    """Names of the weights that did not come from the file."""
    for kind in ("missing_keys", "mismatched_keys"):
        yield from (name if isinstance(name, str) else name[0] for name in info[kind])


@contextmanager
def _quiet() -> Iterator[None]:
    """A new head, and layers that are left out, are meant: no warning of them."""
    import logging

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# -- training --------------------------------------------------------------------------------------------------------------


def _fit(
    model: Any, tokenizer: Any, train: Sequence[Row], config: ScorerTraining, progress: Progress | None
) -> dict[str, Any]:
    """Train in place: the head alone first where asked for, then everything."""
    import torch

    spelt = tokenizer(
        [(row.text or "").encode("utf-8", "replace").decode("utf-8") for row in train],
        truncation=True, max_length=config.length, return_overflowing_tokens=True, split_special_tokens=True,
    )  # fmt: skip
    windows: list[list[list[int]]] = [[] for _ in train]
    for owner, ids in zip(spelt["overflow_to_sample_mapping"], spelt["input_ids"], strict=True):
        if not windows[owner] or train[owner].metadata["score"] == 0:
            windows[owner].append(ids)
    scores = torch.tensor([row.metadata["score"] for row in train])
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    inner = {id(p) for p in model.base_model.parameters()}
    head = [p for p in model.parameters() if id(p) not in inner]
    per_epoch = math.ceil(len(train) / config.batch)
    parts = [
        ("head", config.head_epochs, config.head_lr, head),
        ("all", config.epochs, config.lr, [*model.parameters()]),
    ]
    counts = [round(epochs * per_epoch) or (1 if epochs else 0) for _, epochs, _, _ in parts]
    done, tokens, loss = 0, 0, math.nan
    for (name, _, lr, parameters), steps in zip(parts, counts, strict=True):
        model.requires_grad_(name == "all")
        for p in parameters:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
        for step in range(steps):
            if step % per_epoch == 0:
                epoch = f"{name} {step // per_epoch}"
                texts = _drawn(windows, config.seed, epoch)
                order = batches([len(ids) for ids in texts], config.batch, config.seed, epoch)
            chosen = order[step % per_epoch]
            torch.manual_seed(seed_of("scorer", config.seed, name, step))  # dropout
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps)
            loss = _step(model, tokenizer, [texts[i] for i in chosen], scores[chosen], config.unsafe_weight, optimizer)
            tokens += sum(len(texts[i]) for i in chosen)
            done += 1
            if not math.isfinite(loss):
                raise Fault(f"scorer: the loss of step {done} is not finite; lower 'lr' or 'head_lr'")
            if progress is not None:
                progress({"step": done, "total": sum(counts), "loss": loss})
    model.requires_grad_(True).eval()
    return {"steps": done, "tokens": tokens, "loss": round(loss, 4)}


def _drawn(windows: Sequence[Sequence[list[int]]], seed: int, epoch: str) -> list[list[int]]:
    """One window of each text for one pass."""
    rng = rng_of("scorer", seed, "windows", epoch)
    return [parts[int(rng.integers(len(parts)))] for parts in windows]


def batches(lengths: Sequence[int], size: int, seed: int, epoch: str) -> list[list[int]]:
    """One pass: every index once, in batches of ``size`` (the last of its group may be smaller) of about equal lengths.

    The order is drawn by name; groups of 16 batches are sorted by length, and then the batches are shuffled.
    """
    rng = rng_of("scorer", seed, "order", epoch)
    order = rng.permutation(len(lengths)).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), size * _GROUP):
        group = sorted(order[start : start + size * _GROUP], key=lambda i: lengths[i])
        found += [group[i : i + size] for i in range(0, len(group), size)]
    return [found[i] for i in rng.permutation(len(found)).tolist()]


def _step(
    model: Any, tokenizer: Any, ids: list[list[int]], scores: torch.Tensor, unsafe_weight: float, optimizer: Any
) -> float:
    """One step on one batch; the loss is the weighted mean of the texts' cross-entropies."""
    import torch

    inputs = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt").to(model.device)
    scores = scores.to(model.device)
    optimizer.zero_grad(set_to_none=True)
    each = torch.nn.functional.cross_entropy(model(**inputs).logits.float(), scores, reduction="none")
    weights = torch.where(scores > 0, unsafe_weight, 1.0)
    loss = (each * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return float(loss.detach())


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: up over ``WARMUP`` of the steps, then down to nearly 0."""
    rise = max(1, round(WARMUP * steps))
    return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise + 1)
