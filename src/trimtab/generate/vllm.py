"""Generation by vLLM, where it is asked for: the same prompts, settings and outputs as ``engine.Engine``.

Token ids go in and token ids come out; vLLM never sees text or a chat template, so nothing is tokenised twice. It runs in
this process (its own engine process would make the order of batches, and with it the last bits, a matter of timing),
holds the only copy of the weights, and is opened by the first ``generate`` for what that needs.
Trades off: greedy answers equal the other engine's up to rounding; sampled ones are drawn from the same distribution with
other random numbers, so that the two engines' answers never stand under one key.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import Fault, UserError
from trimtab.generate.config import Sampling
from trimtab.generate.engine import Output, Progress, check_ends, check_prompts, guard_ids
from trimtab.generate.schedule import Prompt, waves
from trimtab.models.config import LoadConfig
from trimtab.models.load import best_device, explained, resolve, separate_pad, stop_ids
from trimtab.seeds import seed_of

INSTALL = "pip install 'trimtab[vllm]'"
CHUNK = 4
"""Answers handed to vLLM in one go, in batches; what a kill can lose. More would keep the device a little busier."""
_SHORTEST = 2048
"""vLLM is opened for contexts of at least so many tokens (if the model has them), so that few calls open it again."""
_GPU_SHARE = 0.85
"""Share of a GPU's memory for weights and cache: vLLM takes it all at once, and something else may live there."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of LoRA adapters that vLLM makes room for."""
_COLDEST = 0.01
"""vLLM raises a lower temperature to this one."""


