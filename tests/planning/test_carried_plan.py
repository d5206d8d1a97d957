"""A model's plan for another data set: what is the model's, what is the data set's, and what does not go."""

from __future__ import annotations

import pytest
from planning_phantoms import fingerprint, task

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError
from medseg.planning.matching import Asked
from medseg.planning.networks import NETWORK_PLANS, Variant, rules_with
from medseg.planning.planner import make_plan
from medseg.planning.presets import MEDSEG
from medseg.planning.transfer import Given, Wishes, carried_plan, origin_of
from medseg.records.fingerprint import Fingerprint, Intensity
from medseg.records.plan import Budget, Plan
from medseg.records.task import Label, Task
from medseg.records.training import TrainingPlan

BODY = fingerprint([((120, 300, 280), (3.0, 0.8, 0.8))] * 20)
SMALL = fingerprint([((40, 60, 50), (1.0, 1.5, 1.2))] * 8, channels=2)
PICTURES = fingerprint([((1, 300, 260), (999.0, 1.0, 1.0))] * 20)
BRIGHT = Intensity(mean=9, median=9, std=3, min=0, max=20, percentile_00_5=1, percentile_99_5=19)
PLENTY = Wishes(Budget(memory_gb=200, device="cpu"), MEDSEG)


def given(names=("3d_fullres",), orientation="canonical", channels=("CT",), data=BODY, **changes) -> Given:
    plan = make_plan(data, task(channels), Budget(memory_gb=8), rules_with(MEDSEG, Variant()))
    plan = plan.model_copy(update={"configurations": {name: plan.configurations[name] for name in names}} | changes)
    return Given(plan, orientation, {name: {"0": "a" * 64} for name in names})


def carry(model: Given, data: Fingerprint, new: Task, wishes: Wishes = PLENTY, asked: Asked | None = None) -> Plan:
    plan = carried_plan(data, new, model, origin_of(model, new, asked or Asked()), wishes)
    assert Plan.model_validate(plan.to_json()) == plan
    return plan


