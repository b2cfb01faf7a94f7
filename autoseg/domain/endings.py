"""File endings of images: which are read, which are written, and how a name is cut into stem and ending."""

from __future__ import annotations

from pathlib import Path, PurePath

NIFTI_ENDINGS = (".nii.gz", ".nii")
PAIR_ENDING = ".hdr"
"""The header of a NIfTI pair stands for both files: the voxels (.img) are no image of their own."""

ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
FREESURFER_ENDINGS = (".mgz", ".mgh")
MINC_ENDING = ".mnc"
TIFF_ENDINGS = (".tif", ".tiff")
PICTURE_ENDINGS = (".png", *TIFF_ENDINGS, ".jpg", ".jpeg", ".bmp")
LOSSY_ENDINGS = (".jpg", ".jpeg")

IMAGE_ENDINGS: tuple[str, ...] = (
    *NIFTI_ENDINGS,
    PAIR_ENDING,
    *ITK_ENDINGS,
    *FREESURFER_ENDINGS,
    MINC_ENDING,
    *PICTURE_ENDINGS,
)
"""Every ending that is read, lower case; names are compared without regard to case."""

_WRITTEN_INSTEAD = {PAIR_ENDING: ".nii.gz", MINC_ENDING: ".nii.gz", **dict.fromkeys(LOSSY_ENDINGS, ".png")}
WRITTEN_ENDINGS: tuple[str, ...] = tuple(ending for ending in IMAGE_ENDINGS if ending not in _WRITTEN_INSTEAD)
"""Every ending that label maps are written with."""


def written_ending(ending: str) -> str:
    """The ending of label maps that belong to files of an ending: the same, where that format is written.

    NIfTI pairs and MINC become .nii.gz, JPEG, which changes values, becomes .png.
    """
    return _WRITTEN_INSTEAD.get(ending.lower(), ending)


def split_ending(path: str | PurePath) -> tuple[str, str]:
    """Cut a file name into stem and ending: "case_0000.nii.gz" gives ("case_0000", ".nii.gz").

    Dots inside the stem stay there ("sub.01.nii.gz" gives "sub.01"). An ending that is not known is the last suffix,
    or "" when there is none. The ending keeps its case, so that stem + ending is the name again.
    """
    name = PurePath(path).name
    lower = name.lower()
    for ending in IMAGE_ENDINGS:
        if lower.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    suffix = PurePath(name).suffix
    return (name[: -len(suffix)], suffix) if suffix else (name, "")


def is_image_name(path: str | PurePath) -> bool:
    """Whether a file of this name is taken for an image; hidden files ("._case.nii.gz") are not."""
    name = PurePath(path).name
    return not name.startswith(".") and split_ending(name)[1].lower() in IMAGE_ENDINGS


def list_images(folder: Path) -> tuple[Path, ...]:
    """The image files directly in a folder, sorted by name; none when the folder does not exist."""
    if not folder.is_dir():
        return ()
    return tuple(sorted(item for item in folder.iterdir() if is_image_name(item.name)))
