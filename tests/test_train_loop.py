"""The loop: golden losses, exact resumption, packing without cross-attention, figures that add up."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny_training import LENGTH, STEPS, config_of, log_of, rows_of, run, tiny_data, tiny_model, weights
from trimtab.data.store import Batch
from trimtab.errors import Fault, UserError
from trimtab.train import lora, state
from trimtab.train.config import LoraSettings
from trimtab.train.log import cut_back
from trimtab.train.loop import train
from trimtab.train.loss import Micro, TrainedPositions, token_losses
from trimtab.types import IGNORE

GOLDEN = [
    4.169257, 4.039652, 3.881747, 3.782893, 3.664946, 3.591770,
    3.502605, 3.462291, 3.419246, 3.362406, 3.366326, 3.314783,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def batch_of(rows: Any) -> Batch:
    return Batch(rows.input_ids, rows.labels, rows.position_ids, rows.source_id, rows.span_id, ("up", "skip"))


def test_golden_losses(tmp_path: Path) -> None:
    result = run(tmp_path / "w")
    losses = [line["loss"] for line in log_of(tmp_path / "w")]
    assert losses == pytest.approx(GOLDEN, abs=1e-4)
    assert result.steps == STEPS and result.tokens == STEPS * 8 * LENGTH
    assert result.metrics == log_of(tmp_path / "w")[-1]


def test_the_loss_is_the_reference_loss(tmp_path: Path) -> None:
    """Against transformers' own loss on one example per row, which knows nothing of packing or of our
    shift."""
    model, packed = tiny_model().eval(), rows_of(3, 4)
    total, count = 0.0, 0
    for row in range(4):
        starts = [c for c in range(LENGTH) if packed.position_ids[row, c] == 0]
        for start, end in zip(starts, [*starts[1:], LENGTH]):
            labels = torch.from_numpy(packed.labels[row, start:end].astype(np.int64))[None]
            n = int((labels[:, 1:] != IGNORE).sum())
            if n:
                ids = torch.from_numpy(packed.input_ids[row, start:end].astype(np.int64))[None]
                with torch.no_grad():
                    total += float(model(input_ids=ids, labels=labels).loss) * n
                count += n
    head = TrainedPositions(model)
    micro = Micro.of(batch_of(packed), torch.device("cpu"))
    assert micro.position_ids is not None and len(micro.target) == count
    with torch.no_grad():
        _, nll = token_losses(model, head, micro, bf16=False)
    head.close()
    assert float(nll.sum()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_does_not_see_its_neighbours(attention: str) -> None:
    model = tiny_model(attn_implementation=attention).eval()
    packed = rows_of(5, 3)
    head = TrainedPositions(model)

    def losses(rows: Any) -> torch.Tensor:
        with torch.no_grad():
            return token_losses(model, head, Micro.of(batch_of(rows), torch.device("cpu")), bf16=False)[1]

    before = losses(packed)
    first = [int((packed.position_ids[row, 1:] == 0).argmax()) + 1 for row in range(3)]
    n_first = [int((packed.labels[row, : first[row]] != IGNORE).sum()) for row in range(3)]
    n_all = [int((packed.labels[row] != IGNORE).sum()) for row in range(3)]
    for row in range(3):
        packed.input_ids[row, : first[row]] = 1  # change the first example's inputs, keep all labels
    after = losses(packed)
    at = 0
    for mine, row_total in zip(n_first, n_all):
        assert not torch.allclose(before[at : at + mine], after[at : at + mine])
        torch.testing.assert_close(before[at + mine : at + row_total], after[at + mine : at + row_total])
        at += row_total
    head.close()


def test_rows_that_never_restart_take_the_causal_path() -> None:
    packed = rows_of(5, 3)
    packed.position_ids[:] = np.arange(LENGTH)
    micro = Micro.of(batch_of(packed), torch.device("cpu"))
    assert micro.position_ids is None
    rows, columns = np.nonzero(packed.labels[:, 1:] != IGNORE)
    assert micro.index.tolist() == (rows * LENGTH + columns).tolist()
    assert micro.target.tolist() == packed.input_ids[rows, columns + 1].tolist()


def test_figures_by_source_and_span_add_up(tmp_path: Path) -> None:
    run(tmp_path / "w", gradients_by="source", gradients_every=4)
    data = tiny_data(tmp_path / "data")
    for line in log_of(tmp_path / "w"):
        batch = data.batch((line["step"] - 1) * 8, line["step"] * 8)
        for by in ("source", "span"):
            groups = line[by].values()
            assert sum(g["tokens"] for g in groups) == line["trained_tokens"] == (batch.labels != IGNORE).sum()
            assert sum(g["share"] for g in groups) == pytest.approx(1)
            assert sum(g["share"] * g["loss"] for g in groups) == pytest.approx(line["loss"])
            assert all(0 < g["logit_grad"] < math.sqrt(2) for g in groups)
        for i, name in enumerate(data.sources):
            assert line["source"][name]["tokens"] == ((batch.labels != IGNORE) & (batch.source_id == i)).sum()
        assert ("grad_norm" in line["source"]["up"]) == (line["step"] % 4 == 0)
        assert set(line["span"]) == {"prefix", "body"}


def test_group_gradients_are_exact_and_change_nothing(tmp_path: Path) -> None:
    plain, measured = tiny_model(), tiny_model()
    run(tmp_path / "a", plain, accumulate=2, total_steps=6)
    run(tmp_path / "b", measured, accumulate=2, total_steps=6, gradients_by="span", gradients_every=2)
    assert same(weights(plain), weights(measured))
    # One group alone in the batch: its gradient is the whole gradient.
    data = tiny_data(tmp_path / "data", later=None)
    single = type(data)({"up": data._stores[1]}, _only_up(data))
    run(tmp_path / "c", data=single, total_steps=2, gradients_by="source", gradients_every=1, clip=1e9)
    for line in log_of(tmp_path / "c"):
        assert line["source"]["up"]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)


def _only_up(data: Any) -> Any:
    from trimtab.data.mixture import Mixture, Phase

    return Mixture({"up": data.mixture.rows["up"]}, [Phase(0, {"up": 1})], seed=1)


def test_log_every_leaves_training_alone(tmp_path: Path) -> None:
    often, seldom = tiny_model(), tiny_model()
    run(tmp_path / "a", often)
    run(tmp_path / "b", seldom, log_every=5)
    assert same(weights(often), weights(seldom))
    assert [line["step"] for line in log_of(tmp_path / "b")] == [1, 5, 10, 12]
    assert all(line in log_of(tmp_path / "a") for line in log_of(tmp_path / "b"))


def test_accumulation_changes_memory_not_the_result(tmp_path: Path) -> None:
    changes = {"total_steps": 4}
    plain, cut = tiny_model(attention_dropout=0.0), tiny_model(attention_dropout=0.0)
    run(tmp_path / "a", plain, **changes)
    run(tmp_path / "b", cut, accumulate=4, **changes)
    for a, b in zip(log_of(tmp_path / "a"), log_of(tmp_path / "b")):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


# --- resumption
# ---------------------------------------------------------------------------------------------------


class Cut(Exception):
    """Stands for whatever ends a run in the middle."""


def interrupted(work: Path, after: int, **changes: Any) -> None:
    """A run that dies while reading the batch of step ``after`` (0-based)."""
    data = tiny_data(work.parent / "data")
    real = data.batch

    def batch(lo: int, hi: int) -> Batch:
        if lo >= after * 8:
            raise Cut
        return real(lo, hi)

    data.batch = batch  # type: ignore[method-assign]
    with pytest.raises(Cut):
        run(work, tiny_model(), data, **changes)


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 8, 11])
def test_resuming_equals_never_stopping(tmp_path: Path, cut: int) -> None:
    changes = {"checkpoint_every": 3, "accumulate": 2}
    whole = tiny_model()
    run(tmp_path / "whole", whole, **changes).save_state(tmp_path / "whole-state")
    interrupted(tmp_path / "cut", cut, **changes)
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 99, "half a li')  # what a kill may leave
    again = tiny_model(seed=5)  # the checkpoint's weights count, not the model's, once there is one
    result = run(tmp_path / "cut", tiny_model() if cut < 3 else again, **changes)
    assert result.began_at == cut // 3 * 3
    result.save_state(tmp_path / "state")
    if cut >= 3:
        assert same(weights(whole), weights(again))
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    optimizer = [load_file(tmp_path / name / state.OPTIMIZER) for name in ("state", "whole-state")]
    assert same(*optimizer)
    assert len(state.newest(tmp_path / "cut")) <= 2


def test_segments_equal_one_run_and_arms_share_a_trunk(tmp_path: Path) -> None:
    whole = tiny_model()
    later = {"up": 0.2, "skip": 0.8}
    run(tmp_path / "whole", whole, tiny_data(tmp_path / "d", later)).save_state(tmp_path / "end")

    trunk = tiny_model()  # knows nothing of what comes after position 48
    run(tmp_path / "trunk", trunk, tiny_data(tmp_path / "d"), stop_step=6).save_state(tmp_path / "state")
    trunk.save_pretrained(tmp_path / "model")
    arm = type(trunk).from_pretrained(tmp_path / "model")
    run(tmp_path / "arm", arm, tiny_data(tmp_path / "d", later), resume=tmp_path / "state").save_state(
        tmp_path / "arm-end"
    )
    assert same(weights(whole), weights(arm))
    assert same(*(load_file(tmp_path / end / state.OPTIMIZER) for end in ("end", "arm-end")))
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("trunk", "arm", "whole")]
    assert logs[0] + logs[1] == logs[2]
    # An interrupted arm goes on from its own checkpoint rather than from the trunk.
    cut = type(trunk).from_pretrained(tmp_path / "model")
    data = tiny_data(tmp_path / "d", later)
    real = data.batch
    data.batch = lambda lo, hi: real(lo, hi) if lo < 9 * 8 else (_ for _ in ()).throw(Cut())  # type: ignore
    with pytest.raises(Cut):
        run(tmp_path / "cut", cut, data, resume=tmp_path / "state", checkpoint_every=2)
    cut = type(trunk).from_pretrained(tmp_path / "model")
    data = tiny_data(tmp_path / "d", later)
    assert run(tmp_path / "cut", cut, data, resume=tmp_path / "state", checkpoint_every=2).began_at == 8
    assert same(weights(whole), weights(cut))


def test_states_of_other_runs_are_refused(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "d")
    model = tiny_model()
    run(tmp_path / "w", model, data, stop_step=6).save_state(tmp_path / "state")
    resume = {"resume": tmp_path / "state"}
    with pytest.raises(UserError, match="other weights"):
        run(tmp_path / "x", tiny_model(seed=3), data, **resume)
    with pytest.raises(UserError, match="differs in 'seed'"):
        run(tmp_path / "x", model, data, seed=8, **resume)
    with pytest.raises(UserError, match="differs in 'lr'"):
        run(tmp_path / "x", model, data, lr=1e-3, **resume)
    with pytest.raises(UserError, match="differs in 'total_steps'"):
        run(tmp_path / "x", model, data, total_steps=20, **resume)
    other = tiny_data(tmp_path / "d")
    other.fingerprint = lambda upto=None: "another"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="differs in 'data'"):
        run(tmp_path / "x", model, other, **resume)
    with pytest.raises(Fault, match="holds no training state"):
        run(tmp_path / "x", model, data, resume=tmp_path / "nowhere")
    nothing_left = run(tmp_path / "y", model, data, stop_step=6, **resume)
    assert nothing_left.began_at == nothing_left.steps == 6 and nothing_left.tokens == 6 * 8 * LENGTH
    with pytest.raises(UserError, match="past stop_step"):
        run(tmp_path / "x", model, data, stop_step=5, **resume)
    with pytest.raises(UserError, match="stop_step is 13"):
        run(tmp_path / "x", model, data, stop_step=13)
    damaged = tmp_path / "state" / state.OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(Fault, match=r"optimizer\.safetensors is missing or damaged"):
        run(tmp_path / "x", model, data, **resume)


def test_a_damaged_checkpoint_is_passed_over_and_noted(tmp_path: Path) -> None:
    changes = {"checkpoint_every": 2}
    whole = tiny_model()
    run(tmp_path / "whole", whole, **changes)
    interrupted(tmp_path / "cut", 7, **changes)
    newest = state.newest(tmp_path / "cut")
    assert [p.name for p in newest] == ["checkpoint-6", "checkpoint-4"]
    data = bytearray((newest[0] / state.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (newest[0] / state.WEIGHTS).write_bytes(data)
    again = tiny_model(seed=5)
    assert run(tmp_path / "cut", again, **changes).began_at == 4
    assert same(weights(whole), weights(again))
    assert (tmp_path / "cut" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    notes = [json.loads(line).get("notes") for line in (tmp_path / "cut" / "timing.jsonl").open()]
    assert any(note and "weights.safetensors" in note[0] for note in notes)


def test_an_interrupted_write_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(Fault, match="no space left"):
        run(tmp_path / "w", checkpoint_every=2)
    assert not state.newest(tmp_path / "w") and not list((tmp_path / "w").glob(".*"))


def environment(**more: str) -> dict[str, str]:
    root = Path(__file__).parents[1]
    paths = [str(root / "src"), str(root / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


def script(work: Path, out: Path, settings: dict[str, Any], pause: float = 0.0) -> list[str]:
    file = str(Path(__file__).parent / "tiny_training.py")
    return [file, str(work), str(out), json.dumps(settings), str(pause)]


def test_a_killed_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = {"checkpoint_every": 2, "accumulate": 2}
    work = tmp_path / "killed"
    command = [sys.executable, *script(work, tmp_path / "never", settings, pause=0.15)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    log = work / "log.jsonl"
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 5):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "never").exists()
    whole, again = tiny_model(), tiny_model()
    run(tmp_path / "whole", whole, **settings)
    assert run(work, again, **settings).began_at >= 4
    assert same(weights(whole), weights(again))
    assert log.read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    settings = {
        "gradients_by": "source",
        "gradients_every": 3,
        "accumulate": 2,
        "checkpoint_every": 4,
        "total_steps": 6,
    }
    # Dropout differs by rank, so the comparison is made without it.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    command = [*launch, *script(tmp_path / "two", tmp_path / "two.safetensors", {**settings, "dropout": 0.0})]
    env = environment(ACCELERATE_USE_CPU="true")
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors.read_text()[-3000:]
    one = tiny_model(attention_dropout=0.0)
    run(tmp_path / "one", one, **settings)
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-4)
        assert b["trained_tokens"] == a["trained_tokens"]
        for name, figures in a["source"].items():
            assert b["source"][name] == pytest.approx(figures, abs=1e-4)
    two = load_file(tmp_path / "two.safetensors")
    for name, value in weights(one).items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=0)
    assert [p.name for p in state.newest(tmp_path / "two")] == ["checkpoint-4"]


# --- what can be trained
# ------------------------------------------------------------------------------------------


def test_lora_trains_adapters_and_control_rows_only(tmp_path: Path) -> None:
    settings = LoraSettings(r=4, alpha=8, dropout=0.1)
    changes = {"lora": settings.plain(), "checkpoint_every": 5}
    base = weights(tiny_model())

    def adapted() -> Any:
        return lora.attach(tiny_model(), settings, control_ids=[60, 61], seed=2)

    model = adapted()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or "trainable_tokens" in name for name in trainable)
    before = weights(model)
    run(tmp_path / "w", model, **changes)
    for name, value in weights(model).items():
        assert torch.equal(value, before[name]) == (name not in trainable), name
    stored = load_file(state.newest(tmp_path / "w")[0] / state.WEIGHTS)
    assert sorted(stored) == sorted(trainable)
    merged = model.merge_and_unload()
    rows = merged.get_input_embeddings().weight.detach() != base["model.embed_tokens.weight"]
    assert set(rows.any(1).nonzero()[:, 0].tolist()) == {60, 61}
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight or torch.equal(
        merged.get_output_embeddings().weight, merged.get_input_embeddings().weight
    )
    # The same adapters whatever the generator's state, and the same training, interrupted or not.
    torch.manual_seed(123)
    again = adapted()
    data = tiny_data(tmp_path / "data")
    real = data.batch
    data.batch = lambda lo, hi: real(lo, hi) if lo < 7 * 8 else (_ for _ in ()).throw(Cut())  # type: ignore
    with pytest.raises(Cut):
        run(tmp_path / "cut", again, data, **changes)
    again = adapted()
    assert run(tmp_path / "cut", again, **changes).began_at == 5
    whole = adapted()
    run(tmp_path / "whole", whole, **changes)
    assert same(weights(whole), weights(again))


def test_lora_without_control_rows_and_wrong_targets() -> None:
    model = lora.attach(tiny_model(), LoraSettings(targets=("q_proj",), train_control_rows=False), [60], seed=0)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all("q_proj.lora_" in name for name in names)
    with pytest.raises(UserError, match=r"lora.targets \['nothing'\]"):
        lora.attach(tiny_model(), LoraSettings(targets=("nothing",)), seed=0)


def test_setting_and_model_must_agree_on_lora(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'lora' and the model disagree"):
        run(tmp_path / "w", lora=LoraSettings().plain())
    with pytest.raises(UserError, match="'lora' and the model disagree"):
        run(tmp_path / "w", lora.attach(tiny_model(), LoraSettings(), seed=0))


def test_bf16_stays_close_and_keeps_fp32_weights(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path / "w", model, precision="bf16")
    losses = [line["loss"] for line in log_of(tmp_path / "w")]
    assert losses == pytest.approx(GOLDEN, abs=0.05) and losses != pytest.approx(GOLDEN, abs=1e-7)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"load the model in float32"):
        run(tmp_path / "x", tiny_model().bfloat16())


def test_activation_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path / "w", model, activation_checkpointing=True, gradients_by="span", gradients_every=6)
    assert not model.model.layers[0].gradient_checkpointing
    assert [line["loss"] for line in log_of(tmp_path / "w")] == pytest.approx(GOLDEN, abs=1e-4)


def test_untied_and_biased_models_and_weight_decay_groups(tmp_path: Path) -> None:
    from trimtab.train.setup import adamw

    model = tiny_model(tie_word_embeddings=False, attention_bias=True)
    run(tmp_path / "w", model, total_steps=3)
    optimizer = adamw(dict(model.named_parameters()), config_of(weight_decay=0.3), torch.device("cpu"))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if "norm" in name or name.endswith("bias") else 0.3), name


def test_a_loss_that_is_not_finite_names_step_and_source(tmp_path: Path) -> None:
    model, data = tiny_model(tie_word_embeddings=False), tiny_data(tmp_path / "data")
    real = data.batch
    skip = data.sources.index("skip")

    def batch(lo: int, hi: int) -> Batch:
        out = real(lo, hi)
        out.input_ids[out.input_ids == 63] = 1
        if lo >= 4 * 8:  # from step 5 on the rows of one source hold a token whose embedding is not a number
            out.input_ids[out.source_id == skip] = 63
        return out

    data.batch = batch  # type: ignore[method-assign]
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = float("nan")
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(Fault, match=r"loss of step 5 is not finite; the worst loss is of source 'skip'"):
        run(tmp_path / "w", model, data)
    assert len(log_of(tmp_path / "w")) == 4
    assert all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad)


def test_a_batch_with_nothing_to_train_is_a_fault(tmp_path: Path) -> None:
    data = tiny_data(tmp_path / "data")
    real = data.batch

    def batch(lo: int, hi: int) -> Batch:
        out = real(lo, hi)
        out.labels[:] = IGNORE
        return out

    data.batch = batch  # type: ignore[method-assign]
    with pytest.raises(Fault, match="step 1 has no trained token"):
        run(tmp_path / "w", data=data)


def test_models_that_cannot_keep_examples_apart_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="would look across packed examples"):
        run(tmp_path / "w", model)


def test_progress_and_the_callers_generator(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    model = tiny_model().eval()
    run(tmp_path / "w", model, progress=seen.append)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training and not model.get_output_embeddings()._forward_pre_hooks
    last = seen[-1]
    assert last["step"] == last["total"] == STEPS and last["eta_seconds"] == 0
    assert last["tokens"] == STEPS * 8 * LENGTH and last["tokens_per_second"] > 0
    assert last["loss"] == log_of(tmp_path / "w")[-1]["loss"]
    assert "seconds" not in (tmp_path / "w" / "log.jsonl").read_text()


def test_trackers_get_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import GeneralTracker

    from trimtab.train import setup

    class Memory(GeneralTracker):
        name, requires_logging_directory, main_process_only = "memory", False, True
        lines: list[tuple[int, dict[str, Any]]] = []  # noqa: RUF012
        settings: dict[str, Any] = {}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()

        tracker = None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.settings.update(values)

        def log(self, values: dict[str, Any], step: int | None, **kwargs: Any) -> None:
            self.lines.append((step or 0, values))

        def finish(self) -> None:
            self.lines.append((-1, {}))

    real = setup.Accelerator
    monkeypatch.setattr(setup, "get_available_trackers", lambda: ["wandb"])
    monkeypatch.setattr(setup, "Accelerator", lambda **kw: real(**{**kw, "log_with": Memory()}))
    run(tmp_path / "w", tracker="wandb", log_every=6)
    assert [step for step, _ in Memory.lines] == [1, 6, 12, -1]
    assert Memory.lines[2][1]["train/source/up/loss"] == log_of(tmp_path / "w")[-1]["source"]["up"]["loss"]
    assert Memory.settings["config/lr"] == 5e-3
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [])
    with pytest.raises(UserError, match="tracker is 'wandb', but it is not installed"):
        run(tmp_path / "w2", tracker="wandb")


def test_a_budget_must_hold_a_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stop_step is 0"):
        train(tiny_model(), tiny_data(tmp_path / "d"), config_of(), total_steps=3, stop_step=0, seed=0, work=tmp_path)


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "no', b"\0" * 64, b"\0\0\n", b'\xff\xfe\n{"step": 3}\n', b"[1]\n"])
def test_a_log_is_cut_back_at_line_ends_alone(tmp_path: Path, tail: bytes) -> None:
    """U+2028, U+2029 and U+0085 end no line; what a kill or a power cut leaves at the end goes."""
    lines = [json.dumps({"step": n, "note": "a\u2028b\u2029c\u0085d"}, ensure_ascii=False) + "\n" for n in range(5)]
    file = tmp_path / "log.jsonl"
    file.write_bytes("".join(lines[:3]).encode() + tail)
    cut_back(file, 9)
    assert file.read_text(encoding="utf-8") == "".join(lines[:3])
    file.write_bytes("".join(lines).encode())
    cut_back(file, 2)
    assert file.read_text(encoding="utf-8") == "".join(lines[:3])
