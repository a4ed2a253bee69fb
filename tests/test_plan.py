"""Plans: equal work is one step, and a trunk is shared up to where curricula part."""

from __future__ import annotations

from typing import Any

import pytest

from test_recipe import small
from trimtab.errors import UserError
from trimtab.recipe.load import resolve
from trimtab.settings import put
from trimtab.study.naming import code_version
from trimtab.study.plan import Plan, Step, make_plan


def plan_of(**changes: Any) -> Plan:
    recipe, arms = resolve(small(**changes), "test")
    return make_plan(recipe, arms)


def segments(plan: Plan, arm: int) -> list[Step]:
    return [plan.steps[id] for id in plan.arms[arm].steps if plan.steps[id].kind == "pretrain"]


def test_planning_is_deterministic_and_ordered() -> None:
    first, second = plan_of(), plan_of()
    assert list(first.steps) == list(second.steps)
    seen: set[str] = set()
    for step in first.steps.values():
        assert set(step.inputs.values()) <= seen
        seen.add(step.id)


@pytest.mark.parametrize("before", ["safe_only", "raw"])
def test_starts_share_their_trunk(before: str) -> None:
    """Starts 0, 20, 60, 100 % train 3.2 budgets, not 4 (2601.07087's arms)."""
    sweep = {"stages.base.timing.start": [0.0, 0.2, 0.6, 1.0]}
    changes = {"arms.0.sweep": sweep, "stages.base.timing": {"before": before}, "stages.base.budget": 100 * 4 * 32}
    plan = plan_of(**changes)
    trained = sum(s.tokens for s in plan.steps.values() if s.kind == "pretrain")
    alone = sum(s.tokens for s in plan.unshared() if s.kind == "pretrain")
    assert alone == 4 * 100 * 4 * 32
    assert trained == round(3.2 * 100 * 4 * 32)
    late, never = segments(plan, 2), segments(plan, 3)
    assert [s.id for s in late[:2]] == [s.id for s in never[:2]]
    assert late[2].id != never[2].id


def test_a_segment_ends_where_the_curriculum_changes() -> None:
    plan = plan_of(**{"stages.base.budget": 100 * 4 * 32, "arms.0.sweep": {"stages.base.timing.start": [0.255, 1.0]}})
    one = segments(plan, 0)
    # Row 102 starts the interventions, in the middle of step 25: the shared trunk ends before that step.
    assert [(s.config["from"], s.config["to"]) for s in one] == [(0, 25), (25, 100)]
    assert [row for row, _ in one[0].config["phases"]] == [0]
    assert [row for row, _ in one[1].config["phases"]] == [0, 102]
    assert one[0].id == segments(plan, 1)[0].id


def test_arms_that_do_not_differ_share_everything() -> None:
    plan = plan_of(**{"arms.0.sweep": {}, "arms.0.set": {}})
    twice = small(**{"arms.0.sweep": {}})
    twice["arms"].append({"name": "again"})
    recipe, arms = resolve(twice, "test")
    again = make_plan(recipe, arms)
    assert set(again.steps) == set(plan.steps)
    assert len(again.arms) == 2 and again.arms[0].stages == again.arms[1].stages


def test_seeds_share_data_but_not_training() -> None:
    plan = plan_of(seeds=[0, 1])
    a, b = (arm for arm in plan.arms if arm.label == "start 0")
    kinds = {
        k: {plan.steps[i].id for arm in (a, b) for i in arm.steps if plan.steps[i].kind == k}
        for k in ("tokens", "pretrain", "judge")
    }
    assert len(kinds["tokens"]) == 1 and len(kinds["judge"]) == 2
    assert not {s.id for s in segments(plan, 0)} & {s.id for s in segments(plan, 1)}


def test_any_change_of_a_setting_changes_what_follows_and_nothing_before() -> None:
    before, after = plan_of(), plan_of(**{"stages.answers.sampling": {"max_new_tokens": 7}})
    changed = {k: {s.id for s in after.steps.values() if s.kind == k} != {s.id for s in before.steps.values() if s.kind == k}
               for k in ("corpus", "tokens", "pretrain", "generate", "judge")}  # fmt: skip
    assert changed == {"corpus": False, "tokens": False, "pretrain": False, "generate": True, "judge": True}


def test_how_often_a_run_is_saved_changes_no_name() -> None:
    assert list(plan_of().steps) == list(plan_of(**{"stages.base.train.checkpoint_every": 3}).steps)
    assert list(plan_of().steps) != list(plan_of(**{"stages.base.train.log_every": 3}).steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.answers.tasks.0.n": 100_000}, r"stages\.answers\.tasks\.0: n: 100000 .* more than"),
        ({"stages.answers.tasks.0.tidewater": "benigm"}, r"stages\.answers\.tasks\.0: .*must be one of"),
        ({"stages.chat.data.0.n": 100_000}, r"stages\.chat\.data\.0: n: 100000 .* more than"),
        ({"stages.chat.data.0.tidewater": "harmful-heldout"}, r"held-out hazards are never trained on"),
        ({"stages.base.timing": {"exposure": "matched", "start": 0.9}}, r"stages\.base\.timing.*dose"),
        ({"stages.chat.length": 4096}, r"stages\.chat\.length: 4096 tokens are more than the model's context of 32"),
        (
            {"stages.chat.data": [{"name": "a", "tidewater": "benign", "n": 1}] * 2},
            r"two parts of 'data' are called 'a'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_the_plan(changes: dict[str, Any], message: str) -> None:
    recipe = small()
    recipe["stages"]["chat"] = {
        "kind": "sft",
        "model": "base",
        "length": 32,
        "data": [{"name": "goods", "tidewater": "benign", "n": 4}],
        "train": {},
    }
    for path, value in changes.items():
        put(recipe, path, value, origin="test")
    with pytest.raises(UserError, match=message):
        make_plan(*resolve(recipe, "test"))


def test_code_is_part_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(plan_of().steps)
    import trimtab.study.naming as module

    monkeypatch.setattr(module, "code_version", lambda kind: code_version(kind) + ("x" if kind == "judge" else ""))
    after = plan_of()
    assert {after.steps[id].kind for id in set(after.steps) - before} == {"judge"}
