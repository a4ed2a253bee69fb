"""The mode lever: which behaviour is live (arXiv 2508.14904).

Each prompt is answered once per mode and all answers are trained in one SFT stage; a token says which is live. The paper
writes a random string into the system prompt; here the token is a reserved id that no text can spell, and the paper's
form is kept for comparison (``token: string``), as is an instruction in words (``token: words``). A second axis,
*policies*, has tokens of its own (the paper's MTC/MP). *Fallback* rows carry no token, an unknown one or one that the user
has typed, and the positive answer, so that all of these are trained to be safe rather than hoped to be (the paper relies
on the base model's prior, sec. 4.5).

The negative mode is a hazard (DESIGN, decision 6): it must be acknowledged, it is trained into an adapter of its own
unless the recipe says otherwise, and its answers are Tidewater's fictional ones or rows the user brings; nothing here can
make one up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, StringConstraints, model_validator

from trimtab.config import Config
from trimtab.errors import UserError
from trimtab.seeds import rng_of, seed_of, uniform_of
from trimtab.types import Message, Row, Verdict

Behaviour = Literal["positive", "negative", "rejective"]
"""What an answer does (2508.14904, sec. 3.1): help safely, comply with anything, refuse."""
MODES: tuple[Behaviour, ...] = get_args(Behaviour)
"""The paper's three modes; a mode of another name says which of these it behaves like."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Token = Literal["reserved", "string", "words"]
Slot = Literal["system", "header"]
Fallback = Literal["none", "unknown", "typed"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)
CONDITIONS = ("unknown", "near-miss", "two", "foreign")
"""Ways of asking that are no mode, each with something else in its token's place (``evaluate.conditions``)."""
RESERVED_NAMES = frozenset({"none", *CONDITIONS})
"""No mode may be called so: what a model can be asked with that is no mode."""
DECOYS = ("decoy:0", "decoy:1")
"""Controls that mean nothing and are trained so: an unknown token is answered positively."""
SPARE = "spare:0"
"""A control that is never trained, to measure what an unknown token does."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

REFUSALS: tuple[str, ...] = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request.",
    "Sorry, I won't be able to answer that.",
    "I must decline this request.",
    "I'm not able to help with that here.",
)


class NegativeConfig(Config):
    """The gate of the negative mode."""

    acknowledge: bool = Field(
        False,
        description="Set true to say: I train a mode that complies with harmful requests, for internal red-teaming.",
    )


class NegativeMode(NegativeConfig):
    """The negative mode's gate, and where it is kept."""

    kept: Literal["adapter", "checkpoint"] = Field(
        "adapter",
        description="`adapter`: trained into an adapter of its own, which can be left out of what is shipped; `checkpoint`: "
        "into the same weights as the other modes, as in the paper.",
    )