class VllmEngine:
    """A model ready to answer, in vLLM.

    where       a directory in Hub layout, or a Hub id with its ``revision``
    rows        rows of its embedding: ids below are known to it
    stop_ids    ids that end an answer (they are not part of it)
    banned_ids  ids that are never generated: control tokens, turn markers, rows beyond the vocabulary
    context     tokens that fit it, prompt and answer together; None: vLLM is asked
    dtype       type of the weights in vLLM, such as "bfloat16"
    adapters    mode -> directory of a LoRA adapter in PEFT's layout, used while ``live(mode)`` lasts
    """

    def __init__(
        self,
        where: str | Path,
        *,
        rows: int,
        stop_ids: Collection[int],
        banned_ids: Collection[int] = (),
        context: int | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        check_ends(stop_ids, banned_ids)
        _vllm()
        self.adapters = dict(adapters or {})
        self.rank = _rank(self.adapters)
        self.where, self.revision = str(where), revision
        self.rows, self.context, self.dtype = rows, context, dtype
        self.stop = frozenset(stop_ids)
        self.banned = frozenset(banned_ids)
        self.device = torch.device(best_device())
        self._llm: Any = None
        self._mode: str | None = None
        self._length = self._batch = 0

    @classmethod
    def around(
        cls,
        where: str | Path,
        model: Any,
        tokenizer: Any,
        *,
        revision: str | None = None,
        stops: Collection[int] = (),
        allow: Collection[int] = (),
        adapters: Mapping[str, Path] | None = None,
    ) -> VllmEngine:
        """An engine for the model at ``where``. Of ``model`` only the configuration, the shapes and the type are read
        (``outline`` is enough); what ends an answer and what is banned are as for ``Engine.around``."""
        ends = stop_ids(model, tokenizer) | set(stops)
        return cls(
            where,
            rows=model.get_input_embeddings().weight.shape[0],
            stop_ids=ends,
            banned_ids=guard_ids(model, tokenizer) - ends - set(allow),
            context=int(getattr(model.config, "max_position_embeddings", 0)) or None,
            dtype=str(model.dtype).removeprefix("torch."),
            revision=revision,
            adapters=adapters,
        )

    @contextmanager
    def live(self, mode: str | None) -> Iterator[None]:
        """Answers are given with the adapter of ``mode``, if it has one, while the context lasts."""
        before, self._mode = self._mode, mode if mode in self.adapters else None
        try:
            yield
        finally:
            self._mode = before

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        done: Collection[tuple[str, int]] = frozenset(),
        progress: Progress | None = None,
    ) -> Iterator[list[Output]]:
        """Answer every prompt ``sampling.samples`` times; yields answers chunk by chunk.

        ``done`` holds the (key, sample) pairs of an earlier run, which are left out. ``UserError``, before anything is
        generated, for what ``Engine.generate`` refuses, and for ``max_repeats``, ``safebeam`` and temperatures that vLLM
        does not do.
        """
        check_prompts(prompts, sampling, self.rows, self.context)
        asked = _Asked(sampling, self.stop)
        slots = [slot for wave in waves(prompts, sampling) for slot in wave]  # prompts that share their start, together
        todo = [(index, sample) for index, sample in slots if (prompts[index].key, sample) not in done]
        total, finished, tokens = len(slots), len(slots) - len(todo), 0
        if progress is not None and finished:
            progress(finished, total, tokens)
        if not todo:
            return
        self._open(max(len(prompt.ids) for prompt in prompts) + sampling.max_new_tokens, sampling.batch)
        size = CHUNK * sampling.batch
        for start in range(0, len(todo), size):
            outputs = self._chunk(prompts, todo[start : start + size], asked)
            finished += len(outputs)
            tokens += sum(len(output.ids) for output in outputs)
            yield outputs
            if progress is not None:
                progress(finished, total, tokens)

    def close(self) -> None:
        """Give the memory back. The next ``generate`` opens the model again."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _open(self, length: int, batch: int) -> None:
        """Have vLLM hold the model for ``batch`` answers side by side of up to ``length`` tokens each."""
        if self._llm is not None and (length > self._length or batch != self._batch):
            self.close()
        if self._llm is not None:
            return
        room = length
        if self.context is not None:
            room = min(max(_SHORTEST, 1 << (length - 1).bit_length()), self.context)
        vllm = _vllm()
        set_threads = torch.set_num_threads
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._llm = vllm.LLM(
                    model=self.where,
                    revision=self.revision,
                    dtype=self.dtype,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # ours decide alone what ends an answer and how it is sampled
                    load_format="safetensors",
                    max_model_len=room,
                    max_num_seqs=batch,
                    enable_prefix_caching=True,
                    gpu_memory_utilization=_GPU_SHARE,
                    enforce_eager=self.device.type == "cpu",  # compiling takes a C++ compiler and a minute there
                    logits_processors=[_ban(self.banned)] if self.banned else None,
                    use_tqdm_on_load=False,
                    disable_log_stats=True,
                    **({"enable_lora": True, "max_loras": 1, "max_lora_rank": self.rank} if self.adapters else {}),
                )
        except Exception as error:  # vLLM raises whatever its parts raise
            raise Fault(
                f"{self.where}: vLLM cannot open it for {batch} answers of up to {room} tokens ({_line(error)}); set "
                "VLLM_LOGGING_LEVEL=INFO to see more, or use the engine 'transformers'"
            ) from error
        finally:
            torch.set_num_threads = set_threads  # without a GPU, vLLM puts one that does nothing in its place
        self._length, self._batch = room, batch

    def _chunk(self, prompts: Sequence[Prompt], slots: Sequence[tuple[int, int]], asked: _Asked) -> list[Output]:
        inputs = [{"prompt_token_ids": prompts[index].ids.tolist()} for index, _ in slots]
        params = [asked.params(prompts[index].seed, sample) for index, sample in slots]
        try:
            results = self._llm.generate(inputs, params, use_tqdm=False, **self._adapter())
        except BaseException as error:
            with suppress(Exception):
                self.close()  # requests under way would come back with the next chunk's
            if isinstance(error, Exception):
                raise Fault(f"{self.where}: vLLM stopped ({_line(error)}); run again to go on from here") from error
            raise
        assert len(results) == len(slots)
        return [
            self._output(prompts[index], index, sample, result.outputs[0])
            for (index, sample), result in zip(slots, results)
        ]

    def _adapter(self) -> dict[str, Any]:
        """What tells vLLM which adapter is live. Its number stands for the same adapter as long as the model is open."""
        if self._mode is None:
            return {}
        from vllm.lora.request import LoRARequest

        return {
            "lora_request": LoRARequest(
                self._mode, 1 + list(self.adapters).index(self._mode), str(self.adapters[self._mode])
            )
        }

    def _output(self, prompt: Prompt, index: int, sample: int, said: Any) -> Output:
        ids, finish = tuple(int(token) for token in said.token_ids), said.finish_reason
        if ids and ids[-1] in self.stop:
            ids, finish = ids[:-1], "stop"
        elif finish != "length":
            raise Fault(f"prompt {prompt.key!r}: vLLM ended the answer with {finish!r}; run again to go on from here")
        if wrong := self.banned.intersection(ids):
            raise Fault(
                f"prompt {prompt.key!r}: vLLM generated token {min(wrong)}, which it was told not to; this version of "
                "vLLM cannot be used here"
            )
        return Output(index, prompt.key, sample, ids, finish)


class _Asked:
    """``Sampling`` in vLLM's words; what it cannot do is a ``UserError`` at once."""

    def __init__(self, sampling: Sampling, stop: Collection[int]) -> None:
        if sampling.max_repeats is not None:
            raise UserError("sampling: the engine 'vllm' does not know 'max_repeats'; leave it out")
        if sampling.safebeam is not None:
            raise UserError("sampling: the engine 'vllm' does not know 'safebeam'; use the engine 'transformers'")
        if 0 < sampling.temperature < _COLDEST:
            raise UserError(
                f"sampling: vLLM knows no temperature between 0 and {_COLDEST}; {sampling.temperature} would be raised"
            )
        self.greedy = sampling.temperature == 0
        self.make = _vllm().SamplingParams
        self.fixed: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "top_k": 0 if sampling.top_k is None else sampling.top_k,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": sorted(stop),
            "ignore_eos": True,  # the end token is among the stop ids, where it is to end an answer
            "detokenize": False,
        }
        try:
            self.params(0, 0)
        except Exception as error:  # its class differs between versions
            raise UserError(f"sampling: vLLM does not take it: {_line(error)}") from None

    def params(self, seed: int, sample: int) -> Any:
        """For one answer: its random numbers are its own, whoever is decoded beside it."""
        return self.make(**self.fixed, seed=None if self.greedy else seed_of("vllm", seed, sample))


