"""Names of the images that `predict` writes beside a label map, which are no label maps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PROBABILITIES = "_probabilities.nii.gz"
ENTROPY = "_uncertainty.nii.gz"
SEGMENTATION = ".seg.nrrd"

_ENDINGS = (PROBABILITIES, ENTROPY, SEGMENTATION)


def without_side_images(files: Sequence[Path]) -> tuple[Path, ...]:
    """The images of a folder without those that lie beside a label map: X_probabilities.nii.gz where there is an X.

    Args:
        files: Of one folder.
    """
    names = [path.name for path in files]
    return tuple(path for path in files if not any(_lies_beside(path.name, ending, names) for ending in _ENDINGS))


def _lies_beside(name: str, ending: str, names: Sequence[str]) -> bool:
    if not name.endswith(ending) or len(name) == len(ending):
        return False
    # An ending alone may follow: "case.nii.gz" of "case_probabilities.nii.gz".
    stem = name.removesuffix(ending)
    return any(other.startswith(f"{stem}.") and not other.startswith(f"{stem}.seg.") for other in names)
