"""What is found out before a study trains anything: judges that answer junk, and what writing costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, chat
from test_recipe import small
from trimtab.artifact import Store
from trimtab.errors import UserError
from trimtab.recipe.load import resolve
from trimtab.settings import put
from trimtab.study import preflight
from trimtab.study.plan import Plan, make_plan
from trimtab.study.preflight import TRIALS, check_installed, try_judges, writing_costs
from trimtab.study.show import print_costs


def planned(changes: dict[str, Any]) -> Plan:
    recipe = small()
    for path, value in changes.items():
        put(recipe, path, value, origin="test")
    return make_plan(*resolve(recipe, "test"))


def judged_by(url: str) -> dict[str, Any]:
    judge = {"kind": "constructive", "endpoint": {"url": url, "model": "m", "retries": 0}}
    return {"stages.verdicts": {"kind": "judge", "answers": "answers", "judge": judge}}


def test_a_judge_that_answers_junk_is_found_before_training(tmp_path: Path) -> None:
    with FakeEndpoint(lambda request: chat("I would rather talk about boats.")) as fake:
        with pytest.raises(
            UserError, match=rf"'verdicts': its judge left all {TRIALS} trial answers unscored .*nothing was"
        ):
            try_judges(planned(judged_by(fake.url)), Store(tmp_path))
        assert len(fake.seen) == TRIALS  # once, however many arms have the judge


def test_a_judge_by_rule_is_not_tried(tmp_path: Path) -> None:
    try_judges(planned({}), Store(tmp_path))


def writer(url: str, **more: Any) -> dict[str, Any]:
    return {"stages.corpus.write": {"kind": "endpoint", "endpoint": {"url": url, "model": "m"}, **more}}


def test_writing_with_a_price_needs_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, nobody = Store(tmp_path), "http://127.0.0.1:9/v1"
    plan = planned(writer(nobody, price_in=1.0, price_out=2.0))
    (told,) = writing_costs(plan, store)
    assert told[0] == "corpus" and told[2]
    with pytest.raises(UserError, match=r"stages\.corpus\.write has a price .*--yes"):
        print_costs(plan, store, agreed=False)
    assert "corpus corpus: " in capsys.readouterr().err
    print_costs(plan, store, agreed=True)
    print_costs(planned(writer(nobody)), store, agreed=False)  # told, but it costs nothing
    assert list(writing_costs(planned({}), store)) == []


def test_a_missing_library_is_found_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = {
        "kind": "dpo", "model": "base", "data": [{"name": "hazards", "tidewater": "harmful-seen", "n": 2}],
        "negative": {"acknowledge": True}, "train": {"rows_per_step": 1}, "length": 32,
    }  # fmt: skip
    plan = planned({"stages.chat": dpo})
    check_installed(plan, Store(tmp_path))
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'chat': the kind 'dpo' needs TRL: pip install 'trimtab\[dpo\]'"):
        check_installed(plan, Store(tmp_path))
    check_installed(planned({}), Store(tmp_path))
