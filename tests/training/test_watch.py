"""The watch: what it says of a training follows from the lines of the journal and can be reckoned by hand."""

from __future__ import annotations

import pytest

from medseg.training.journal import StepLine, ValidationLine
from medseg.training.schedule import Length
from medseg.training.watch import Watch


def step(number: int, seconds: float, **more) -> StepLine:
    return StepLine(step=number, loss=-0.5 - 0.01 * number, lr=0.01, seconds=seconds, **more)


def words(watch: Watch) -> dict[str, tuple[str, str]]:
    return {fact.name: (fact.value, fact.detail) for fact in watch.facts().lines}


def test_before_the_first_step_there_is_nothing_to_say():
    assert Watch(Length(steps=10)).facts().lines == ()


def test_speed_and_waiting_are_those_of_the_last_steps():
    watch = Watch(Length(steps=30))
    for number in range(1, 11):
        watch.take(step(number, 100 + 0.5 * number, waited_s=0.1), 4 if number > 5 else 2)
    values = watch.facts().values
    assert values["samples_per_s"] == pytest.approx((5 * 4 + 4 * 2) / 4.5, abs=1e-3)
    assert values["wait_share"] == pytest.approx(0.2)
    assert watch.facts().seconds_left == pytest.approx(20 * 0.5)
    assert words(watch)["step"] == ("10", "of 30")
    assert words(watch)["speed"] == ("6.22/s", "samples; 0.5 s/step")
    assert words(watch)["waiting"][0] == "20 %"


def test_the_time_of_a_validation_is_not_taken_for_a_slow_step():
    watch = Watch(Length(seconds=100))
    for number in range(1, 4):
        watch.take(step(number, float(number)), 1)
    watch.take(ValidationLine(step=3, dice={"a": 0.5}, seconds=3))
    watch.take(step(4, 24.0), 1)
    watch.take(step(5, 25.0), 1)
    assert watch.facts().values["samples_per_s"] == pytest.approx(1)
    assert watch.facts().seconds_left == pytest.approx(75)


def test_losses_are_means_and_memory_stays_until_it_is_measured_again():
    watch = Watch(Length(steps=3))
    watch.take(step(1, 1, losses={"Dice": -0.25, "CE": 0.5}, memory_gb=1.5, gpu_gb=7.25))
    watch.take(step(2, 2, losses={"Dice": -0.75, "CE": 0.25}))
    assert words(watch)["loss"] == ("-0.515", "Dice -0.500, CE 0.375")
    assert words(watch)["memory"] == ("1.5 GB", "GPU 7.2 GB")
    assert watch.facts().values["losses"] == {"Dice": -0.75, "CE": 0.25}


def test_of_a_validation_it_tells_every_label_or_of_many_the_lowest():
    watch = Watch(Length(steps=3))
    watch.take(step(1, 1))
    watch.take(ValidationLine(step=1, dice={"kidney": 0.75, "tumour": 0.25, "cyst": None}, seconds=1, smoothed=0.4))
    assert words(watch)["Dice"] == ("0.500", "kidney 0.750, tumour 0.250")
    assert words(watch)["best"] == ("0.400", "moving average; now 0.400, of step 1")
    many = {f"rib {n}": 0.1 * n for n in range(1, 10)}
    watch.take(ValidationLine(step=2, dice=many, seconds=2, smoothed=0.3))
    assert words(watch)["Dice"] == ("0.500", "lowest: rib 1 0.100, rib 2 0.200, rib 3 0.300")
    assert watch.facts().values["best_dice"] == 0.4
    assert watch.facts().values["dice"] == many


def test_a_validation_without_any_label_says_nothing():
    watch = Watch(Length(steps=3))
    watch.take(step(1, 1))
    watch.take(ValidationLine(step=1, dice={"kidney": None}, seconds=1))
    assert "Dice" not in words(watch)


def test_a_training_that_goes_on_knows_what_was_best_before():
    before = [ValidationLine(step=n, dice={"a": 0.1 * n}, seconds=n, smoothed=0.1 * n) for n in (1, 3, 2)]
    watch = Watch(Length(steps=9), before)
    watch.take(step(4, 4))
    assert words(watch)["best"] == ("0.300", "moving average; now 0.200, of step 2")
