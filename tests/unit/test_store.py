from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import SafetensorError

from autoseg.errors import DatasetError
from autoseg.io import cached
from autoseg.io import store as store_module
from autoseg.io.cached import Source
from autoseg.io.store import CaseHeader, CaseStore, foreground_locations


@pytest.fixture
def arrays() -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 6, 7, 8)).astype(np.float32), rng.integers(-1, 3, (6, 7, 8)).astype(np.int16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "image.nii.gz"
    path.write_bytes(b"0123456789")
    return path


def write(store: CaseStore, case_id: str, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], *files: Path) -> None:
    image, labels = arrays
    foreground = foreground_locations(labels, 3, np.random.default_rng(0))
    sources = [Source.of(file) for file in files]
    store.write(case_id, image, labels, foreground, spacing_mm=(3.0, 1.0, 1.5), sources=sources)


def test_what_is_read_is_what_was_written(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays)
    case = store.open("a")
    assert (case.id, case.channels, case.shape, case.spacing_mm) == ("a", 2, (6, 7, 8), (3.0, 1.0, 1.5))
    image, labels = case.read((1, 0, 3), (4, 7, 5))
    assert np.array_equal(image, arrays[0][:, 1:4, 0:7, 3:5])
    assert np.array_equal(labels, arrays[1][1:4, 0:7, 3:5])
    image[:] = 0
    labels[:] = 0
    assert np.array_equal(case.read((0, 0, 0), case.shape)[0], arrays[0]), "reads are copies"
    assert list(case.foreground) == [0, 1, 2]
    for index in (1, 2):
        assert (arrays[1][tuple(case.foreground[index].T)] == index).all()


def test_labels_of_ten_and_more_classes_come_back_in_order(tmp_path: Path) -> None:
    labels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    store = CaseStore(tmp_path)
    foreground = foreground_locations(labels, 24, np.random.default_rng(0))
    store.write("a", np.zeros((1, 2, 3, 4), np.float32), labels, foreground, spacing_mm=(1.0, 1.0, 1.0), sources=())
    assert list(store.open("a").foreground) == list(range(1, 24))


@pytest.mark.parametrize("box", [((0, 0, 0), (7, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((2, 2, 2), (2, 3, 3))])
def test_a_box_outside_is_refused(
    tmp_path: Path,
    arrays: tuple[NDArray[np.float32], NDArray[np.int16]],
    box: tuple[tuple[int, int, int], tuple[int, int, int]],
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    with pytest.raises(ValueError, match="not inside"):
        store.open("a").read(*box)


def test_the_same_case_gives_the_same_bytes(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)
    first = store.path("a").read_bytes()
    write(store, "a", arrays, source)
    assert store.path("a").read_bytes() == first


@pytest.mark.parametrize("case_id", ["a", "a/b", "..", ".tmp-1-x", "Patient 7", "ünï", "50%", "con:1"])
def test_any_id_is_a_file_in_the_folder(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], case_id: str
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, case_id, arrays)
    assert store.path(case_id).parent == store.folder
    assert store.ids() == (case_id,)
    assert store.open(case_id).id == case_id


def test_current_only_while_the_sources_keep_their_content(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    assert not store.is_current("a", [source])
    write(store, "a", arrays, source)
    assert store.is_current("a", [source])
    assert not store.is_current("a", [source, source]), "another number of files"
    status = source.stat()
    source.touch()
    assert store.is_current("a", [source]), "touched, same content"
    source.write_bytes(b"012345678X")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not store.is_current("a", [source]), "same size and modification time, other content"
    source.unlink()
    assert not store.is_current("a", [source])


def test_a_data_set_may_move(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], source: Path
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)
    moved = source.rename(tmp_path / "elsewhere.nii.gz")
    assert store.is_current("a", [moved])


def test_unchanged_files_are_not_hashed(
    tmp_path: Path,
    arrays: tuple[NDArray[np.float32], NDArray[np.int16]],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = CaseStore(tmp_path / "cache")
    write(store, "a", arrays, source)

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr(cached, "content_digest", fail)
    assert store.is_current("a", [source])


def test_broken_foreign_and_old_files_are_not_current_and_say_so(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    whole = store.path("a").read_bytes()
    for broken in (whole[:-5], whole[:40], b"", b"not safetensors at all"):
        store.path("a").write_bytes(broken)
        assert not store.is_current("a", [])
        with pytest.raises(DatasetError, match="cached case"):
            store.open("a")
    cached.save_file({"image": arrays[0]}, store.path("a"))
    assert not store.is_current("a", [])
    monkeypatch.setattr(CaseHeader, "VERSION", CaseHeader.VERSION + 1)
    store.path("a").write_bytes(whole)
    assert not store.is_current("a", [])


def test_a_file_that_is_damaged_inside_is_named_with_what_to_do(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    case = store.open("a")

    class Damaged:
        def __getitem__(self, _: object) -> object:
            raise SafetensorError("InvalidOffset")

    monkeypatch.setattr(case, "_labels", Damaged())
    with pytest.raises(DatasetError, match=r"a\.safetensors cannot be read: InvalidOffset") as refused:
        case.read((0, 0, 0), case.shape)
    assert "Delete this file from the cache" in refused.value.hint
    whole = cached.save_file
    monkeypatch.setattr(cached, "save_file", lambda tensors, *rest, **more: whole({}, *rest, **more))
    write(store, "b", arrays)
    with pytest.raises(DatasetError, match=r"b\.safetensors cannot be read"):
        store.open("b")


def test_a_failed_write_leaves_the_old_case_and_no_rest(
    tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaseStore(tmp_path)
    write(store, "a", arrays)
    before = store.path("a").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(before[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(cached, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        write(store, "a", arrays)
    assert store.path("a").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [store.path("a").name]


def test_half_written_files_are_no_cases(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]) -> None:
    store = CaseStore(tmp_path)
    write(store, "b", arrays)
    (tmp_path / ".tmp-99-a.safetensors").write_bytes(b"half")
    assert store.ids() == ("b",)


def test_shapes_must_agree(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.int16]]) -> None:
    with pytest.raises(ValueError, match="do not agree"):
        write(CaseStore(tmp_path), "a", (arrays[0], arrays[1][1:]))


def test_locations_are_all_of_a_small_class_and_a_part_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MIN_LOCATIONS", 50)
    labels = np.zeros((20, 30, 40), np.int16)
    labels[:10] = 1
    labels[15, :5, :6] = 2
    labels[19, 0, 0] = -1
    found = foreground_locations(labels, 5, np.random.default_rng(3))
    assert list(found) == [0, 1, 2]
    assert len(found[1]) == 120, "one per cent of 12,000"
    assert len(np.unique(found[1], axis=0)) == 120, "without replacement"
    assert (labels[tuple(found[1].T)] == 1).all()
    assert np.array_equal(found[2], np.argwhere(labels == 2))
    assert len(found[0]) == 240, "one per cent of 23,999 voxels that somebody annotated"
    assert (labels[tuple(found[0].T)] >= 0).all()
    again = foreground_locations(labels, 5, np.random.default_rng(3))
    assert np.array_equal(found[1], again[1])
