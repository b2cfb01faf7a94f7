#!/usr/bin/env python3
"""Resample small label maps with nnU-Net v2, for `tests/golden/test_labels_equal_nnunet.py`.

Runs in nnU-Net's environment (see the header of `scripts/nnunet_oracle.py`), with batchgenerators 0.25.5:

    oracle/bin/python scripts/nnunet_label_golden.py tests/golden/nnunet_labels.npz
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

NUM_CLASSES = 7
ISOTROPIC, COARSE_FIRST, COARSE_LAST = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (1.0, 1.0, 5.0)

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]] = {
    "double": ((6, 7, 5), (12, 14, 10), ISOTROPIC),
    "half": ((12, 8, 10), (6, 4, 5), ISOTROPIC),
    "one_and_a_half": ((6, 8, 4), (9, 12, 6), ISOTROPIC),
    "third": ((9, 12, 6), (3, 4, 2), ISOTROPIC),
    "any": ((7, 9, 8), (11, 6, 13), ISOTROPIC),
    "one_axis": ((7, 9, 8), (7, 9, 4), ISOTROPIC),
    "coarse_first": ((5, 8, 9), (8, 12, 6), COARSE_FIRST),
    "coarse_last": ((8, 10, 6), (4, 5, 3), COARSE_LAST),
    "slices_only": ((6, 8, 9), (9, 8, 9), COARSE_FIRST),
}
"""Voxels before and after, and the spacing before, which decides whether an axis is resampled apart."""


def main() -> None:
    """Write the maps and what nnU-Net makes of them."""
    stored: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for name, (shape, new_shape, spacing) in CASES.items():
        labels = rng.integers(0, NUM_CLASSES, shape).astype(np.int8)
        new_spacing = [mm * old / new for mm, old, new in zip(spacing, shape, new_shape, strict=True)]
        made = resample_data_or_seg_to_shape(
            labels[None], new_shape, spacing, new_spacing, is_seg=True, order=1, order_z=0, force_separate_z=None
        )
        stored |= {f"{name}/labels": labels, f"{name}/spacing": np.array(spacing), f"{name}/expected": made[0]}
    np.savez_compressed(sys.argv[1], **stored)


if __name__ == "__main__":
    main()