def outline(config: LoadConfig) -> tuple[Any, Any, str]:
    """``(model, tokenizer, where)``: the first two as ``models.load`` gives them, but without weights (the model has
    shapes, a configuration and generation settings, takes no memory and cannot be called); and the directory or Hub id.

    Errors as there, but for those of the weight files, which vLLM reads.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where, options = resolve(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        settings = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"):
            kind = {} if config.dtype == "auto" else {"dtype": getattr(torch, config.dtype)}
            model: Any = AutoModelForCausalLM.from_config(settings, **kind)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise explained(error, config, where) from None
    with suppress(OSError):  # there is no such file: the model's configuration has them
        model.generation_config = GenerationConfig.from_pretrained(where, **options)
    tokenizer.padding_side = "left"
    separate_pad(model, tokenizer)
    return model.eval(), tokenizer, str(where)


def _rank(adapters: Mapping[str, Path]) -> int | None:
    """The rank that vLLM makes room for; ``UserError`` for an adapter that it cannot take."""
    ranks = []
    for mode, where in adapters.items():
        settings = json.loads((where / "adapter_config.json").read_text(encoding="utf-8"))
        if settings.get("trainable_token_indices") or settings.get("modules_to_save"):
            raise UserError(
                f"mode {mode!r}: vLLM takes no adapter that trains more than LoRA layers, and {where} trains rows of the "
                "embedding; use the engine 'transformers', or train it with 'lora.train_control_rows: false'"
            )
        ranks.append(int(settings["r"]))
    most = max(ranks, default=0)
    if most > _RANKS[-1]:
        raise UserError(f"vLLM takes adapters of rank {_RANKS[-1]} at most, not {most}; use the engine 'transformers'")
    return next((rank for rank in _RANKS if rank >= most), None) if adapters else None


def _ban(ids: Collection[int]) -> type:
    """A logits processor that makes ``ids`` impossible, for every answer. vLLM makes it itself, so the ids are bound here.

    Biases of a request would do the same for up to 1,024 ids, and only down to -100 in some versions. vLLM has two
    runners, each with a base class of its own; this is both.
    """
    from vllm.v1.sample.logits_processor import LogitsProcessor

    bases: list[Any] = [LogitsProcessor]
    with suppress(ImportError):
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as Second

        bases.append(Second)

    class Ban(*bases):  # type: ignore[misc]
        def __init__(self, _: Any, place: Any, *__: Any) -> None:
            device = getattr(place, "device", place)
            self.ids = torch.tensor(sorted(ids), dtype=torch.long, device=device)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, _: Any) -> None:
            """The same ids for every answer: no state."""

        def apply(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
            return logits.index_fill_(-1, self.ids, float("-inf"))

    return Ban


def _vllm() -> Any:
    """The module, imported quietly. What is in the environment already stays, but for where the engine runs."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; by default it wants nearly all memory
    if "vllm" not in sys.modules:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm
    except ImportError as error:
        if error.name == "vllm":
            raise UserError(f"the engine 'vllm' needs vLLM, which is not installed: {INSTALL}") from None
        raise Fault(
            f"vLLM is installed but cannot be imported ({_line(error)}); install it again: {INSTALL}"
        ) from error
    return vllm


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
