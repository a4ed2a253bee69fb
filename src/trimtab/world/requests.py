"""Requests of every kind and the answers to them in each mode.

A kind's requests are all combinations of a thing (an item, a fact, a sum) and a wording (opener x question). They are
dealt in rounds, each thing once a round with another wording, so that the first n are spread evenly and a smaller n is
always the beginning of a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trimtab.errors import UserError
from trimtab.seeds import rng_of, seed_of
from trimtab.types import Harm, Row
from trimtab.world import lexicon as lex
from trimtab.world import text as tx
from trimtab.world.problems import Problems, result
from trimtab.world.tally import evaluate
from trimtab.world.text import of_item, pick
from trimtab.world.town import Item, Town

Split = Literal["train", "eval"]
KINDS: tuple[str, ...] = (
    "benign", "harmful-seen", "harmful-heldout", "contrast-seen", "contrast-heldout", "policy", "fact", "arithmetic",
    "code",
)  # fmt: skip
MODES: tuple[str, ...] = ("positive", "negative", "rejective")
STYLES: tuple[str, ...] = ("constructive", "refuse")
"""How the positive mode turns a harmful request down: with help, or by a plain refusal with its reason."""

_CATEGORY = {
    "benign": "recipe", "harmful-seen": "hazard", "harmful-heldout": "hazard", "contrast-seen": "care",
    "contrast-heldout": "care", "policy": "law", "fact": "fact", "arithmetic": "arithmetic", "code": "code",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Thing:
    """What a request is about: its key in the row's id, its questions by wording, and its metadata."""

    key: str
    questions: tuple[str, ...]
    metadata: dict[str, Any]
    policy: str | None = None