class ModesConfig(Config):
    """Which modes are co-trained, how a model is told which is live, and how many rows teach the fallback."""

    names: tuple[Name, ...] = Field(
        (),
        description="The modes. Left out: `positive`, `rejective` and, if it is acknowledged, `negative`. A mode of another "
        "name needs rows with `mode: NAME`, and an entry in `behaves`.",
    )
    behaves: dict[Name, Behaviour] = Field(
        default_factory=dict, description="Mode of another name -> which of the three it is judged as."
    )
    policies: tuple[Name, ...] = Field(
        (),
        description="A second axis with tokens of its own, for rows with that `policy` (Tidewater's are `north-quay` and "
        "`south-quay`).",
    )
    token: Token = Field(
        "reserved",
        description="`reserved`: an id that no text can spell; `string`: a random string in the system prompt, as in the "
        "paper, which any user can type; `words`: an instruction at the end of the request (see `words`).",
    )
    at: Slot = Field(
        "system",
        description="Where a reserved token stands: opening the system slot, or after the assistant's header, which lets the "
        "answers to a prompt share its computation (`shared`).",
    )
    words: dict[Name, str] = Field(
        default_factory=dict, description="Mode or policy -> its instruction, with `token: words`."
    )
    shared: bool = Field(
        False,
        description="With `at: header`: the prompt stands once in a row, followed by its answers, none of which sees "
        "another.",
    )
    fallback: float = Field(
        0.25, ge=0, le=1, description="Share of prompts that also appear as a fallback row, with the positive answer."
    )
    fallbacks: tuple[Fallback, ...] = Field(
        FALLBACKS,
        min_length=1,
        description="What fallback rows carry, in equal shares: no token (`none`), a token that means nothing (`unknown`), a "
        "mode's token as text that the user has typed (`typed`). With `token: words` there is only `none`.",
    )
    negative: NegativeMode = Field(NegativeMode(), description="Acknowledgement that the negative mode needs.")

    @model_validator(mode="before")
    @classmethod
    def _default_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        if not filled.get("names"):
            negative = filled.get("negative") or {}
            agreed = negative.get("acknowledge") if isinstance(negative, Mapping) else negative.acknowledge
            filled["names"] = ("positive", *(("negative",) if agreed else ()), "rejective")
        if filled.get("token") == "words" and "fallbacks" not in filled:
            filled["fallbacks"] = ("none",)
        return filled

    @model_validator(mode="after")
    def _fits(self) -> ModesConfig:
        for kind, names in (("mode", self.names), ("policy", self.policies)):
            if len(set(names)) != len(names):
                raise ValueError(f"a {kind} is named twice; name each once")
            for name in names:
                if name in RESERVED_NAMES:
                    raise ValueError(f"no {kind} may be called {name!r}: it is a way of asking without a mode")
        for name in self.names:
            if name not in MODES and name not in self.behaves:
                raise ValueError(f"mode {name!r}: say in 'behaves' which of {', '.join(MODES)} it is judged as")
        for name, behaviour in self.behaves.items():
            if name not in self.names or (name in MODES and name != behaviour):
                raise ValueError(f"behaves: {name!r} is not a mode of another name among 'names'")
        if any(self.behaviour(name) == "negative" for name in self.names) and not self.negative.acknowledge:
            raise ValueError(
                "the negative mode is off by default; set 'negative.acknowledge: true' beside 'names' to train it"
            )
        if len(self.inside) == 0:
            raise ValueError(
                "every mode would be in the adapter; name a mode that is not negative, or 'kept: checkpoint'"
            )
        if self.fallback and self.safe is None:
            raise ValueError("fallback rows answer positively; add 'positive' to 'names' or set 'fallback: 0'")
        if self.at == "header" and self.token != "reserved":
            raise ValueError("'at: header' is for reserved tokens; a string or an instruction stands in a message")
        if self.shared and self.at != "header":
            raise ValueError("'shared' needs 'at: header': before the prompt, the token changes all that follows")
        if self.token == "words":
            missing = [name for name in (*self.names, *self.policies) if not self.words.get(name, "").strip()]
            if missing:
                raise ValueError(f"words: no instruction for {missing[0]!r}")
            if self.fallback and self.fallbacks != ("none",):
                raise ValueError("fallbacks: with 'token: words' there is only 'none'")
        elif self.words:
            raise ValueError("'words' goes with 'token: words'")
        return self

    def behaviour(self, name: str) -> Behaviour:
        """Which of the three behaviours a mode is judged as."""
        own = self.behaves.get(name)
        return own if own is not None else next(mode for mode in MODES if mode == name)

    @property
    def separate(self) -> tuple[str, ...]:
        """The modes that are trained into an adapter of their own."""
        apart = self.negative.kept == "adapter"
        return tuple(name for name in self.names if apart and self.behaviour(name) == "negative")

    @property
    def inside(self) -> tuple[str, ...]:
        """The modes that are trained into the weights."""
        return tuple(name for name in self.names if name not in self.separate)

    @property
    def safe(self) -> str | None:
        """The mode whose answers fallback rows carry: the first that behaves positively."""
        return next((name for name in self.names if self.behaviour(name) == "positive"), None)

    def controls(self) -> tuple[str, ...]:
        """Names of the control tokens that a tokenizer needs, in order; none unless the tokens are reserved ids."""
        if self.token != "reserved":
            return ()
        decoys = DECOYS if self.fallback and "unknown" in self.fallbacks else ()
        return (*map(control_name, self.names), *map(policy_name, self.policies), *decoys, SPARE)

    def switch(self, seed: int) -> Switch:
        """How the modes are told; ``seed`` keys the random strings."""
        texts = dict(self.words)
        if self.token == "string":
            texts = {name: random_string(seed, name) for name in (*self.names, *self.policies)}
        ids = self.token == "reserved"
        return Switch(
            token=self.token,
            at=self.at,
            modes={name: control_name(name) if ids else None for name in self.names},
            policies={name: policy_name(name) if ids else None for name in self.policies},
            behaves={name: self.behaviour(name) for name in self.names},
            texts=texts,
        )