def test_what_images_look_like_is_the_models_and_what_they_are_of_the_data_sets():
    data = SMALL.model_copy(update={"intensities": (BRIGHT, BRIGHT)})
    new = task(("PET", "ct"), classes=5)
    model = given()
    plan = carry(model, data, new)
    theirs, ours = model.plan.configurations["3d_fullres"], plan.configurations["3d_fullres"]
    for field in ("spacing_mm", "patch_size", "batch_size", "network", "resampling"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert plan.transpose == model.plan.transpose
    assert plan.task == new
    assert [n.scheme for n in ours.normalisation] == ["zscore", "ct"]
    assert plan.intensities == (BRIGHT, model.plan.intensities[0])
    assert plan.fingerprint_sha256 == sha256_of_json(data.to_json())
    assert plan.origin.channels.places == (None, 0)
    assert [reason.text for reason in plan.reasons if reason.topic == "taken over"] == [
        "channels: 1 taken over (ct), 1 new (PET)",
        "labels: 1 taken over (l1), 3 new (l2, l3, l4)",
    ]


def test_the_median_case_is_the_new_one_on_the_models_grid():
    plan = carry(given(("2d", "3d_fullres")), SMALL, task(("a", "b")))
    order, sizes = plan.transpose, []
    for axis in order:
        spacing = plan.configurations["3d_fullres"].spacing_mm[order.index(axis)]
        sizes.append(round(SMALL.cases[0].shape_after_crop[axis] * SMALL.cases[0].spacing_mm[axis] / spacing))
    assert plan.configurations["3d_fullres"].median_shape == tuple(sizes)
    assert plan.configurations["2d"].median_shape == tuple(sizes[1:])


def test_a_batch_that_memory_does_not_hold_becomes_smaller_and_the_plan_says_so():
    model = given()
    theirs = model.plan.configurations["3d_fullres"].batch_size
    assert theirs > 1
    small = carry(model, BODY, task(), Wishes(Budget(memory_gb=1.5, device="cpu"), MEDSEG))
    assert small.configurations["3d_fullres"].batch_size < theirs
    (reason,) = (reason for reason in small.reasons if reason.topic == "3d_fullres batch")
    assert "instead of the model's" in reason.text
    tiny = carry(model, BODY, task(), Wishes(Budget(memory_gb=0.5, device="cpu"), MEDSEG))
    assert tiny.configurations["3d_fullres"].batch_size == 1


def test_a_3d_model_is_not_for_pictures_but_a_2d_model_is_for_volumes():
    with pytest.raises(IncompatibleError, match=r"E0802.*single slices"):
        carry(given(), PICTURES, task())
    plan = carry(given(("2d",), data=PICTURES), BODY, task())
    assert plan.configurations["2d"].dimensions == 2


def test_what_mirroring_means_is_found_anew_and_never_mirrors_more_than_the_model_did():
    sides = tuple(Label(name=name, value=value) for value, name in enumerate(("background", "kidney l", "kidney r")))
    lateral = task().model_copy(update={"labels": sides})
    assert carry(given(), BODY, task()).configurations["3d_fullres"].training.mirror_axes == (0, 1, 2)
    assert len(carry(given(), BODY, lateral).configurations["3d_fullres"].training.mirror_axes) == 2
    assert carry(given(orientation="file"), BODY, lateral).configurations["3d_fullres"].training.mirror_axes == ()
    model = given()
    full = model.plan.configurations["3d_fullres"].model_copy(update={"training": TrainingPlan(mirror_axes=(1,))})
    still = given(configurations={"3d_fullres": full})
    assert carry(still, BODY, task()).configurations["3d_fullres"].training.mirror_axes == (1,)


def test_orientation_is_the_models_and_written_only_where_it_is_not_ours():
    plan = carry(given(orientation="file"), BODY, task())
    assert plan.to_json()["orientation"] == "file"
    written = make_plan(BODY, task()).to_json()
    assert "orientation" not in written
    assert "origin" not in written


def test_loss_weights_of_classes_and_checkpointing_may_be_chosen_anew():
    counted = [case.model_copy(update={"voxels_per_label": {1: 50, 2: 9}}) for case in BODY.cases]
    data = BODY.model_copy(update={"cases": tuple(counted)})
    variant = Variant(loss="weighted-ce", checkpointing=True, elastic=0.2)
    plan = carry(given(), data, task(classes=3), Wishes(PLENTY.budget, MEDSEG, variant))
    training = plan.configurations["3d_fullres"].training
    assert (training.loss, len(training.class_weights), training.elastic) == ("weighted-ce", 3, 0.2)
    assert plan.configurations["3d_fullres"].network.checkpointing


def test_a_cascade_comes_along_as_a_whole():
    large = fingerprint([((300, 500, 520), (1.0, 0.8, 0.8))] * 20)
    plan = carry(given(("3d_lowres", "3d_cascade_fullres"), data=large), large, task(classes=4))
    second = plan.configurations["3d_cascade_fullres"]
    assert second.previous_stage == "3d_lowres"
    assert second.input_channels(plan.task) == 4


@pytest.mark.parametrize("name", NETWORK_PLANS)
def test_every_network_can_be_carried_over(name):
    plan = make_plan(BODY, task(), Budget(memory_gb=8), rules_with(MEDSEG, Variant(name)))
    carried = carry(Given(plan, "canonical", {"2d": {"all": "b" * 64}}), SMALL, task(("x", "MRI"), classes=4))
    assert carried.configurations["2d"].network == plan.configurations["2d"].network
    assert len(carried.task.labels) == 4


def test_an_origin_that_does_not_fit_its_plan_is_refused():
    plan = carry(given(), BODY, task()).to_json()
    for field, value in (
        ("channels", {"names": ["CT"], "places": [0, None]}),
        ("labels", {"names": ["a", "b"], "places": [0, 2]}),
        ("outputs", {"names": ["a", "b"], "places": [0]}),
        ("weights", {"other": {"0": "a" * 64}}),
        ("weights", {"3d_fullres": {"../..": "a" * 64}}),
        ("weights", {"3d_fullres": {"0": "a/../b"}}),
        ("weights", {"3d_fullres": {}}),
    ):
        with pytest.raises(ValueError, match=r"origin|places|pattern|fold"):
            Plan.model_validate(plan | {"origin": plan["origin"] | {field: value}})


@pytest.mark.parametrize(
    ("there", "fold", "expected"),
    [("0 1 all", "1", "1"), ("0 1 all", "all", "all"), ("0 all", "1", "all"), ("0 2", "1", "0"), ("3 4", "all", "3")],
)
def test_a_fold_begins_from_its_like_else_from_all_cases_else_from_the_first(there, fold, expected):
    model = given()
    weights = {"3d_fullres": dict.fromkeys(there.split(), "a" * 64)}
    origin = origin_of(Given(model.plan, "canonical", weights), task(), Asked())
    assert origin.fold_for("3d_fullres", fold) == expected
