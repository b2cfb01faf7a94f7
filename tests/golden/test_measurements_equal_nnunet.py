"""Our measurements of the real data sets against nnU-Net's fingerprints of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from planning_cases import load_golden

from autoseg.domain.layouts import load_dataset
from autoseg.pipeline.planning import measure

NAMES = ("hippocampus", "headneck_ct", "sarcoma", "fetal_brain", "mouse_brain", "membrane", "nuclei", "axon_sem")
TOLERANCE_STD = 0.025
"""nnU-Net samples, we interpolate in a sketch, where one grey level of an 8-bit image is up to 0.03 deviations."""


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_fingerprint_equals_nnunets(name: str, data_folder: Path) -> None:
    expected = load_golden(name)["fingerprint"]
    found = measure(load_dataset(data_folder / name))
    assert [list(shape) for shape in found.shapes] == expected["shapes_after_crop"]
    np.testing.assert_allclose(found.spacings_mm, expected["spacings"], rtol=1e-6)
    assert found.median_relative_size_fraction == pytest.approx(expected["median_relative_size_after_cropping"])
    channels = expected["foreground_intensity_properties_per_channel"]
    for number, ours in enumerate(found.intensities):
        theirs = channels[str(number)]
        assert (ours.minimum, ours.maximum) == pytest.approx((theirs["min"], theirs["max"]), rel=1e-3)
        for key in ("mean", "std", "median", "percentile_00_5", "percentile_99_5"):
            assert abs(getattr(ours, key) - theirs[key]) < TOLERANCE_STD * theirs["std"], key