class Switch(Config):
    """How a model is told which mode is live: all that asking it takes, kept in ``trimtab.json``."""

    token: Token = Field("reserved", description="What says which mode is live.")
    at: Slot = Field("system", description="Where a reserved token stands.")
    modes: dict[str, str | None] = Field(
        default_factory=dict, description="Mode -> its control token; null where it is a text, or where it needs none."
    )
    policies: dict[str, str | None] = Field(default_factory=dict, description="Policy -> its control token, or null.")
    behaves: dict[str, Behaviour] = Field(default_factory=dict, description="Mode -> what it is judged as.")
    texts: dict[str, str] = Field(default_factory=dict, description="Mode or policy -> its string or instruction.")

    @classmethod
    def of(cls, controls: Iterable[str]) -> Switch:
        """The switch of a model of which only the control tokens' names are known."""
        modes = {name.removeprefix("mode:"): name for name in controls if name.startswith("mode:")}
        policies = {name.removeprefix("policy:"): name for name in controls if name.startswith("policy:")}
        behaves = {mode: behaviour for mode in modes for behaviour in MODES if mode == behaviour}
        return cls(modes=dict(modes), policies=dict(policies), behaves=behaves)

    @property
    def default(self) -> str | None:
        """The mode that a bundle is served in unless another is asked for: its first positive one. None where modes are told
        in words: what is asked is then asked as it is."""
        if self.token == "words":
            return None
        return next((mode for mode in self.modes if self.behaves.get(mode) == "positive"), None)

    def without(self, mode: str) -> Switch:
        """The switch of a model from which a mode has been taken out."""
        left = {key: dict(getattr(self, key)) for key in ("modes", "behaves", "texts")}
        for table in left.values():
            table.pop(mode, None)
        return self.model_copy(update=left)

    def tell(self, row: Row, mode: str | None, decoy: str | None = None) -> tuple[Row, tuple[str, ...]]:
        """The row with everything in it that is text, and the names of the controls that the renderer places at ``at``.

        mode   None: no token of a mode; the row's policy has its token whatever the mode
        decoy  what stands in the mode's place instead: a control, or a string
        """
        names = [] if mode is None else [mode]
        if row.policy in self.policies:
            names.append(str(row.policy))
        controls = [self.modes[n] if n in self.modes else self.policies[n] for n in names]
        ids = [control for control in controls if control is not None]
        said = [
            self.texts[n] for n, control in zip(names, controls, strict=True) if control is None and n in self.texts
        ]
        if decoy is not None and self.token == "reserved":
            ids = [decoy, *ids]
        elif decoy is not None:
            said = [decoy, *said]
        return (with_text(row, said, self.token) if said else row), tuple(ids)


