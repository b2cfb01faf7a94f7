"""File endings of images: which are read, and how a name is cut into stem and ending."""

from __future__ import annotations

from pathlib import Path, PurePath

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")
PICTURE_ENDINGS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")

IMAGE_ENDINGS: tuple[str, ...] = (*NIFTI_ENDINGS, *ITK_ENDINGS, *PICTURE_ENDINGS)
"""Every ending that is read, lower case; names are compared without regard to case."""


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
