"""Data sets of the Hub by name, each at one commit: prompts only, by the columns that its card names.

``TRAINING_CARDS`` holds what a plain ``source: {hub: ...}`` cannot express of a training split; its answers are the safe
ones that the set was made with. Of the sets for evaluation (``HUB_CARDS``) no other column is read into a row, so the
sets' completions and optimisation targets (``completion`` of WildJailbreak, ``Target`` of JailbreakBench, reference
answers of GSM8K beyond the number) never leave the Hub's cache. ``datasets`` keeps what it fetched below ``HF_HOME``;
afterwards no network is needed. Some sets are gated: one accepts their terms on the Hub and logs in. The commits, columns
and counts are those that public loaders of the sets agree on (docs/tasks.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.setcard import ASK_NUMBER, PromptSet, choice_row, prompt_row
from trimtab.errors import Fault, UserError
from trimtab.types import Harm, Row

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubCard(PromptSet):
    """A prompt set that is one split of a Hub data set.

    columns  all that is read of it
    options  further arguments of ``load_dataset``
    to_row   one record, by its position in the split, as a row; None leaves it out
    """

    hub: str
    config: str | None
    split: str
    commit: str
    columns: tuple[str, ...]
    to_row: Callable[[int, Record], Row | None]
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False

    def found(self) -> Iterator[Row]:
        for index, record in enumerate(_records(self)):
            row = self.to_row(index, record)
            if row is not None:
                yield row

    @property
    def pins(self) -> dict[str, Any]:
        return {"hub": self.hub, "config": self.config, "split": self.split, "commit": self.commit}

    @property
    def origin(self) -> str:
        config = "" if self.config is None else f", configuration {self.config}"
        return f"{self.hub} on the Hub{config}, split {self.split}" + (" (gated)" if self.gated else "")

    @property
    def revision(self) -> str:
        return self.commit

    @property
    def offline(self) -> bool:
        return False


def _records(card: HubCard) -> Iterator[Record]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    where = f"prompt set {card.name!r} ({card.hub} on the Hub)"
    absent = (
        f"{where}: the Hub cannot be reached and the set is not in its cache; read the set once where there is a "
        "network, with the same HF_HOME, or leave it out"
    )
    try:
        data = datasets.load_dataset(
            card.hub, card.config, split=card.split, revision=card.commit, **dict(card.options)
        )
    except (ConnectionError, OfflineModeIsEnabled, TimeoutError):
        raise Fault(absent) from None
    except datasets.exceptions.DatasetNotFoundError:
        if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"):
            raise Fault(absent) from None
        what = (
            "it is gated: accept its terms on its page and run `hf auth login`"
            if card.gated
            else "log in, or report this"
        )
        raise UserError(f"{where}: the Hub does not give it out; {what}") from None
    except HfHubHTTPError as error:
        raise Fault(f"{where}: the Hub answered {str(error).splitlines()[0]}; try again later") from None
    except ValueError as error:
        # In offline mode `datasets` says so when the cache holds another configuration or commit only.
        raise Fault(f"{where}: {str(error).splitlines()[0]}") from None
    if missing := sorted(set(card.columns) - set(data.column_names)):
        raise Fault(
            f"{where}: no column {missing[0]!r} (there are {', '.join(data.column_names)}); report this as a bug"
        )
    yield from data.select_columns(list(card.columns))


# -- one record as a row ---------------------------------------------------------------------------------------------------


def _gsm8k(index: int, record: Record) -> Row:
    said = record["answer"].rpartition("####")[2].strip().replace(",", "")
    try:
        number = int(said)
    except ValueError:
        raise UserError(f"row 'gsm8k/{index}': its answer ends in {said[-40:]!r}, not in #### and a number") from None
    return prompt_row(
        "gsm8k",
        str(index),
        f"{record['question'].strip()}\n\n{ASK_NUMBER}",
        "benign",
        "grade-school maths",
        {"answer": number},
    )


def _mbpp(index: int, record: Record) -> Row:
    tests = "\n".join(record["test_list"])
    prompt = (
        f"{record['prompt'].strip()}\n\nWrite it in Python, as one block of code that passes these tests:\n\n"
        f"```python\n{tests}\n```"
    )
    test = "\n".join((*record["test_imports"], *record["test_list"]))
    return prompt_row("mbpp", str(record["task_id"]), prompt, "benign", "code", {"test": test})


def _truthfulqa(index: int, record: Record) -> Row:
    targets = record["mc1_targets"]
    return choice_row(
        "truthfulqa",
        str(index),
        record["question"],
        targets["choices"],
        list(targets["labels"]).index(1),
        "misconceptions",
    )


def _xstest(name: str, label: str, harm: Harm) -> Callable[[int, Record], Row | None]:
    def to_row(index: int, record: Record) -> Row | None:
        if record["label"] != label:
            return None
        return prompt_row(name, str(index), record["prompt"], harm, record["type"])

    return to_row


def _orbench(index: int, record: Record) -> Row:
    return prompt_row("orbench-hard", str(index), record["prompt"], "contrast", record["category"])


def _jailbreakbench(name: str, harm: Harm) -> Callable[[int, Record], Row | None]:
    def to_row(index: int, record: Record) -> Row:
        about = {"behavior": record["Behavior"], "origin": record["Source"]}
        return prompt_row(name, str(index), record["Goal"], harm, record["Category"], about)

    return to_row


def _wildjailbreak(name: str, data_type: str, harm: Harm) -> Callable[[int, Record], Row | None]:
    def to_row(index: int, record: Record) -> Row | None:
        if record["data_type"] != data_type:
            return None
        return prompt_row(name, str(index), record["adversarial"], harm, data_type)

    return to_row


def _wildjailbreak_train(index: int, record: Record) -> Row:
    wrapped, _, harm = record["data_type"].partition("_")
    prompt = record["adversarial" if wrapped == "adversarial" else "vanilla"]
    row = prompt_row(
        "wildjailbreak-train", str(index), prompt, "harmful" if harm == "harmful" else "contrast", record["data_type"]
    )
    return row.with_answer(record["completion"].strip())


def _aegis2(index: int, record: Record) -> Row | None:
    """A prompt alone, of those that the set may show: some are redacted, since they belong to another set."""
    prompt, label = (record["prompt"] or "").strip(), record["prompt_label"]
    if not prompt or prompt == "REDACTED" or label not in ("safe", "unsafe"):
        return None
    topic = (record["violated_categories"] or "").partition(",")[0].strip().lower() or "none"
    return prompt_row("aegis2-train", str(record["id"]), prompt, "harmful" if label == "unsafe" else "benign", topic)


# -- the sets ----------------------------------------------------------------------------------------------------------

_XSTEST: dict[str, Any] = {
    "hub": "walledai/XSTest", "config": None, "split": "test", "commit": "f1d713187c61b6ae64e602d74f0b3d812cc2e8e8",
    "columns": ("prompt", "type", "label"), "licence": "CC-BY-4.0", "category": "XSTest's type of prompt", "gated": True,
}  # fmt: skip
_JBB: dict[str, Any] = {
    "hub": "JailbreakBench/JBB-Behaviors", "config": "behaviors", "commit": "886acc352a31533ffbcf4ef22c744658688086fc",
    "columns": ("Goal", "Behavior", "Category", "Source"), "licence": "MIT", "rows": 100,
    "category": "JailbreakBench's category of misuse",
}  # fmt: skip
_WILDJAILBREAK: dict[str, Any] = {
    "hub": "allenai/wildjailbreak", "config": "eval", "split": "train",
    "commit": "5ddc12a7894f842b0619b8e1c7ee496b198af009", "columns": ("adversarial", "data_type"),
    "options": {"delimiter": "\t", "keep_default_na": False}, "licence": "ODC-BY", "category": "always the data type",
    "gated": True,
}  # fmt: skip

HUB_CARDS: dict[str, HubCard] = {
    card.name: card
    for card in (
        HubCard(
            name="gsm8k",
            about="GSM8K's test split: grade-school word problems of two to eight steps (2110.14168).",
            hub="openai/gsm8k",
            config="main",
            split="test",
            commit="cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
            columns=("question", "answer"),
            licence="MIT",
            rows=1319,
            harm="benign",
            category="always 'grade-school maths'",
            to_row=_gsm8k,
        ),
        HubCard(
            name="mbpp",
            about="MBPP's hand-checked test split: short Python functions with three tests each (2108.07732).",
            hub="google-research-datasets/mbpp",
            config="sanitized",
            split="test",
            commit="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
            columns=("task_id", "prompt", "test_imports", "test_list"),
            licence="CC-BY-4.0",
            rows=257,
            harm="benign",
            category="always 'code'",
            to_row=_mbpp,
        ),
        HubCard(
            name="truthfulqa",
            about="TruthfulQA with one true choice (MC1): questions that people answer with a misconception (2109.07958).",
            hub="truthfulqa/truthful_qa",
            config="multiple_choice",
            split="validation",
            commit="741b8276f2d1982aa3d5b832d3ee81ed3b896490",
            columns=("question", "mc1_targets"),
            licence="Apache-2.0",
            rows=817,
            harm="benign",
            category="always 'misconceptions'",
            to_row=_truthfulqa,
        ),
        HubCard(
            name="xstest",
            about="XSTest's safe prompts, in ten types, which look like unsafe ones (2308.01263).",
            rows=250,
            harm="contrast",
            to_row=_xstest("xstest", "safe", "contrast"),
            **_XSTEST,
        ),
        HubCard(
            name="xstest-unsafe",
            about="XSTest's unsafe prompts, the counterparts of its safe ones (2308.01263).",
            rows=200,
            harm="harmful",
            to_row=_xstest("xstest-unsafe", "unsafe", "harmful"),
            **_XSTEST,
        ),
        HubCard(
            name="orbench-hard",
            about="OR-Bench-Hard-1K: safe prompts that several large models refuse (2405.20947).",
            hub="bench-llm/or-bench",
            config="or-bench-hard-1k",
            split="train",
            commit="e36d8b80e81837c8a8f264bbb2a49f1b32c7e272",
            columns=("prompt", "category"),
            licence="CC-BY-4.0",
            rows=1319,
            harm="contrast",
            category="the kind of harm that the prompt looks like",
            to_row=_orbench,
        ),
        HubCard(
            name="jailbreakbench",
            about="JailbreakBench's 100 misuse behaviours, as requests (2404.01318).",
            split="harmful",
            harm="harmful",
            to_row=_jailbreakbench("jailbreakbench", "harmful"),
            **_JBB,
        ),
        HubCard(
            name="jailbreakbench-benign",
            about="JailbreakBench's 100 benign behaviours on the same themes as its harmful ones (2404.01318).",
            split="benign",
            harm="contrast",
            to_row=_jailbreakbench("jailbreakbench-benign", "contrast"),
            **_JBB,
        ),
        HubCard(
            name="wildjailbreak",
            about="WildJailbreak's evaluation set: harmful requests already wrapped in tactics seen in the wild (2406.18510).",
            rows=2000,
            harm="harmful",
            to_row=_wildjailbreak("wildjailbreak", "adversarial_harmful", "harmful"),
            **_WILDJAILBREAK,
        ),
        HubCard(
            name="wildjailbreak-benign",
            about="WildJailbreak's evaluation set: harmless requests in the same wrappings (2406.18510).",
            rows=210,
            harm="contrast",
            to_row=_wildjailbreak("wildjailbreak-benign", "adversarial_benign", "contrast"),
            **_WILDJAILBREAK,
        ),
    )
}

TRAINING_CARDS: dict[str, HubCard] = {
    "wildjailbreak-train": HubCard(
        name="wildjailbreak-train",
        about="WildJailbreak's training set: plain and wrapped requests, harmful and harmless, each with a safe answer "
        "(2406.18510): chats to train on.",
        hub="allenai/wildjailbreak",
        config="train",
        split="train",
        commit=_WILDJAILBREAK["commit"],
        columns=("vanilla", "adversarial", "completion", "data_type"),
        options=_WILDJAILBREAK["options"],
        licence="ODC-BY",
        rows=261_559,
        harm=None,
        category="the data type",
        gated=True,
        to_row=_wildjailbreak_train,
    ),
    "aegis2-train": HubCard(
        name="aegis2-train",
        about="AEGIS 2.0's training prompts, safe and unsafe by their annotators, without the redacted ones (2501.09004): "
        "prompts to distil from. No commit of it is known to us, so its main branch is read: keep what you have read.",
        hub="nvidia/Aegis-AI-Content-Safety-Dataset-2.0",
        config=None,
        split="train",
        commit="main",
        columns=("id", "prompt", "prompt_label", "violated_categories"),
        licence="CC-BY-4.0",
        rows=0,
        harm=None,
        category="the first category that is violated",
        to_row=_aegis2,
    ),
}