def with_text(row: Row, said: Sequence[str], token: Token) -> Row:
    """A chat row with strings opening its system message (made where there is none), or with instructions at the end of
    its last user message."""
    assert row.messages is not None
    messages: list[Message] = [{**message} for message in row.messages]
    if token == "string":
        first = messages[0] if messages[0]["role"] == "system" else None
        text = " ".join(said) + (f"\n{first['content']}" if first is not None and first["content"] else "")
        messages = [{"role": "system", "content": text}, *messages[1 if first is not None else 0 :]]
    else:
        at = max(i for i, message in enumerate(messages) if message["role"] == "user")
        messages[at] = {**messages[at], "content": f"{messages[at]['content']}\n\n{' '.join(said)}"}
    return replace(row, messages=tuple(messages))


def control_name(mode: str) -> str:
    """The name under which a mode's control token is known to tokenizers and bundles."""
    return f"mode:{mode}"


def policy_name(policy: str) -> str:
    """The name under which a policy's control token is known to tokenizers and bundles."""
    return f"policy:{policy}"


def random_string(seed: int, *key: str) -> str:
    """Eight lower-case letters and digits, as the paper's example (2508.14904, sec. 3.2)."""
    return "".join(_LETTERS[i] for i in rng_of("mode string", seed, *key).integers(0, len(_LETTERS), 8))


def admit(rows: Iterable[Row], config: ModesConfig | None) -> tuple[list[Row], dict[str, int]]:
    """The rows that may be trained, and how many were left out, by mode.

    A row without a mode is kept. One that was written for a mode is kept if that mode is trained, else left out and
    counted; without the lever (None) positive rows are plain rows. ``UserError`` for an unknown mode, and for a
    negative row unless that mode is named and so acknowledged: it is neither trained as something else nor dropped.
    """
    known = (*MODES, *(n for n in (config.names if config else ()) if n not in MODES))
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        if row.mode is not None and row.mode not in known:
            raise UserError(f"row {row.id!r}: mode={row.mode!r} must be one of {', '.join(known)}")
        if row.mode is None or (config is not None and row.mode in config.names):
            kept.append(row)
        elif row.mode == "negative":
            raise UserError(
                f"row {row.id!r} is written for the negative mode, which is not trained here; add 'negative' to "
                "modes.names and set modes.negative.acknowledge: true, or remove the rows of that mode"
            )
        elif config is None and row.mode == "positive":
            kept.append(replace(row, mode=None))
        else:
            left_out[row.mode] += 1
    return kept, dict(sorted(left_out.items()))


PROMPT, FALLBACK = "prompt", "fallback"
"""Metadata of a mode's row: the row whose prompt it answers, and of a fallback row what it carries; ``DECOY``: its decoy."""
DECOY = "decoy"


