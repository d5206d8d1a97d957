"""Comparison: two sets of predictions on the same cases, tested label by label."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medseg.errors import Problem
from medseg.records.base import Record
from medseg.records.scores import TargetKind

DEFINITIONS: dict[str, str] = {
    "difference": "B minus A of one case. Where one prediction is rightly empty and the other spurious, the empty one "
    "counts as Dice 1, NSD 1 and distance 0; two infinite distances are equal",
    "pairs": "cases with the label in the reference or in one of the predictions; equal: those whose difference is 0",
    "mean": "over the pairs; infinite distances are left out and counted",
    "median_difference": "median over the pairs; none if it is infinite",
    "ci": "95 % percentile bootstrap interval of the median difference, 2000 seeded draws of cases; none for fewer "
    "than 3 pairs or if an end is infinite",
    "p_wilcoxon": "Wilcoxon signed-rank test, two-sided, zero differences ranked (Pratt 1959); exact up to 200 pairs, "
    "else by the normal distribution. An infinite difference has the highest rank",
    "p_permutation": "two-sided test that flips the signs of differences: every choice of flips up to 13 pairs, else "
    "9999 seeded ones; of their mean, or of the signed ranks where a difference is infinite",
    "holm": "p values after Holm (1979) over the labels of the same measure",
    "better": "the side that the median difference favours, where both p values after Holm are below 0.05",
}


class PairedTest(Record):
    """One measure of one label; see ``DEFINITIONS``."""

    label: str
    kind: TargetKind = "label"
    measure: str
    pairs: int = Field(ge=0)
    equal: int = Field(ge=0)
    mean_a: float | None = None
    mean_b: float | None = None
    infinite_a: int = Field(default=0, ge=0)
    infinite_b: int = Field(default=0, ge=0)
    median_difference: float | None = None
    ci: tuple[float, float] | None = None
    p_wilcoxon: float | None = Field(default=None, ge=0, le=1)
    p_permutation: float | None = Field(default=None, ge=0, le=1)
    p_wilcoxon_holm: float | None = Field(default=None, ge=0, le=1)
    p_permutation_holm: float | None = Field(default=None, ge=0, le=1)
    better: Literal["a", "b", "neither"] = "neither"


class Comparison(Record):
    """Two sets of predictions on the same cases, tested label by label."""

    schema_version: int = Field(default=1, ge=1, le=1)
    a: str
    b: str
    tolerance_mm: float = Field(ge=0)
    label_tolerances_mm: dict[str, float] = Field(default_factory=dict)
    definitions: dict[str, str] = Field(default_factory=lambda: dict(DEFINITIONS))
    cases: tuple[str, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    tests: tuple[PairedTest, ...] = ()
    problems: tuple[Problem, ...] = ()
