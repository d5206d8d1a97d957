"""What ``medseg plan --compare`` shows."""

from __future__ import annotations

from planning_phantoms import fingerprint, task

from medseg.planning.compare import plan_differences
from medseg.planning.planner import make_plan
from medseg.records.plan import Budget

LARGE = fingerprint([((300, 500, 520), (1.0, 0.8, 0.8))] * 20)


def test_equal_plans_have_no_differences():
    assert plan_differences(make_plan(LARGE, task()), make_plan(LARGE, task())) == []


def test_only_what_differs_is_listed_with_both_values():
    one = make_plan(LARGE, task())
    full = one.configurations["3d_fullres"].model_copy(update={"batch_size": 5})
    other = one.model_copy(update={"configurations": one.configurations | {"3d_fullres": full}})
    assert plan_differences(one, other) == [("3d_fullres batch_size", "2", "5")]


def test_networks_budgets_and_presets_are_compared_field_by_field():
    one, other = make_plan(LARGE, task()), make_plan(LARGE, task(), Budget(memory_gb=12), "resenc-m")
    rows = {field: values for field, *values in plan_differences(one, other)}
    assert rows["preset"] == ["nnunet", "resenc-m"]
    assert rows["budget.memory_gb"] == ["8", "12"]
    assert rows["2d network.name"] == ["plain", "residual"]
    assert rows["3d_fullres network.convs_encoder"] == ["2 2 2 2 2 2", "1 3 4 6 6 6"]
    assert rows["3d_fullres patch_size"] == ["96 160 160", "112 160 192"]
    assert not any("spacing" in field and field.startswith("3d_fullres") for field in rows)


def test_a_configuration_that_only_one_has_is_one_row():
    one, other = make_plan(LARGE, task()), make_plan(LARGE, task(), Budget(memory_gb=200))
    rows = plan_differences(one, other)
    assert ("3d_lowres", "planned", "–") in rows
    assert ("3d_lowres", "–", "planned") in plan_differences(other, one)
    assert not any(field.startswith("3d_lowres ") for field, _, _ in rows)


def test_digits_that_short_numbers_leave_out_are_shown_where_they_differ():
    one = make_plan(LARGE, task())
    flat = one.configurations["2d"].model_copy(update={"spacing_mm": (0.8, 0.800000001)})
    other = one.model_copy(update={"configurations": one.configurations | {"2d": flat}})
    assert plan_differences(one, other) == [("2d spacing_mm", "[0.8, 0.8]", "[0.8, 0.800000001]")]
