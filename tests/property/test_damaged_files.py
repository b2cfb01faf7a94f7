"""Whatever is done to a file, reading it gives a volume or a DatasetError: no other error, no endless memory."""

import contextlib
import gzip
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoseg.domain.geometry import Geometry
from autoseg.errors import DatasetError
from autoseg.io.images import read_header, read_image, read_labels, write_labels

SHAPE = (5, 4, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    whole = {}
    for ending in (".nii", ".nrrd", ".mha", ".png", ".tif"):
        shape = (5, 4, 1) if ending in (".png", ".tif") else SHAPE
        labels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        write_labels(folder / f"x{ending}", labels, Geometry(shape, np.eye(4), is_2d=shape[2] == 1))
        whole[ending] = (folder / f"x{ending}").read_bytes()
    return whole


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without tifffile's log of damaged tags."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".png", ".tif"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore")  # libraries warn about headers that we damaged on purpose
@given(changes=changes, keep=st.floats(0.3, 1))
def test_damaged_files_give_a_volume_or_a_clear_error(
    ending: str, files: dict[str, bytes], tmp_path: Path, changes: list[tuple[float, int]], keep: float
) -> None:
    content = bytearray(files[".nii" if ending == ".nii.gz" else ending])
    for where, byte in changes:
        content[int(where * len(content))] = byte
    content = content[: max(1, int(len(content) * (1 if keep > 0.8 else keep)))]
    path = tmp_path / f"x{ending}"
    path.write_bytes(gzip.compress(bytes(content)) if ending == ".nii.gz" else bytes(content))
    with contextlib.suppress(DatasetError):
        volume = read_image(path)
        assert volume.array.shape[1:] == volume.geometry.shape
    with contextlib.suppress(DatasetError):
        labels, geometry = read_labels(path)
        assert labels.shape == geometry.shape
    with contextlib.suppress(DatasetError):
        assert all(length > 0 for length in read_header(path).geometry.shape)