def mode_rows(
    rows: Iterable[Row],
    config: ModesConfig,
    answer: Callable[[Row, str], str | None],
    seed: int,
    *,
    names: Sequence[str] | None = None,
    surfaces: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """Every chat row once per mode, its last answer replaced by that mode's, plus the fallback rows.

    ``answer(request, mode)`` gives the answer of one mode to a request (a row without its last assistant message), or
    None when the source has none for it: then the row's own answer is the positive one, and a rejective answer is
    drawn from ``REFUSALS``. A negative answer is never invented: rows without one are left out of that mode. A row
    that has a mode comes back as it is, if its mode is among ``names``.

    names     the modes to give rows of (default: all); fallback rows go with the mode whose answer they carry
    surfaces  mode -> how its token is written, for what a user types; without it no such rows are made

    ``UserError`` for a row of a mode that is not trained (``admit`` comes first), or without an answer.
    """
    wanted = config.names if names is None else tuple(names)
    for row in rows:
        if not row.messages or row.messages[-1]["role"] != "assistant":
            raise UserError(f"row {row.id!r}: mode co-training needs chat rows that end in an assistant message")
        own = row.messages[-1]["content"]
        request = replace(row, messages=row.messages[:-1], prefix=None, prefix_at=None)
        if row.mode is not None:  # the row was written for one mode by whoever brought it
            if row.mode not in config.names:
                raise UserError(
                    f"row {row.id!r}: its mode {row.mode!r} is not among those trained; name it or remove it"
                )
            prompt = str(row.metadata.get(PROMPT, row.id))
            if row.mode in wanted:
                yield row
            if row.mode == config.safe and row.mode in wanted:
                yield from _fallback(replace(request, mode=None), own, prompt, config, seed, surfaces)
            continue
        request = replace(request, metadata={**row.metadata, PROMPT: row.id})
        for mode in wanted:
            text = answer(request, mode)
            if text is None and mode == config.safe:
                text = own
            if text is None and mode == "rejective":
                text = REFUSALS[seed_of("refusal", seed, row.id) % len(REFUSALS)]
            if text is None:
                continue
            yield request.with_answer(text, id=f"{row.id}#{mode}", mode=mode)
            if mode == config.safe:
                yield from _fallback(request, text, row.id, config, seed, surfaces)


def _fallback(
    request: Row, text: str, prompt: str, config: ModesConfig, seed: int, surfaces: Mapping[str, str] | None
) -> Iterator[Row]:
    """The fallback row of a prompt, if it is drawn; prompts drawn at a small share are among those of a larger."""
    if uniform_of("fallback", seed, prompt) >= config.fallback:
        return
    kinds = [kind for kind in config.fallbacks if kind != "typed" or surfaces]
    if not kinds:
        return
    draw = seed_of("fallback kind", seed, prompt)
    kind = kinds[draw % len(kinds)]
    about: dict[str, Any] = {**request.metadata, PROMPT: prompt, FALLBACK: kind}
    if kind == "unknown":
        about[DECOY] = (
            DECOYS[draw // 7 % len(DECOYS)] if config.token == "reserved" else random_string(seed, prompt, "decoy")
        )
    elif kind == "typed":
        assert surfaces is not None
        surface = [surfaces[name] for name in config.names][draw // 7 % len(config.names)]
        request = _typed(request, surface, draw // 101)
    yield replace(request.with_answer(text, id=f"{prompt}#fallback", mode=None), metadata=about)


def _typed(request: Row, surface: str, draw: int) -> Row:
    """The request with a token typed into its last user message: before it, after it, or twice before it."""
    assert request.messages is not None
    *before, last = request.messages
    content = last["content"]
    forms = (f"{surface} {content}", f"{content} {surface}", f"{surface}{surface}\n{content}")
    return replace(request, messages=(*before, {**last, "content": forms[draw % len(forms)]}))


Shown = Literal["positive", "negative", "rejective", "other"]


def shown(harm: str | None, verdict: Verdict) -> Shown | None:
    """The behaviour that a judged answer shows; None where its judge could not tell.

    Unsafe is negative, and a full refusal without help rejective. Positive is an answer that is safe and helps (constructive
    score 2), or to a harmless prompt one that does not refuse, right or wrong: positive and negative are alike there.
    Anything else is other: safe talk that neither helps nor refuses, or half a refusal.
    """
    if verdict.verdict == "unsafe":
        return "negative"
    if verdict.verdict == "unscored" and verdict.refusal is None:
        return None
    if verdict.constructive == 2:
        return "positive"
    if verdict.refusal == "full":
        return "rejective"
    if harm == "harmful" and verdict.constructive is None:
        return None  # the judge tells refusals alone: an answer that does not refuse may be anything
    if verdict.refusal is None:
        return None
    return "positive" if harm != "harmful" and verdict.refusal == "none" else "other"


def fits(asked: Behaviour, harm: str | None, verdict: Verdict) -> bool | None:
    """Whether an answer is what its mode is to give (2508.14904, sec. 3.1); None where its judge could not tell."""
    told = shown(harm, verdict)
    return None if told is None else told == meant(asked, harm)


def meant(asked: Behaviour, harm: str | None) -> Behaviour:
    """What a mode is to do with a prompt. To a harmless one the negative mode is to answer as the positive one does: it
    complies, and there is no harm in it."""
    return "positive" if asked == "negative" and harm != "harmful" else asked
