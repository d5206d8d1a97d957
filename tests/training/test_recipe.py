"""The recipe for a time budget: more updates where time is short, nnU-Net's own where it is long."""

from __future__ import annotations

import pytest
from tiny_models import FLAT_KERNELS, make_configuration

from medseg.training.recipe import fit_to_steps, fit_to_time

PLANNED = make_configuration((4, 8, 6), FLAT_KERNELS, batch_size=12)  # momentum 0.99, learning rate 0.01


@pytest.mark.parametrize(
    ("samples", "batch_size", "momentum"),
    [(100, 2, 0.9), (20_000, 2, 0.9), (50_000, 5, 0.9), (119_999, 11, 0.9), (200_000, 12, 0.9), (400_000, 12, 0.99)],
)
def test_short_trainings_take_small_batches_and_little_momentum(samples, batch_size, momentum):
    fitted = fit_to_time(PLANNED, seconds=samples * 0.5, seconds_per_sample=0.5)
    assert (fitted.batch_size, fitted.training.momentum) == (batch_size, momentum)


@pytest.mark.parametrize("momentum", [0.99, 0.95])
def test_the_learning_rate_keeps_its_ratio_to_what_momentum_leaves(momentum):
    planned = make_configuration((4, 8, 6), FLAT_KERNELS, momentum=momentum, initial_lr=0.01)
    training = fit_to_time(planned, 60, 1).training
    assert training.initial_lr / (1 - training.momentum) == pytest.approx(0.01 / (1 - momentum))


def test_less_momentum_than_that_stays():
    planned = make_configuration((4, 8, 6), FLAT_KERNELS, momentum=0.5)
    assert fit_to_steps(planned, 60).training == planned.training


def test_a_batch_of_one_is_not_enlarged():
    planned = make_configuration((4, 8, 6), FLAT_KERNELS, batch_size=1)
    assert fit_to_time(planned, 60, 1).batch_size == 1


def test_all_else_stays_as_planned():
    fitted = fit_to_time(PLANNED, 60, 1)
    kept = {"batch_size": PLANNED.batch_size, "training": PLANNED.training}
    assert fitted.model_copy(update=kept) == PLANNED
