"""Length of a training, learning rate, and durations as people write them."""

from __future__ import annotations

import pytest

from medseg.errors import UsageError
from medseg.training.schedule import Length, parse_duration, poly


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("1.5h", 5400),
        ("2d", 172800),
        ("1h30m", 5400),
        ("1d2h3m4s", 93784),
        ("0.5m", 30),
        ("30m1h", 5400),
        ("10", 600),
        ("0.25", 15),
        ("007s", 7),
    ],
)
def test_durations_are_read_as_seconds(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "h", "10 m", " 10m", "10m\n", "-5m", "+5m", "1,5h", "1e3s", "10min", "10M", "5m3", "1:30"),
        *("inf", "nan", ".5m", "1.m", "0", "0s", "0h0m", "0.0", "9" * 400 + "s", "9" * 400),
    ],
)
def test_what_is_no_duration_is_a_usage_error(text):
    with pytest.raises(UsageError, match="E0001"):
        parse_duration(text)


def test_a_length_in_steps_depends_on_the_step_alone():
    length = Length(steps=8)
    assert [length.fraction(step, elapsed) for step, elapsed in [(0, 9e9), (2, 0), (8, 0), (11, 0)]] == [0, 0.25, 1, 1]


def test_a_length_in_seconds_follows_the_clock_alone():
    length = Length(seconds=40)
    assert [length.fraction(step, elapsed) for step, elapsed in [(99, 0), (0, 10), (1, 40), (1, 41)]] == [0, 0.25, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        *({}, {"steps": 3, "seconds": 3.0}, {"steps": 0}, {"steps": -2}, {"seconds": 0.0}, {"seconds": -1.0}),
        *({"seconds": float("inf")}, {"seconds": float("nan")}),
    ],
)
def test_a_length_is_some_steps_or_some_seconds(wrong):
    with pytest.raises(ValueError, match=r"steps|length"):
        Length(**wrong)


def test_the_learning_rate_falls_by_the_power_of_nine_tenths_to_zero():
    rates = [poly(0.01, fraction) for fraction in (0, 0.25, 0.5, 0.99, 1)]
    expected = [0.01, 0.01 * 0.75**0.9, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9, 0]
    assert rates == pytest.approx(expected)
    assert rates == sorted(rates, reverse=True)
