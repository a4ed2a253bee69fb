"""Learning-rate schedules over the whole budget, and the settings that cannot be."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.train.config import TrainConfig
from trimtab.train.schedule import lr_at


def rates(total: int, **changes: object) -> list[float]:
    config = TrainConfig(lr=1.0, **changes)  # type: ignore[arg-type]
    return [lr_at(step, total, config) for step in range(total)]


def test_cosine_by_hand() -> None:
    assert rates(6, schedule="cosine", warmup=1 / 3, min_lr=0) == pytest.approx([0.5, 1, 1, 0.75, 0.25, 0])
    assert rates(5, schedule="cosine", warmup=0, min_lr=0.2) == pytest.approx(
        [1, 0.2 + 0.8 * 0.8535534, 0.6, 0.2 + 0.8 * 0.1464466, 0.2]
    )


def test_wsd_by_hand() -> None:
    assert rates(10, schedule="wsd", warmup=0.2, decay=0.4, min_lr=0) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    )
    assert rates(4, schedule="wsd", warmup=0, decay=0) == [1] * 4


def test_constant() -> None:
    assert rates(4, schedule="constant", warmup=0.5) == pytest.approx([0.5, 1, 1, 1])


@given(
    st.integers(1, 400),
    st.sampled_from(["cosine", "wsd", "constant"]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0, 1),
)
def test_shape(total: int, schedule: str, warmup: float, decay: float, min_lr: float) -> None:
    lr = rates(total, schedule=schedule, warmup=warmup, decay=decay, min_lr=min_lr)
    warm = round(warmup * total)
    assert all(0 <= rate <= 1 + 1e-12 for rate in lr)
    assert all(b > a for a, b in pairwise(lr[:warm]))
    assert all(b <= a + 1e-12 for a, b in zip(lr[max(warm - 1, 0) :], lr[max(warm, 1) :]))
    if warm:
        assert lr[warm - 1] == pytest.approx(1)
    if schedule == "cosine" and warm < total:
        assert lr[-1] == pytest.approx(min_lr) and (lr[warm] == pytest.approx(1) or warm == total - 1)
    if schedule == "wsd" and round(decay * total) and warm < total:
        assert lr[-1] == pytest.approx(min_lr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows_per_step": 10, "accumulate": 4}, r"rows_per_step \(10\) must be a multiple of accumulate \(4\)"),
        ({"schedule": "wsd", "warmup": 0.6, "decay": 0.5}, "more than the whole budget"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"warmup": 1.5}, "warmup"),
        ({"lr": 0}, "lr"),
        ({"learning_rate": 1}, "learning_rate"),
        ({"lora": {"r": 0}}, "lora.r"),
        ({"tracker": "paper"}, "tracker"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**changes)  # type: ignore[arg-type]


def test_settings_schedule_and_data_do_without_torch() -> None:
    names = "train.config, trimtab.train.schedule, trimtab.data.mixture, trimtab.data.pack, trimtab.data.store"
    code = f"import sys, trimtab.{names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
