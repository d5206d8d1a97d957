"""Fingerprints of real data against those that nnU-Net 2.8.1 extracted from the same files."""

from __future__ import annotations

import pytest

from medseg.dataset.fingerprint import measure
from medseg.dataset.layouts import read_dataset

FIELDS = ("mean", "std", "median", "min", "max", "percentile_00_5", "percentile_99_5")
# nnUNetv2_extract_fingerprint, foreground_intensity_properties_per_channel, rounded to four digits
NNUNET = {
    "cardiac": [(1832.385, 1002.1852, 1513.0, 0.0, 4095.0, 352.0, 4095.0)],
    "nuclei": [
        (69.8694, 47.6957, 56.0, 0.0, 255.0, 9.0, 241.0),
        (62.6501, 42.18, 52.0, 0.0, 255.0, 8.0, 241.0),
        (77.544, 59.2863, 56.0, 0.0, 255.0, 9.0, 241.0),
    ],
    "glioma": [
        (-0.0665, 1.6457, -0.255, -6.1524, 9.2598, -3.1691, 6.1723),
        (2.0709, 1.7458, 2.1635, -5.3425, 11.4368, -3.3945, 7.6377),
    ],
    "membranes": [(85.5907, 33.1017, 83.0, 0.0, 255.0, 12.0, 187.0)],
    "ms_lesions": [
        (118.8682, 15.7151, 117.3159, 65.3737, 166.5907, 88.782, 161.2004),
        (283.9044, 58.9837, 292.3997, 34.1792, 426.0089, 91.8785, 385.0955),
        (267.915, 47.4305, 275.8048, 44.9041, 390.1899, 106.1696, 363.2371),
        (428.624, 121.2921, 405.8179, 80.4909, 908.1315, 223.2565, 837.0929),
    ],
}


@pytest.mark.parametrize("name", sorted(NNUNET))
def test_intensities_are_nnunets_but_for_the_chance_in_its_sample(shared, name):
    """nnU-Net draws 1e8 values with replacement: its mean has a standard error of std / 1e4, ours none."""
    found = measure(read_dataset(shared / "data" / name), 2).fingerprint
    for ours, theirs in zip(found.intensities, NNUNET[name], strict=True):
        std = theirs[1]
        tolerances = {"min": 1e-4, "max": 1e-4, "mean": 5e-4 * std, "std": 5e-4 * std}
        for field, value in zip(FIELDS, theirs, strict=True):
            assert getattr(ours, field) == pytest.approx(value, abs=tolerances.get(field, 4e-3 * std)), field
