"""Label maps on other grids are those of nnU-Net v2, voxel by voxel (see `scripts/nnunet_label_golden.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from autoseg.preprocessing.resample import resample_labels

STORED = Path(__file__).parent / "nnunet_labels.npz"

CASES = (
    "double",
    "half",
    "one_and_a_half",
    "third",
    "any",
    "one_axis",
    "coarse_first",
    "coarse_last",
    "slices_only",
)


@pytest.mark.parametrize("name", CASES)
def test_the_largest_part_is_nnunets(name: str) -> None:
    with np.load(STORED) as stored:
        labels, expected = stored[f"{name}/labels"].astype(np.int16), stored[f"{name}/expected"]
        spacing = tuple(stored[f"{name}/spacing"])
    got = resample_labels(labels, expected.shape, spacing, decision="largest")
    np.testing.assert_array_equal(got, expected)


def test_every_stored_map_is_compared() -> None:
    with np.load(STORED) as stored:
        assert {key.split("/")[0] for key in stored.files} == set(CASES)


def test_ties_are_among_what_is_compared() -> None:
    """At half the size every new voxel lies in the middle of eight: the rule of halves gives other labels there."""
    with np.load(STORED) as stored:
        labels, expected = stored["half/labels"].astype(np.int16), stored["half/expected"]
    by_halves = resample_labels(labels, expected.shape, (1.0, 1.0, 1.0))
    assert (by_halves != expected).mean() > 0.5