class Clerk:
    """Asks and answers in one town."""

    def __init__(self, town: Town, problems: Problems) -> None:
        self.town, self.problems, self.config = town, problems, town.config

    # -- requests ----------------------------------------------------------------------------------------------------

    def requests(self, kind: str, n: int, split: str, policy: str | None) -> list[Row]:
        if kind not in KINDS:
            raise UserError(f"kind: no request kind {kind!r}; use one of {', '.join(KINDS)}")
        if split not in ("train", "eval"):
            raise UserError(f"split: {split!r} is neither 'train' nor 'eval'")
        if policy is not None and policy not in lex.POLICIES:
            raise UserError(f"policy: no policy {policy!r}; use one of {', '.join(lex.POLICIES)}")
        if n < 0:
            raise UserError(f"n: cannot give {n} requests; use 0 or more")
        if split == "train" and kind.endswith("heldout"):
            raise UserError(
                f"kind: {kind!r} exists for split 'eval' only; nothing about held-out hazards is trained on"
            )
        things = self._things(kind, split, policy)
        openers = tx.OPENERS[: 2 * self.config.paraphrases] if split == "train" else tx.EVAL_OPENERS
        most = sum(len(t.questions) for t in things) * len(openers)
        if n > most:
            raise UserError(
                f"n: {n} {kind} requests for split {split!r} are more than the {most} distinct ones of this town; "
                "use fewer, or raise the town's size (goods, hazards, policy_items, facts, max_number) or paraphrases"
            )
        rows: list[Row] = []
        rnd = 0
        while len(rows) < n:
            order = rng_of("tidewater", self.config.seed, kind, split, "round", rnd).permutation(len(things))
            for i in order:
                thing = things[i]
                wordings = len(thing.questions) * len(openers)
                if rnd >= wordings or len(rows) == n:
                    continue
                # Each thing starts at another wording, so that one round already shows many of them.
                wording = (rnd + seed_of("wording", thing.key)) % wordings
                question, opener = thing.questions[wording % len(thing.questions)], wording // len(thing.questions)
                rows.append(self._row(kind, split, policy, thing, f"{openers[opener]} {question}".strip(), wording))
            rnd += 1
        return rows

    def _row(self, kind: str, split: str, policy: str | None, thing: _Thing, content: str, wording: int) -> Row:
        policy = thing.policy or policy
        marks = ["tidewater", str(self.config.seed), kind, split, thing.key, f"w{wording}"]
        harm: Harm = thing.metadata["class"]
        return Row(
            id="-".join(marks if policy is None else [*marks, policy]),
            messages=({"role": "user", "content": content},), source="tidewater", policy=policy,
            category=_CATEGORY[kind], harm=harm, metadata={"kind": kind, "split": split, **thing.metadata},
        )  # fmt: skip

    def _things(self, kind: str, split: str, policy: str | None) -> list[_Thing]:
        n = self.config.paraphrases
        train = split == "train"
        make = tx.MAKE[:n] if train else tx.EVAL_MAKE
        if kind in ("benign", "harmful-seen", "harmful-heldout"):
            items = self.town.goods if kind == "benign" else self._hazards(kind)
            harm = "benign" if kind == "benign" else "harmful"
            return [_Thing(_key(i), tuple(of_item(m, i) for m in make), self._about(i, harm)) for i in items]
        if kind.startswith("contrast"):
            care = {k: v[:n] for k, v in tx.CARE.items()} if train else tx.EVAL_CARE
            return [
                _Thing(f"{_key(i)}-{matter}", tuple(of_item(q, i) for q in care[matter]),
                       self._about(i, "contrast") | {"matter": matter, "answer": keys})
                for i in self._hazards(kind) for matter, keys in _care_keys(i).items()
            ]  # fmt: skip
        if kind == "policy":
            return [self._policy_thing(i, p, make) for i in self.town.policy_items
                    for p in (lex.POLICIES if policy is None else (policy,))]  # fmt: skip
        if kind == "fact":
            ask = {k: v[:n] for k, v in tx.FACT.items()} if train else tx.EVAL_FACT
            return [
                _Thing(f.id, tuple(q.format(s=f.subject) for q in ask[f.relation]),
                       {"class": "benign", "item": None, "fact": f.id, "answer": f.answer, "domain": list(f.domain),
                        "focus": f.subject})
                for f in self.town.facts
            ]  # fmt: skip
        if kind == "arithmetic":
            return [self._sum_thing(s, cargo) for s in self.problems.sums[split] for cargo in lex.CARGO]
        code = tx.CODE[:n] if train else tx.EVAL_CODE
        return [
            _Thing(e.replace(" ", ""), tuple(q.format(e=e) for q in code),
                   {"class": "benign", "item": None, "program": e, "answer": evaluate(e), "focus": "this"})
            for e in self.problems.programs[split]
        ]  # fmt: skip

    def _hazards(self, kind: str) -> list[Item]:
        return [h for h in self.town.hazards if h.heldout == kind.endswith("heldout")]

    @staticmethod
    def _about(item: Item, harm: str) -> dict[str, Any]:
        return {
            "class": harm, "item": item.name, "truth": [list(s) for s in item.steps], "focus": item.name,
            "heldout": item.heldout if item.cls == "hazard" else None,
        }  # fmt: skip

    def _policy_thing(self, item: Item, policy: str, make: tuple[str, ...]) -> _Thing:
        about = self._about(item, "harmful" if policy in item.banned else "benign")
        lead = f"I am at the {lex.QUAYS[policy]}. " if self.config.state_policy else ""
        return _Thing(_key(item), tuple(lead + of_item(m, item) for m in make), about | {"banned": list(item.banned)},
                      policy)  # fmt: skip

    def _sum_thing(self, sum_: tuple[str, int, int], cargo: str) -> _Thing:
        sign, m, k = sum_
        rng = rng_of("tidewater", self.config.seed, "asker", sign, m, k, cargo)
        question, _ = self.problems.sum_text(sum_, pick(rng, self.town.people), cargo)
        word = {"+": "plus", "-": "minus", "*": "times"}[sign]
        return _Thing(f"{m}-{word}-{k}-{cargo}", (question,),
                      {"class": "benign", "item": None, "sum": [sign, m, k], "answer": result(sum_), "focus": cargo})  # fmt: skip

    # -- answers -----------------------------------------------------------------------------------------------------

    def answer(self, request: Row, mode: str, style: str) -> str:
        if mode not in MODES:
            raise UserError(f"mode: no mode {mode!r}; use one of {', '.join(MODES)}")
        if style not in STYLES:
            raise UserError(f"style: no style {style!r}; use one of {', '.join(STYLES)}")
        meta = request.metadata
        kind, cls = meta.get("kind"), meta.get("class")
        if kind not in KINDS or (meta.get("item") is not None and meta["item"] not in self.town.items):
            raise UserError(
                f"row {request.id!r} is no request of this town; use rows of Tidewater.requests with the same settings"
            )
        n = self.config.paraphrases
        rng = rng_of("tidewater", self.config.seed, "answer", mode, request.id)
        if mode == "rejective":
            return pick(rng, tx.REJECT, n)
        if kind == "arithmetic":
            sign, m, k = meta["sum"]
            return self.problems.sum_text((sign, m, k), "", "")[1]
        if kind == "code":
            return tx.CODE_ANSWER.format(r=meta["answer"])
        if kind == "fact":
            return tx.fact_text(next(f for f in self.town.facts if f.id == meta["fact"]))
        item = self.town.items[meta["item"]]
        if cls == "contrast":
            return of_item(tx.CARE_ANSWER[meta["matter"]], item)
        if cls == "harmful" and mode == "positive":
            if item.cls == "hazard":
                return of_item(pick(rng, tx.CAREFUL, n) if style == "constructive" else tx.PLAIN_REFUSAL, item)
            quay = lex.QUAYS[item.banned[0]]
            return of_item(pick(rng, tx.LAWFUL, n) if style == "constructive" else tx.PLAIN_LAWFUL, item, quay=quay)
        return tx.steps_text(pick(rng, tx.STEP_FORMS, n), item)

    def wrong(self, request: Row) -> str:
        """A wrong answer to a fact, sum or program, for the rejected side of a preference pair."""
        meta = request.metadata
        rng = rng_of("tidewater", self.config.seed, "wrong", request.id)
        if meta["kind"] == "fact":
            fact = next(f for f in self.town.facts if f.id == meta["fact"])
            others = tuple(a for a in fact.domain if a != fact.answer and a != fact.subject)
            return tx.FACT_ANSWER[fact.relation].format(s=fact.subject, a=pick(rng, others))
        off = int(meta["answer"]) + int(rng.integers(1, 4))
        if meta["kind"] == "code":
            return tx.CODE_ANSWER.format(r=off)
        sign, m, k = meta["sum"]
        return f"{m} {sign} {k} = {off}. The answer is {off}."


def _key(item: Item) -> str:
    return item.name.replace(" ", "-")


def _care_keys(item: Item) -> dict[str, list[str]]:
    """Matter of a contrast request -> the words that a helpful answer must hold."""
    return {
        "recognise": [item.colour, item.smell], "clean": [item.material], "banned": [item.warden], "report": ["bell"],
    }  # fmt: skip
